//! The loop on a small model: it learns, resumes to the bit, agrees over ranks, and stops when it must.

mod common;

use std::path::Path;
use std::sync::atomic::AtomicBool;

use common::*;
use occult_train::checkpoint::{DiskFiles, latest};
use occult_train::trainer::*;
use occult_train::{Result, TrainError, log};

#[test]
fn it_learns_and_resumes_to_the_bit_from_every_step() {
    let whole_dir = tempfile::tempdir().unwrap();
    let (whole, losses) = on_disk(whole_dir.path(), 14, u64::MAX, false).unwrap();
    assert_eq!(losses.len(), 14);
    assert!(losses[13] < 0.9 * losses[0], "{losses:?}");
    let entries = log::read(&whole_dir.path().join("log.jsonl")).unwrap();
    assert_eq!(entries.iter().map(|e| e.step).collect::<Vec<_>>(), (1..=14).collect::<Vec<_>>());
    assert_eq!((entries[0].limit, entries[13].limit), (Some(4), Some(2)));
    assert_eq!(entries[0].figures["sequences"], 2.0);
    for cut in 1..14 {
        let dir = tempfile::tempdir().unwrap();
        let (_, first) = on_disk(dir.path(), 14, cut, false).unwrap();
        let (end, rest) = on_disk(dir.path(), 14, u64::MAX, true).unwrap();
        assert_eq!([first, rest].concat(), losses, "stopped after {cut}");
        assert_eq!(end, whole, "stopped after {cut}");
        assert_eq!(log::read(&dir.path().join("log.jsonl")).unwrap().len(), 14);
    }
    // Two are kept, and resuming a finished run changes nothing.
    assert_eq!(std::fs::read_dir(whole_dir.path()).unwrap().count(), 2 + 2);
    assert_eq!(on_disk(whole_dir.path(), 14, u64::MAX, true).unwrap(), (whole, vec![]));
}

/// Trains with threads; all experts' and the table's weights in the end.
fn in_threads(dir: &Path, world: usize, blocks: bool, stop_at: u64, resume: bool) -> Vec<(u32, Vec<f32>)> {
    let run = |thread: Thread| -> Result<Vec<(u32, Vec<f32>)>> {
        let ids = experts_of(thread.rank(), world, blocks);
        let mut model = Bigram::new(ids, Box::new(thread.clone()));
        let loader = loader(3);
        let stop = AtomicBool::new(false);
        let options = options(12);
        let mut trainer = Trainer::new(&mut model, &loader, &thread, options, dir, &DiskFiles, resume)?;
        // Only the last rank is told to stop.
        let last = thread.rank() + 1 == world;
        trainer.run(&stop, &mut |e| {
            stop.store(last && e.step >= stop_at, std::sync::atomic::Ordering::Relaxed)
        })?;
        Ok(model.values())
    };
    let mut all: Vec<(u32, Vec<f32>)> = std::thread::scope(|scope| {
        let handles: Vec<_> = threads(world).into_iter().map(|t| scope.spawn(|| run(t).unwrap())).collect();
        handles.into_iter().flat_map(|h| h.join().unwrap()).collect()
    });
    all.sort_by_key(|(id, _)| *id);
    all.dedup();
    all
}

#[test]
fn any_number_of_ranks_and_any_placement_goes_on_where_another_stopped() {
    let at = |world, blocks, stop_at, resume, dir: &tempfile::TempDir| {
        in_threads(dir.path(), world, blocks, stop_at, resume)
    };
    let dir = || tempfile::tempdir().unwrap();
    let alone = at(1, true, u64::MAX, false, &dir());
    assert_eq!(alone.len(), E + 1);
    let close = |found: &[(u32, Vec<f32>)]| {
        assert_eq!(found.len(), E + 1, "replicas of the table differ");
        for ((id, a), (other, b)) in found.iter().zip(&alone) {
            assert_eq!(id, other);
            let off = a.iter().zip(b).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
            assert!(off < 2e-4, "expert {id} is off by {off}");
        }
    };
    for world in [2, 3, 4] {
        close(&at(world, false, u64::MAX, false, &dir()));
        let changed = dir();
        at(world, false, 5, false, &changed);
        close(&at(5 - world, true, u64::MAX, true, &changed));
        let same = dir();
        at(world, false, 5, false, &same);
        assert_eq!(at(world, false, u64::MAX, true, &same), at(world, false, u64::MAX, false, &dir()));
    }
}

fn fails(change: impl Fn(&mut Bigram, &mut Options)) -> (TrainError, Vec<u32>, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let (mut model, loader, mut options) = (solo(), loader(3), options(40));
    change(&mut model, &mut options);
    let error = Trainer::new(&mut model, &loader, &Solo, options, dir.path(), &DiskFiles, false)
        .and_then(|mut t| t.run(&AtomicBool::new(false), &mut |_| {}))
        .unwrap_err();
    (error, model.bits(), dir)
}

#[test]
fn a_diverging_run_stops_with_its_step_and_the_last_good_checkpoint() {
    let (error, _, dir) = fails(|model, options| {
        model.jump = 50.0;
        options.guard.window = 8;
    });
    let TrainError::Diverged { step: 11, last_good: Some(path), .. } = &error else { panic!("{error}") };
    assert_eq!(Some(path.clone()), latest(dir.path()).unwrap());
    assert!(error.to_string().contains("at step 11: the loss is"), "{error}");
    assert!(error.to_string().ends_with("step-00000008"), "{error}");
}

#[test]
fn gradients_that_are_not_finite_are_skipped_and_then_stop_the_run() {
    let dir = tempfile::tempdir().unwrap();
    let (mut model, loader) = (solo(), loader(3));
    model.breaks_at = Some(5);
    let before = on_disk(tempfile::tempdir().unwrap().path(), 40, 5, false).unwrap().0;
    let mut skipped = vec![];
    let error = Trainer::new(&mut model, &loader, &Solo, options(40), dir.path(), &DiskFiles, false)
        .and_then(|mut t| t.run(&AtomicBool::new(false), &mut |e| skipped.push(e.skipped)))
        .unwrap_err();
    assert!(matches!(error, TrainError::Diverged { step: 9, .. }), "{error}");
    assert_eq!(skipped, [[false; 5].as_slice(), &[true; 3]].concat());
    assert_eq!(model.bits(), before, "a skipped step changed the weights");
}

#[test]
fn requests_without_a_meaning_are_refused() {
    assert!(fails(|_, o| o.batch = 0).0.to_string().contains("batch is 0"));
    assert!(fails(|_, o| o.schedule.peak = -1.0).0.to_string().contains("learning rate is -1"));
    assert!(fails(|_, o| o.max_norm = Some(0.0)).0.to_string().contains("clipping norm"));
    let dir = tempfile::tempdir().unwrap();
    assert!(on_disk(dir.path(), 5, 5, true).unwrap_err().to_string().contains("no checkpoint to resume"));
    on_disk(dir.path(), 5, 2, false).unwrap();
    assert!(on_disk(dir.path(), 5, 5, false).unwrap_err().to_string().contains("holds a run"));
    // Other options are another run.
    let other = on_disk(dir.path(), 6, 6, true).unwrap_err();
    assert!(matches!(&other, TrainError::Other { what, .. } if what == "configuration"), "{other}");
    assert!(other.to_string().ends_with("it has steps 5, this run has steps 6"), "{other}");
}

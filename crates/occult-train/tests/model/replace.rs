//! Another placement at a checkpoint: the model stays the same, and so does a run that is resumed.

use super::*;

struct Run {
    weights: BTreeMap<String, Vec<f32>>,
    losses: Vec<f64>,
    figures: Vec<BTreeMap<String, f64>>,
    placement: Vec<LayerPlacement>,
}

struct Setup<'a> {
    world: usize,
    scope: Scope,
    limit: Option<usize>,
    /// `None`: no other placement is looked for.
    share: Option<f64>,
    dir: &'a Path,
}

/// Trains until `stop_at`, with checkpoints every 3 of 8 steps.
fn run(setup: &Setup<'_>, stop_at: u64, resume: bool) -> Result<Run, String> {
    let Setup { world, scope, limit, share, dir } = *setup;
    let how = ModelOptions { scope, ..plain() };
    let results = run_threads(world, &ThreadOptions::default(), |comm| {
        let comm: Arc<dyn Communicator> = Arc::from(comm);
        let mut model = model("olmoe", comm.clone(), how);
        if let Some(share) = share {
            let make = move |ranks| MoeModel::read(&files("olmoe"), ranks, how);
            model = model.with_replacement(Replacement::new(share, limit, make));
        }
        let (loader, group) = (loader(), CommGroup(comm.clone()));
        let options = Options { batch: 12, ..options(limit) };
        let (mut losses, mut figures) = (vec![], vec![]);
        let mut trainer = Trainer::new(&mut model, &loader, &group, options, dir, &DiskFiles, resume)?;
        let stop = AtomicBool::new(false);
        trainer.run(&stop, &mut |entry| {
            losses.push(entry.loss.expect("a loss"));
            figures.push(entry.figures.clone());
            stop.store(entry.step >= stop_at, Ordering::Relaxed);
        })?;
        let placement = model.ranks().layers().to_vec();
        Ok::<_, TrainError>(Run { weights: written(&model), losses, figures, placement })
    });
    results.all().map(|mut all| all.swap_remove(0)).map_err(|(_, e)| e.to_string())
}

fn dir_of() -> tempfile::TempDir {
    tempfile::tempdir().expect("directory")
}

/// A share that every placement saves.
const ANY: f64 = -9.0;

#[test]
fn a_run_with_other_placements_learns_the_same_and_resumes_to_the_bit() {
    let lora = Scope::Lora(Lora { rank: 2, alpha: 4.0, rank_stabilised: false });
    let first = ranks("olmoe", alone()).layers().to_vec();
    for (world, scope, limit) in [
        (1, Scope::All, None),
        (2, Scope::All, None),
        (4, Scope::All, Some(2)),
        (4, Scope::Experts, None),
        (2, lora, Some(2)),
    ] {
        let what = format!("{world} ranks, {scope:?}, limit {limit:?}");
        let dirs = [dir_of(), dir_of(), dir_of()];
        let setup = |i: usize, share| Setup { world, scope, limit, share, dir: dirs[i].path() };
        let whole = run(&setup(0, Some(ANY)), u64::MAX, false).expect(&what);
        assert_ne!(whole.placement, first, "{what}");
        let replaced: Vec<Option<f64>> = whole.figures.iter().map(|f| f.get("replaced").copied()).collect();
        assert_eq!(replaced, [None, None, Some(1.0), None, None, Some(1.0), None, None], "{what}");
        if limit.is_none() {
            // Where experts live changes sums in their last digits only.
            let stayed = run(&setup(1, None), u64::MAX, false).expect(&what);
            assert_eq!(stayed.placement, first);
            for (a, b) in whole.losses.iter().zip(&stayed.losses) {
                assert!((a - b).abs() < 1e-4, "{what}: {a} and {b}");
            }
        }
        // Stopped at the checkpoint where the placement changes, in between, and where it has changed twice.
        for stop_at in [3, 5, 7] {
            let dir = dir_of();
            let setup = Setup { world, scope, limit, share: Some(ANY), dir: dir.path() };
            run(&setup, stop_at, false).expect(&what);
            let resumed = run(&setup, u64::MAX, true).expect(&what);
            assert_eq!(resumed.weights, whole.weights, "{what}, stopped at {stop_at}");
            assert_eq!(resumed.losses, whole.losses[stop_at as usize..], "{what}, stopped at {stop_at}");
            assert_eq!(resumed.placement, whole.placement);
            assert_eq!(resumed.figures.last(), whole.figures.last());
        }
    }
}

#[test]
fn a_placement_that_saves_too_little_is_not_taken() {
    let dirs = [dir_of(), dir_of()];
    let setup =
        |i: usize, share| Setup { world: 2, scope: Scope::All, limit: None, share, dir: dirs[i].path() };
    let looked = run(&setup(0, Some(0.9)), u64::MAX, false).expect("trained");
    let plain = run(&setup(1, None), u64::MAX, false).expect("trained");
    assert_eq!(looked.weights, plain.weights);
    let at = &looked.figures[2];
    assert!(at["replaced"] == 0.0 && at["C_T_searched"] > 0.1 * at["C_T_held_out"], "{at:?}");
}

#[test]
fn a_model_that_is_made_wrong_is_noticed() {
    let dir = dir_of();
    let how = ModelOptions { scope: Scope::Experts, ..plain() };
    let results = run_threads(2, &ThreadOptions::default(), |comm| {
        let comm: Arc<dyn Communicator> = Arc::from(comm);
        // What is frozen is not that of the checkpoint.
        let make = move |ranks| MoeModel::random(files("olmoe").spec(), &Threads::new(1), 0.02, ranks, how);
        let mut model = model("olmoe", comm.clone(), how).with_replacement(Replacement::new(ANY, None, make));
        let (loader, group) = (loader(), CommGroup(comm.clone()));
        let options = Options { batch: 12, ..options(None) };
        let mut trainer = Trainer::new(&mut model, &loader, &group, options, dir.path(), &DiskFiles, false)?;
        trainer.run(&AtomicBool::new(false), &mut |_| {}).map(|_| ())
    });
    let message = results.all().expect_err("refused").1.to_string();
    assert!(message.contains("texts differ by more than"), "{message}");
}

//! Another placement at a checkpoint: the model stays the same, and so does a run that is resumed.

use super::*;
use std::cell::Cell;

/// What a run needs to be compared with another one.
#[derive(Debug)]
struct Run {
    weights: BTreeMap<String, Vec<f32>>,
    losses: Vec<f64>,
    figures: Vec<BTreeMap<String, f64>>,
    placement: Vec<LayerPlacement>,
    /// That of the resumed run, then those of its steps.
    warnings: Vec<Option<String>>,
}

/// Does something to a model that was made for another placement: on this rank, for the so-many-th time from 0.
type Spoil = fn(usize, usize, MoeModel) -> Result<MoeModel, TrainError>;

struct Setup<'a> {
    world: usize,
    scope: Scope,
    limit: Option<usize>,
    /// `None`: no other placement is looked for.
    share: Option<f64>,
    spoil: Spoil,
    dir: &'a Path,
}

const SOUND: Spoil = |_, _, model| Ok(model);

/// Trains until `stop_at`, with checkpoints every 3 of 8 steps.
fn run(setup: &Setup<'_>, stop_at: u64, resume: bool) -> Result<Run, String> {
    let Setup { world, scope, limit, share, spoil, dir } = *setup;
    let how = ModelOptions { scope, ..plain() };
    let results = run_threads(world, &ThreadOptions::default(), |comm| {
        let comm: Arc<dyn Communicator> = Arc::from(comm);
        let mut model = model("olmoe", comm.clone(), how);
        if let Some(share) = share {
            let (rank, made) = (comm.rank(), Cell::new(0));
            let make = move |ranks| {
                let time = made.replace(made.get() + 1);
                spoil(rank, time, MoeModel::read(&files("olmoe"), ranks, how)?)
            };
            model = model.with_replacement(Replacement::new(share, limit, make));
        }
        let (loader, group) = (loader(), CommGroup(comm.clone()));
        let options = Options { batch: 12, ..options(limit) };
        let (mut losses, mut figures) = (vec![], vec![]);
        let mut trainer = Trainer::new(&mut model, &loader, &group, options, dir, &DiskFiles, resume)?;
        let mut warnings = vec![trainer.warning().map(str::to_owned)];
        let stop = AtomicBool::new(false);
        trainer.run(&stop, &mut |entry| {
            losses.push(entry.loss.expect("a loss"));
            figures.push(entry.figures.clone());
            warnings.push(entry.warning.clone());
            stop.store(entry.step >= stop_at, Ordering::Relaxed);
        })?;
        let placement = model.ranks().layers().to_vec();
        Ok::<_, TrainError>(Run { weights: written(&model), losses, figures, placement, warnings })
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
        let setup = |i: usize, share| Setup { world, scope, limit, share, spoil: SOUND, dir: dirs[i].path() };
        let whole = run(&setup(0, Some(ANY)), u64::MAX, false).expect(&what);
        assert_ne!(whole.placement, first, "{what}");
        assert_eq!(whole.warnings, [const { None }; 9], "{what}");
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
            let setup = Setup { world, scope, limit, share: Some(ANY), spoil: SOUND, dir: dir.path() };
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
    let setup = |i: usize, share| {
        let (world, scope, limit, dir) = (2, Scope::All, None, dirs[i].path());
        Setup { world, scope, limit, share, spoil: SOUND, dir }
    };
    let looked = run(&setup(0, Some(0.9)), u64::MAX, false).expect("trained");
    let plain = run(&setup(1, None), u64::MAX, false).expect("trained");
    assert_eq!(looked.weights, plain.weights);
    let at = &looked.figures[2];
    assert!(at["replaced"] == 0.0 && at["C_T_searched"] > 0.1 * at["C_T_held_out"], "{at:?}");
}

/// Fills the first or the last norm of a model, which are frozen where only experts are trained, with a value.
fn fill(model: MoeModel, last: bool, value: f32) -> Result<MoeModel, TrainError> {
    let mut norms = model.model().iter().filter(|p| p.kind() == ParameterKind::Norm);
    let norm = if last { norms.next_back() } else { norms.next() }.expect("a norm").var();
    let filled = candle_core::Tensor::full(value, norm.dims(), norm.device());
    filled.and_then(|t| norm.set(&t)).map_err(|e| TrainError::model("filling a norm", e))?;
    Ok(model)
}

/// What can go wrong with a model for another placement, and what the warning says of it.
const SPOILT: [(&str, Spoil, &str); 8] = [
    ("other frozen weights", |_, _, model| fill(model, false, 0.3), "texts differ by more than"),
    (
        "on rank 0 alone",
        |r, _, m| if r == 0 { fill(m, true, 0.9) } else { Ok(m) },
        "texts differ by more than",
    ),
    ("NaN at the end", |_, _, model| fill(model, true, f32::NAN), "the worst by inf"),
    ("NaN before the routers", |_, _, model| fill(model, false, f32::NAN), "the worst by inf"),
    // Its routers have no choice, the others' have.
    (
        "NaN on rank 0 alone",
        |r, _, m| if r == 0 { fill(m, false, f32::NAN) } else { Ok(m) },
        "the worst by inf",
    ),
    ("too large", |_, _, model| fill(model, false, f32::MAX), "the worst by inf"),
    (
        "cannot be read on rank 0",
        |r, _, m| if r == 0 { Err(TrainError::request("no such file")) } else { Ok(m) },
        "rank 0: no such file",
    ),
    (
        "other parameters",
        |_, _, model| MoeModel::read(&files("olmoe"), model.ranks().clone(), plain()),
        "other parameters",
    ),
];

#[test]
fn a_placement_whose_model_is_another_one_is_refused_and_the_run_goes_on_and_resumes_to_the_bit() {
    let (scope, limit) = (Scope::Experts, None);
    for world in [1, 2, 4] {
        let plain = dir_of();
        let plain = Setup { world, scope, limit, share: None, spoil: SOUND, dir: plain.path() };
        let plain = run(&plain, u64::MAX, false).expect("trained");
        for (name, spoil, reason) in SPOILT {
            let what = format!("{world} ranks, {name}");
            let dir = dir_of();
            let setup = Setup { world, scope, limit, share: Some(ANY), spoil, dir: dir.path() };
            // Past a checkpoint at which it was refused, then on from there, past another one.
            let begun = run(&setup, 4, false).expect(&what);
            let rest = run(&setup, u64::MAX, true).expect(&what);
            assert_eq!(rest.weights, plain.weights, "{what}");
            assert_eq!([begun.losses, rest.losses].concat(), plain.losses, "{what}");
            assert_eq!((&begun.placement, &rest.placement), (&plain.placement, &plain.placement), "{what}");
            let steps = [&begun.figures[..], &rest.figures[..]].concat();
            let replaced: Vec<Option<f64>> = steps.iter().map(|f| f.get("replaced").copied()).collect();
            assert_eq!(replaced, [None, None, Some(0.0), None, None, Some(0.0), None, None], "{what}");
            assert_eq!(rest.warnings[0], None, "{what}: nothing was recorded");
            let warnings = [&begun.warnings[1..], &rest.warnings[1..]].concat();
            for (step, warning) in (1..).zip(warnings) {
                let expected = [3, 6].contains(&step);
                assert_eq!(warning.is_some(), expected, "{what}, step {step}");
                assert!(warning.is_none_or(|w| w.contains(reason)), "{what}: no word of {reason}");
            }
            let log = occult_train::log::read(&dir.path().join("log.jsonl")).expect("a log");
            assert_eq!(log.iter().filter(|e| e.warning.is_some()).count(), 2, "{what}");
        }
    }
}

#[test]
fn a_refused_placement_leaves_the_one_that_was_taken_before() {
    let spoil: Spoil = |_, time, model| if time == 0 { Ok(model) } else { fill(model, false, 0.3) };
    for (world, limit) in [(1, None), (2, Some(2)), (4, None)] {
        let dir = dir_of();
        let setup = Setup { world, scope: Scope::Experts, limit, share: Some(ANY), spoil, dir: dir.path() };
        let whole = run(&setup, u64::MAX, false).expect("trained");
        let replaced: Vec<f64> = whole.figures.iter().filter_map(|f| f.get("replaced").copied()).collect();
        assert_eq!(replaced, [1.0, 0.0]);
        assert!(whole.warnings[6].is_some() && whole.placement != ranks("olmoe", alone()).layers());
        for stop_at in [3, 5, 7] {
            let dir = dir_of();
            let setup = Setup { dir: dir.path(), ..setup };
            run(&setup, stop_at, false).expect("trained");
            let resumed = run(&setup, u64::MAX, true).expect("resumed");
            assert_eq!(resumed.weights, whole.weights, "{world} ranks, stopped at {stop_at}");
            assert_eq!(resumed.placement, whole.placement);
            assert_eq!(resumed.losses, whole.losses[stop_at as usize..]);
        }
    }
}

#[test]
fn a_recorded_placement_that_cannot_be_taken_again_is_a_warning_and_the_run_goes_on() {
    let scope = Scope::Experts;
    for world in [1, 2, 4] {
        let dir = dir_of();
        let setup = |spoil| Setup { world, scope, limit: None, share: Some(ANY), spoil, dir: dir.path() };
        let begun = run(&setup(SOUND), 4, false).expect("trained");
        let first = ranks("olmoe", alone()).layers().to_vec();
        assert_ne!(begun.placement, first);
        let resumed = run(&setup(|_, _, model| fill(model, false, 0.3)), 7, true).expect("resumed");
        let warning = resumed.warnings[0].as_deref().expect("a warning");
        assert!(warning.contains("experts stay where the run began"), "{warning}");
        assert_eq!(resumed.placement, first);
        let again = run(&setup(|_, _, _| Err(TrainError::request("not needed"))), 8, true).expect("again");
        assert_eq!((again.warnings[0].as_deref(), &again.placement), (None, &first), "not recorded");
        let whole = dir_of();
        let whole = Setup { world, scope, limit: None, share: None, spoil: SOUND, dir: whole.path() };
        let whole = run(&whole, u64::MAX, false).expect("trained");
        for (a, b) in [begun.losses, resumed.losses, again.losses].concat().iter().zip(&whole.losses) {
            assert!((a - b).abs() < 1e-4, "{world} ranks: {a} and {b}");
        }
    }
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
        let mut warnings = vec![];
        trainer.run(&AtomicBool::new(false), &mut |entry| warnings.extend(entry.warning.clone()))?;
        Ok::<_, TrainError>(warnings)
    });
    for warnings in results.all().expect("all ranks go on") {
        assert_eq!(warnings.len(), 2);
        assert!(warnings[0].contains("texts differ by more than"), "{}", warnings[0]);
    }
}

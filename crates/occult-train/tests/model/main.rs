//! The real model under the trainer: ranks, limits, low-rank updates, gradients, writing back.

mod balance;
mod overlap;
mod replace;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use occult_comm::{Communicator, SoloComm, ThreadOptions, run_threads};
use occult_model::hf::ExpertLayout;
use occult_model::{LoadOptions, ModelFiles, ParameterKind, StoredDtype, Threads};
use occult_moe::{Overlap, PruneRule};
use occult_plan::{ExpertId, LayerPlacement, Topology};
use occult_train::TrainError;
use occult_train::checkpoint::{DiskFiles, Kind, latest};
use occult_train::data::*;
use occult_train::lora::Lora;
use occult_train::model::*;
use occult_train::optim::AdamW;
use occult_train::random::mix;
use occult_train::schedule::{Decay, LimitSchedule, Schedule};
use occult_train::trainer::*;

const CASES: [&str; 3] = ["olmoe", "qwen2_moe-norm-tied-window", "deepseek_v2-lite"];
/// Ranks of the placement.
const PLACED: usize = 4;

fn dir(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../occult-model/tests/fixtures").join(case)
}

fn files(case: &str) -> ModelFiles {
    let options = LoadOptions { threads: Some(Threads::new(1)), dtype: None };
    ModelFiles::open(&dir(case), options).expect(case)
}

fn alone() -> Arc<dyn Communicator> {
    Arc::new(SoloComm::new())
}

/// Experts over four ranks in no order.
fn ranks(case: &str, comm: Arc<dyn Communicator>) -> ExpertRanks {
    let files = files(case);
    let (e, layers) = (files.spec().moe.router.num_experts, files.spec().moe_layers().count());
    let layer = |l: usize| {
        let mut experts: Vec<Vec<ExpertId>> = vec![vec![]; PLACED];
        for id in 0..e {
            experts[(id * 3 + id / PLACED + l) % PLACED].push(id as ExpertId);
        }
        LayerPlacement::from_rank_experts(e, &experts).expect("placement")
    };
    let topology = Topology::flat(PLACED).expect("topology");
    ExpertRanks::placed(comm, topology, (0..layers).map(layer).collect(), PruneRule::BestMass).expect("ranks")
}

fn model(case: &str, comm: Arc<dyn Communicator>, options: ModelOptions) -> MoeModel {
    MoeModel::read(&files(case), ranks(case, comm), options).expect(case)
}

fn plain() -> ModelOptions {
    // Auxiliary losses are means over the sequences computed at once, which are others on other numbers of ranks here: their
    // tests are in `balance`.
    ModelOptions { balance_coefficient: 0.0, ..ModelOptions::default() }
}

fn loader() -> Loader {
    let documents = (0..30u64).map(|i| {
        let ids: Vec<u32> = (0..5 + i % 9).map(|j| (mix(i * 31 + j) % 90) as u32).collect();
        let learn = ids.iter().map(|id| id % 7 != 0).collect();
        (Encoded { ids, learn }, 0, mix(i))
    });
    let store = TokenStore::in_memory(documents);
    let long = LongDocument::Truncate;
    let options = PackOptions { length: 14, long, validation: 0.0, validation_part: false, source: None };
    let packed = Packed::new(&store, &options).expect("packed");
    Loader::new(store, packed, Some(3))
}

fn options(limit: Option<usize>) -> Options {
    let steps = 8;
    Options {
        schedule: Schedule { peak: 2e-3, steps, warm_up: 2, decay: Decay::Cosine, final_ratio: 0.1 },
        // A larger epsilon: the first steps of Adam are signs of gradients, which rounding decides near zero.
        adamw: AdamW { eps: 1e-3, ..AdamW::default() },
        max_norm: Some(1.0),
        limit: limit.map(|target| LimitSchedule { ranks: PLACED, target, steps, fraction: 0.5 }),
        batch: 5,
        seed: 1,
        data: "test".into(),
        more: Default::default(),
        micro_batch: 2,
        checkpoint_every: 3,
        keep: 2,
        guard: Guard::default(),
    }
}

/// All values by name, experts of all ranks together, as they are written.
fn written(model: &MoeModel) -> BTreeMap<String, Vec<f32>> {
    let to = tempfile::tempdir().expect("directory");
    model.write(to.path(), ExpertLayout::PerExpert, StoredDtype::F32).expect("written");
    let file = to.path().join("model.safetensors");
    if !file.is_file() {
        return BTreeMap::new();
    }
    let bytes = std::fs::read(file).expect("read");
    let tensors = safetensors::SafeTensors::deserialize(&bytes).expect("safetensors");
    let values = |t: safetensors::tensor::TensorView<'_>| -> Vec<f32> {
        t.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().expect("four"))).collect()
    };
    tensors.tensors().into_iter().map(|(name, t)| (name, values(t))).collect()
}

type Run = (BTreeMap<String, Vec<f32>>, Vec<f64>, Vec<Option<f64>>);

/// Trains on `world` ranks until `stop_at`; what is written, losses and `C_T` of every step.
fn train(case: &str, world: usize, limit: Option<usize>, dir: &Path, stop_at: u64, resume: bool) -> Run {
    train_in_parts(&Overlap::Off, case, world, limit, dir, stop_at, resume)
}

fn train_in_parts(
    overlap: &Overlap,
    case: &str,
    world: usize,
    limit: Option<usize>,
    dir: &Path,
    stop_at: u64,
    resume: bool,
) -> Run {
    let results = run_threads(world, &ThreadOptions::default(), |comm| {
        let comm: Arc<dyn Communicator> = Arc::from(comm);
        let ranks = ranks(case, comm.clone()).with_overlap(overlap.clone());
        let mut model = MoeModel::read(&files(case), ranks, plain())?;
        let (loader, group) = (loader(), CommGroup(comm.clone()));
        let (mut losses, mut copies) = (vec![], vec![]);
        let mut trainer = Trainer::new(&mut model, &loader, &group, options(limit), dir, &DiskFiles, resume)?;
        let stop = AtomicBool::new(false);
        trainer.run(&stop, &mut |entry| {
            losses.push(entry.loss.expect("a loss"));
            copies.push(entry.figures.get("C_T").copied());
            stop.store(entry.step >= stop_at, Ordering::Relaxed);
        })?;
        Ok::<_, TrainError>((written(&model), losses, copies))
    });
    results.all().expect("all ranks").remove(0)
}

fn fresh(case: &str, world: usize, limit: Option<usize>) -> Run {
    train(case, world, limit, tempfile::tempdir().expect("directory").path(), u64::MAX, false)
}

fn close(found: &Run, expected: &Run, limit: f32, what: &str) {
    assert_eq!(found.0.keys().collect::<Vec<_>>(), expected.0.keys().collect::<Vec<_>>());
    for (name, want) in &expected.0 {
        let off = found.0[name].iter().zip(want).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
        assert!(off < limit, "{what}: {name} is off by {off:.1e}");
    }
}

#[test]
fn any_number_of_ranks_learns_the_same_with_and_without_a_limit() {
    for case in CASES {
        for limit in [None, Some(2)] {
            let one = fresh(case, 1, limit);
            assert_eq!(one.1.len(), 8);
            assert!(one.1[7] < one.1[0], "{case}: nothing was learned: {:?}", one.1);
            for world in [2, 4] {
                let more = fresh(case, world, limit);
                close(&more, &one, 2e-4, &format!("{case}, limit {limit:?}, {world} ranks"));
            }
        }
    }
}

#[test]
fn a_limit_falls_to_its_target_and_is_kept() {
    let free = fresh("olmoe", 1, None);
    let limited = fresh("olmoe", 1, Some(2));
    let copies: Vec<f64> = limited.2.iter().map(|c| c.expect("C_T")).collect();
    assert!(
        free.2.iter().all(|c| c.expect("C_T") > 2.0),
        "the test needs tokens of more ranks: {:?}",
        free.2
    );
    assert!(copies[..2].iter().all(|c| *c > 2.0), "{copies:?}");
    assert!(copies[4..].iter().all(|c| *c <= 2.0), "{copies:?}");
    assert_ne!(free.0, limited.0);
}

#[test]
fn drift_is_what_the_routers_would_need_over_what_they_needed_at_first() {
    let figures = |limit, promised| {
        let mut model = {
            let ranks = ranks("olmoe", alone()).with_promised_copies(promised);
            MoeModel::read(&files("olmoe"), ranks, plain()).expect("model")
        };
        let (loader, dir) = (loader(), tempfile::tempdir().expect("directory"));
        let mut entries = vec![];
        Trainer::new(&mut model, &loader, &Solo, options(limit), dir.path(), &DiskFiles, false)
            .and_then(|mut t| t.run(&AtomicBool::new(false), &mut |e| entries.push(e.figures.clone())))
            .expect("trained");
        entries
    };
    let free = figures(None, None);
    assert!((free[0]["C_T_drift"] - 1.0).abs() < 1e-6);
    for f in &free {
        assert_eq!(f["C_T"], f["C_T_unlimited"]);
        assert!((f["C_T_drift"] - f["C_T"] / free[0]["C_T"]).abs() < 1e-5);
    }
    let limited = figures(Some(2), Some(2.0));
    for f in &limited[4..] {
        // The limit holds what is sent at 2; the routers' own choices are not touched by it.
        assert!(f["C_T"] <= 2.0 && f["C_T_unlimited"] > 2.0, "{f:?}");
        assert_eq!(f["C_T_drift"], f["C_T_unlimited"] / 2.0);
    }
}

#[test]
fn a_run_goes_on_to_the_bit_and_on_other_ranks_closely() {
    let (case, limit) = ("olmoe", Some(2));
    for world in [1, 2] {
        let whole = fresh(case, world, limit);
        let same = tempfile::tempdir().expect("directory");
        train(case, world, limit, same.path(), 5, false);
        let resumed = train(case, world, limit, same.path(), u64::MAX, true);
        assert_eq!(resumed.0, whole.0, "{world} ranks");
        assert_eq!(resumed.1, whole.1[5..]);
        let other = tempfile::tempdir().expect("directory");
        train(case, world, limit, other.path(), 5, false);
        assert!(latest(other.path()).expect("a run").is_some());
        close(&train(case, 4, limit, other.path(), u64::MAX, true), &whole, 2e-4, "resumed on 4 ranks");
    }
}

/// One batch, with padding and targets that are not learned.
fn batch() -> Batch {
    loader().batch(0, 3, 0, 1).expect("a batch")
}

/// Gradients of everything against differences of the loss, at the largest entry of each.
fn check_gradients(model: &mut MoeModel, what: &str) {
    let batch = batch();
    let scale = 1.0 / batch.num_targets() as f64;
    model.clear_gradients().expect("cleared");
    model.loss_and_gradients(&batch, scale).expect("gradients");
    let mut largest = vec![];
    model
        .visit(&mut |i, _, g| {
            let at = (0..g.len()).max_by(|&a, &b| g[a].abs().total_cmp(&g[b].abs())).expect("a value");
            largest.push((i, at, g[at]));
            Ok(())
        })
        .expect("visited");
    let infos = model.parameters().to_vec();
    for (i, at, gradient) in largest {
        // Where a step changes a choice of experts the loss jumps; on the other side, or nearer, it does not.
        let mut at_shift = |by: f32| {
            shift(model, i, at, by);
            let loss = model.loss(&batch).expect("loss") * scale;
            shift(model, i, at, -by);
            loss
        };
        let here = at_shift(0.0);
        let slopes = [2e-3f32, 5e-4].map(|step| {
            let (up, down, step) = (at_shift(step), at_shift(-step), f64::from(step));
            [(up - down) / (2.0 * step), (up - here) / step, (here - down) / step]
        });
        let good = |slope: f64| (slope - f64::from(gradient)).abs() <= 0.05 * slope.abs() + 2e-3;
        assert!(
            slopes.into_iter().flatten().any(good),
            "{what} {}: gradient {gradient}, slopes {slopes:?}",
            infos[i].name
        );
    }
}

/// Adds to one value of a parameter.
fn shift(model: &mut MoeModel, parameter: usize, at: usize, by: f32) {
    model
        .visit(&mut |i, w, _| {
            if i == parameter {
                w[at] += by;
            }
            Ok(())
        })
        .expect("visited");
}

#[test]
fn gradients_are_slopes_with_a_limit_and_of_low_rank_updates() {
    for case in CASES {
        let bare = ModelOptions { balance_coefficient: 0.0, ..ModelOptions::default() };
        for recompute in [false, true] {
            let mut whole = model(case, alone(), ModelOptions { recompute, ..bare });
            check_gradients(&mut whole, &format!("{case}, recompute {recompute}"));
            whole.set_limit(Some(2)).expect("limit");
            check_gradients(&mut whole, &format!("{case}, recompute {recompute}, limit"));
        }
        let scope = Scope::Lora(Lora { rank: 2, alpha: 4.0, rank_stabilised: false });
        let mut lora = model(case, alone(), ModelOptions { scope, ..bare });
        // B begins at zero, where A has no gradient.
        lora.visit(&mut |i, w, _| {
            w.iter_mut().zip(0u64..).for_each(|(w, j)| *w += (mix(j + i as u64) % 100) as f32 / 2000.0);
            Ok(())
        })
        .expect("visited");
        check_gradients(&mut lora, &format!("{case}, lora"));
    }
}

#[test]
fn what_is_frozen_stays_and_what_is_trained_changes() {
    let lora = Scope::Lora(Lora { rank: 2, alpha: 4.0, rank_stabilised: false });
    for (scope, dir) in
        [Scope::All, Scope::Experts, lora].map(|s| (s, tempfile::tempdir().expect("directory")))
    {
        let mut model = model("olmoe", alone(), ModelOptions { scope, ..ModelOptions::default() });
        let before = (written(&model), model.loss(&batch()).expect("loss"));
        let loader = loader();
        Trainer::new(&mut model, &loader, &Solo, options(None), dir.path(), &DiskFiles, false)
            .and_then(|mut t| t.run(&AtomicBool::new(false), &mut |_| {}))
            .expect("trained");
        let loss = model.loss(&batch()).expect("loss");
        assert!(loss < before.1, "{scope:?}: {loss} after {}", before.1);
        let (before, after) = (before.0, written(&model));
        for p in model.model().iter() {
            let matches = |name: &&String| match p.kind() {
                ParameterKind::Experts { layer } => name.contains(&format!("layers.{layer}.mlp.experts.")),
                _ => *name == p.name(),
            };
            let changed = before.keys().filter(matches).any(|n| before[n] != after[n]);
            let trained = match scope {
                Scope::All => true,
                Scope::Experts => matches!(p.kind(), ParameterKind::Experts { .. }),
                Scope::Lora(_) => {
                    matches!(p.kind(), ParameterKind::Experts { .. } | ParameterKind::Matrix)
                }
            };
            assert_eq!(changed, trained, "{scope:?}: {}", p.name());
        }
    }
}

#[test]
fn impossible_ranks_and_limits_are_refused() {
    let refused = |r: Result<ExpertRanks, TrainError>| r.expect_err("refused").to_string();
    let spec = files("olmoe").spec().clone();
    let router = spec.moe.router;
    let good = ranks("olmoe", alone());
    assert!(good.check_limit(PLACED, &router).is_ok());
    let scarce =
        good.check_limit(1, &occult_model::spec::RouterSpec { top_k: 5, ..router }).expect_err("refused");
    assert!(scarce.to_string().contains("a token needs 5"), "{scarce}");
    let three = Topology::flat(3).expect("topology");
    let wrong = ExpertRanks::placed(alone(), three, good.layers().to_vec(), PruneRule::BestMass);
    assert!(refused(wrong).contains("placed over 4 ranks, not 3"));
    let few = ExpertRanks::contiguous(alone(), 1, router.num_experts).expect("ranks");
    let error = MoeModel::read(&files("olmoe"), few, plain()).expect_err("refused").to_string();
    assert!(error.contains("a placement of 1 MoE layers"), "{error}");
}

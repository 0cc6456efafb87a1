//! What keeps experts evenly used: the balancing losses over ranks, and the bias that follows the load.

use occult_model::hf::BalanceLoss;

use super::*;

/// Gradients by name, those of experts in the order of their ids, and the loss's figure.
type Gradients = (BTreeMap<String, Vec<f32>>, f64);

/// Of one step whose sequences are computed at once on `world` ranks: gradients of replicated parameters added over ranks,
/// of experts from those who have them.
fn gradients(case: &str, world: usize, options: ModelOptions, sequences: usize) -> Gradients {
    let results = run_threads(world, &ThreadOptions::default(), |comm| {
        let comm: Arc<dyn Communicator> = Arc::from(comm);
        let mut model = model(case, comm.clone(), options);
        // B of low-rank updates begins at zero, where A has no gradient; the same values whoever has an expert.
        let infos = model.parameters().to_vec();
        if matches!(options.scope, Scope::Lora(_)) {
            model.visit(&mut |i, w, _| {
                let each: usize = infos[i].shape.iter().rev().take(2).product();
                w.iter_mut().enumerate().for_each(|(j, w)| {
                    *w += (mix((j % each) as u64) % 100) as f32 / 2000.0;
                });
                Ok(())
            })?;
        }
        let batch = loader().batch(0, sequences, comm.rank(), world)?;
        let targets = loader().batch(0, sequences, 0, 1)?.num_targets();
        model.clear_gradients()?;
        let report = model.loss_and_gradients(&batch, 1.0 / targets as f64)?;
        let mut weighted = [report.weight, report.weight * report.figures["aux_loss"]];
        let group = CommGroup(comm.clone());
        group.sum_f64(&mut weighted)?;
        let mut found = vec![];
        model.visit(&mut |i, _, g| {
            let info = &infos[i];
            match &info.kind {
                Kind::Replicated => {
                    group.sum_f32(g)?;
                    found.push((info.name.clone(), g.to_vec()));
                }
                Kind::Experts(ids) => {
                    let each = (g.len() / ids.len().max(1)).max(1);
                    for (id, g) in ids.iter().zip(g.chunks_exact(each)) {
                        found.push((format!("{} of expert {id}", info.name), g.to_vec()));
                    }
                }
            }
            Ok(())
        })?;
        Ok::<_, TrainError>((found, weighted[1] / weighted[0]))
    });
    let all = results.all().expect("all ranks");
    let loss = all[0].1;
    (all.into_iter().flat_map(|(found, _)| found).collect(), loss)
}

#[test]
fn balancing_losses_of_ranks_are_those_of_one() {
    let lora = Scope::Lora(Lora { rank: 2, alpha: 4.0, rank_stabilised: false });
    for case in ["olmoe", "deepseek_v2-lite"] {
        for balance in [BalanceLoss::AllLayers, BalanceLoss::Layers, BalanceLoss::Sequences] {
            for (scope, recompute) in [
                (Scope::All, false),
                (Scope::All, true),
                (Scope::Experts, false),
                (lora, false),
                (lora, true),
            ] {
                // Large, so that it decides the gradients of routers.
                let options = ModelOptions {
                    scope,
                    balance,
                    balance_coefficient: 2.0,
                    router_z_coefficient: 0.1,
                    recompute,
                    ..ModelOptions::default()
                };
                // With 3 sequences one of 4 ranks has none.
                for sequences in [5, 3] {
                    let one = gradients(case, 1, options, sequences);
                    for world in [2, 4] {
                        let more = gradients(case, world, options, sequences);
                        let what =
                            format!("{case}, {balance:?}, {scope:?}, recompute {recompute}, {world} ranks");
                        assert!((more.1 - one.1).abs() < 1e-5 * one.1, "{what}: {} for {}", more.1, one.1);
                        assert_eq!(more.0.len(), one.0.len(), "{what}");
                        for (name, want) in &one.0 {
                            let largest = want.iter().fold(0f32, |m, v| m.max(v.abs()));
                            let off =
                                more.0[name].iter().zip(want).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
                            assert!(
                                off <= 1e-3 * largest + 1e-7,
                                "{what}: {name} is off by {off:.1e} of {largest:.1e}"
                            );
                        }
                    }
                }
            }
        }
    }
}

/// The routers' gradients come from the balancing loss mostly: what the test above compares is not zero.
#[test]
fn balancing_losses_reach_the_routers() {
    let with = |coefficient| {
        let options = ModelOptions { balance_coefficient: coefficient, ..ModelOptions::default() };
        gradients("olmoe", 2, options, 4).0
    };
    let (little, much) = (with(1e-9), with(2.0));
    for (name, much) in much.iter().filter(|(name, _)| name.ends_with("mlp.gate.weight")) {
        let norm = |g: &[f32]| g.iter().map(|g| g * g).sum::<f32>().sqrt();
        assert!(norm(much) > 2.0 * norm(&little[name]), "{name}: {} {}", norm(much), norm(&little[name]));
    }
}

/// Every token prefers the same four of 16 experts; trained so slowly that only the bias can change that.
fn skewed(comm: Arc<dyn Communicator>, balance_bias: f32) -> MoeModel {
    let options = ModelOptions { balance_coefficient: 0.0, balance_bias, ..ModelOptions::default() };
    let files = files("olmoe").with_selection_bias(skew()).expect("a bias");
    MoeModel::read(&files, ranks("olmoe", comm), options).expect("model")
}

fn skew() -> Vec<Vec<f32>> {
    vec![(0..16).map(|e| if e < 4 { 0.5 } else { 0.0 }).collect(); 2]
}

type Balanced = (Vec<f64>, Vec<f64>, Option<Vec<Vec<f32>>>, BTreeMap<String, Vec<f32>>);

/// Balancedness and losses of every step, bias and weights at the end.
fn balance(
    world: usize,
    rate: f32,
    limit: Option<usize>,
    dir: &Path,
    stop_at: u64,
    resume: bool,
) -> Balanced {
    let results = run_threads(world, &ThreadOptions::default(), |comm| {
        let comm: Arc<dyn Communicator> = Arc::from(comm);
        let mut model = skewed(comm.clone(), rate);
        let (loader, group) = (loader(), CommGroup(comm.clone()));
        let slow = Schedule { peak: 1e-6, steps: 40, ..options(None).schedule };
        let options =
            Options { schedule: slow, batch: 16, micro_batch: 16, checkpoint_every: 7, ..options(limit) };
        let (mut balanced, mut losses) = (vec![], vec![]);
        let mut trainer = Trainer::new(&mut model, &loader, &group, options, dir, &DiskFiles, resume)?;
        let stop = AtomicBool::new(false);
        trainer.run(&stop, &mut |entry| {
            balanced.push(entry.figures["balancedness"]);
            losses.push(entry.loss.expect("a loss"));
            stop.store(entry.step >= stop_at, Ordering::Relaxed);
        })?;
        let bias = model.selection_bias().map(<[_]>::to_vec);
        Ok::<_, TrainError>((balanced, losses, bias, written(&model)))
    });
    let mut all = results.all().expect("all ranks");
    assert!(all.iter().all(|r| r.2 == all[0].2), "ranks have different biases");
    all.swap_remove(0)
}

fn balance_afresh(world: usize, rate: f32, limit: Option<usize>) -> Balanced {
    balance(world, rate, limit, tempfile::tempdir().expect("directory").path(), u64::MAX, false)
}

#[test]
fn a_bias_evens_out_skewed_routers() {
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
    let (without, with) = (balance_afresh(1, 0.0, None), balance_afresh(1, 0.02, None));
    assert_eq!(without.2, Some(skew()));
    let (before, after) = (mean(&with.0[..3]), mean(&with.0[30..]));
    assert!(before < 0.3 && mean(&without.0[30..]) < 0.3, "{:?}, without {:?}", with.0, without.0);
    assert!(after > 1.4 * before, "from {before} to {after}: {:?}", with.0);
}

#[test]
fn a_bias_is_the_same_on_any_number_of_ranks_and_resumes_to_the_bit() {
    for limit in [None, Some(2)] {
        let one = balance_afresh(1, 0.01, limit);
        for world in [2, 4] {
            let more = balance_afresh(world, 0.01, limit);
            for (a, b) in more.1.iter().zip(&one.1) {
                assert!((a - b).abs() < 2e-3, "{world} ranks, limit {limit:?}: losses {a} and {b}");
            }
            let off = more.2.iter().flatten().flatten().zip(one.2.iter().flatten().flatten());
            let off = off.filter(|(a, b)| (**a - **b).abs() > 1e-6).count();
            assert!(off <= 2, "{world} ranks, limit {limit:?}: {off} biases differ");
        }
        let dir = tempfile::tempdir().expect("directory");
        let stopped = balance(2, 0.01, limit, dir.path(), 11, false);
        let resumed = balance(2, 0.01, limit, dir.path(), u64::MAX, true);
        let whole = balance_afresh(2, 0.01, limit);
        assert_ne!(stopped.2, whole.2);
        assert_eq!((&resumed.2, &resumed.3), (&whole.2, &whole.3));
        assert_eq!(resumed.1, whole.1[11..]);
    }
}

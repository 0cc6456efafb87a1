//! Experts spread over ranks: the logits, losses and gradients of one process.

mod common;

use std::sync::Arc;

use candle_core::Tensor;
use common::{Reference, dir};
use occult_comm::{Communicator, ThreadOptions, run_threads};
use occult_kernels::smm::ExpertDims;
use occult_model::{
    Batch, IGNORE, LoadOptions, Logits, ModelError, ModelFiles, ModelParameters, MoeLayer, ParallelExperts,
    Router, Threads, TrainBatch, TrainOptions,
};
use occult_moe::{ExpertParallelLayer, LayerOptions, topology_of};
use occult_plan::{ExpertId, LayerPlacement};

const CASES: [&str; 3] = ["olmoe", "qwen2_moe-norm-tied-window", "deepseek_v2-groups-bf16"];

fn files(case: &str) -> ModelFiles {
    let options = LoadOptions { threads: Some(Threads::new(1)), dtype: None };
    ModelFiles::open(&dir(case), options).expect(case)
}

/// Experts dealt out unevenly, in no order.
fn placement(num_experts: usize, num_ranks: usize) -> LayerPlacement {
    let mut ranks: Vec<Vec<ExpertId>> = vec![Vec::new(); num_ranks];
    for e in 0..num_experts {
        ranks[(e * 5 + e / 3) % num_ranks].push(e as ExpertId);
    }
    LayerPlacement::from_rank_experts(num_experts, &ranks).expect("placement")
}

fn layer(comm: &Arc<dyn Communicator>, router: &Router) -> Result<ExpertParallelLayer, ModelError> {
    let failed = |source| ModelError::Moe { layer: 0, source };
    let options = LayerOptions::new(topology_of(&**comm).map_err(failed)?);
    let placement = placement(router.spec().num_experts, comm.world_size());
    ExpertParallelLayer::new(comm.clone(), router.rule().clone(), placement, options, Threads::new(1))
        .map_err(failed)
}

#[test]
fn logits_are_those_of_one_process() {
    for case in CASES {
        let reference = Reference::of(case);
        let (sequences, want) = (reference.sequences(), reference.f32("logits"));
        for world in [1, 2, 3] {
            let logits = run_threads(world, &ThreadOptions::default(), |comm| {
                let comm: Arc<dyn Communicator> = Arc::from(comm);
                let model = files(case).load_with(&mut |files, number| {
                    let router = files.router(number)?;
                    let layer = layer(&comm, &router)?;
                    let spec = files.spec();
                    let dims = ExpertDims { hidden: spec.hidden_size, intermediate: spec.moe.expert_size };
                    let held: Vec<usize> = layer.local_experts().iter().map(|&e| usize::from(e)).collect();
                    let experts = files.experts(number, &held)?;
                    Ok(Box::new(ParallelExperts::new(layer, router, dims, experts)?) as Box<dyn MoeLayer>)
                })?;
                // Every rank has tokens of its own: a sequence more or less.
                let own = &sequences[comm.rank() % sequences.len()];
                let logits = model.forward(&Batch::single(own)?, None, Logits::All, None)?;
                Ok::<_, ModelError>((comm.rank() % sequences.len(), common::values(&logits)))
            });
            for (sequence, got) in logits.all().expect("all ranks") {
                let off = common::difference(&got, &want[sequence * got.len()..][..got.len()]);
                assert!(off <= common::LIMIT, "{case} on {world} ranks: {off:.1e}");
            }
        }
    }
}

#[test]
fn gradients_added_over_ranks_are_those_of_one_process() {
    for case in CASES {
        let sequences = Reference::of(case).sequences();
        let next = |s: &Vec<u32>| s[1..].iter().copied().chain([IGNORE]).collect::<Vec<_>>();
        let whole = ModelParameters::read(&files(case), None, &|_, _| true).expect(case);
        let model = whole.decoder().expect(case);
        for s in &sequences {
            let (tokens, targets) = (s.as_slice(), next(s));
            let batch = TrainBatch { num_sequences: 1, tokens, targets: &targets, segments: None };
            let out = model.forward_train(batch, TrainOptions::default()).expect("forward");
            whole.accumulate(&out.loss.backward().expect("backward")).expect("accumulate");
        }
        let wants: Vec<Tensor> = whole
            .iter()
            .map(|p| p.take_gradient().expect("gradient").expect("one of every parameter"))
            .collect();
        for recompute in [false, true] {
            let ranks = run_threads(sequences.len(), &ThreadOptions::default(), |comm| {
                let comm: Arc<dyn Communicator> = Arc::from(comm);
                let e = files(case).spec().moe.router.num_experts;
                let held: Vec<usize> = placement(e, comm.world_size())
                    .experts_of(comm.rank() as u16)
                    .iter()
                    .map(|&e| usize::from(e))
                    .collect();
                let own = ModelParameters::read(&files(case), Some(&|_| held.clone()), &|_, _| true)?;
                let model = own.decoder_with(&mut |own, number| {
                    let router = own.router(number)?;
                    let layer = layer(&comm, &router)?;
                    let experts = own.experts(number)?;
                    Ok(Box::new(ParallelExperts::stacked(layer, router, experts)?) as Box<dyn MoeLayer>)
                })?;
                let (tokens, targets) = (sequences[comm.rank()].as_slice(), next(&sequences[comm.rank()]));
                let batch = TrainBatch { num_sequences: 1, tokens, targets: &targets, segments: None };
                let options = TrainOptions { recompute, ..TrainOptions::default() };
                let out = model.forward_train(batch, options)?;
                own.accumulate(&out.loss.backward()?)?;
                let mut gradients = Vec::new();
                for p in own.iter() {
                    let gradient = p.take_gradient()?.map(|g| g.flatten_all()?.to_vec1::<f32>());
                    gradients.push(gradient.transpose()?);
                }
                Ok::<_, ModelError>((held, gradients))
            });
            let ranks = ranks.all().expect("all ranks");
            for (i, (p, want)) in whole.iter().zip(&wants).enumerate() {
                let want = common::values(want);
                let mut got = vec![0f32; want.len()];
                for (held, gradients) in &ranks {
                    let of_rank = gradients[i].as_ref().expect("a gradient");
                    if p.kind().is_replicated() {
                        got.iter_mut().zip(of_rank).for_each(|(g, v)| *g += v);
                        continue;
                    }
                    let each = want.len() / files(case).spec().moe.router.num_experts;
                    for (&e, values) in held.iter().zip(of_rank.chunks(each)) {
                        got[e * each..][..each].copy_from_slice(values);
                    }
                }
                let range = want.iter().fold(1e-6f32, |m, v| m.max(v.abs()));
                let off = got.iter().zip(&want).fold(0f32, |m, (g, w)| m.max((g - w).abs()));
                assert!(off <= 1e-4 * range, "{case} {}: off by {off:.1e} of {range:.1e}", p.name());
            }
        }
    }
}

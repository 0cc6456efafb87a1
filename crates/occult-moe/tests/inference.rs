//! The path without autograd equals the path with it, for weights as stored, for small batches and in parts.

mod common;

use std::sync::Arc;

use common::{Case, difference, rank, run, tensor, values};
use half::bf16;
use occult_comm::{Communicator, Metered, ThreadOptions};
use occult_kernels::smm::{ExpertDims, ExpertMatrices};
use occult_kernels::{Matrix, Threads};
use occult_moe::{ExpertParallelLayer, LayerOptions, Mode, MoeError, Overlap, Step};
use occult_plan::{Rank, Topology};
use proptest::prelude::*;

/// One rank's inference: output, shared part that ran, and names of its operations.
fn infer(
    case: &Case,
    options: &LayerOptions,
    comm: Arc<dyn Communicator>,
    stored: bool,
) -> Result<(Vec<f32>, Vec<&'static str>), MoeError> {
    let metered = Metered::new(comm);
    let meter = metered.meter();
    let comm: Arc<dyn Communicator> = Arc::new(metered);
    let (rank, d, f, e) = (comm.rank(), case.d, case.f, case.router.num_experts);
    let rows = case.rows_of(rank);
    let x = &case.x[rows.start * d..rows.end * d];
    let logits = if rows.is_empty() {
        Vec::new()
    } else {
        values(&tensor(x, (rows.len(), d)).matmul(&tensor(&case.w_router, (e, d)).t()?)?)
    };
    let up = case.local(rank, &case.w_up, 2 * f * d);
    let down = case.local(rank, &case.w_down, d * f);
    let narrow = |v: &[f32]| v.iter().map(|&v| bf16::from_f32(v)).collect::<Vec<_>>();
    let (up16, down16) = (narrow(&up), narrow(&down));
    let matrix = |wide: usize, from: usize, to: usize| match (wide, stored) {
        (0, true) => Matrix::Bf16(&up16[from..to]),
        (0, false) => Matrix::F32(&up[from..to]),
        (_, true) => Matrix::Bf16(&down16[from..to]),
        (_, false) => Matrix::F32(&down[from..to]),
    };
    let experts: Vec<_> = (0..case.placement.experts_of(rank as Rank).len())
        .map(|i| ExpertMatrices {
            gate: matrix(0, i * 2 * f * d, (i * 2 + 1) * f * d),
            up: matrix(0, (i * 2 + 1) * f * d, (i * 2 + 2) * f * d),
            down: matrix(1, i * d * f, (i + 1) * d * f),
        })
        .collect();
    let step = Step::agree(&*comm, rows.len())?;
    assert_eq!(step.tokens(), case.tokens);
    let (router, placement) = (case.router.clone(), case.placement.clone());
    let layer = ExpertParallelLayer::new(comm, router, placement, options.clone(), Threads::new(1))?;
    let dims = ExpertDims { hidden: d, intermediate: f };
    let mut ran = false;
    let mut meanwhile = || {
        ran = true;
        Ok(())
    };
    let (y, _) = layer.forward_inference(x, &logits, dims, &experts, Some(&step), Some(&mut meanwhile))?;
    assert!(ran);
    let seconds = layer.take_seconds();
    assert!(seconds.plan > 0.0 && seconds.compute > 0.0 && seconds.wire > 0.0 && seconds.moving > 0.0);
    Ok((y, meter.snapshot().operations.keys().copied().collect()))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn equals_the_differentiable_path(
        seed in 0u64..1_000_000,
        world in prop::sample::select(vec![1usize, 2, 3, 4, 8]),
        two_hosts in any::<bool>(),
        conventional in any::<bool>(),
    ) {
        let mut case = Case::random(seed, world, 9, 3, 8, 6);
        // Weights that bf16 holds exactly.
        for values in [&mut case.w_up, &mut case.w_down] {
            values.iter_mut().for_each(|v| *v = bf16::from_f32(*v).to_f32());
        }
        let nodes = if two_hosts && world % 2 == 0 { 2 } else { 1 };
        let topology = Topology::new(world, nodes).unwrap();
        let mut options = LayerOptions::new(topology);
        options.mode = if conventional { Mode::Conventional } else { Mode::Dedup };
        let threads = ThreadOptions::default();
        let want: Vec<_> = run(world, &threads, |comm| rank(&case, &options, comm)).all().unwrap();
        let ways = [(0, Overlap::Off, true), (0, Overlap::Chunks(3), false), (64, Overlap::Off, true)];
        for (small_batch_tokens, overlap, stored) in ways {
            let options = LayerOptions { small_batch_tokens, overlap, ..options.clone() };
            let got = run(world, &threads, |comm| infer(&case, &options, comm, stored)).all().unwrap();
            for ((y, names), (want, _)) in got.iter().zip(&want) {
                prop_assert!(difference(y, &want.y) < 1e-5);
                // A small batch sends one message per peer each way, and no counts.
                let small = ["moe combine", "moe dispatch", "moe tokens of a step"];
                prop_assert_eq!(names.as_slice() == small, small_batch_tokens > 0);
            }
        }
    }
}

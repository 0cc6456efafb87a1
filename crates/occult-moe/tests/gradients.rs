//! Gradients that do not pass the experts: routing weights by themselves, sums of replicated parameters over ranks, and
//! gradients that go to a sink.

mod common;

use std::sync::Arc;

use candle_core::{DType, Var};
use common::{Case, difference, run, tensor, values, var, var_of};
use occult_comm::{Communicator, ThreadOptions};
use occult_kernels::Threads;
use occult_kernels::ops::GradSink;
use occult_moe::reference::{dense_layer, spread_weights};
use occult_moe::{
    ExpertParallelLayer, ExpertTensors, LayerOptions, Mode, MoeError, Overlap, all_reduce_gradients,
    all_reduce_replicas,
};
use occult_plan::{ExpertId, LayerPlacement, Rank, RoutingBuf, Topology};
use proptest::prelude::*;

/// Experts and weights that no router chose.
fn routing(case: &Case, k: usize) -> (Vec<ExpertId>, Vec<f32>) {
    let e = case.router.num_experts;
    let t: usize = case.tokens.iter().sum();
    let ids = (0..t).flat_map(|t| (0..k).map(move |i| ((t * 3 + i * 2) % e) as ExpertId)).collect();
    (ids, common::Rng(3).values(t * k))
}

/// The gradient of routing weights by themselves, over ranks and by the definition.
fn routing_weights(
    seed: u64,
    world: usize,
    (k, d, f): (usize, usize, usize),
    stored: DType,
    options: &LayerOptions,
) {
    let experts = 7;
    let case = Case { stored, ..Case::random(seed, world, experts, k, d, f) };
    let t: usize = case.tokens.iter().sum();
    let (ids, weights) = routing(&case, k);

    let w = var(&weights, (t, k));
    let dense = spread_weights(&w, &ids, experts).unwrap();
    let (up, down) = (tensor(&case.w_up, (experts, 2 * f, d)), tensor(&case.w_down, (experts, d, f)));
    let y = dense_layer(&tensor(&case.x, (t, d)), &dense, &up, &down).unwrap();
    let grads = (y * tensor(&case.dy, (t, d))).unwrap().sum_all().unwrap().backward().unwrap();
    let want = values(grads.get(w.as_tensor()).unwrap());

    let topology = options.topology;
    let hosts = (0..world as Rank).map(|r| topology.node_of(r)).collect();
    let threads = ThreadOptions { host_of_rank: Some(hosts), ..ThreadOptions::default() };
    let got = run(world, &threads, |comm| {
        let rank = comm.rank();
        let rows = case.rows_of(rank);
        let n = case.placement.experts_of(rank as Rank).len();
        let (up, down) = (case.local(rank, &case.w_up, 2 * f * d), case.local(rank, &case.w_down, d * f));
        let up = tensor(&up, (n, 2 * f, d)).to_dtype(case.stored)?;
        let down = tensor(&down, (n, d, f)).to_dtype(case.stored)?;
        let w = var(&weights[rows.start * k..rows.end * k], (rows.len(), k));
        let (router, placement) = (case.router.clone(), case.placement.clone());
        let layer = ExpertParallelLayer::new(comm, router, placement, options.clone(), Threads::new(1))?;
        let expert_ids = ids[rows.start * k..rows.end * k].to_vec();
        let routing = RoutingBuf { num_experts: experts, top_k: k, expert_ids, ..RoutingBuf::default() };
        let x = tensor(&case.x[rows.start * d..rows.end * d], (rows.len(), d));
        let experts = ExpertTensors { w_up: &up, w_down: &down, sinks: None };
        let y = layer.forward_routed(&x, &routing, &w, experts, None, None)?;
        let dy = tensor(&case.dy[rows.start * d..rows.end * d], (rows.len(), d));
        let grads = (y * dy)?.sum_all()?.backward()?;
        Ok(grads.get(w.as_tensor()).map_or_else(Vec::new, values))
    });
    assert!(difference(&got.all().unwrap().concat(), &want) < 2e-5);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn routing_weights_have_their_own_gradient(
        seed in 0u64..1_000_000,
        world in prop::sample::select(vec![1usize, 2, 3, 4, 8]),
        sizes in (1usize..4, 1usize..20, 1usize..12),
        two_hosts in any::<bool>(),
        conventional in any::<bool>(),
        chunks in 0usize..4,
        stored in prop::sample::select(vec![DType::F32, DType::BF16, DType::F16]),
    ) {
        let nodes = if two_hosts && world % 2 == 0 { 2 } else { 1 };
        let mut options = LayerOptions::new(Topology::new(world, nodes).unwrap());
        options.mode = if conventional { Mode::Conventional } else { Mode::Dedup };
        options.overlap = if chunks == 0 { Overlap::Off } else { Overlap::Chunks(chunks) };
        routing_weights(seed, world, sizes, stored, &options);
    }
}

#[test]
fn sinks_get_what_autograd_would() {
    let (world, k, d, f) = (2, 2, 8, 6);
    let case = Case::random(5, world, 6, k, d, f);
    let (ids, weights) = routing(&case, k);
    for overlap in [Overlap::Off, Overlap::Chunks(2)] {
        let mut options = LayerOptions::new(Topology::flat(world).unwrap());
        options.overlap = overlap;
        let body = |comm: Arc<dyn Communicator>, sink: bool| -> Result<[Vec<f32>; 3], MoeError> {
            let rank = comm.rank();
            let rows = case.rows_of(rank);
            let n = case.placement.experts_of(rank as Rank).len();
            let up = var(&case.local(rank, &case.w_up, 2 * f * d), (n, 2 * f, d));
            let down = var(&case.local(rank, &case.w_down, d * f), (n, d, f));
            let w = tensor(&weights[rows.start * k..rows.end * k], (rows.len(), k));
            let (router, placement) = (case.router.clone(), case.placement.clone());
            let layer = ExpertParallelLayer::new(comm, router, placement, options.clone(), Threads::new(1))?;
            let expert_ids = ids[rows.start * k..rows.end * k].to_vec();
            let routing = RoutingBuf { num_experts: 6, top_k: k, expert_ids, ..RoutingBuf::default() };
            let x = var(&case.x[rows.start * d..rows.end * d], (rows.len(), d));
            let sinks = [GradSink::new(), GradSink::new()];
            let sinks_of = sink.then_some([&sinks[0], &sinks[1]]);
            let experts = ExpertTensors { w_up: &up, w_down: &down, sinks: sinks_of };
            let pass = || -> Result<_, MoeError> {
                let y = layer.forward_routed(&x, &routing, &w, experts, None, None)?;
                Ok(y.sqr()?.sum_all()?.backward()?)
            };
            let mut grads = pass()?;
            if sink {
                // What was forgotten does not count; two passes add up.
                sinks.iter().for_each(GradSink::forget);
                assert!(sinks[0].take(up.shape())?.is_none());
                pass()?;
                sinks.iter().for_each(GradSink::forget);
                pass()?;
                grads = pass()?;
            }
            let of = |v: &Var| grads.get(v.as_tensor()).map_or_else(Vec::new, values);
            let taken = |i: usize, v: &Var| -> Result<Vec<f32>, MoeError> {
                let sum = sinks[i].take(v.shape())?;
                Ok(sum.map_or_else(Vec::new, |t| values(&t).iter().map(|v| v / 2.0).collect()))
            };
            if sink {
                assert!(grads.get(up.as_tensor()).is_none() && grads.get(down.as_tensor()).is_none());
                return Ok([of(&x), taken(0, &up)?, taken(1, &down)?]);
            }
            Ok([of(&x), of(&up), of(&down)])
        };
        let of = |sink| run(world, &ThreadOptions::default(), |comm| body(comm, sink)).all().unwrap();
        for (got, want) in of(true).iter().zip(&of(false)) {
            for (got, want) in got.iter().zip(want) {
                assert!(difference(got, want) < 1e-5);
            }
        }
    }
}

/// Weights in 16 bits take the four ops, those in 32 bits the one op for all parts: the same values give the same results.
#[test]
fn one_op_for_all_parts_does_what_four_ops_do() {
    let (world, k, d, f) = (3, 2, 8, 6);
    let case = Case::random(17, world, 7, k, d, f);
    let (ids, weights) = routing(&case, k);
    for overlap in [Overlap::Off, Overlap::Chunks(3)] {
        let mut options = LayerOptions::new(Topology::flat(world).unwrap());
        options.overlap = overlap;
        let body = |comm: Arc<dyn Communicator>, dtype: DType| -> Result<[Vec<f32>; 4], MoeError> {
            let rank = comm.rank();
            let rows = case.rows_of(rank);
            let n = case.placement.experts_of(rank as Rank).len();
            let up = var_of(&case.local(rank, &case.w_up, 2 * f * d), (n, 2 * f, d), dtype);
            let down = var_of(&case.local(rank, &case.w_down, d * f), (n, d, f), dtype);
            let w = tensor(&weights[rows.start * k..rows.end * k], (rows.len(), k));
            let (router, placement) = (case.router.clone(), case.placement.clone());
            let layer = ExpertParallelLayer::new(comm, router, placement, options.clone(), Threads::new(1))?;
            let expert_ids = ids[rows.start * k..rows.end * k].to_vec();
            let routing = RoutingBuf { num_experts: 7, top_k: k, expert_ids, ..RoutingBuf::default() };
            let x = var(&case.x[rows.start * d..rows.end * d], (rows.len(), d));
            let sinks = [GradSink::new(), GradSink::new()];
            let experts = ExpertTensors { w_up: &up, w_down: &down, sinks: Some([&sinks[0], &sinks[1]]) };
            let y = layer.forward_routed(&x, &routing, &w, experts, None, None)?;
            let grads = y.sqr()?.sum_all()?.backward()?;
            let dx = grads.get(x.as_tensor()).map_or_else(Vec::new, values);
            let [d_up, d_down] = [(&sinks[0], &up), (&sinks[1], &down)]
                .map(|(sink, v)| sink.take(v.shape()).unwrap().map_or_else(Vec::new, |t| values(&t)));
            Ok([values(&y), dx, d_up, d_down])
        };
        let of = |dtype| run(world, &ThreadOptions::default(), |comm| body(comm, dtype)).all().unwrap();
        for (got, want) in of(DType::F32).iter().zip(&of(DType::BF16)) {
            for (got, want) in got.iter().zip(want) {
                assert_eq!(got.len(), want.len());
                assert!(difference(got, want) < 1e-5, "{}", difference(got, want));
            }
        }
    }
}

/// The first pass leaves gradients where the pre-activations stood.
#[test]
fn a_second_backward_pass_over_a_graph_gives_the_same_bits() {
    let (world, k, d, f) = (3, 2, 8, 6);
    let case = Case::random(23, world, 7, k, d, f);
    let (ids, weights) = routing(&case, k);
    for overlap in [Overlap::Off, Overlap::Chunks(3)] {
        let mut options = LayerOptions::new(Topology::flat(world).unwrap());
        options.overlap = overlap.clone();
        let ranks = run(world, &ThreadOptions::default(), |comm| {
            let rank = comm.rank();
            let rows = case.rows_of(rank);
            let n = case.placement.experts_of(rank as Rank).len();
            let up = var(&case.local(rank, &case.w_up, 2 * f * d), (n, 2 * f, d));
            let down = var(&case.local(rank, &case.w_down, d * f), (n, d, f));
            let w = var(&weights[rows.start * k..rows.end * k], (rows.len(), k));
            let x = var(&case.x[rows.start * d..rows.end * d], (rows.len(), d));
            let (router, placement) = (case.router.clone(), case.placement.clone());
            let layer = ExpertParallelLayer::new(comm, router, placement, options.clone(), Threads::new(1))?;
            let expert_ids = ids[rows.start * k..rows.end * k].to_vec();
            let routing = RoutingBuf { num_experts: 7, top_k: k, expert_ids, ..RoutingBuf::default() };
            let experts = ExpertTensors { w_up: &up, w_down: &down, sinks: None };
            let loss = layer.forward_routed(&x, &routing, &w, experts, None, None)?.sqr()?.sum_all()?;
            let pass = || -> Result<Vec<Vec<u32>>, MoeError> {
                let grads = loss.backward()?;
                let of = |v: &Var| grads.get(v.as_tensor()).map_or_else(Vec::new, values);
                Ok([&x, &w, &up, &down].map(|v| of(v).iter().map(|g| g.to_bits()).collect()).into())
            };
            Ok([pass()?, pass()?, pass()?])
        });
        for [first, second, third] in ranks.all().unwrap() {
            assert!(first == second && first == third, "{overlap:?}");
        }
    }
}

#[test]
fn gradients_of_replicated_parameters_are_added() {
    let sums = run(3, &ThreadOptions::default(), |comm| {
        let rank = comm.rank() as f32;
        let (a, b, c) = (var(&[rank, 1.0], 2), var(&[2.0; 6], (2, 3)), var(&[1.0], 1));
        let loss = ((a.sqr()?.sum_all()? + (b.sum_all()? * f64::from(rank))?)? + c.detach().sum_all()?)?;
        let mut grads = loss.backward()?;
        all_reduce_gradients(&*comm, &[&a, &b, &c], &mut grads, 0.5)?;
        Ok([&a, &b, &c].map(|v| values(grads.get(v.as_tensor()).unwrap())))
    });
    for rank in sums.all().unwrap() {
        assert_eq!(rank, [vec![3.0, 3.0], vec![1.5; 6], vec![0.0]]);
    }
}

#[test]
fn gradients_of_replicas_are_added_and_others_stay() {
    let ranks: [&[ExpertId]; 3] = [&[0, 2], &[1, 2], &[0]];
    let placement = LayerPlacement::from_rank_experts(3, &ranks).unwrap();
    let sums = run(3, &ThreadOptions::default(), |comm| {
        let mut grads: Vec<f32> =
            ranks[comm.rank()].iter().flat_map(|&e| [f32::from(e) + 1.0, comm.rank() as f32]).collect();
        all_reduce_replicas(&*comm, &placement, 2, &mut grads)?;
        Ok(grads)
    });
    let want = [vec![2.0, 2.0, 6.0, 1.0], vec![2.0, 1.0, 6.0, 1.0], vec![2.0, 2.0]];
    assert_eq!(sums.all().unwrap(), want);
}

//! Shared by the tests: a random layer, its definition on one rank, and the same on many.
#![allow(dead_code, reason = "not every test uses everything")]

use std::sync::Arc;

use candle_core::{DType, Device, Tensor, Var};
use occult_comm::{Communicator, RankResults, ThreadOptions, run_threads};
use occult_kernels::Threads;
use occult_kernels::ops::GradSink;
use occult_moe::reference::{dense_layer, dense_weights};
use occult_moe::{ExpertParallelLayer, ExpertTensors, LayerOptions, MoeError, RouterSpec};
use occult_plan::{ExpertId, LayerPlacement, Rank, Scoring};

/// A small generator: the same numbers everywhere.
pub(crate) struct Rng(pub(crate) u64);

impl Rng {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }
    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
    /// From -1 to 1.
    pub(crate) fn values(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.next() as f32 / (1u64 << 30) as f32 - 1.0).collect()
    }
}

/// A layer over several ranks with all its inputs.
#[derive(Debug, Clone)]
pub(crate) struct Case {
    pub(crate) router: RouterSpec,
    pub(crate) placement: LayerPlacement,
    /// Tokens of every rank.
    pub(crate) tokens: Vec<usize>,
    pub(crate) d: usize,
    pub(crate) f: usize,
    pub(crate) x: Vec<f32>,
    pub(crate) w_router: Vec<f32>,
    pub(crate) w_up: Vec<f32>,
    pub(crate) w_down: Vec<f32>,
    /// Gradient of the loss by the output.
    pub(crate) dy: Vec<f32>,
    /// How the ranks store `w_up` and `w_down`, whose values bf16 can hold. Others than f32 are walked op by op.
    pub(crate) stored: DType,
}

impl Case {
    pub(crate) fn random(seed: u64, world: usize, experts: usize, top_k: usize, d: usize, f: usize) -> Self {
        let mut rng = Rng(seed);
        let mut tokens: Vec<usize> = (0..world).map(|_| rng.below(7)).collect();
        if seed.is_multiple_of(3) {
            tokens[rng.below(world)] = 0;
        }
        if tokens.iter().all(|&t| t == 0) {
            // The definition's operations refuse empty tensors.
            tokens[world - 1] = 3;
        }
        // Every expert somewhere, some of them twice; one rank may be left without.
        let empty = if seed.is_multiple_of(2) && world > 1 { rng.below(world) } else { world };
        let mut ranks = vec![Vec::new(); world];
        for e in 0..experts as ExpertId {
            let copies = 1 + usize::from(seed % 4 <= 1 && rng.below(3) == 0);
            for _ in 0..copies {
                let mut rank = rng.below(world);
                if rank == empty {
                    rank = (rank + 1) % world;
                }
                if !ranks[rank].contains(&e) {
                    ranks[rank].push(e);
                }
            }
        }
        let placement = LayerPlacement::from_rank_experts(experts, &ranks).expect("placement");
        let t: usize = tokens.iter().sum();
        let mut router = RouterSpec::softmax(experts, top_k, seed.is_multiple_of(5));
        if seed % 7 == 3 {
            router.rule.scoring = Scoring::Sigmoid;
            router.rule.routed_scaling_factor = 1.5;
            router.rule.selection_bias = Some((0..experts).map(|e| e as f32 * 0.01).collect());
        }
        Self {
            router,
            placement,
            tokens,
            d,
            f,
            x: rng.values(t * d),
            w_router: rng.values(experts * d),
            w_up: bf16_values(rng.values(experts * 2 * f * d)),
            w_down: bf16_values(rng.values(experts * d * f)),
            dy: rng.values(t * d),
            stored: DType::F32,
        }
    }

    pub(crate) fn rows_of(&self, rank: usize) -> std::ops::Range<usize> {
        let start: usize = self.tokens[..rank].iter().sum();
        start..start + self.tokens[rank]
    }

    /// This rank's experts' part of stacked weights with `size` values per expert.
    pub(crate) fn local(&self, rank: usize, values: &[f32], size: usize) -> Vec<f32> {
        let experts = self.placement.experts_of(rank as Rank);
        experts.iter().flat_map(|&e| values[usize::from(e) * size..][..size].to_vec()).collect()
    }
}

/// The nearest values that bf16 has.
fn bf16_values(values: Vec<f32>) -> Vec<f32> {
    let narrow = tensor(&values, values.len()).to_dtype(DType::BF16).expect("values");
    narrow.to_dtype(DType::F32).and_then(|wide| wide.to_vec1()).expect("values")
}

/// A variable stored in another type.
pub(crate) fn var_of(values: &[f32], shape: impl Into<candle_core::Shape>, stored: DType) -> Var {
    tensor(values, shape).to_dtype(stored).and_then(|t| Var::from_tensor(&t)).expect("variable")
}

pub(crate) fn tensor(values: &[f32], shape: impl Into<candle_core::Shape>) -> Tensor {
    Tensor::from_slice(values, shape, &Device::Cpu).expect("shape")
}

pub(crate) fn var(values: &[f32], shape: impl Into<candle_core::Shape>) -> Var {
    Var::from_tensor(&tensor(values, shape)).expect("variable")
}

pub(crate) fn values(t: &Tensor) -> Vec<f32> {
    t.flatten_all().and_then(|t| t.to_vec1()).expect("values")
}

/// Outputs and every gradient.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Outcome {
    pub(crate) y: Vec<f32>,
    pub(crate) dx: Vec<f32>,
    pub(crate) d_router: Vec<f32>,
    pub(crate) d_up: Vec<f32>,
    pub(crate) d_down: Vec<f32>,
}

fn backward(
    y: &Tensor,
    dy: &[f32],
    vars: [&Var; 4],
    sinks: Option<[&GradSink; 2]>,
) -> Result<Outcome, MoeError> {
    let loss = (y * tensor(dy, y.shape()))?.sum_all()?;
    let grads = loss.backward()?;
    let zeros = |v: &Var| vec![0.0; v.elem_count()];
    let of = |v: &Var| grads.get(v.as_tensor()).map_or_else(|| zeros(v), values);
    let [x, r, u, d] = vars;
    let [d_up, d_down] = match sinks {
        None => [of(u), of(d)],
        Some([up, down]) => {
            let taken = |sink: &GradSink, v: &Var| -> Result<Vec<f32>, MoeError> {
                Ok(sink.take(v.shape())?.map_or_else(|| zeros(v), |t| values(&t)))
            };
            [taken(up, u)?, taken(down, d)?]
        }
    };
    Ok(Outcome { y: values(y), dx: of(x), d_router: of(r), d_up, d_down })
}

/// By the definition; `ids` of all tokens are given, as the ranks chose them.
pub(crate) fn dense(case: &Case, ids: &[ExpertId]) -> Outcome {
    let (t, d, f, e) = (case.tokens.iter().sum::<usize>(), case.d, case.f, case.router.num_experts);
    let (x, r) = (var(&case.x, (t, d)), var(&case.w_router, (e, d)));
    let (up, down) = (var(&case.w_up, (e, 2 * f, d)), var(&case.w_down, (e, d, f)));
    let logits = x.matmul(&r.t().unwrap()).unwrap();
    let weights = dense_weights(&case.router, &logits, ids).unwrap();
    let y = dense_layer(&x, &weights, &up, &down).unwrap();
    backward(&y, &case.dy, [&x, &r, &up, &down], None).unwrap()
}

/// One rank's forward and backward.
pub(crate) fn rank(
    case: &Case,
    options: &LayerOptions,
    comm: Arc<dyn Communicator>,
) -> Result<(Outcome, Vec<ExpertId>), MoeError> {
    let (rank, d, f, e) = (comm.rank(), case.d, case.f, case.router.num_experts);
    let rows = case.rows_of(rank);
    let n = case.placement.experts_of(rank as Rank).len();
    let (x, r) = (var(&case.x[rows.start * d..rows.end * d], (rows.len(), d)), var(&case.w_router, (e, d)));
    let up = var_of(&case.local(rank, &case.w_up, 2 * f * d), (n, 2 * f, d), case.stored);
    let down = var_of(&case.local(rank, &case.w_down, d * f), (n, d, f), case.stored);
    // Gradients in f32 also of weights that are not.
    let sinks = [GradSink::new(), GradSink::new()];
    let sinks = (case.stored != DType::F32).then_some([&sinks[0], &sinks[1]]);
    let (router, placement) = (case.router.clone(), case.placement.clone());
    let layer = ExpertParallelLayer::new(comm, router, placement, options.clone(), Threads::new(1))?;
    let logits = if rows.is_empty() {
        // candle's product refuses empty matrices.
        x.narrow(1, 0, 1)?.broadcast_as((0, e))?.contiguous()?
    } else {
        x.matmul(&r.t()?)?
    };
    let experts = ExpertTensors { w_up: &up, w_down: &down, sinks };
    let (y, decision) = layer.forward(&x, &logits, experts, None, None)?;
    Ok((
        backward(&y, &case.dy[rows.start * d..rows.end * d], [&x, &r, &up, &down], sinks)?,
        decision.routing.expert_ids,
    ))
}

/// Runs all ranks as threads.
pub(crate) fn run<R: Send>(
    world: usize,
    options: &ThreadOptions,
    body: impl Fn(Arc<dyn Communicator>) -> Result<R, MoeError> + Sync,
) -> RankResults<R, MoeError> {
    run_threads(world, options, |comm| body(Arc::from(comm)))
}

/// All ranks, put together as if they were one: rows after rows, gradients of replicated parameters and of replicas added.
pub(crate) fn together(case: &Case, ranks: &[(Outcome, Vec<ExpertId>)]) -> (Outcome, Vec<ExpertId>) {
    let (d, f, e) = (case.d, case.f, case.router.num_experts);
    let mut all = Outcome {
        y: Vec::new(),
        dx: Vec::new(),
        d_router: vec![0.0; e * d],
        d_up: vec![0.0; e * 2 * f * d],
        d_down: vec![0.0; e * d * f],
    };
    let mut ids = Vec::new();
    for (rank, (outcome, of)) in ranks.iter().enumerate() {
        all.y.extend(&outcome.y);
        all.dx.extend(&outcome.dx);
        ids.extend(of);
        add(&mut all.d_router, &outcome.d_router);
        for (i, &e) in case.placement.experts_of(rank as Rank).iter().enumerate() {
            let (up, down) = (2 * f * d, d * f);
            add(&mut all.d_up[usize::from(e) * up..][..up], &outcome.d_up[i * up..][..up]);
            add(&mut all.d_down[usize::from(e) * down..][..down], &outcome.d_down[i * down..][..down]);
        }
    }
    (all, ids)
}

fn add(sum: &mut [f32], values: &[f32]) {
    assert_eq!(sum.len(), values.len());
    sum.iter_mut().zip(values).for_each(|(s, v)| *s += v);
}

/// Largest difference, relative to the largest value (at least 1).
pub(crate) fn difference(got: &[f32], want: &[f32]) -> f32 {
    assert_eq!(got.len(), want.len());
    let scale = want.iter().fold(1f32, |m, v| m.max(v.abs()));
    got.iter().zip(want).fold(0f32, |m, (g, w)| m.max((g - w).abs())) / scale
}

/// Panics where any part differs by more than the rounding of f32 sums of this size.
pub(crate) fn assert_close(got: &Outcome, want: &Outcome) {
    for (name, got, want) in [
        ("y", &got.y, &want.y),
        ("dx", &got.dx, &want.dx),
        ("d_router", &got.d_router, &want.d_router),
        ("d_up", &got.d_up, &want.d_up),
        ("d_down", &got.d_down, &want.d_down),
    ] {
        let found = difference(got, want);
        assert!(found < 2e-5, "{name} differs by {found}");
    }
}

//! One expert-parallel MoE layer.
//!
//! # The algorithm
//! On every rank, with its own tokens; all ranks run the same steps, so that every collective call is met.
//! 1. *Choose*: router logits to `K` experts per token ([`RouterSpec::select`]).
//! 2. *Prune*: limit the ranks a token visits, if asked to; `K` experts stay. Weights of the final experts follow from the
//!    logits by the model's own rule, differentiably ([`routing_weights`]).
//! 3. *Plan*: BRIM_0, one row per (token, rank).
//! 4. *Dispatch*: counts, then rows with the local experts and weights they are for. Meanwhile the shared experts are
//!    computed.
//! 5. *Expand*: BRIM_1, one row per (received row, local expert).
//! 6. *Scattering sparse matmul* with gate and up; activation times routing weight; *merging sparse matmul* with down.
//! 7. *Combine*: rows go back the way they came, and a token adds its copies.
//!
//! Order of additions: within a rank experts ascending, then ranks ascending (on two levels: ranks of a node ascending,
//! then nodes). So the bits depend on the placement, the mode, the levels and the parts (a kernel may be chosen by
//! the number of an expert's rows, and gradients of weights are added part by part, in blocks of the kernel), not on timing
//! or threads.
//!
//! Backward, walked by autograd: 7 sends gradients of outputs to the experts, 6 gives those of weights, pre-activations
//! and rows, 4 returns the gradients of rows and routing weights in one exchange.
//!
//! A world of one rank takes the same steps with a communicator of one.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{DType, Tensor};
use occult_comm::{CommError, Communicator};
use occult_kernels::ops::GradSink;
use occult_kernels::{SparseRows, Threads};
use occult_plan::cost::{Cut, LayerShape};
use occult_plan::{DispatchPlan, ExpertRows, LayerPlacement, PruneSpec, PruneStats, RoutingBuf, prune};

use crate::config::{LayerOptions, Overlap, Pruning, Step};
use crate::error::{MoeError, Result, check_len};
use crate::exchange::{DispatchHandle, Exchanger};
use crate::overlap::{self, Pass};
use crate::router::{RouterSpec, routing_weights};
use crate::tensor::with_f32;
use crate::timers::{Phase, PhaseSeconds, Timers};

/// One layer's experts over all ranks of a communicator, without their weights: these are arguments, so that whoever
/// owns them (a model, an optimiser, a mapped file) keeps them.
#[derive(Debug)]
pub struct ExpertParallelLayer {
    pub(crate) comm: Arc<dyn Communicator>,
    pub(crate) router: RouterSpec,
    pub(crate) placement: LayerPlacement,
    pub(crate) options: LayerOptions,
    pub(crate) threads: Threads,
    pub(crate) exchanger: Exchanger,
    /// For small batches when `exchanger` has two levels.
    pub(crate) straight: Option<Exchanger>,
    pub(crate) timers: Arc<Timers>,
}

/// Weights of this rank's experts, in ascending expert id.
#[derive(Debug, Clone, Copy)]
pub struct ExpertTensors<'a> {
    /// `[e, 2F, D]`, f32 or as stored: gate rows, then up rows.
    pub w_up: &'a Tensor,
    /// `[e, D, F]`.
    pub w_down: &'a Tensor,
    /// Where their gradients are added, instead of autograd's store.
    pub sinks: Option<[&'a GradSink; 2]>,
}

impl ExpertTensors<'_> {
    fn are_f32(&self) -> bool {
        self.w_up.dtype() == DType::F32 && self.w_down.dtype() == DType::F32
    }
}

/// What the router and pruning decided for this rank's tokens.
#[derive(Debug, Clone)]
pub struct Decision {
    /// Final experts, their weights, and the router's logits as scores.
    pub routing: RoutingBuf,
    /// What pruning did.
    pub pruned: Option<PruneStats>,
}

/// Something to compute while rows are under way.
pub type Meanwhile<'a, T> = &'a mut dyn FnMut() -> Result<T>;

impl ExpertParallelLayer {
    /// A layer whose experts live where `placement` says. Collective in the sense that every rank must give the same
    /// arguments (but `threads`).
    pub fn new(
        comm: Arc<dyn Communicator>,
        router: RouterSpec,
        placement: LayerPlacement,
        options: LayerOptions,
        threads: Threads,
    ) -> Result<Self> {
        router.check()?;
        check_len("experts of the placement", router.num_experts, placement.num_experts())?;
        let topology = options.topology;
        let two_level = options.has_two_levels();
        let timers = Arc::new(Timers::default());
        let exchanger = |two_level| {
            let (comm, rows, timers) = (Arc::clone(&comm), options.mode.rows(), Arc::clone(&timers));
            Exchanger::new(comm, &placement, topology, rows, two_level, timers)
        };
        let straight = two_level.then(|| exchanger(false)).transpose()?;
        let exchanger = exchanger(two_level)?;
        Ok(Self { comm, router, placement, options, threads, exchanger, straight, timers })
    }

    /// How it runs.
    pub fn options(&self) -> &LayerOptions {
        &self.options
    }

    /// Where its experts live.
    pub fn placement(&self) -> &LayerPlacement {
        &self.placement
    }

    /// Its router's rule.
    pub fn router(&self) -> &RouterSpec {
        &self.router
    }

    /// Its communicator.
    pub fn comm(&self) -> &Arc<dyn Communicator> {
        &self.comm
    }

    /// Experts of this rank, ascending: whose weights it wants.
    pub fn local_experts(&self) -> &[occult_plan::ExpertId] {
        self.placement.experts_of(self.comm.rank() as occult_plan::Rank)
    }

    /// Time per phase since the last call.
    pub fn take_seconds(&self) -> PhaseSeconds {
        self.timers.take()
    }

    /// The differentiable layer: `x` `[T, D]` and router logits `[T, E]`, both f32, to the weighted sum of the chosen
    /// experts' outputs `[T, D]`, plus what `shared` computes while rows are under way.
    ///
    /// `step`: tokens of every rank, needed for [`Overlap::Auto`] only and asked for (one collective call) when absent.
    ///
    /// # Errors
    /// Any failure of this rank is told to all others, whose calls then fail with [`CommError::Peer`].
    pub fn forward(
        &self,
        x: &Tensor,
        logits: &Tensor,
        experts: ExpertTensors<'_>,
        step: Option<&Step>,
        shared: Option<Meanwhile<'_, Tensor>>,
    ) -> Result<(Tensor, Decision)> {
        self.or_abort(|| {
            let logits = logits.contiguous()?;
            let decision = self.timers.time(Phase::Plan, || {
                let values = with_f32(&logits, |values| Ok(values.to_vec()))?;
                self.decide(&values)
            })?;
            let weights = routing_weights(&self.router, &logits, &decision.routing.expert_ids)?;
            let y = self.forward_routed(x, &decision.routing, &weights, experts, step, shared)?;
            Ok((y, decision))
        })
    }

    /// Choice and pruning, from logits `[T, E]`.
    pub fn decide(&self, logits: &[f32]) -> Result<Decision> {
        let mut routing = self.router.select(logits)?;
        let Some(pruning) = &self.options.pruning else { return Ok(Decision { routing, pruned: None }) };
        let (placement, topology) = (&self.placement, self.options.topology);
        let Pruning { rule, budget } = pruning;
        let spec = PruneSpec { rule: rule.rule(), budget: *budget, router: &self.router.rule };
        let pruned = prune(&routing.view()?, placement, topology, spec)?;
        routing.expert_ids = pruned.routing.expert_ids;
        routing.weights = Some(self.router.weights(logits, &routing.expert_ids)?);
        Ok(Decision { routing, pruned: Some(pruned.stats) })
    }

    /// [`forward`](Self::forward) from a decision: steps 3 to 7 of [the module](self). `weights` `[T, K]` of
    /// `routing`'s experts; they get a gradient.
    pub fn forward_routed(
        &self,
        x: &Tensor,
        routing: &RoutingBuf,
        weights: &Tensor,
        experts: ExpertTensors<'_>,
        step: Option<&Step>,
        mut shared: Option<Meanwhile<'_, Tensor>>,
    ) -> Result<Tensor> {
        self.or_abort(|| {
            let (tokens, d) = x.dims2()?;
            check_len("routing of the tokens", tokens, routing.num_tokens())?;
            check_len("routing weights", routing.expert_ids.len(), weights.elem_count())?;
            self.check_experts(experts, d)?;
            let (x, weights) = (x.contiguous()?, weights.contiguous()?);
            let plan = self.timers.time(Phase::Plan, || self.plan(routing))?;
            let cut = self.cut(tokens, d, experts.w_down.dims()[2], step, Pass::Training)?;
            let parts: Vec<Range<usize>> = cut.ranges(tokens).collect();
            let rows: Vec<_> = self.timers.time(Phase::Plan, || {
                parts.iter().map(|part| self.exchanger.rows(&plan, part.clone())).collect()
            });
            let counts = self.exchanger.exchange_counts(&rows)?;

            // Every dispatch is started before anything is computed, every combine as soon as its rows are there.
            let k = routing.top_k;
            let mut dispatches = Vec::with_capacity(parts.len());
            for ((part, rows), counts) in parts.iter().zip(rows).zip(counts) {
                let started = with_f32(&x, |x| {
                    with_f32(&weights, |w| {
                        let (x, w) = (&x[part.start * d..part.end * d], &w[part.start * k..part.end * k]);
                        Ok(self.exchanger.start_dispatch(rows, counts, x, w, d))
                    })
                })??;
                dispatches.push(started);
            }
            let shared = match &mut shared {
                Some(compute) => Some(self.timers.time(Phase::Compute, compute)?),
                None => None,
            };
            let in_parts = experts.are_f32();
            let walk = if in_parts { Self::in_parts } else { Self::op_by_op };
            let y = walk(self, &x, &weights, experts, parts.into_iter().zip(dispatches).collect())?;
            Ok(match shared {
                Some(shared) => (y + shared)?,
                None => y,
            })
        })
    }

    /// BRIM_1 of the received rows, and the same as the kernels want it.
    pub(crate) fn expand(&self, handle: &DispatchHandle) -> Result<(ExpertRows, SparseRows)> {
        let received = handle.row_experts();
        let expanded = ExpertRows::build(self.local_experts().len(), received)?;
        let (offsets, idx) = (expanded.expert_offsets().to_vec(), expanded.brim().scatter_idx().to_vec());
        let sparse = SparseRows::new(received.num_rows(), offsets, idx)
            .map_err(|error| MoeError::argument("rows of the experts", "a plan", error))?;
        Ok((expanded, sparse))
    }

    /// BRIM_0 of this rank's tokens.
    pub(crate) fn plan(&self, routing: &RoutingBuf) -> Result<DispatchPlan> {
        check_len("experts per token", self.router.top_k, routing.top_k)?;
        Ok(DispatchPlan::build(&routing.view()?, &self.placement, self.options.topology)?)
    }

    /// Parts of a step of `tokens` tokens here, `d` wide, experts of intermediate size `f`: the same on every rank.
    /// Collective where `step` is missing and [`Overlap::Auto`] is chosen.
    pub fn cut(&self, tokens: usize, d: usize, f: usize, step: Option<&Step>, pass: Pass) -> Result<Cut> {
        let cluster = match &self.options.overlap {
            Overlap::Off => return Ok(Cut::WHOLE),
            Overlap::Chunks(n) => return Ok(Cut::even(*n)),
            Overlap::Auto(cluster) => cluster,
        };
        let asked;
        let step = match step {
            Some(step) => step,
            None => {
                asked = Step::agree(&*self.comm, tokens)?;
                &asked
            }
        };
        let shape = LayerShape::gated(d, f, 4.0);
        // The slowest rank sets the pace: as if all had as many tokens as the one that has most.
        let all = step.max_tokens() * self.comm.world_size();
        Ok(overlap::cut(cluster, &shape, &self.placement, &self.options, self.router.top_k, all, pass))
    }

    fn check_experts(&self, experts: ExpertTensors<'_>, d: usize) -> Result<()> {
        let e = self.local_experts().len();
        let (up, down) = (experts.w_up.dims3()?, experts.w_down.dims3()?);
        let expected = (e, 2 * down.2, d);
        if up != expected || (down.0, down.1) != (e, d) {
            let expected = format!("[{e}, 2 F, {d}] and [{e}, {d}, F]");
            return Err(MoeError::argument("expert weights", expected, format!("{up:?} and {down:?}")));
        }
        Ok(())
    }

    /// Tells the other ranks of a failure of this one. A rank that failed because another did has nothing to tell.
    pub(crate) fn or_abort<R>(&self, body: impl FnOnce() -> Result<R>) -> Result<R> {
        body().inspect_err(|error| {
            if !matches!(error, MoeError::Comm(CommError::Peer { .. })) {
                self.comm.abort(&error.to_string());
            }
        })
    }
}

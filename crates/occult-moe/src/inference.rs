//! The layer without autograd: weights as they are stored, nothing kept, and a path for small batches.

use std::ops::Range;

use occult_kernels::smm::{ExpertDims, ExpertMatrices, expert_ffn};
use occult_plan::RoutingBuf;

use crate::config::{Mode, Step};
use crate::error::{MoeError, Result, check_len};
use crate::exchange::{Counts, DispatchHandle, DispatchInFlight, Returning};
use crate::layer::{Decision, ExpertParallelLayer, Meanwhile};
use crate::ops::expanded_weights;
use crate::overlap::Pass;
use crate::room;
use crate::timers::Phase;

impl ExpertParallelLayer {
    /// `x` `[T, D]` and router logits `[T, E]` to the weighted sum of the chosen experts' outputs `[T, D]`. `experts`: of
    /// this rank, ascending by id. `meanwhile` runs while rows are under way (shared experts).
    ///
    /// With a `step` of at most [`small_batch_tokens`](crate::LayerOptions::small_batch_tokens) on every rank, each
    /// peer gets one message with counts, ids, weights and rows, and no counts travel before.
    ///
    /// # Errors
    /// Any failure of this rank is told to all others.
    pub fn forward_inference(
        &self,
        x: &[f32],
        logits: &[f32],
        dims: ExpertDims,
        experts: &[ExpertMatrices<'_>],
        step: Option<&Step>,
        meanwhile: Option<Meanwhile<'_, ()>>,
    ) -> Result<(Vec<f32>, Decision)> {
        self.or_abort(|| {
            let decision = self.timers.time(Phase::Plan, || self.decide(logits))?;
            let y = self.inference_routed(x, &decision.routing, dims, experts, step, meanwhile)?;
            Ok((y, decision))
        })
    }

    /// [`forward_inference`](Self::forward_inference) from a decision; `routing` must have weights.
    pub fn inference_routed(
        &self,
        x: &[f32],
        routing: &RoutingBuf,
        dims: ExpertDims,
        experts: &[ExpertMatrices<'_>],
        step: Option<&Step>,
        mut meanwhile: Option<Meanwhile<'_, ()>>,
    ) -> Result<Vec<f32>> {
        self.or_abort(|| {
            let (tokens, k, d) = (routing.num_tokens(), routing.top_k, dims.hidden);
            check_len("rows of the tokens", tokens * d, x.len())?;
            check_len("experts of this rank", self.local_experts().len(), experts.len())?;
            let Some(weights) = &routing.weights else {
                return Err(MoeError::argument("routing", "with weights", "without"));
            };
            if let Some(step) = step {
                self.check_step(step, tokens)?;
            }
            let plan = self.timers.time(Phase::Plan, || self.plan(routing))?;
            let small = step.filter(|step| step.max_tokens() <= self.options.small_batch_tokens);
            let mut dispatches = Vec::new();
            if let Some(step) = small {
                let exchanger = self.straight.as_ref().unwrap_or(&self.exchanger);
                let rows = self.timers.time(Phase::Plan, || exchanger.rows(&plan, 0..tokens));
                let bounds = self.bounds(step);
                dispatches.push(exchanger.start_dispatch_bounded(rows, bounds, x, weights, d)?);
            } else {
                let cut = self.cut(tokens, d, dims.intermediate, step, Pass::Inference)?;
                let parts: Vec<Range<usize>> = cut.ranges(tokens).collect();
                let exchanger = &self.exchanger;
                let rows: Vec<_> = self.timers.time(Phase::Plan, || {
                    parts.iter().map(|part| exchanger.rows(&plan, part.clone())).collect()
                });
                let counts = exchanger.exchange_counts(&rows)?;
                for ((part, rows), counts) in parts.into_iter().zip(rows).zip(counts) {
                    let (x, w) = (&x[part.start * d..part.end * d], &weights[part.start * k..part.end * k]);
                    dispatches.push(exchanger.start_dispatch(rows, counts, x, w, d)?);
                }
            }
            if let Some(compute) = &mut meanwhile {
                self.timers.time(Phase::Compute, compute)?;
            }
            self.compute_and_combine(dispatches, dims, experts, tokens)
        })
    }

    fn compute_and_combine(
        &self,
        dispatches: Vec<DispatchInFlight<'_>>,
        dims: ExpertDims,
        experts: &[ExpertMatrices<'_>],
        tokens: usize,
    ) -> Result<Vec<f32>> {
        let mut combines = Returning::default();
        let mut received = room::empty("rows received", tokens * dims.hidden)?;
        for dispatch in dispatches {
            received.clear();
            let handle = dispatch.finish_into(&mut received)?;
            combines.pass_on()?;
            let y = self.compute(&received, &handle, dims, experts)?;
            combines.push_combine(handle.start_combine(&y)?);
            room::give(y);
        }
        combines.pass_on()?;
        room::give(received);
        let mut y = Vec::new();
        room::reserve("outputs of the tokens", &mut y, tokens * dims.hidden)?;
        for combine in combines {
            combine.finish_into(&mut y)?;
        }
        Ok(y)
    }

    fn compute(
        &self,
        x: &[f32],
        handle: &DispatchHandle,
        dims: ExpertDims,
        experts: &[ExpertMatrices<'_>],
    ) -> Result<Vec<f32>> {
        let (expanded, sparse) = self.timers.time(Phase::Plan, || self.expand(handle))?;
        let row_weights = expanded_weights(&expanded, handle.row_experts().weights());
        let mut y = room::any("outputs of the experts", x.len())?;
        self.timers
            .time(Phase::Compute, || {
                expert_ffn(&self.threads, &sparse, dims, x, experts, &row_weights, &mut y)
            })
            .map_err(|error| MoeError::argument("experts", "matrices that fit the layer", error))?;
        Ok(y)
    }

    fn check_step(&self, step: &Step, tokens: usize) -> Result<()> {
        check_len("ranks of the step", self.comm.world_size(), step.tokens().len())?;
        check_len("tokens of this rank in the step", step.tokens()[self.comm.rank()], tokens)
    }

    /// The most that every rank can send to one other.
    fn bounds(&self, step: &Step) -> Counts {
        let k = self.router.top_k;
        let rows_per_token = if self.options.mode == Mode::Conventional { k } else { 1 };
        step.tokens().iter().map(|&t| [(t * rows_per_token) as u32, (t * k) as u32]).collect()
    }
}

//! The routed experts of one layer: who chooses ([`Router`]), who computes ([`MoeLayer`]), who watches
//! ([`RoutingObserver`]).

mod experts;
mod router;

pub use experts::{ExpertWeights, LocalExperts, StackedExperts};
pub use router::Router;

use candle_core::Tensor;
use occult_plan::RoutingBuf;

use crate::error::Result;

/// What a [`MoeLayer`] computed.
#[derive(Debug, Clone)]
pub struct MoeOutput {
    /// `[T, D]` f32: the weighted sum of the chosen experts' outputs, plus that of the shared experts.
    pub y: Tensor,
    /// Router logits `[T, E]` f32, differentiable where the layer is: auxiliary losses are made from them.
    pub logits: Tensor,
    /// The decisions, with `weights` `[T, K]` and `scores` (router logits) `[T, E]`.
    pub routing: RoutingBuf,
}

/// Computes the shared experts' outputs `[T, D]`; a layer calls it once, when it has time.
pub type Shared<'a> = &'a mut dyn FnMut() -> Result<Tensor>;

/// One layer's routed experts, router included. The weights of shared experts are not part of it, but when they are
/// computed is: an expert-parallel layer does it while rows are under way.
///
/// This is the seam where an expert-parallel layer takes the place of [`LocalExperts`].
pub trait MoeLayer: std::fmt::Debug + Send + Sync {
    /// `x` `[T, D]` f32. Differentiable in `x` and in the layer's variables, if it has any.
    fn forward(&self, x: &Tensor, shared: Option<Shared<'_>>) -> Result<MoeOutput>;
}

/// What an observer is shown: one layer's decisions for one batch.
#[derive(Debug, Clone, Copy)]
pub struct RoutingRecord<'a> {
    /// The model's number of the layer.
    pub layer: usize,
    /// Index among the MoE layers.
    pub moe_layer: usize,
    /// Decisions of all rows `[B * T]`, with `weights` and `scores` (router logits).
    pub routing: &'a RoutingBuf,
    /// Rows that are tokens; the others are padding, whose decisions mean nothing. `None`: all are tokens.
    pub is_token: Option<&'a [bool]>,
}

/// Is shown the routing of every MoE layer during a forward pass, layer after layer.
pub trait RoutingObserver {
    /// Called once per MoE layer and batch.
    fn record(&mut self, record: &RoutingRecord<'_>) -> Result<()>;
}

impl<F: FnMut(&RoutingRecord<'_>) -> Result<()>> RoutingObserver for F {
    fn record(&mut self, record: &RoutingRecord<'_>) -> Result<()> {
        self(record)
    }
}

impl RoutingRecord<'_> {
    /// The decisions of tokens alone: a copy without the padding rows, or the routing itself.
    pub fn tokens(&self) -> std::borrow::Cow<'_, RoutingBuf> {
        let Some(is_token) = self.is_token else { return std::borrow::Cow::Borrowed(self.routing) };
        let r = self.routing;
        fn keep<T: Copy>(values: &[T], width: usize, is_token: &[bool]) -> Vec<T> {
            let rows = values.chunks_exact(width.max(1)).zip(is_token);
            rows.filter(|(_, t)| **t).flat_map(|(row, _)| row.iter().copied()).collect()
        }
        std::borrow::Cow::Owned(RoutingBuf {
            num_experts: r.num_experts,
            top_k: r.top_k,
            expert_ids: keep(&r.expert_ids, r.top_k, is_token),
            weights: r.weights.as_ref().map(|w| keep(w, r.top_k, is_token)),
            scores: r.scores.as_ref().map(|s| keep(s, r.num_experts, is_token)),
            occurrences: None,
        })
    }
}

//! Routers that can be trained: scores, the choice of experts, the weights of the chosen, and auxiliary losses.
//!
//! The choice itself has no gradient; weights and losses have one, through the scores.

mod group;
mod loss;
mod reference;
mod scores;
mod select;
#[cfg(test)]
mod tests;
mod weights;

use candle_core::{Result, Tensor};

pub use group::Grouped;
pub use loss::{
    expert_balance_loss, expert_counts, load_balancing_loss, load_balancing_part, router_z_loss,
    sequence_balance_loss,
};
pub use reference::routing_weights as reference;
pub use scores::{Scoring, router_scores};
pub use select::{GroupScore, Groups, Selection, select_experts};
pub use weights::{ABSENT, TopkWeights, routing_weights};

use super::tensor::with_f32;

/// The rule of a router.
#[derive(Debug, Clone, PartialEq)]
pub struct RouterRule {
    /// From logits to scores.
    pub scoring: Scoring,
    /// Which experts are chosen.
    pub selection: Selection,
    /// Whether the weights of a token are divided by their sum.
    pub norm_topk: bool,
    /// Factor on the weights.
    pub scale: f32,
}

/// What a router decided for T tokens.
#[derive(Debug, Clone)]
pub struct Routed {
    /// `[T, E]`, differentiable.
    pub scores: Tensor,
    /// `[T, K]`, of each token in descending score.
    pub expert_ids: Vec<u32>,
    /// `[T, K]`, differentiable.
    pub weights: Tensor,
}

/// Routes tokens by their `logits` `[T, E]` f32.
///
/// # Errors
/// A score that is NaN, more experts per token than the groups hold, other shapes, dtypes or devices.
pub fn route(logits: &Tensor, rule: &RouterRule) -> Result<Routed> {
    let (_, num_experts) = logits.dims2()?;
    let scores = router_scores(logits, rule.scoring)?;
    let expert_ids = with_f32(&scores, "scores", |s| select_experts(s, num_experts, &rule.selection))?;
    let how = TopkWeights { top_k: rule.selection.top_k, norm_topk: rule.norm_topk, scale: rule.scale };
    let weights = routing_weights(&scores, &expert_ids, how)?;
    Ok(Routed { scores, expert_ids, weights })
}

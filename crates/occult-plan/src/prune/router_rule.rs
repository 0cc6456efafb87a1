//! From router logits to routing weights, by the model's own rule.

use crate::{ExpertId, PlanError, Result};

/// How a router turns logits into probabilities.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scoring {
    /// Softmax over all experts: OLMoE, Qwen-MoE, Mixtral, DeepSeek-MoE and -V2, gpt-oss (see [`RouterRule`]).
    Softmax,
    /// Sigmoid of each expert by itself: DeepSeek-V3.
    Sigmoid,
}

/// What a model does with its router logits. The fields are those of its `config.json`.
///
/// `weight = routed_scaling_factor * p`, or with `norm_topk_prob` `routed_scaling_factor * p / (sum of the chosen p)`.
/// A softmax over the chosen logits only (Mixtral, gpt-oss) is the same as softmax with `norm_topk_prob`. Computed in
/// f64 and rounded to f32 once.
#[derive(Debug, Clone, PartialEq)]
pub struct RouterRule {
    /// From logits to probabilities `p`.
    pub scoring: Scoring,
    /// Whether the chosen experts' weights are made to sum to one.
    pub norm_topk_prob: bool,
    /// Factor on every weight; 1 for most models.
    pub routed_scaling_factor: f32,
    /// `[E]`, added to `p` to select experts, not to weigh them (`e_score_correction_bias` of DeepSeek-V3).
    pub selection_bias: Option<Vec<f32>>,
}

impl RouterRule {
    /// Softmax routing without factor or bias.
    pub fn softmax(norm_topk_prob: bool) -> Self {
        Self { scoring: Scoring::Softmax, norm_topk_prob, routed_scaling_factor: 1.0, selection_bias: None }
    }

    pub(super) fn check(&self, num_experts: usize) -> Result<()> {
        if !self.routed_scaling_factor.is_finite() {
            return Err(PlanError::range("routed_scaling_factor", "finite", self.routed_scaling_factor));
        }
        let Some(bias) = &self.selection_bias else { return Ok(()) };
        if bias.len() != num_experts {
            let (expected, found) = (num_experts, bias.len());
            return Err(PlanError::Shape { what: "selection_bias [E]", expected, found });
        }
        match bias.iter().position(|b| !b.is_finite()) {
            Some(e) => {
                Err(PlanError::range("selection_bias", "finite", format!("{} of expert {e}", bias[e])))
            }
            None => Ok(()),
        }
    }

    /// Probabilities of all experts, `[E]`.
    pub(super) fn probabilities(&self, logits: &[f32], p: &mut [f64]) {
        match self.scoring {
            Scoring::Softmax => softmax(logits.iter().copied(), p),
            Scoring::Sigmoid => {
                for (p, &logit) in p.iter_mut().zip(logits) {
                    *p = 1.0 / (1.0 + libm::exp(-f64::from(logit)));
                }
            }
        }
    }

    /// What the router selects by, `[E]`, larger first: the logits, or with a bias `p + bias`.
    pub(super) fn selection_scores(&self, logits: &[f32], p: &[f64], scores: &mut [f64]) {
        match &self.selection_bias {
            // Adding zero makes -0 equal to 0 in the total order of the sort.
            None => scores.iter_mut().zip(logits).for_each(|(s, &logit)| *s = f64::from(logit) + 0.0),
            Some(bias) => {
                for ((s, p), &bias) in scores.iter_mut().zip(p).zip(bias) {
                    *s = p + f64::from(bias);
                }
            }
        }
    }

    /// Weights of the chosen experts, `[K]`. `chosen_p` is working memory of the same length.
    pub(super) fn weights(
        &self,
        logits: &[f32],
        p: &[f64],
        ids: &[ExpertId],
        chosen_p: &mut [f64],
        weights: &mut [f32],
    ) {
        match (self.scoring, self.norm_topk_prob) {
            // p / sum(p), without the underflow of p where all chosen logits are far below the largest.
            (Scoring::Softmax, true) => softmax(ids.iter().map(|&id| logits[usize::from(id)]), chosen_p),
            (_, normalised) => {
                chosen_p.iter_mut().zip(ids).for_each(|(c, &id)| *c = p[usize::from(id)]);
                let sum: f64 = chosen_p.iter().sum();
                if normalised && sum > 0.0 {
                    chosen_p.iter_mut().for_each(|c| *c /= sum);
                }
            }
        }
        for (weight, p) in weights.iter_mut().zip(chosen_p) {
            *weight = (f64::from(self.routed_scaling_factor) * *p) as f32;
        }
    }
}

fn softmax(logits: impl Iterator<Item = f32> + Clone, p: &mut [f64]) {
    let max = logits.clone().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0;
    for (p, logit) in p.iter_mut().zip(logits) {
        *p = libm::exp(f64::from(logit) - f64::from(max));
        sum += *p;
    }
    p.iter_mut().for_each(|p| *p /= sum);
}

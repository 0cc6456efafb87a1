//! The router's decision: logits in, experts and weights out; the weights are differentiable.

use std::cmp::Ordering;

use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Shape, Tensor};
use occult_plan::{ExpertId, RouterRule, RoutingBuf, Scoring};

use crate::error::{MoeError, Result, check_len};
use crate::tensor::{f32s, with_f32};

/// Group-limited routing: only experts of the best groups can be chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GroupLimit {
    /// Groups of `E / num_groups` consecutive experts.
    pub num_groups: usize,
    /// Groups a token may use.
    pub top_groups: usize,
    /// Best experts of a group whose scores are added to the group's score: 1 takes the best one (DeepSeek-V2), 2 the best
    /// two (DeepSeek-V3).
    pub best_of: usize,
}

/// From router logits `[T, E]` to `K` experts and their weights.
#[derive(Debug, Clone, PartialEq)]
pub struct RouterSpec {
    /// `E`.
    pub num_experts: usize,
    /// `K`.
    pub top_k: usize,
    /// Probabilities, selection bias, renormalisation and factor.
    pub rule: RouterRule,
    /// Routing groups.
    pub groups: Option<GroupLimit>,
}

impl RouterSpec {
    /// Softmax over all experts, the best `top_k`.
    pub fn softmax(num_experts: usize, top_k: usize, norm_topk_prob: bool) -> Self {
        Self { num_experts, top_k, rule: RouterRule::softmax(norm_topk_prob), groups: None }
    }

    /// Errors on numbers that make no sense together.
    pub fn check(&self) -> Result<()> {
        let e = self.num_experts;
        if e == 0 || e > usize::from(ExpertId::MAX) || self.top_k == 0 || self.top_k > e {
            let found = format!("{} of {e}", self.top_k);
            return Err(MoeError::argument(
                "top_k of the router's experts",
                "1 to all of at most 65535",
                found,
            ));
        }
        if let Some(bias) = &self.rule.selection_bias {
            check_len("selection bias of the router", e, bias.len())?;
        }
        let Some(g) = self.groups else { return Ok(()) };
        let size = e.checked_div(g.num_groups).unwrap_or(0);
        let fits = size * g.num_groups == e
            && (1..=g.num_groups).contains(&g.top_groups)
            && (1..=size).contains(&g.best_of)
            && g.top_groups * size >= self.top_k;
        if fits {
            Ok(())
        } else {
            Err(MoeError::argument("routing groups", "equal groups that hold top_k", format!("{g:?}")))
        }
    }

    /// Chooses experts: ids in descending score, equal scores by the lower id; weights of the chosen; the logits as
    /// `scores`. A logit that is NaN or infinite is an error.
    pub fn select(&self, logits: &[f32]) -> Result<RoutingBuf> {
        let (e, k) = (self.num_experts, self.top_k);
        check_len("router logits [T, E]", logits.len().next_multiple_of(e), logits.len())?;
        if let Some(at) = logits.iter().position(|l| !l.is_finite()) {
            return Err(MoeError::RouterLogit { row: at / e, expert: at % e, value: logits[at] });
        }
        let mut expert_ids = Vec::with_capacity(logits.len() / e * k);
        let mut scores = vec![0.0; e];
        let mut order: Vec<ExpertId> = Vec::with_capacity(e);
        for row in logits.chunks_exact(e) {
            self.probabilities(row, &mut scores);
            if let Some(bias) = &self.rule.selection_bias {
                scores.iter_mut().zip(bias).for_each(|(s, b)| *s += b);
            }
            if let Some(groups) = self.groups {
                mask_groups(&mut scores, groups);
            }
            order.clear();
            order.extend(0..e as ExpertId);
            let best = |a: &ExpertId, b: &ExpertId| {
                descending(scores[usize::from(*a)], scores[usize::from(*b)]).then(a.cmp(b))
            };
            if k < e {
                order.select_nth_unstable_by(k - 1, best);
                order.truncate(k);
            }
            order.sort_unstable_by(best);
            expert_ids.extend_from_slice(&order);
        }
        let weights = self.weights(logits, &expert_ids)?;
        Ok(RoutingBuf {
            num_experts: e,
            top_k: k,
            expert_ids,
            weights: Some(weights),
            scores: Some(logits.to_vec()),
            occurrences: None,
        })
    }

    /// Routing weights `[T, K]` of given experts `[T, K]`, by the model's own rule, from logits `[T, E]`: what a router
    /// gives its choice, and pruning the experts it chose instead.
    pub fn weights(&self, logits: &[f32], ids: &[ExpertId]) -> Result<Vec<f32>> {
        let (e, k) = (self.num_experts, self.top_k);
        check_len("expert ids [T, K]", logits.len() / e * k, ids.len())?;
        if let Some(&id) = ids.iter().find(|&&id| usize::from(id) >= e) {
            return Err(MoeError::argument("expert id", format!("below {e}"), id));
        }
        let mut p = vec![0.0; e];
        let mut weights = Vec::with_capacity(ids.len());
        for (row, ids) in logits.chunks_exact(e).zip(ids.chunks_exact(k)) {
            self.probabilities(row, &mut p);
            let chosen = ids.iter().map(|&id| p[usize::from(id)]);
            let sum = self.sum(chosen.clone());
            weights.extend(chosen.map(|p| p / sum * self.rule.routed_scaling_factor));
        }
        Ok(weights)
    }

    /// What the chosen probabilities are divided by.
    fn sum(&self, chosen: impl Iterator<Item = f32>) -> f32 {
        let sum = if self.rule.norm_topk_prob { chosen.sum() } else { 1.0 };
        if sum > 0.0 { sum } else { 1.0 }
    }

    fn probabilities(&self, logits: &[f32], p: &mut [f32]) {
        if self.rule.scoring == Scoring::Sigmoid {
            p.iter_mut().zip(logits).for_each(|(p, l)| *p = 1.0 / (1.0 + (-l).exp()));
            return;
        }
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let mut sum = 0.0;
        for (p, l) in p.iter_mut().zip(logits) {
            *p = (l - max).exp();
            sum += *p;
        }
        p.iter_mut().for_each(|p| *p /= sum);
    }

    /// Gradient of [`RouterSpec::weights`]: from `dw` `[T, K]` to the logits `[T, E]`.
    ///
    /// With `w_k = s p_k / Z`: `dp_k = s (dw_k - sum_j dw_j p_j / Z) / Z` where `Z` is the sum of the chosen `p`, or
    /// `dp_k = s dw_k` without renormalisation; then the softmax's `p_j (dp_j - sum_i p_i dp_i)`, or the sigmoid's
    /// `p_j (1 - p_j) dp_j`.
    fn weights_backward(&self, logits: &[f32], ids: &[ExpertId], dw: &[f32]) -> Vec<f32> {
        let (e, k) = (self.num_experts, self.top_k);
        let scale = self.rule.routed_scaling_factor;
        let (mut p, mut dp) = (vec![0.0; e], vec![0.0; e]);
        let mut out = Vec::with_capacity(logits.len());
        for ((row, ids), dw) in logits.chunks_exact(e).zip(ids.chunks_exact(k)).zip(dw.chunks_exact(k)) {
            self.probabilities(row, &mut p);
            let sum = self.sum(ids.iter().map(|&id| p[usize::from(id)]));
            let mean = if self.rule.norm_topk_prob {
                ids.iter().zip(dw).map(|(&id, dw)| p[usize::from(id)] / sum * dw).sum()
            } else {
                0.0
            };
            dp.fill(0.0);
            for (&id, dw) in ids.iter().zip(dw) {
                dp[usize::from(id)] = scale * (dw - mean) / sum;
            }
            if self.rule.scoring == Scoring::Sigmoid {
                out.extend(p.iter().zip(&dp).map(|(p, dp)| p * (1.0 - p) * dp));
            } else {
                let dot: f32 = p.iter().zip(&dp).map(|(p, dp)| p * dp).sum();
                out.extend(p.iter().zip(&dp).map(|(p, dp)| p * (dp - dot)));
            }
        }
        out
    }
}

fn descending(a: f32, b: f32) -> Ordering {
    b.total_cmp(&a)
}

/// Puts the scores of all experts outside the best groups below every other.
fn mask_groups(scores: &mut [f32], limit: GroupLimit) {
    let size = scores.len() / limit.num_groups;
    let score = |group: &[f32]| -> f32 {
        let mut of = group.to_vec();
        of.sort_unstable_by(|a, b| descending(*a, *b));
        of[..limit.best_of].iter().sum()
    };
    let best: Vec<f32> = scores.chunks_exact(size).map(score).collect();
    let mut order: Vec<usize> = (0..limit.num_groups).collect();
    order.sort_by(|&a, &b| descending(best[a], best[b]));
    for &group in &order[limit.top_groups..] {
        scores[group * size..(group + 1) * size].fill(f32::NEG_INFINITY);
    }
}

/// Differentiable [`RouterSpec::weights`]: `logits` `[T, E]` and ids `[T, K]` to weights `[T, K]`.
pub fn routing_weights(spec: &RouterSpec, logits: &Tensor, ids: &[ExpertId]) -> Result<Tensor> {
    let op = WeightsOp { spec: spec.clone(), ids: ids.to_vec() };
    Ok(logits.to_dtype(DType::F32)?.contiguous()?.apply_op1(op)?)
}

struct WeightsOp {
    spec: RouterSpec,
    ids: Vec<ExpertId>,
}

impl CustomOp1 for WeightsOp {
    fn name(&self) -> &'static str {
        "moe-routing-weights"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let logits = f32s(storage, layout)?;
        let weights = self.spec.weights(logits, &self.ids).map_err(MoeError::into_candle)?;
        Ok((CpuStorage::F32(weights), (layout.dims()[0], self.spec.top_k).into()))
    }

    fn bwd(&self, logits: &Tensor, _: &Tensor, grad: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let dw = grad.contiguous()?;
        let values = with_f32(logits, |logits| {
            with_f32(&dw, |dw| Ok(self.spec.weights_backward(logits, &self.ids, dw)))
        })?;
        Ok(Some(Tensor::from_vec(values, logits.shape(), &Device::Cpu)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn specs() -> [RouterSpec; 4] {
        let plain = RouterSpec::softmax(6, 2, false);
        let scaled = RouterRule { routed_scaling_factor: 2.5, ..RouterRule::softmax(true) };
        let sigmoid = RouterRule { scoring: Scoring::Sigmoid, ..scaled.clone() };
        [
            plain.clone(),
            RouterSpec::softmax(6, 3, true),
            RouterSpec { rule: scaled, ..plain.clone() },
            RouterSpec { rule: sigmoid, ..plain },
        ]
    }

    #[test]
    fn weights_have_the_gradient_of_finite_differences() {
        let logits: Vec<f32> = (0..12).map(|i| ((i * 37 % 11) as f32 - 5.0) / 4.0).collect();
        for spec in specs() {
            let ids = spec.select(&logits).unwrap().expert_ids;
            let dw: Vec<f32> = (0..ids.len()).map(|i| 1.0 - i as f32 * 0.7).collect();
            let loss = |logits: &[f32]| -> f64 {
                let w = spec.weights(logits, &ids).unwrap();
                w.iter().zip(&dw).map(|(w, d)| f64::from(*w) * f64::from(*d)).sum()
            };
            let got = spec.weights_backward(&logits, &ids, &dw);
            for (i, got) in got.iter().enumerate() {
                let (mut up, mut down) = (logits.clone(), logits.clone());
                up[i] += 1e-2;
                down[i] -= 1e-2;
                let want = (loss(&up) - loss(&down)) / 2e-2;
                assert!((f64::from(*got) - want).abs() < 2e-4, "{spec:?} [{i}]: {got} for {want}");
            }
        }
    }

    #[test]
    fn equal_scores_go_to_the_lowest_id_and_groups_limit_the_choice() {
        let spec = RouterSpec::softmax(6, 3, false);
        assert_eq!(spec.select(&[0.5, 1.0, 0.5, 1.0, 0.5, 0.5]).unwrap().expert_ids, [1, 3, 0]);
        let groups = Some(GroupLimit { num_groups: 3, top_groups: 1, best_of: 1 });
        let spec = RouterSpec { groups, ..RouterSpec::softmax(6, 2, false) };
        assert_eq!(spec.select(&[1.9, 1.8, 0.0, 0.0, 0.1, 2.0]).unwrap().expert_ids, [5, 4]);
        let groups = Some(GroupLimit { num_groups: 3, top_groups: 1, best_of: 2 });
        let spec = RouterSpec { groups, ..spec };
        assert_eq!(spec.select(&[1.9, 1.8, 0.0, 0.0, 0.1, 2.0]).unwrap().expert_ids, [0, 1]);
    }

    #[test]
    fn a_logit_that_is_no_number_names_row_and_expert() {
        let error = RouterSpec::softmax(2, 1, false).select(&[0.0, 0.0, 1.0, f32::NAN]).unwrap_err();
        assert_eq!(error.to_string(), "row 1: router logit of expert 1 is NaN");
    }
}

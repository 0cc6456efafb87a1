//! The router: f32 logits, softmax over all experts, the best `top_k`.

use std::cmp::Ordering;

use candle_core::Tensor;
use occult_plan::{ExpertId, RoutingBuf};

use crate::error::{ModelError, Result};
use crate::layers::{Threads, matmul_nt};
use crate::spec::{GroupSpec, RouterSpec};
use crate::weight::{Values, Weight};

/// One layer's router.
#[derive(Debug, Clone)]
pub struct Router {
    spec: RouterSpec,
    /// The model's layer, for messages.
    layer: usize,
    hidden: usize,
    /// `[E, D]`
    weight: Vec<f32>,
}

impl Router {
    /// From the stored weight `[E, D]`, which is widened to f32.
    pub fn new(spec: RouterSpec, layer: usize, weight: &Weight) -> Result<Self> {
        let &[experts, hidden] = weight.shape() else {
            return Err(ModelError::request(format!("router {}: shape {:?}", weight.name(), weight.shape())));
        };
        if experts != spec.num_experts {
            let message =
                format!("router {}: {experts} rows for {} experts", weight.name(), spec.num_experts);
            return Err(ModelError::request(message));
        }
        Ok(Self { spec, layer, hidden, weight: weight.to_f32() })
    }

    /// What it does.
    pub fn spec(&self) -> &RouterSpec {
        &self.spec
    }

    /// Routes `x` `[T, D]` f32: ids in descending score, equal scores by the lower id; weights of the chosen; logits of
    /// all experts as `scores`. A logit that is NaN or infinite is an error.
    pub fn route(&self, x: &Tensor) -> Result<RoutingBuf> {
        let tokens = x.dim(0)?;
        let rows = x.flatten_all()?.to_vec1::<f32>()?;
        let (e, k) = (self.spec.num_experts, self.spec.top_k);
        let logits = matmul_nt(&rows, Values::F32(&self.weight), 0, (tokens, e, self.hidden), Threads::All);
        if let Some(at) = logits.iter().position(|l| !l.is_finite()) {
            let (row, expert, value) = (at / e, at % e, logits[at]);
            return Err(ModelError::RouterLogit { layer: self.layer, row, expert, value });
        }
        let mut expert_ids = Vec::with_capacity(tokens * k);
        let mut weights = Vec::with_capacity(tokens * k);
        let mut scores = vec![0.0; e];
        let mut order: Vec<ExpertId> = Vec::with_capacity(e);
        for row in logits.chunks_exact(e) {
            softmax(row, &mut scores);
            if let Some(groups) = self.spec.groups {
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
            let chosen = order.iter().map(|&id| scores[usize::from(id)]);
            let sum: f32 = if self.spec.norm_topk { chosen.clone().sum() } else { 1.0 };
            weights.extend(chosen.map(|w| if self.spec.norm_topk { w / sum } else { w } * self.spec.scale));
            expert_ids.extend_from_slice(&order);
        }
        Ok(RoutingBuf {
            num_experts: e,
            top_k: k,
            expert_ids,
            weights: Some(weights),
            scores: Some(logits),
            occurrences: None,
        })
    }
}

fn descending(a: f32, b: f32) -> Ordering {
    b.total_cmp(&a)
}

fn softmax(logits: &[f32], out: &mut [f32]) {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0;
    for (o, l) in out.iter_mut().zip(logits) {
        *o = (l - max).exp();
        sum += *o;
    }
    out.iter_mut().for_each(|o| *o /= sum);
}

/// Sets the scores of all experts outside the best groups to zero.
fn mask_groups(scores: &mut [f32], spec: GroupSpec) {
    let size = scores.len() / spec.num_groups;
    let best: Vec<f32> = scores.chunks_exact(size).map(|g| g.iter().copied().fold(0.0, f32::max)).collect();
    let mut order: Vec<usize> = (0..spec.num_groups).collect();
    order.sort_by(|&a, &b| descending(best[a], best[b]));
    for &group in &order[spec.top_groups..] {
        scores[group * size..(group + 1) * size].fill(0.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weight::StoredDtype;
    use candle_core::Device;

    /// A router whose logits are the input itself.
    fn identity(spec: RouterSpec) -> Router {
        let e = spec.num_experts;
        let eye: Vec<f32> = (0..e * e).map(|i| f32::from(u8::from(i / e == i % e))).collect();
        let weight = Weight::from_f32("gate", &eye, vec![e, e], StoredDtype::F32).expect("shape");
        Router::new(spec, 3, &weight).expect("router")
    }

    fn spec(top_k: usize) -> RouterSpec {
        RouterSpec { num_experts: 6, top_k, norm_topk: false, groups: None, scale: 1.0 }
    }

    fn route(router: &Router, logits: [f32; 6]) -> Result<RoutingBuf> {
        router.route(&Tensor::from_slice(&logits, (1, 6), &Device::Cpu)?)
    }

    #[test]
    fn equal_scores_go_to_the_lowest_id() -> Result<()> {
        let r = route(&identity(spec(3)), [0.5, 1.0, 0.5, 1.0, 0.5, 0.5])?;
        assert_eq!(r.expert_ids, [1, 3, 0]);
        let r = route(&identity(spec(6)), [0.0; 6])?;
        assert_eq!(r.expert_ids, [0, 1, 2, 3, 4, 5]);
        Ok(())
    }

    #[test]
    fn weights_are_probabilities_or_renormalised_or_scaled() -> Result<()> {
        let logits: [f32; 6] = [0.3, -1.0, 2.0, 0.9, 0.0, -0.4];
        let total: f32 = logits.iter().map(|l| l.exp()).sum();
        let (first, second) = (2f32.exp() / total, 0.9f32.exp() / total);
        for (norm, scale, want) in [
            (false, 1.0, [first, second]),
            (true, 1.0, [first / (first + second), second / (first + second)]),
            (false, 2.5, [first * 2.5, second * 2.5]),
        ] {
            let r = route(&identity(RouterSpec { norm_topk: norm, scale, ..spec(2) }), logits)?;
            assert_eq!(r.expert_ids, [2, 3]);
            for (got, want) in r.weights.iter().flatten().zip(want) {
                assert!((got - want).abs() < 1e-6, "{got} for {want}");
            }
        }
        Ok(())
    }

    #[test]
    fn groups_limit_the_choice() -> Result<()> {
        let groups = Some(GroupSpec { num_groups: 3, top_groups: 1 });
        // The best group is the last one; the second best expert, in the first group, is out of reach.
        let r = route(&identity(RouterSpec { groups, ..spec(2) }), [1.9, 1.8, 0.0, 0.0, 0.1, 2.0])?;
        assert_eq!(r.expert_ids, [5, 4]);
        Ok(())
    }

    #[test]
    fn a_logit_that_is_no_number_names_layer_row_and_expert() {
        let error = route(&identity(spec(2)), [0.0, 0.0, f32::NAN, 0.0, 0.0, 0.0]).expect_err("NaN");
        // 0 * NaN is NaN, so the first column shows it.
        assert_eq!(error.to_string(), "layer 3, row 0: router logit of expert 0 is NaN");
    }
}

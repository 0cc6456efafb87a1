//! The router: f32 logits, softmax over all experts, the best `top_k`.

use candle_core::Tensor;
use occult_kernels::Threads;
use occult_moe::{GroupLimit, MoeError, routing_weights};
use occult_plan::{RouterRule, RoutingBuf};

use crate::error::{ModelError, Result};
use crate::layers::{Linear, with_f32};
use crate::spec::RouterSpec;
use crate::weight::Weight;

/// Rows that one thread decides at a time.
const ROWS: usize = 32;

/// One layer's router.
#[derive(Debug, Clone)]
pub struct Router {
    spec: RouterSpec,
    rule: occult_moe::RouterSpec,
    /// The model's layer, for messages.
    layer: usize,
    /// `[E, D]`
    linear: Linear,
}

impl Router {
    /// From the stored weight `[E, D]`.
    pub fn new(threads: &Threads, spec: RouterSpec, layer: usize, weight: &Weight) -> Result<Self> {
        Self::from_linear(spec, layer, Linear::new(threads, weight, None)?)
    }

    pub(crate) fn from_linear(spec: RouterSpec, layer: usize, linear: Linear) -> Result<Self> {
        match *linear.weight().dims() {
            [experts, _] if experts == spec.num_experts => {}
            ref dims => {
                let message =
                    format!("the router of layer {layer} is {dims:?} for {} experts", spec.num_experts);
                return Err(ModelError::request(message));
            }
        }
        Ok(Self { rule: rule(&spec), spec, layer, linear })
    }

    /// The same router with `bias` `[E]` added to its probabilities for the choice of experts, not for their weights
    /// (DeepSeek-V3's balancing). Errors when it is not E finite numbers.
    pub fn with_selection_bias(mut self, bias: &[f32]) -> Result<Self> {
        if bias.len() != self.spec.num_experts || bias.iter().any(|b| !b.is_finite()) {
            let message = format!(
                "the selection bias of layer {}: {} numbers, expected {} finite ones",
                self.layer,
                bias.len(),
                self.spec.num_experts
            );
            return Err(ModelError::request(message));
        }
        self.rule.rule.selection_bias = Some(bias.to_vec());
        Ok(self)
    }

    /// What it does.
    pub fn spec(&self) -> &RouterSpec {
        &self.spec
    }

    /// The same as the expert-parallel layer describes it.
    pub fn rule(&self) -> &occult_moe::RouterSpec {
        &self.rule
    }

    /// Logits `[T, E]` of `x` `[T, D]`, both f32; differentiable.
    pub fn logits(&self, x: &Tensor) -> Result<Tensor> {
        self.linear.forward(x)
    }

    /// Chooses from logits `[T, E]`: ids in descending score, equal scores by the lower id; weights of the chosen; logits
    /// of all experts as `scores`. A logit that is NaN or infinite is an error.
    pub fn choose(&self, logits: &Tensor) -> Result<RoutingBuf> {
        let (e, k) = (self.spec.num_experts, self.spec.top_k);
        let logits = logits.flatten_all()?.contiguous()?;
        with_f32(&logits, |logits| {
            let mut parts: Vec<Result<RoutingBuf, MoeError>> = Vec::new();
            parts.resize_with(logits.len().div_ceil(e * ROWS), || self.rule.select(&[]));
            self.linear.threads().for_each_chunk(&mut parts, 1, |i, part| {
                let from = i * e * ROWS;
                part[0] = self.rule.select(&logits[from..(from + e * ROWS).min(logits.len())]);
            });
            let mut expert_ids = Vec::with_capacity(logits.len() / e * k);
            let mut weights = Vec::with_capacity(expert_ids.capacity());
            for (i, part) in parts.into_iter().enumerate() {
                let part = part.map_err(|error| self.error(error, i * ROWS))?;
                expert_ids.extend(part.expert_ids);
                weights.extend(part.weights.unwrap_or_default());
            }
            Ok(RoutingBuf {
                num_experts: e,
                top_k: k,
                expert_ids,
                weights: Some(weights),
                scores: Some(logits.to_vec()),
                occurrences: None,
            })
        })?
    }

    /// [`logits`](Self::logits) and [`choose`](Self::choose).
    pub fn route(&self, x: &Tensor) -> Result<RoutingBuf> {
        self.choose(&self.logits(x)?)
    }

    /// The weights `[T, K]` of a choice, differentiable in the logits `[T, E]`.
    pub fn weights(&self, logits: &Tensor, routing: &RoutingBuf) -> Result<Tensor> {
        routing_weights(&self.rule, logits, &routing.expert_ids).map_err(|error| self.error(error, 0))
    }

    /// An error of the decision, in rows after `first`, with the layer.
    pub(super) fn error(&self, error: MoeError, first: usize) -> ModelError {
        match error {
            MoeError::RouterLogit { row, expert, value } => {
                ModelError::RouterLogit { layer: self.layer, row: first + row, expert, value }
            }
            other => ModelError::Moe { layer: self.layer, source: other },
        }
    }
}

fn rule(spec: &RouterSpec) -> occult_moe::RouterSpec {
    occult_moe::RouterSpec {
        num_experts: spec.num_experts,
        top_k: spec.top_k,
        rule: RouterRule { routed_scaling_factor: spec.scale, ..RouterRule::softmax(spec.norm_topk) },
        groups: spec.groups.map(|g| GroupLimit {
            num_groups: g.num_groups,
            top_groups: g.top_groups,
            best_of: 1,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::RoutingGroups;
    use crate::weight::StoredDtype;
    use candle_core::Device;

    /// A router whose logits are the input itself.
    fn identity(spec: RouterSpec) -> Router {
        let e = spec.num_experts;
        let eye: Vec<f32> = (0..e * e).map(|i| f32::from(u8::from(i / e == i % e))).collect();
        let weight = Weight::from_f32("gate", &eye, vec![e, e], StoredDtype::F32).expect("shape");
        Router::new(&Threads::new(2), spec, 3, &weight).expect("router")
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
        let groups = Some(RoutingGroups { num_groups: 3, top_groups: 1 });
        // The best group is the last one; the second best expert, in the first group, is out of reach.
        let r = route(&identity(RouterSpec { groups, ..spec(2) }), [1.9, 1.8, 0.0, 0.0, 0.1, 2.0])?;
        assert_eq!(r.expert_ids, [5, 4]);
        Ok(())
    }

    #[test]
    fn a_bias_takes_part_in_the_choice_only() -> Result<()> {
        let logits: [f32; 6] = [0.3, -1.0, 2.0, 0.9, 0.0, -0.4];
        let plain = identity(spec(2));
        let zero = plain.clone().with_selection_bias(&[0.0; 6])?;
        assert_eq!(route(&zero, logits)?, route(&plain, logits)?);
        let r = route(&plain.clone().with_selection_bias(&[0.0, 1.0, 0.0, 0.0, 0.0, 0.0])?, logits)?;
        assert_eq!(r.expert_ids, [1, 2]);
        let total: f32 = logits.iter().map(|l| l.exp()).sum();
        let weights = r.weights.expect("weights");
        assert!((weights[0] - (-1f32).exp() / total).abs() < 1e-6, "{weights:?}");
        assert!(plain.clone().with_selection_bias(&[0.0; 5]).is_err());
        assert!(plain.with_selection_bias(&[f32::NAN; 6]).is_err());
        Ok(())
    }

    #[test]
    fn a_logit_that_is_no_number_names_layer_row_and_expert() {
        let error = route(&identity(spec(2)), [0.0, 0.0, f32::NAN, 0.0, 0.0, 0.0]).expect_err("NaN");
        // 0 * NaN is NaN, so the first column shows it.
        assert_eq!(error.to_string(), "layer 3, row 0: router logit of expert 0 is NaN");
    }
}

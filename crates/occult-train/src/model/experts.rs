//! The routed experts of a layer in training: limited by the placement's ranks, computed on those there are.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::Tensor;
use occult_model::{ModelError, ModelParameters, MoeLayer, MoeOutput, Router, StackedExperts, Threads};
use occult_moe::{ExpertParallelLayer, ExpertTensors, MoeError, PruneRule};
use occult_plan::{Budget, ExpertId, LayerPlacement, PruneSpec, RoutingBuf, Topology, prune};

use crate::error::{Result, TrainError};
use crate::model::ranks::ExpertRanks;

type Shared<'a> = &'a mut dyn FnMut() -> occult_model::Result<Tensor>;

/// What a router chose in the latest forward pass before the limit changed it.
#[derive(Debug, Clone, Default)]
pub(super) struct Choices(Arc<Mutex<Option<Vec<ExpertId>>>>);

impl Choices {
    fn put(&self, expert_ids: Vec<ExpertId>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(expert_ids);
    }

    /// `[T, K]`; `None` where there was no limit.
    pub(super) fn take(&self) -> Option<Vec<ExpertId>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// The limit on the ranks a token visits.
#[derive(Debug, Clone)]
struct Limit {
    placement: LayerPlacement,
    topology: Topology,
    rule: PruneRule,
    budget: Budget,
}

/// Chooses and limits by the placement, computes on the ranks of the communicator.
#[derive(Debug)]
pub(super) struct TrainedExperts {
    number: usize,
    router: Router,
    experts: StackedExperts,
    layer: ExpertParallelLayer,
    limit: Option<Limit>,
    choices: Choices,
    forgiving: bool,
}

impl TrainedExperts {
    /// The layer of the model's number `number`, which is MoE layer `moe_layer`.
    pub(super) fn new(
        parameters: &ModelParameters,
        (number, moe_layer): (usize, usize),
        router: Router,
        ranks: &ExpertRanks,
        threads: &Threads,
        max_ranks: Option<usize>,
        choices: &Choices,
    ) -> Result<Self> {
        let failed = |e: MoeError| TrainError::model(format!("layer {number}"), e);
        let experts = parameters.experts(number).map_err(|e| TrainError::model("experts", e))?;
        let (rule, computed) = (router.rule().clone(), ranks.computed(moe_layer)?);
        let options = ranks.layer_options(&computed, rule.top_k, max_ranks)?;
        let layer = ExpertParallelLayer::new(ranks.comm().clone(), rule, computed, options, threads.clone());
        let layer = layer.map_err(failed)?;
        let limit = match max_ranks.filter(|&n| n < ranks.topology().num_ranks()) {
            None => None,
            Some(n) => Some(Limit {
                placement: ranks.layer(moe_layer)?.clone(),
                topology: ranks.topology(),
                rule: ranks.rule(moe_layer).clone(),
                budget: ranks.budget(n),
            }),
        };
        Ok(Self { number, router, experts, layer, limit, choices: choices.clone(), forgiving: false })
    }

    /// Whether router logits that are no numbers give an output of NaN instead of an error, which would leave the other ranks
    /// waiting.
    pub(super) fn forgiving(self, forgiving: bool) -> Self {
        Self { forgiving, ..self }
    }

    fn decide(&self, logits: &Tensor) -> occult_model::Result<RoutingBuf> {
        let mut routing = self.router.choose(logits)?;
        let Some(Limit { placement, topology, rule, budget }) = &self.limit else { return Ok(routing) };
        let failed = |source: MoeError| ModelError::Moe { layer: self.number, source };
        let view = routing.view().map_err(|e| failed(e.into()))?;
        let spec = PruneSpec { rule: rule.rule(), budget: *budget, router: &self.router.rule().rule };
        let pruned = prune(&view, placement, *topology, spec);
        let pruned = pruned.map_err(|e| failed(e.into()))?.routing.expert_ids;
        self.choices.put(std::mem::replace(&mut routing.expert_ids, pruned));
        Ok(routing)
    }
}

impl MoeLayer for TrainedExperts {
    fn forward(&self, x: &Tensor, shared: Option<Shared<'_>>) -> occult_model::Result<MoeOutput> {
        let failed = |source: MoeError| ModelError::Moe { layer: self.number, source };
        let mut logits = self.router.logits(x)?.contiguous()?;
        let lost = self.forgiving && logits.flatten_all()?.to_vec1::<f32>()?.iter().any(|v| !v.is_finite());
        if lost {
            logits = logits.zeros_like()?;
        }
        let mut routing = self.decide(&logits)?;
        let weights = self.router.weights(&logits, &routing)?;
        routing.weights = Some(weights.detach().flatten_all()?.to_vec1()?);
        let StackedExperts { w_up, w_down, sinks } = &self.experts;
        let experts = ExpertTensors { w_up, w_down, sinks: sinks.as_ref().map(|[up, down]| [up, down]) };
        let mut compute =
            shared.map(|shared| || shared().map_err(|e| MoeError::Tensor(candle_core::Error::wrap(e))));
        let shared = compute.as_mut().map(|c| c as &mut dyn FnMut() -> occult_moe::Result<Tensor>);
        let y = self.layer.forward_routed(x, &routing, &weights, experts, None, shared).map_err(failed)?;
        let y = if lost { (y * f64::NAN)? } else { y };
        Ok(MoeOutput { y, logits, routing })
    }
}

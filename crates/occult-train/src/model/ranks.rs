//! The ranks that train together: where experts live, and the limit on the ranks a token visits.

use std::sync::Arc;

use occult_comm::{Communicator, SoloComm};
use occult_moe::{LayerOptions, PruneRule, topology_of};
use occult_plan::{Budget, ExpertId, LayerPlacement, Rank, Topology};

use crate::error::{Result, TrainError};
use crate::trainer::Group;

/// Where the experts of every MoE layer live, and who computes.
///
/// The placement's ranks are those that a token's visits are counted and limited by. The ranks that compute can be fewer:
/// each then takes a run of the placement's, so that what is learned does not depend on how many there are.
#[derive(Debug, Clone)]
pub struct ExpertRanks {
    comm: Arc<dyn Communicator>,
    topology: Topology,
    layers: Vec<LayerPlacement>,
    rule: PruneRule,
    keep_mass: Option<f64>,
    promised_copies: Option<f64>,
}

impl ExpertRanks {
    /// One rank with all experts of `num_layers` MoE layers.
    pub fn solo(num_layers: usize, num_experts: usize) -> Result<Self> {
        Self::contiguous(Arc::new(SoloComm::new()), num_layers, num_experts)
    }

    /// Experts in equal runs over the ranks of a communicator.
    pub fn contiguous(comm: Arc<dyn Communicator>, num_layers: usize, num_experts: usize) -> Result<Self> {
        let topology = topology_of(&*comm).map_err(|e| TrainError::model("topology", e))?;
        let world = topology.num_ranks();
        let runs: Vec<Vec<ExpertId>> = (0..world)
            .map(|r| crate::data::share(num_experts, r, world).map(|e| e as ExpertId).collect())
            .collect();
        let layer = LayerPlacement::from_rank_experts(num_experts, &runs);
        let layer = layer.map_err(|e| TrainError::model("placing experts", e))?;
        Self::placed(comm, topology, vec![layer; num_layers], PruneRule::BestMass)
    }

    /// Experts as a placement says, one table per MoE layer. The placement's number of ranks must be a multiple of the
    /// communicator's.
    pub fn placed(
        comm: Arc<dyn Communicator>,
        topology: Topology,
        layers: Vec<LayerPlacement>,
        rule: PruneRule,
    ) -> Result<Self> {
        let (ranks, world) = (topology.num_ranks(), comm.world_size());
        if !ranks.is_multiple_of(world) {
            let message =
                format!("a placement over {ranks} ranks on {world} ranks: expected a multiple of {world}");
            return Err(TrainError::request(message));
        }
        if let Some(layer) = layers.iter().find(|l| l.num_ranks() != ranks) {
            let found = layer.num_ranks();
            return Err(TrainError::request(format!("a layer placed over {found} ranks, not {ranks}")));
        }
        Ok(Self { comm, topology, layers, rule, keep_mass: None, promised_copies: None })
    }

    /// Adaptive: per token the fewest ranks, up to the limit, that keep this share of its routing mass.
    pub fn with_keep_mass(self, keep_mass: Option<f64>) -> Self {
        Self { keep_mass, ..self }
    }

    /// Copies per token that the placement's maker measured: what drift is measured from, instead of the first step.
    pub fn with_promised_copies(self, promised_copies: Option<f64>) -> Self {
        Self { promised_copies: promised_copies.filter(|c| *c > 0.0 && c.is_finite()), ..self }
    }

    pub(super) fn promised_copies(&self) -> Option<f64> {
        self.promised_copies
    }

    /// Errors when some set of `max_ranks` ranks cannot give a token all its experts, or when a router that is limited to
    /// groups of experts needs more ranks than that.
    pub fn check_limit(&self, max_ranks: usize, router: &occult_model::spec::RouterSpec) -> Result<()> {
        let k = router.top_k;
        for (moe_layer, layer) in self.layers.iter().enumerate() {
            let mut held: Vec<usize> =
                (0..layer.num_ranks()).map(|r| layer.experts_of(r as Rank).len()).collect();
            held.sort_unstable();
            let fewest: usize = held.iter().take(max_ranks).sum();
            if fewest < k {
                return Err(TrainError::request(format!(
                    "a limit of {max_ranks} ranks leaves as few as {fewest} experts in MoE layer {moe_layer}, a token needs {k}"
                )));
            }
        }
        Ok(())
    }

    /// The same ranks with other homes of the experts.
    pub(super) fn with_layers(&self, layers: Vec<LayerPlacement>) -> Self {
        Self { layers, ..self.clone() }
    }

    /// The ranks that compute.
    pub fn comm(&self) -> &Arc<dyn Communicator> {
        &self.comm
    }

    /// Ranks and nodes of the placement.
    pub fn topology(&self) -> Topology {
        self.topology
    }

    /// The placement of each MoE layer.
    pub fn layers(&self) -> &[LayerPlacement] {
        &self.layers
    }

    pub(super) fn layer(&self, moe_layer: usize) -> Result<&LayerPlacement> {
        self.layers.get(moe_layer).ok_or_else(|| {
            let found = self.layers.len();
            TrainError::request(format!("a placement of {found} layers, the model has more"))
        })
    }

    pub(super) fn rule(&self) -> &PruneRule {
        &self.rule
    }

    pub(super) fn budget(&self, max_ranks: usize) -> Budget {
        match self.keep_mass {
            None => Budget::Fixed { max_ranks },
            Some(share) => Budget::Adaptive { max_ranks, share },
        }
    }

    /// Which rank computes which expert: one each, so that there is one copy of an expert to train.
    pub(super) fn computed(&self, moe_layer: usize) -> Result<LayerPlacement> {
        let (layer, world) = (self.layer(moe_layer)?, self.comm.world_size());
        let each = self.topology.num_ranks() / world;
        let ranks: Vec<Rank> =
            (0..layer.num_experts()).map(|e| layer.first_rank_of(e as ExpertId) / each as Rank).collect();
        LayerPlacement::from_expert_ranks(world, &ranks).map_err(|e| TrainError::model("placing experts", e))
    }

    pub(super) fn layer_options(&self) -> Result<LayerOptions> {
        let topology = topology_of(&*self.comm).map_err(|e| TrainError::model("topology", e))?;
        Ok(LayerOptions::new(topology))
    }
}

/// A communicator as the trainer sees it.
#[derive(Debug, Clone)]
pub struct CommGroup(pub Arc<dyn Communicator>);

impl Group for CommGroup {
    fn rank(&self) -> usize {
        self.0.rank()
    }

    fn world_size(&self) -> usize {
        self.0.world_size()
    }

    fn sum_f32(&self, values: &mut [f32]) -> Result<()> {
        let sum = self.0.all_reduce_sum("gradients of replicated parameters", values);
        sum.map_err(|e| TrainError::model("adding gradients", e))
    }

    fn sum_f64(&self, values: &mut [f64]) -> Result<()> {
        let sum = self.0.all_reduce_sum_f64("figures of a training step", values);
        sum.map_err(|e| TrainError::model("adding figures", e))
    }
}

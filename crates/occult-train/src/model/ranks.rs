//! The ranks that train together: where experts live, and the limit on the ranks a token visits.

use std::sync::Arc;

use occult_comm::{Communicator, SoloComm};
use occult_moe::{LayerOptions, Overlap, PruneRule, topology_of};
use occult_plan::prune::check_limit;
use occult_plan::traffic::uniform_copies;
use occult_plan::{Budget, ExpertId, LayerPlacement, Rank, SimilarityTable, Topology};

use crate::error::{Result, TrainError};
use crate::trainer::Group;

/// Where the experts of every MoE layer live, and who computes.
///
/// The placement's ranks are those that a token's visits are counted and limited by. The ranks that compute can be fewer or
/// more: each then takes a run of the placement's, or of one's experts, so that what is learned does not depend on how many
/// there are.
#[derive(Debug, Clone)]
pub struct ExpertRanks {
    comm: Arc<dyn Communicator>,
    topology: Topology,
    layers: Vec<LayerPlacement>,
    /// Of each MoE layer.
    rules: Vec<PruneRule>,
    /// With any number of ranks: see [`Self::budget`].
    budget: Budget,
    promised_copies: Option<f64>,
    overlap: Overlap,
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

    /// Experts as a placement says, one table per MoE layer.
    pub fn placed(
        comm: Arc<dyn Communicator>,
        topology: Topology,
        layers: Vec<LayerPlacement>,
        rule: PruneRule,
    ) -> Result<Self> {
        let ranks = topology.num_ranks();
        if let Some(layer) = layers.iter().find(|l| l.num_ranks() != ranks) {
            let found = layer.num_ranks();
            return Err(TrainError::request(format!("a layer placed over {found} ranks, not {ranks}")));
        }
        let rules = vec![rule; layers.len()];
        let budget = Budget::Fixed { max_ranks: ranks };
        let overlap = Overlap::default();
        Ok(Self { comm, topology, layers, rules, budget, promised_copies: None, overlap })
    }

    /// How many ranks a token may visit where there is a limit: its kind; the limit in force takes the place of its own.
    pub fn with_budget(self, budget: Budget) -> Self {
        Self { budget, ..self }
    }

    /// Pruning by similarity, with one table per MoE layer.
    pub fn with_similarity(self, tables: Vec<Arc<SimilarityTable>>) -> Result<Self> {
        let (found, layers) = (tables.len(), self.layers.len());
        if found != layers {
            let message = format!("{found} tables of similar experts for {layers} MoE layers");
            return Err(TrainError::request(message));
        }
        Ok(Self { rules: tables.into_iter().map(PruneRule::Similarity).collect(), ..self })
    }

    /// Copies per token that the placement's maker measured: what drift is measured from, instead of the first step.
    pub fn with_promised_copies(self, promised_copies: Option<f64>) -> Self {
        Self { promised_copies: promised_copies.filter(|c| *c > 0.0 && c.is_finite()), ..self }
    }

    /// Exchange beside compute, for the ranks that compute. What is learned depends on the parts by rounding only.
    pub fn with_overlap(self, overlap: Overlap) -> Self {
        Self { overlap, ..self }
    }

    pub(super) fn promised_copies(&self) -> Option<f64> {
        self.promised_copies
    }

    /// Errors when a token could not keep its experts within `max_ranks` ranks: see [`check_limit`].
    pub fn check_limit(&self, max_ranks: usize, router: &occult_model::spec::RouterSpec) -> Result<()> {
        for (moe_layer, layer) in self.layers.iter().enumerate() {
            check_limit(layer, max_ranks, router.top_k, router.groups)
                .map_err(|e| TrainError::model("the limit", e.in_layer(moe_layer)))?;
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

    /// The tables of [`with_similarity`](Self::with_similarity); none with another rule.
    pub fn similarity(&self) -> Vec<Arc<SimilarityTable>> {
        let table = |rule: &PruneRule| match rule {
            PruneRule::Similarity(table) => Some(Arc::clone(table)),
            _ => None,
        };
        self.rules.iter().filter_map(table).collect()
    }

    pub(super) fn rule(&self, moe_layer: usize) -> &PruneRule {
        &self.rules[moe_layer]
    }

    pub(super) fn budget(&self, max_ranks: usize) -> Budget {
        self.budget.with_max_ranks(max_ranks)
    }

    /// Which rank computes which expert: one each, so that there is one copy of an expert to train.
    pub(super) fn computed(&self, moe_layer: usize) -> Result<LayerPlacement> {
        let (layer, world) = (self.layer(moe_layer)?, self.comm.world_size());
        let placed = self.topology.num_ranks();
        let mut ranks = vec![0 as Rank; layer.num_experts()];
        for rank in 0..placed {
            // The ranks that compute for this one; the first of them alone where there are not more than placed ones.
            let (first, end) = (rank * world / placed, (rank + 1) * world / placed);
            let firsts = (0..layer.num_experts() as ExpertId)
                .filter(|&e| usize::from(layer.first_rank_of(e)) == rank)
                .collect::<Vec<_>>();
            let parts = end.saturating_sub(first).max(1);
            for part in 0..parts {
                for &e in &firsts[crate::data::share(firsts.len(), part, parts)] {
                    ranks[usize::from(e)] = (first + part) as Rank;
                }
            }
        }
        LayerPlacement::from_expert_ranks(world, &ranks).map_err(|e| TrainError::model("placing experts", e))
    }

    /// How the layer that computes the experts of `computed` runs, where a token visits at most `max_ranks` placed ranks.
    pub(super) fn layer_options(
        &self,
        computed: &LayerPlacement,
        top_k: usize,
        max_ranks: Option<usize>,
    ) -> Result<LayerOptions> {
        let topology = topology_of(&*self.comm).map_err(|e| TrainError::model("topology", e))?;
        // The layer does not know of the limit, which is on placed ranks: several may compute for one of these.
        let most = max_ranks.map(|n| n * topology.num_ranks().div_ceil(self.topology.num_ranks()));
        let uniform = uniform_copies(computed, topology, top_k).map(|[ranks, _]| ranks);
        let copies_per_token = uniform.map(|ranks| most.map_or(ranks, |most| ranks.min(most as f64)));
        Ok(LayerOptions { overlap: self.overlap.clone(), copies_per_token, ..LayerOptions::new(topology) })
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

#[cfg(test)]
mod tests {
    use super::*;
    use occult_comm::{ThreadOptions, run_threads};

    /// The computing rank of each of 12 experts that are placed in runs over `placed` ranks.
    fn computed(placed: usize, world: usize) -> Vec<usize> {
        let runs: Vec<Vec<ExpertId>> =
            (0..placed).map(|r| crate::data::share(12, r, placed).map(|e| e as ExpertId).collect()).collect();
        let layer = LayerPlacement::from_rank_experts(12, &runs).unwrap();
        let results = run_threads(world, &ThreadOptions::default(), |comm| {
            let topology = Topology::flat(placed).unwrap();
            let ranks =
                ExpertRanks::placed(Arc::from(comm), topology, vec![layer.clone()], PruneRule::BestMass)?;
            let layer = ranks.computed(0)?;
            Ok::<_, TrainError>((0..12).map(|e| usize::from(layer.first_rank_of(e))).collect())
        });
        results.all().unwrap().swap_remove(0)
    }

    #[test]
    fn any_number_of_ranks_computes_for_a_placement() {
        assert_eq!(computed(4, 4), [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]);
        assert_eq!(computed(4, 2), [0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1]);
        assert_eq!(computed(4, 3), [0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 2]);
        assert_eq!(computed(2, 4), [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]);
        assert_eq!(computed(2, 5), [0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 4, 4]);
        assert_eq!(computed(3, 1), [0; 12]);
    }
}

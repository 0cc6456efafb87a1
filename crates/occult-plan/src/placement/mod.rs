//! Which rank holds which expert: the table, and the methods that compute it.
//!
//! Every method decides one layer; layers are independent. [`Placement`] is the table for all layers of a model.

pub mod apart;
pub mod contiguous;
pub mod eplb;
pub mod greedy;
mod method;
pub mod random;
pub mod search;

pub use method::Method;

use crate::{ExpertId, PlanError, Rank, Result, Topology};

/// Experts of every rank, for one layer. An expert lives on at least one rank; on more than one where it is replicated.
///
/// Local expert `i` of a rank is the `i`-th of its experts in ascending id order.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerPlacement {
    num_experts: usize,
    /// `[W + 1]` offsets into `experts`.
    rank_offsets: Vec<u32>,
    /// Physical slots: expert ids, rank after rank, ascending within a rank.
    experts: Vec<ExpertId>,
    /// `[E + 1]` offsets into `holders`.
    holder_offsets: Vec<u32>,
    /// Ranks of each expert, ascending.
    holders: Vec<Rank>,
    /// `[W]`, or none: all 1.
    rank_weights: Option<Vec<f32>>,
}

impl LayerPlacement {
    /// From the list of experts of each rank, in any order. A rank may be empty. Errors when an expert is missing, out
    /// of range, or twice on a rank.
    pub fn from_rank_experts<R: AsRef<[ExpertId]>>(num_experts: usize, ranks: &[R]) -> Result<Self> {
        if ranks.is_empty() || ranks.len() > usize::from(Rank::MAX) {
            return Err(PlanError::range("number of ranks", "1 to 65535", ranks.len()));
        }
        let mut rank_offsets = vec![0u32];
        let mut experts = Vec::new();
        let mut replicas = vec![0u32; num_experts];
        for (rank, list) in ranks.iter().enumerate() {
            let start = experts.len();
            experts.extend_from_slice(list.as_ref());
            experts[start..].sort_unstable();
            for (i, &e) in experts[start..].iter().enumerate() {
                let Some(n) = replicas.get_mut(usize::from(e)) else {
                    let message = format!("rank {rank} holds expert {e}, there are {num_experts} experts");
                    return Err(PlanError::Placement(message));
                };
                if i > 0 && experts[start + i - 1] == e {
                    return Err(PlanError::Placement(format!("rank {rank} holds expert {e} twice")));
                }
                *n += 1;
            }
            rank_offsets.push(experts.len() as u32);
        }
        if let Some(e) = replicas.iter().position(|&n| n == 0) {
            return Err(PlanError::Placement(format!("no rank holds expert {e}")));
        }
        let mut holder_offsets = vec![0u32; num_experts + 1];
        for e in 0..num_experts {
            holder_offsets[e + 1] = holder_offsets[e] + replicas[e];
        }
        let mut next = holder_offsets.clone();
        let mut holders = vec![0; experts.len()];
        for rank in 0..ranks.len() {
            for &e in &experts[rank_offsets[rank] as usize..rank_offsets[rank + 1] as usize] {
                holders[next[usize::from(e)] as usize] = rank as Rank;
                next[usize::from(e)] += 1;
            }
        }
        Ok(Self { num_experts, rank_offsets, experts, holder_offsets, holders, rank_weights: None })
    }

    /// From the rank of each expert, `[E]`: no replicas.
    pub fn from_expert_ranks(num_ranks: usize, expert_ranks: &[Rank]) -> Result<Self> {
        let mut ranks = vec![Vec::new(); num_ranks];
        for (e, &r) in expert_ranks.iter().enumerate() {
            let Some(list) = ranks.get_mut(usize::from(r)) else {
                return Err(PlanError::Placement(format!(
                    "expert {e} is on rank {r}, there are {num_ranks} ranks"
                )));
            };
            list.push(e as ExpertId);
        }
        Self::from_rank_experts(expert_ranks.len(), &ranks)
    }

    /// The same with `[W]` weights of the ranks: how much a token's routing mass on each counts when pruning chooses the
    /// token's ranks ([`prune::balance`](crate::prune::balance()) finds some that make their loads even). Nothing else looks at
    /// them. Errors unless every rank has one, above 0 and finite.
    pub fn with_rank_weights(self, weights: Vec<f32>) -> Result<Self> {
        if weights.len() != self.num_ranks() {
            let (expected, found) = (self.num_ranks(), weights.len());
            return Err(PlanError::Shape { what: "weights of the ranks [W]", expected, found });
        }
        if let Some(rank) = weights.iter().position(|w| !(w.is_finite() && *w > 0.0)) {
            let found = format!("{} of rank {rank}", weights[rank]);
            return Err(PlanError::range("weights of the ranks", "above 0, finite", found));
        }
        Ok(Self { rank_weights: Some(weights), ..self })
    }

    /// What [`with_rank_weights`](Self::with_rank_weights) has set, `[W]`.
    pub fn rank_weights(&self) -> Option<&[f32]> {
        self.rank_weights.as_deref()
    }

    /// `E`.
    pub fn num_experts(&self) -> usize {
        self.num_experts
    }

    /// `W`.
    pub fn num_ranks(&self) -> usize {
        self.rank_offsets.len() - 1
    }

    /// Experts of a rank, ascending: local expert `i` is element `i`.
    pub fn experts_of(&self, rank: Rank) -> &[ExpertId] {
        let r = usize::from(rank);
        &self.experts[self.rank_offsets[r] as usize..self.rank_offsets[r + 1] as usize]
    }

    /// Ranks that hold an expert, ascending; one unless it is replicated.
    pub fn ranks_of(&self, expert: ExpertId) -> &[Rank] {
        let e = usize::from(expert);
        &self.holders[self.holder_offsets[e] as usize..self.holder_offsets[e + 1] as usize]
    }

    /// The lowest rank that holds an expert: *the* rank when nothing is replicated.
    pub fn first_rank_of(&self, expert: ExpertId) -> Rank {
        self.ranks_of(expert)[0]
    }

    /// Rank of every expert `[E]`, or `None` when one is replicated.
    pub fn expert_ranks(&self) -> Option<Vec<Rank>> {
        (!self.has_replicas()).then(|| self.holders.clone())
    }

    /// The same placement of experts that got other ids: `order[new]` is the old id, every old id once.
    pub fn renumbered(&self, order: &[ExpertId]) -> Result<Self> {
        check_order(order, self.num_experts)?;
        let mut ranks = vec![Vec::new(); self.num_ranks()];
        for (new, &old) in order.iter().enumerate() {
            self.ranks_of(old).iter().for_each(|&rank| ranks[usize::from(rank)].push(new as ExpertId));
        }
        let renumbered = Self::from_rank_experts(self.num_experts, &ranks)?;
        Ok(Self { rank_weights: self.rank_weights.clone(), ..renumbered })
    }

    /// Number of physical slots (experts with replicas counted).
    pub fn num_slots(&self) -> usize {
        self.experts.len()
    }

    /// Whether any expert lives on more than one rank.
    pub fn has_replicas(&self) -> bool {
        self.experts.len() > self.num_experts
    }
}

/// Errors unless `order` names each of `num_experts` experts once.
pub(crate) fn check_order(order: &[ExpertId], num_experts: usize) -> Result<()> {
    let mut sorted = order.to_vec();
    sorted.sort_unstable();
    if sorted.iter().copied().map(usize::from).eq(0..num_experts) {
        return Ok(());
    }
    Err(PlanError::Placement(format!(
        "an order of {} experts does not name each of {num_experts} once",
        order.len()
    )))
}

/// A placement of all MoE layers of a model on one set of ranks.
#[derive(Debug, Clone, PartialEq)]
pub struct Placement {
    topology: Topology,
    layers: Vec<LayerPlacement>,
}

impl Placement {
    /// All layers must have the topology's ranks and the same number of experts; at least one layer.
    pub fn new(topology: Topology, layers: Vec<LayerPlacement>) -> Result<Self> {
        let Some(first) = layers.first() else {
            return Err(PlanError::Placement("it has no layers".into()));
        };
        for (i, layer) in layers.iter().enumerate() {
            if layer.num_ranks() != topology.num_ranks() || layer.num_experts != first.num_experts {
                let message = format!(
                    "layer {i} has {} ranks and {} experts, expected {} and {}",
                    layer.num_ranks(),
                    layer.num_experts,
                    topology.num_ranks(),
                    first.num_experts
                );
                return Err(PlanError::Placement(message));
            }
        }
        Ok(Self { topology, layers })
    }

    /// Ranks and nodes.
    pub fn topology(&self) -> Topology {
        self.topology
    }

    /// Whether any layer has weights of its ranks ([`LayerPlacement::with_rank_weights`]).
    pub fn has_rank_weights(&self) -> bool {
        self.layers.iter().any(|layer| layer.rank_weights.is_some())
    }

    /// One table per MoE layer.
    pub fn layers(&self) -> &[LayerPlacement] {
        &self.layers
    }

    /// `E`.
    pub fn num_experts(&self) -> usize {
        self.layers[0].num_experts
    }
}

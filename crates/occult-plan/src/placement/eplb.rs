//! EPLB, DeepSeek's expert-parallelism load balancer: even load from token counts alone, with replicas of hot experts.
//!
//! After the description and golden example of `deepseek-ai/EPLB` (MIT). It knows loads but not which experts work
//! together; it stands here as what engines ship.
//!
//! - *Hierarchical* policy, when the routing groups divide evenly among the nodes: (1) pack whole groups onto nodes;
//!   (2) within a node, give each further replica to the expert with the most load per replica; (3) pack the node's
//!   replicas onto its GPUs.
//! - *Global* policy otherwise: steps 2 and 3 over all experts and GPUs, groups and nodes ignored.
//!
//! Packing takes items from heaviest to lightest and puts each into the lightest pack that still has room, every pack
//! getting the same number of items. Ties go to the lower index (the original leaves the order of equal weights to its
//! tensor library, so slots may come out in another order there, with the same loads).

use crate::{ExpertId, LayerPlacement, PlanError, Rank, Result};
use std::cmp::Ordering;

/// Slots, groups, nodes and GPUs, with the original's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EplbConfig {
    /// Physical slots in all (experts plus redundant replicas); a multiple of `num_gpus`, at least the number of experts.
    pub num_replicas: usize,
    /// Routing groups of a group-limited router (consecutive experts); 1 where the router has none.
    pub num_groups: usize,
    /// Nodes.
    pub num_nodes: usize,
    /// GPUs in all (ranks), a multiple of `num_nodes`.
    pub num_gpus: usize,
}

/// More slots than any engine has; keeps a typing mistake from asking for all memory.
const MAX_REPLICAS: usize = 1 << 20;

/// What EPLB decides for one layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EplbLayer {
    num_experts: usize,
    num_gpus: usize,
    physical_to_logical: Vec<ExpertId>,
}

/// Places one layer from its load per expert, `loads` `[E]` (tokens, or any other unit). Layers are independent.
///
/// Errors name the number that does not divide, fewer slots than experts, or an impossible count.
pub fn place(loads: &[u64], config: EplbConfig) -> Result<EplbLayer> {
    let EplbConfig { num_replicas, num_groups, num_nodes, num_gpus } = config;
    let num_experts = loads.len();
    if num_experts == 0 || num_experts > usize::from(ExpertId::MAX) {
        return Err(PlanError::range("number of experts", "1 to 65535", num_experts));
    }
    if num_gpus == 0 || num_gpus > usize::from(Rank::MAX) {
        return Err(PlanError::range("number of GPUs", "1 to 65535", num_gpus));
    }
    if num_nodes == 0 {
        return Err(PlanError::range("number of nodes", "at least 1", num_nodes));
    }
    if num_groups == 0 {
        return Err(PlanError::range("number of expert groups", "at least 1", num_groups));
    }
    if num_replicas < num_experts || num_replicas > MAX_REPLICAS {
        let expected = format!("{num_experts} (the number of experts) to {MAX_REPLICAS}");
        return Err(PlanError::range("number of physical slots", expected, num_replicas));
    }
    divides("number of physical slots", num_replicas, num_gpus, "GPUs")?;
    let (num_groups, num_nodes) =
        if num_groups.is_multiple_of(num_nodes) { (num_groups, num_nodes) } else { (1, 1) };
    divides("number of experts", num_experts, num_groups, "expert groups")?;
    divides("number of GPUs", num_gpus, num_nodes, "nodes")?;

    // Step 1: groups to nodes. `node_experts[node]` are its experts, group after group.
    let group_size = num_experts / num_groups;
    let group_loads: Vec<f64> =
        loads.chunks(group_size).map(|g| g.iter().map(|&n| u128::from(n)).sum::<u128>() as f64).collect();
    let mut physical_to_logical = Vec::with_capacity(num_replicas);
    for groups in pack(&group_loads, num_nodes) {
        let experts: Vec<usize> =
            groups.into_iter().flat_map(|g| g * group_size..(g + 1) * group_size).collect();
        let node_loads: Vec<u64> = experts.iter().map(|&e| loads[e]).collect();
        // Step 2: replicas within the node.
        let (replicas, counts) = replicate(&node_loads, num_replicas / num_nodes);
        // Step 3: replicas to the node's GPUs.
        let replica_loads: Vec<f64> =
            replicas.iter().map(|&i| node_loads[i] as f64 / counts[i] as f64).collect();
        for gpu in pack(&replica_loads, num_gpus / num_nodes) {
            physical_to_logical.extend(gpu.into_iter().map(|slot| experts[replicas[slot]] as ExpertId));
        }
    }
    Ok(EplbLayer { num_experts, num_gpus, physical_to_logical })
}

impl EplbLayer {
    /// Expert of every physical slot, `[num_replicas]`; slot `p` lives on GPU `p / (num_replicas / num_gpus)`. Two replicas
    /// of one expert may share a GPU.
    pub fn physical_to_logical(&self) -> &[ExpertId] {
        &self.physical_to_logical
    }

    /// Experts in the slots of each GPU, in slot order.
    pub fn gpus(&self) -> std::slice::ChunksExact<'_, ExpertId> {
        self.physical_to_logical.chunks_exact(self.physical_to_logical.len() / self.num_gpus)
    }

    /// Replicas of each expert, `[E]`.
    pub fn replica_counts(&self) -> Vec<usize> {
        let mut counts = vec![0; self.num_experts];
        for &e in &self.physical_to_logical {
            counts[usize::from(e)] += 1;
        }
        counts
    }

    /// Load of each GPU `[num_gpus]` when every replica of an expert serves an equal part of its load: what EPLB evens
    /// out. `loads` `[E]` need not be those the placement was made from.
    pub fn gpu_loads(&self, loads: &[u64]) -> Result<Vec<f64>> {
        if loads.len() != self.num_experts {
            return Err(PlanError::Shape {
                what: "loads [E]",
                expected: self.num_experts,
                found: loads.len(),
            });
        }
        let counts = self.replica_counts();
        let load = |&e: &ExpertId| loads[usize::from(e)] as f64 / counts[usize::from(e)] as f64;
        Ok(self.gpus().map(|slots| slots.iter().map(load).sum()).collect())
    }

    /// As a placement. Two replicas of one expert on one GPU become one there: they hold the same weights and serve the
    /// same tokens, so nothing is computed or sent differently, but that GPU then lists fewer experts than it has slots.
    pub fn to_placement(&self) -> Result<LayerPlacement> {
        let ranks: Vec<Vec<ExpertId>> = self
            .gpus()
            .map(|slots| {
                let mut experts = slots.to_vec();
                experts.sort_unstable();
                experts.dedup();
                experts
            })
            .collect();
        LayerPlacement::from_rank_experts(self.num_experts, &ranks)
    }
}

fn divides(what: &'static str, n: usize, by: usize, of: &str) -> Result<()> {
    if n.is_multiple_of(by) {
        return Ok(());
    }
    Err(PlanError::range(what, format!("a multiple of {by} {of}"), n))
}

/// Items of each pack, in the order in which they were put in; equal numbers of items in all packs.
fn pack(weights: &[f64], num_packs: usize) -> Vec<Vec<usize>> {
    let room = weights.len() / num_packs;
    if room == 1 {
        return (0..weights.len()).map(|i| vec![i]).collect();
    }
    let mut order: Vec<usize> = (0..weights.len()).collect();
    order.sort_by(|&a, &b| weights[b].total_cmp(&weights[a]).then(a.cmp(&b)));
    let mut packs = vec![Vec::with_capacity(room); num_packs];
    let mut loads = vec![0.0f64; num_packs];
    for item in order {
        let open = (0..num_packs).filter(|&p| packs[p].len() < room);
        if let Some(pack) = open.min_by(|&a, &b| loads[a].total_cmp(&loads[b]).then(a.cmp(&b))) {
            packs[pack].push(item);
            loads[pack] += weights[item];
        }
    }
    packs
}

/// Index of the expert in each slot (`0..n` first, then the further replicas in the order they were granted), and the
/// number of replicas of each. Each grant goes to the expert with the most load per replica.
fn replicate(loads: &[u64], num_slots: usize) -> (Vec<usize>, Vec<u64>) {
    let mut slots: Vec<usize> = (0..loads.len()).collect();
    let mut counts = vec![1u64; loads.len()];
    while slots.len() < num_slots {
        // loads[a] / counts[a] against loads[b] / counts[b], without rounding.
        let per_replica = |a: usize, b: usize| -> Ordering {
            let left = u128::from(loads[a]) * u128::from(counts[b]);
            left.cmp(&(u128::from(loads[b]) * u128::from(counts[a])))
        };
        let Some(hot) = (0..loads.len()).max_by(|&a, &b| per_replica(a, b).then(b.cmp(&a))) else { break };
        slots.push(hot);
        counts[hot] += 1;
    }
    (slots, counts)
}

#[cfg(test)]
#[path = "eplb_tests.rs"]
mod tests;

//! What `C_T` can be, and what it would be if routers chose at random.

use crate::{LayerPlacement, Rank, Topology};

/// Limits of the copies per token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CopyBounds {
    /// `E`.
    pub num_experts: usize,
    /// `ceil(K W / E)`: no placement with equal numbers of experts per rank and no replicas can do better (the paper's
    /// lower bound). Uneven placements and replicas can.
    pub optimum: usize,
    /// The fewest ranks of *this* placement that hold `K` experts between them (replicas counted as experts, so it may be
    /// out of reach with replicas).
    pub this_placement: usize,
    /// `min(K, W)`: no token visits more ranks.
    pub upper: usize,
}

/// Limits for a placement when every token has `top_k` experts.
pub fn copy_bounds(placement: &LayerPlacement, top_k: usize) -> CopyBounds {
    let (num_experts, num_ranks) = (placement.num_experts(), placement.num_ranks());
    let mut sizes: Vec<usize> = sizes(placement).collect();
    sizes.sort_unstable_by(|a, b| b.cmp(a));
    let mut held = 0;
    let this_placement = sizes
        .iter()
        .take_while(|&&size| {
            let wanted = held < top_k;
            held += size;
            wanted
        })
        .count();
    CopyBounds {
        num_experts,
        optimum: (top_k * num_ranks).div_ceil(num_experts.max(1)),
        this_placement,
        upper: top_k.min(num_ranks),
    }
}

/// Mean ranks (nodes) per token if every token chose a uniformly random set of `top_k` of the `E` experts, for this very
/// placement: the sum over ranks of `1 - C(E - e_r, K) / C(E, K)`, `e_r` the experts of rank (node) `r`.
///
/// `None` when experts are replicated: then the ranks visited depend on the choice of replicas.
pub fn uniform_copies(placement: &LayerPlacement, topology: Topology, top_k: usize) -> Option<[f64; 2]> {
    if placement.has_replicas() {
        return None;
    }
    let num_experts = placement.num_experts();
    let top_k = top_k.min(num_experts);
    let visited = |held: usize| {
        // C(E - e, K) / C(E, K), the chance that none of the K is among the e.
        let missed: f64 = (0..top_k)
            .map(|i| num_experts.saturating_sub(held + i) as f64 / (num_experts - i) as f64)
            .product();
        1.0 - missed
    };
    let mut node_sizes = vec![0; topology.num_nodes()];
    for (rank, size) in sizes(placement).enumerate() {
        node_sizes[topology.node_of(rank as Rank)] += size;
    }
    Some([sizes(placement).map(visited).sum(), node_sizes.into_iter().map(visited).sum()])
}

fn sizes(placement: &LayerPlacement) -> impl Iterator<Item = usize> + '_ {
    (0..placement.num_ranks()).map(|r| placement.experts_of(r as Rank).len())
}

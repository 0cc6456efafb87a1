//! Into how many parts a step is cut so that exchange and compute run side by side.

use std::ops::Range;

use occult_plan::cost::{Cluster, LayerShape};
use occult_plan::traffic::{ID_BYTES, WEIGHT_BYTES, copy_bounds, uniform_copies};
use occult_plan::{LayerPlacement, Topology};

/// More parts gain nothing that is worth the messages.
pub const MAX_CHUNKS: usize = 16;

/// The number of parts with the least predicted time, from what every rank knows, so that all ranks find the same.
///
/// With wire time `w` (dispatch and combine) and compute time `c` of the whole step, `n` parts take about
/// `max(w, c) + min(w, c) / n + n o`: what cannot hide is one part's share of the smaller one, and every part costs `o`,
/// two exchanges' latency and one more reading of the experts' weights. The least is at `n = sqrt(min(w, c) / o)`.
/// Routing is taken as uniform and load as even.
pub fn chunk_count(
    cluster: &Cluster,
    shape: &LayerShape,
    placement: &LayerPlacement,
    topology: Topology,
    top_k: usize,
    tokens: usize,
) -> usize {
    let ranks = topology.num_ranks() as f64;
    if tokens == 0 || topology.num_ranks() == 1 || cluster.check().is_err() {
        return 1;
    }
    let upper = copy_bounds(placement, top_k).upper as f64;
    let [copies, nodes] =
        uniform_copies(placement, topology, top_k).unwrap_or([upper, upper.min(topology.num_nodes() as f64)]);
    let per_rank = tokens as f64 / ranks;
    let row_bytes = shape.hidden as f64 * shape.dtype_bytes;
    let bytes = |rows: f64| per_rank * (2.0 * rows * row_bytes + top_k as f64 * (ID_BYTES + WEIGHT_BYTES));
    // Of the copies, the share that stays at home is one rank's.
    let within = bytes(copies * (ranks - 1.0) / ranks) / cluster.intra.bandwidth_bytes_per_s;
    let between = cluster.inter.as_ref().filter(|_| topology.num_nodes() > 1).map_or(0.0, |inter| {
        let remote = nodes * (1.0 - 1.0 / topology.num_nodes() as f64);
        let sharing =
            if inter.per == occult_plan::cost::LinkEnd::Node { topology.ranks_per_node() } else { 1 };
        bytes(remote) * sharing as f64 / inter.link.bandwidth_bytes_per_s
    });
    let wire = within.max(between);
    let elements = (shape.num_matrices * shape.hidden * shape.ffn) as f64;
    let compute = 2.0 * elements * per_rank * top_k as f64 / cluster.compute.flops_per_s;
    let weights = elements * shape.weight_dtype_bytes * placement.num_slots() as f64 / ranks;
    let latency = cluster
        .inter
        .as_ref()
        .map_or(cluster.intra.latency_s, |i| i.link.latency_s.max(cluster.intra.latency_s));
    let overhead = 2.0 * latency * (ranks - 1.0) + weights / cluster.compute.memory_bandwidth_bytes_per_s;
    let best = (wire.min(compute) / overhead).sqrt();
    // An overhead of zero gives infinity, which the clamp bounds; NaN (0 / 0) becomes 1 by `max`.
    (best.round().max(1.0) as usize).min(MAX_CHUNKS).min(tokens.max(1))
}

/// Tokens of part `i` of `n`: sizes differ by at most one.
pub(crate) fn chunk(tokens: usize, i: usize, n: usize) -> Range<usize> {
    i * tokens / n..(i + 1) * tokens / n
}

#[cfg(test)]
mod tests {
    use super::*;
    use occult_plan::cost::{Compute, Link};

    fn cluster(latency_s: f64, flops_per_s: f64) -> Cluster {
        Cluster {
            name: "test".into(),
            nodes: 1,
            ranks_per_node: 4,
            intra: Link { bandwidth_bytes_per_s: 1e9, latency_s },
            inter: None,
            compute: Compute { flops_per_s, memory_bandwidth_bytes_per_s: 1e11 },
        }
    }

    #[test]
    fn parts_grow_with_what_can_hide_and_shrink_with_latency() {
        let experts: Vec<u16> = (0..16).map(|e| e / 4).collect();
        let placement = LayerPlacement::from_expert_ranks(4, &experts).unwrap();
        let topology = Topology::flat(4).unwrap();
        let shape = LayerShape::gated(512, 512, 4.0);
        let count = |cluster: &Cluster, tokens| chunk_count(cluster, &shape, &placement, topology, 4, tokens);
        assert_eq!(count(&cluster(1e-4, 1e12), 0), 1);
        assert_eq!(count(&cluster(1.0, 1e12), 4096), 1);
        let (few, many) = (count(&cluster(1e-4, 1e12), 4096), count(&cluster(1e-6, 1e12), 4096));
        assert!(1 < few && few < many, "{few} {many}");
        assert_eq!(count(&cluster(1e-6, 1e18), 4096), 1, "no compute to hide behind");
    }

    #[test]
    fn parts_cover_the_tokens() {
        for (tokens, n) in [(0, 3), (1, 4), (10, 3), (7, 7)] {
            let all: Vec<usize> = (0..n).flat_map(|i| chunk(tokens, i, n)).collect();
            assert_eq!(all, (0..tokens).collect::<Vec<_>>());
        }
    }
}

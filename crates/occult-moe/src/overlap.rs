//! Into which parts a step is cut so that exchange and compute run side by side.

use occult_plan::cost::{Cluster, Cut, LayerShape, LinkEnd, PassWork, best_cut};
use occult_plan::traffic::{ID_BYTES, WEIGHT_BYTES, copy_bounds, uniform_copies};
use occult_plan::{LayerPlacement, Rank};

use crate::config::{LayerOptions, Mode};

/// What a step does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pass {
    /// The forward pass alone.
    Inference,
    /// Forward and backward, cut into the same parts.
    Training,
}

/// The fewest parts with nearly the least predicted time, from what every rank knows, so that all ranks find the same: the
/// schedule of [`PassWork`] on the links of the cluster, for the rows that this layer's mode, placement and pruning send.
/// `tokens`: of all ranks. Load is taken as even. On two levels one part: with every part the ranks of a node would wait for
/// each other twice, to pass on its rows, which costs more than overlap gains.
pub fn cut(
    cluster: &Cluster,
    shape: &LayerShape,
    placement: &LayerPlacement,
    options: &LayerOptions,
    top_k: usize,
    tokens: usize,
    pass: Pass,
) -> Cut {
    let ranks = options.topology.num_ranks();
    if tokens == 0 || ranks == 1 || options.has_two_levels() || cluster.check().is_err() {
        return Cut::WHOLE;
    }
    let passes = passes(cluster, shape, placement, options, top_k, tokens);
    best_cut(if pass == Pass::Inference { &passes[..1] } else { &passes }, tokens)
}

/// Ranks of a token: as measured where that is known, otherwise of uniform routing; no more than pruning leaves.
fn copies(placement: &LayerPlacement, options: &LayerOptions, top_k: usize) -> f64 {
    let known = options
        .copies_per_token
        .or_else(|| uniform_copies(placement, options.topology, top_k).map(|[ranks, _]| ranks));
    let ranks = known.unwrap_or_else(|| copy_bounds(placement, top_k).upper as f64);
    let most = options.pruning.as_ref().map_or(f64::INFINITY, |pruning| pruning.budget.max_ranks() as f64);
    ranks.min(most)
}

/// Forward and backward of a step on one rank, rows straight to their ranks.
fn passes(
    cluster: &Cluster,
    shape: &LayerShape,
    placement: &LayerPlacement,
    options: &LayerOptions,
    top_k: usize,
    tokens: usize,
) -> [PassWork; 2] {
    let topology = options.topology;
    let [ranks, per_node] = [topology.num_ranks(), topology.ranks_per_node()].map(|n| n as f64);
    let copies = copies(placement, options, top_k);
    let rows = if options.mode == Mode::Conventional { top_k as f64 } else { copies };
    // Rows of a token over the links between nodes and within one, and the peers of a rank there.
    let peers = ranks - per_node;
    let (between, within) = (rows * peers / ranks, rows * (per_node - 1.0) / ranks);
    let per_rank = tokens as f64 / ranks;
    let wire = |pair_bytes: f64| {
        let bytes = |of_token: f64| {
            let pairs = top_k as f64 * of_token / rows.max(1.0);
            per_rank * (of_token * shape.hidden as f64 * shape.dtype_bytes + pairs * pair_bytes)
        };
        let inter = cluster.inter.map_or(0.0, |inter| {
            let sharing = if inter.per == LinkEnd::Node { per_node } else { 1.0 };
            bytes(between) * sharing / inter.link.bandwidth_bytes_per_s
        });
        inter + bytes(within) / cluster.intra.bandwidth_bytes_per_s
    };
    let latency_s = cluster.intra.latency_s * (per_node - 1.0)
        + cluster.inter.map_or(0.0, |inter| inter.link.latency_s * peers);
    let elements = (shape.num_matrices * shape.hidden * shape.ffn) as f64;
    let compute_s = 2.0 * elements * per_rank * top_k as f64 / cluster.compute.flops_per_s;
    // A rank may hold many experts that are seldom chosen: each part reads them all.
    let slots =
        (0..topology.num_ranks()).map(|rank| placement.experts_of(rank as Rank).len()).max().unwrap_or(0);
    let weights = elements * shape.weight_dtype_bytes * slots as f64;
    let out_s = wire(ID_BYTES + WEIGHT_BYTES);
    let forward = PassWork {
        out_s,
        duplex_s: out_s,
        back_s: wire(0.0),
        latency_s,
        compute_s,
        part_s: weights / cluster.compute.memory_bandwidth_bytes_per_s,
        ..PassWork::default()
    };
    // Gradients of the rows cost what the forward products do, those of the weights the same again, for all parts at once.
    let (out_s, back_s) = (wire(0.0), wire(WEIGHT_BYTES));
    let backward = PassWork { out_s, duplex_s: out_s, back_s, after_s: compute_s, ..forward };
    [forward, backward]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{PruneRule, Pruning};
    use occult_plan::cost::{Compute, Link};
    use occult_plan::{Budget, Topology};

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
    fn parts_follow_latency_compute_mode_and_pass() {
        let experts: Vec<u16> = (0..16).map(|e| e / 4).collect();
        let placement = LayerPlacement::from_expert_ranks(4, &experts).unwrap();
        let shape = LayerShape::gated(512, 512, 4.0);
        let options = LayerOptions::new(Topology::flat(4).unwrap());
        let of = |options: &LayerOptions, cluster: &Cluster, tokens, pass| {
            cut(cluster, &shape, &placement, options, 4, tokens, pass).parts()
        };
        let count = |cluster: &Cluster, tokens| of(&options, cluster, tokens, Pass::Inference);
        assert_eq!(count(&cluster(1e-4, 1e12), 0), 1);
        assert_eq!(count(&cluster(1.0, 1e12), 4096), 1);
        let (few, many) = (count(&cluster(1e-4, 1e12), 4096), count(&cluster(1e-6, 1e12), 4096));
        assert!(1 < few && few < many, "{few} {many}");
        let mut idle = cluster(1e-6, 1e18);
        idle.compute.memory_bandwidth_bytes_per_s = 1e18;
        assert_eq!(count(&idle, 4096), 1, "no compute to hide behind");
        // What hardly sends anything has nothing to hide; pruning and the measured copies say so.
        let pruned = LayerOptions {
            pruning: Some(Pruning { rule: PruneRule::BestMass, budget: Budget::Fixed { max_ranks: 1 } }),
            ..options.clone()
        };
        let conventional = LayerOptions { mode: Mode::Conventional, ..options.clone() };
        let at_home = LayerOptions { copies_per_token: Some(0.01), ..options.clone() };
        let at_home_conventional = LayerOptions { mode: Mode::Conventional, ..at_home.clone() };
        let slow = cluster(3e-4, 1e12);
        for pass in [Pass::Inference, Pass::Training] {
            assert_eq!(of(&at_home, &slow, 4096, pass), 1);
            for options in [&options, &conventional, &at_home_conventional, &pruned] {
                assert!(of(options, &slow, 4096, pass) > 1, "{options:?}");
            }
        }
        let all = [&options, &conventional].map(|o| copies(&placement, o, 4));
        assert_eq!(all[0], all[1]);
        assert_eq!(copies(&placement, &pruned, 4), 1.0);
        assert_eq!(copies(&placement, &at_home, 4), 0.01);
        let on_hosts = LayerOptions::new(Topology::new(4, 2).unwrap());
        assert!(on_hosts.has_two_levels());
        assert_eq!(of(&on_hosts, &cluster(1e-6, 1e12), 4096, Pass::Training), 1);
        let straight = LayerOptions { two_level: crate::config::TwoLevel::Off, ..on_hosts };
        assert!(of(&straight, &cluster(1e-6, 1e12), 4096, Pass::Training) > 1);
    }

    #[test]
    fn the_rank_with_most_experts_pays_for_the_parts() {
        let shape = LayerShape::gated(512, 512, 4.0);
        let count = |experts: [u16; 4]| {
            let experts: Vec<u16> =
                (0..4).flat_map(|rank| vec![rank; usize::from(experts[usize::from(rank)])]).collect();
            let placement = LayerPlacement::from_expert_ranks(4, &experts).unwrap();
            let options =
                LayerOptions { copies_per_token: Some(2.0), ..LayerOptions::new(Topology::flat(4).unwrap()) };
            let mut cluster = cluster(1e-6, 1e12);
            cluster.compute.memory_bandwidth_bytes_per_s = 3e10;
            cut(&cluster, &shape, &placement, &options, 4, 4096, Pass::Inference).parts()
        };
        let (even, uneven) = (count([16; 4]), count([4, 4, 4, 52]));
        assert!(uneven < even, "{uneven} {even}");
    }
}

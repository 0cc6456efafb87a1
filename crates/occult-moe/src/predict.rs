//! The bytes that one rank's tokens cause, predicted by occult-plan's traffic from routing and placement alone.
//!
//! `occult_comm::Metered` counts the same bytes on the way; tests hold the two equal.

use std::ops::AddAssign;

use occult_comm::Reach;
use occult_plan::traffic::{ID_BYTES, WEIGHT_BYTES};
use occult_plan::{HomeRanks, LayerPlacement, LayerTraffic, Rank, Routing};

use crate::config::{LayerOptions, Mode};
use crate::error::Result;
use crate::wire::COUNT_BYTES;

/// Bytes by exchange and by how far they go. Nodes of the topology count as hosts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RankBytes {
    /// Rows, ids and weights to the experts.
    pub dispatch: Reach,
    /// Rows back.
    pub combine: Reach,
    /// Gradients of the outputs to the experts.
    pub combine_gradients: Reach,
    /// Gradients of rows and weights back.
    pub dispatch_gradients: Reach,
}

impl AddAssign for RankBytes {
    fn add_assign(&mut self, other: Self) {
        for (sum, add) in [
            (&mut self.dispatch, other.dispatch),
            (&mut self.combine, other.combine),
            (&mut self.combine_gradients, other.combine_gradients),
            (&mut self.dispatch_gradients, other.dispatch_gradients),
        ] {
            sum.local += add.local;
            sum.same_host += add.same_host;
            sum.other_host += add.other_host;
        }
    }
}

impl RankBytes {
    /// Everything of the forward pass.
    pub fn forward_wire(&self) -> u64 {
        self.dispatch.wire() + self.combine.wire()
    }

    /// Everything of the backward pass.
    pub fn backward_wire(&self) -> u64 {
        self.combine_gradients.wire() + self.dispatch_gradients.wire()
    }

    /// `rows` and `pairs` that travel from one rank to another in dispatch, and the same way in the other exchanges.
    fn add(&mut self, options: &LayerOptions, (from, to): (usize, usize), [rows, pairs]: [u64; 2], d: usize) {
        let node = |rank: usize| options.topology.node_of(rank as Rank);
        let row_bytes = rows * d as u64 * 4;
        for (reach, pair_bytes) in [
            (&mut self.dispatch, ID_BYTES + WEIGHT_BYTES),
            (&mut self.combine, 0.0),
            (&mut self.combine_gradients, 0.0),
            (&mut self.dispatch_gradients, WEIGHT_BYTES),
        ] {
            let bytes = row_bytes + pairs * pair_bytes as u64;
            if from == to {
                reach.local += bytes;
            } else if node(from) == node(to) {
                reach.same_host += bytes;
            } else {
                reach.other_host += bytes;
            }
        }
    }
}

/// Bytes caused by the tokens `routing` at home on rank `home`, rows of `d` f32. Counts ([`count_bytes`]) are not in it. On two levels the bytes that other ranks of the target node forward for these tokens are.
pub fn predict_bytes(
    home: usize,
    routing: &Routing<'_>,
    placement: &LayerPlacement,
    options: &LayerOptions,
    d: usize,
) -> Result<RankBytes> {
    let mut bytes = RankBytes::default();
    if routing.num_tokens() == 0 {
        return Ok(bytes);
    }
    let topology = options.topology;
    let traffic = LayerTraffic::measure(placement, topology, HomeRanks::Uniform, routing)?;
    // With uniform homes every rank would send a share of the same counts; here one rank sends them all.
    let (world, per_node) = (topology.num_ranks(), topology.ranks_per_node());
    let count = |share: f64| (share * world as f64).round() as u64;
    let pairs = |to: usize| count(traffic.rank_pairs().get(home, to));
    let rows = |to: usize| match options.mode {
        Mode::Conventional => pairs(to),
        Mode::Dedup => count(traffic.rank_rows().get(home, to)),
    };
    if !options.has_two_levels() {
        for to in 0..world {
            bytes.add(options, (home, to), [rows(to), pairs(to)], d);
        }
        return Ok(bytes);
    }
    for node in 0..topology.num_nodes() {
        let gateway = node * per_node + home % per_node;
        let ranks = node * per_node..(node + 1) * per_node;
        let node_rows = count(traffic.rank_node_rows().get(home, node));
        bytes.add(options, (home, gateway), [node_rows, ranks.clone().map(pairs).sum()], d);
        for to in ranks {
            bytes.add(options, (gateway, to), [rows(to), pairs(to)], d);
        }
    }
    Ok(bytes)
}

/// The counts that one rank sends in one forward pass whose tokens are cut into so many parts (a small batch: one part,
/// counts within its messages).
pub fn count_bytes(options: &LayerOptions, parts: usize) -> Reach {
    let topology = options.topology;
    let (world, per_node) = (topology.num_ranks(), topology.ranks_per_node());
    let (nodes, bytes) = (topology.num_nodes(), (parts * COUNT_BYTES) as u64);
    let to = |peers: usize| peers as u64 * bytes;
    if options.has_two_levels() {
        return Reach { local: to(2), same_host: to(per_node - 1), other_host: to(nodes - 1) };
    }
    Reach { local: to(1), same_host: to(per_node - 1), other_host: to(world - per_node) }
}

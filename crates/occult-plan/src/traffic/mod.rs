//! What a placement costs on recorded routing: token copies, collaboration, load, rows per rank pair.
//!
//! [`TrafficMeter`] reads the tokens of one layer chunk by chunk; [`LayerTraffic`] is what it counted, as integers;
//! [`TrafficSummary`] is the handful of ratios that people compare.
//!
//! # Copies
//! A token needs the results of its `K` experts, which live on some number of *distinct* ranks. One copy of the token is
//! sent to each of them: that number is its copies, and the mean over tokens is `C_T`. One of the copies may stay at home;
//! the *remote* copies are those that cross a wire. Exchanges compared here:
//! - **per rank** (this project): one row per (token, rank).
//! - **per node, then rank** (two levels): one row per (token, node) to the rank of the same position in that node, which
//!   passes it on to the token's ranks there.
//! - **per expert** (conventional): one row per (token, expert), `K` for every token.
//!
//! # Home
//! The rank on which a token lives between MoE layers is not part of a routing profile; [`HomeRanks`] says what is assumed.

mod bounds;
mod bytes;
mod meter;
mod rows;
mod summary;

pub use bounds::{CopyBounds, copy_bounds, uniform_copies};
pub use bytes::{ID_BYTES, TrafficBytes, WEIGHT_BYTES};
pub use meter::TrafficMeter;
pub use rows::PairRows;
pub use summary::TrafficSummary;

use crate::{LayerPlacement, Rank, Result, Routing, Topology};

/// Where a token lives before dispatch and after combine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HomeRanks {
    /// Any rank with equal probability, independent of its experts. Remote figures are expectations: exact fractions of
    /// the counts, no random numbers.
    Uniform,
    /// The rows of the layer are cut into `W` consecutive blocks whose sizes differ by at most one, larger first; block `r`
    /// lives on rank `r`. All occurrences of a row live where the row lives. Needs the number of rows of the whole layer.
    Blocks {
        /// Rows of the whole layer, over all chunks.
        num_rows: usize,
    },
}

/// Everything counted for one layer under one placement. All counts weigh a row by its occurrences.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerTraffic {
    topology: Topology,
    top_k: usize,
    num_tokens: u64,
    bounds: CopyBounds,
    /// `C_T` of uniform independent routing, over ranks and over nodes; none with replicas.
    uniform_copies: Option<[f64; 2]>,
    /// `[W + 1]` offsets into `slot_tokens`.
    slot_offsets: Vec<usize>,
    /// `[min(K, W) + 1]`.
    ranks_per_token: Vec<u64>,
    intra_pairs: u64,
    /// Tokens in each physical slot, rank after rank, experts ascending within a rank.
    slot_tokens: Vec<u64>,
    num_experts_touched: usize,
    rank_rows: PairRows,
    rank_pairs: PairRows,
    node_rows: PairRows,
}

impl LayerTraffic {
    /// Measures one layer whose tokens are all at hand; [`TrafficMeter`] takes them in chunks.
    pub fn measure(
        placement: &LayerPlacement,
        topology: Topology,
        home: HomeRanks,
        routing: &Routing<'_>,
    ) -> Result<Self> {
        let mut meter = TrafficMeter::new(placement, topology, home)?;
        meter.add(routing)?;
        meter.finish()
    }

    /// Ranks and nodes.
    pub fn topology(&self) -> Topology {
        self.topology
    }

    /// `K`.
    pub fn top_k(&self) -> usize {
        self.top_k
    }

    /// `E`.
    pub fn num_experts(&self) -> usize {
        self.bounds.num_experts
    }

    /// Tokens (occurrences), at least one.
    pub fn num_tokens(&self) -> u64 {
        self.num_tokens
    }

    /// What `C_T` could be at best and at worst.
    pub fn bounds(&self) -> CopyBounds {
        self.bounds
    }

    /// Mean ranks and mean nodes per token that uniform independent routing would give under this placement
    /// ([`uniform_copies`]); `None` with replicas.
    pub fn uniform_copies(&self) -> Option<[f64; 2]> {
        self.uniform_copies
    }

    /// Tokens that visit exactly `i` ranks, `[min(K, W) + 1]`; element 0 is 0.
    pub fn ranks_per_token(&self) -> &[u64] {
        &self.ranks_per_token
    }

    /// Unordered pairs of different experts of one token that are computed on one rank, summed over tokens.
    pub fn intra_pairs(&self) -> u64 {
        self.intra_pairs
    }

    /// All such pairs, on one rank or two: `K (K - 1) / 2` per token.
    pub fn all_pairs(&self) -> u64 {
        self.num_tokens * (self.top_k as u64 * (self.top_k as u64 - 1) / 2)
    }

    /// (token, expert) pairs that each rank computes, `[W]`.
    pub fn load(&self) -> Vec<u64> {
        (0..self.topology.num_ranks()).map(|r| self.slots_of(r).iter().sum()).collect()
    }

    /// Tokens of each expert that a rank holds, `[experts of the rank]`, ascending by expert id. With replicas, the tokens
    /// which this replica serves.
    pub fn tokens_per_local_expert(&self, rank: Rank) -> &[u64] {
        self.slots_of(usize::from(rank))
    }

    /// Experts with at least one token.
    pub fn num_experts_touched(&self) -> usize {
        self.num_experts_touched
    }

    /// Experts (replicas) with at least one token on each rank, `[W]`.
    pub fn experts_touched_per_rank(&self) -> Vec<usize> {
        (0..self.topology.num_ranks()).map(|r| self.slots_of(r).iter().filter(|&&n| n > 0).count()).collect()
    }

    /// Rows of the exchange *per rank*, home rank to expert rank, `[W, W]`; the diagonal stays at home.
    pub fn rank_rows(&self) -> &PairRows {
        &self.rank_rows
    }

    /// (token, expert) pairs, home rank to expert rank, `[W, W]`: the rows of the *conventional* exchange, and the ids and
    /// weights that travel with the rows of any exchange.
    pub fn rank_pairs(&self) -> &PairRows {
        &self.rank_pairs
    }

    /// Rows of the first step of the *two-level* exchange, home rank to node, `[W, num_nodes]`; a rank's own node is the
    /// copy that stays on it.
    pub fn rank_node_rows(&self) -> &PairRows {
        &self.node_rows
    }

    /// Rows of the two-level exchange between nodes, `[num_nodes, num_nodes]`; the diagonal stays on the node.
    pub fn node_rows(&self) -> PairRows {
        self.node_rows.fold_sources(|r| r / self.topology.ranks_per_node(), self.topology.num_nodes())
    }

    /// Rows of the second step of the two-level exchange, `[ranks per node, W]`: from the rank at position `l` of the
    /// destination's own node, where the copies of the tokens at home at position `l` of *any* node arrive, to the
    /// destination. Where the destination is itself at position `l` nothing moves.
    pub fn forwarded_rows(&self) -> PairRows {
        let per_node = self.topology.ranks_per_node();
        self.rank_rows.fold_sources(|r| r % per_node, per_node)
    }

    /// The ratios.
    pub fn summary(&self) -> TrafficSummary {
        TrafficSummary::of(self)
    }

    fn slots_of(&self, rank: usize) -> &[u64] {
        &self.slot_tokens[self.slot_offsets[rank]..self.slot_offsets[rank + 1]]
    }
}

#[cfg(test)]
mod tests;

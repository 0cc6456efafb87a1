//! Rows as bytes.

use super::LayerTraffic;

/// Size of an expert id on the wire.
pub const ID_BYTES: f64 = 2.0;
/// Size of a routing weight (or of its gradient) on the wire.
pub const WEIGHT_BYTES: f64 = 4.0;

/// Bytes that leave their home rank, over all ranks and all measured tokens of one layer. Under
/// [`HomeRanks::Uniform`](super::HomeRanks) an expectation.
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct TrafficBytes {
    /// Token rows of dispatch, one per remote (token, rank).
    pub dispatch_row_bytes: f64,
    /// Expert ids that travel with them: 2 bytes per (token, expert) pair on its rank, those of other ranks do not travel.
    pub dispatch_id_bytes: f64,
    /// Routing weights that travel with them: 4 bytes per such pair.
    pub dispatch_weight_bytes: f64,
    /// Token rows of combine: the same rows on their way back.
    pub combine_row_bytes: f64,
    /// Token rows of a conventional dispatch, one per remote (token, expert); its combine is the same again.
    pub conventional_dispatch_row_bytes: f64,
    /// Of a two-level dispatch: the rows that cross between nodes, one per remote (token, node).
    pub node_dispatch_row_bytes: f64,
}

impl LayerTraffic {
    /// Bytes for rows of `hidden` elements of `dtype_bytes` bytes each.
    pub fn bytes(&self, hidden: usize, dtype_bytes: f64) -> TrafficBytes {
        let row_bytes = hidden as f64 * dtype_bytes;
        let rows = self.rank_rows().remote_total(|r| r);
        let pairs = self.rank_pairs().remote_total(|r| r);
        let per_node = self.topology().ranks_per_node();
        TrafficBytes {
            dispatch_row_bytes: rows * row_bytes,
            dispatch_id_bytes: pairs * ID_BYTES,
            dispatch_weight_bytes: pairs * WEIGHT_BYTES,
            combine_row_bytes: rows * row_bytes,
            conventional_dispatch_row_bytes: pairs * row_bytes,
            node_dispatch_row_bytes: self.rank_node_rows().remote_total(|r| r / per_node) * row_bytes,
        }
    }
}

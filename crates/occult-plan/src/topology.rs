//! How many ranks there are and which of them share a node (a host).

use crate::{PlanError, Rank, Result};

/// `W` ranks in equal nodes of consecutive ranks: rank `r` lives on node `r / ranks_per_node`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Topology {
    num_ranks: usize,
    num_nodes: usize,
}

impl Topology {
    /// `num_ranks` must be a multiple of `num_nodes`; both at least 1.
    pub fn new(num_ranks: usize, num_nodes: usize) -> Result<Self> {
        if num_ranks == 0 || num_ranks > usize::from(Rank::MAX) {
            return Err(PlanError::range("number of ranks", "1 to 65535", num_ranks));
        }
        if num_nodes == 0 || !num_ranks.is_multiple_of(num_nodes) {
            return Err(PlanError::range(
                "number of nodes",
                format!("a divisor of {num_ranks} ranks"),
                num_nodes,
            ));
        }
        Ok(Self { num_ranks, num_nodes })
    }

    /// All ranks on one node.
    pub fn flat(num_ranks: usize) -> Result<Self> {
        Self::new(num_ranks, 1)
    }

    /// `W`.
    pub fn num_ranks(&self) -> usize {
        self.num_ranks
    }

    /// Number of nodes.
    pub fn num_nodes(&self) -> usize {
        self.num_nodes
    }

    /// Ranks on each node.
    pub fn ranks_per_node(&self) -> usize {
        self.num_ranks / self.num_nodes
    }

    /// Node of a rank.
    pub fn node_of(&self, rank: Rank) -> usize {
        usize::from(rank) / self.ranks_per_node()
    }
}

//! Links and compute of a cluster.

use crate::{PlanError, Result, Topology};

/// A link, one direction.
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Link {
    /// Bytes per second each way, as reached in practice.
    pub bandwidth_bytes_per_s: f64,
    /// Seconds added for every peer of an exchange.
    pub latency_s: f64,
}

/// What has one link between nodes to itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "lowercase"))]
pub enum LinkEnd {
    /// Every rank has its own.
    Rank,
    /// All ranks of a node share one.
    Node,
}

/// The links between nodes.
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct InterLink {
    /// One such link.
    pub link: Link,
    /// Whose link it is.
    pub per: LinkEnd,
}

/// What one rank computes with.
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Compute {
    /// Floating-point operations per second that the expert products reach in practice (a multiply-add counts two).
    pub flops_per_s: f64,
    /// Bytes per second at which weights are read.
    pub memory_bandwidth_bytes_per_s: f64,
}

/// Equal nodes of equal ranks.
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Cluster {
    /// For people.
    pub name: String,
    /// Number of nodes.
    pub nodes: usize,
    /// Ranks on each.
    pub ranks_per_node: usize,
    /// Links within a node, one per rank.
    pub intra: Link,
    /// Links between nodes; needed when there are several.
    pub inter: Option<InterLink>,
    /// Of each rank.
    pub compute: Compute,
}

impl Cluster {
    /// Ranks and nodes. Errors when there are none or too many.
    pub fn topology(&self) -> Result<Topology> {
        let ranks = self.nodes.checked_mul(self.ranks_per_node);
        let ranks = ranks.ok_or_else(|| {
            let found = format!("{} nodes of {}", self.nodes, self.ranks_per_node);
            PlanError::range("number of ranks", "1 to 65535", found)
        })?;
        Topology::new(ranks, self.nodes)
    }

    /// The same links and compute under another number of ranks and nodes (half a machine, or ten of them). Errors when
    /// several nodes are asked of a cluster that says nothing about links between nodes.
    pub fn resized(&self, topology: Topology) -> Result<Self> {
        let cluster =
            Self { nodes: topology.num_nodes(), ranks_per_node: topology.ranks_per_node(), ..self.clone() };
        cluster.check()?;
        Ok(cluster)
    }

    /// Errors on the first number that cannot be: bandwidths and FLOP/s must be positive and finite, latencies finite and
    /// not negative, and several nodes need links between them.
    pub fn check(&self) -> Result<()> {
        self.topology()?;
        check_link(&self.intra, ["intra bandwidth (bytes/s)", "intra latency (s)"])?;
        if let Some(inter) = &self.inter {
            check_link(&inter.link, ["inter bandwidth (bytes/s)", "inter latency (s)"])?;
        } else if self.nodes > 1 {
            let missing = "the links between nodes (`inter`) of the cluster";
            return Err(PlanError::Missing { what: "a cluster of several nodes", missing });
        }
        positive("compute FLOP/s", self.compute.flops_per_s)?;
        positive("compute memory bandwidth (bytes/s)", self.compute.memory_bandwidth_bytes_per_s)
    }
}

fn check_link(link: &Link, [bandwidth, latency]: [&'static str; 2]) -> Result<()> {
    positive(bandwidth, link.bandwidth_bytes_per_s)?;
    if link.latency_s >= 0.0 && link.latency_s.is_finite() {
        return Ok(());
    }
    Err(PlanError::range(latency, "a number that is not negative", link.latency_s))
}

fn positive(what: &'static str, value: f64) -> Result<()> {
    if value > 0.0 && value.is_finite() {
        return Ok(());
    }
    Err(PlanError::range(what, "a positive number", value))
}

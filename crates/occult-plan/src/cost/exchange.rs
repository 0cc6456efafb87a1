//! Time of one exchange.

use super::{Cluster, Link, LinkEnd};
use crate::{LayerTraffic, PlanError, traffic::PairRows};
use std::{fmt, str::FromStr};

/// What travels in an exchange.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "kebab-case"))]
pub enum Exchange {
    /// Two levels: one row per (token, node), passed on to the token's ranks there. The same as `PerRank` on one node.
    PerNode,
    /// One row per (token, rank), straight to the rank.
    PerRank,
    /// One row per (token, expert), straight to its rank: the conventional exchange.
    PerExpert,
}

impl Exchange {
    /// Every kind, fewest rows first.
    pub const ALL: [Exchange; 3] = [Exchange::PerNode, Exchange::PerRank, Exchange::PerExpert];

    /// The name on command lines.
    pub fn name(self) -> &'static str {
        match self {
            Exchange::PerNode => "per-node",
            Exchange::PerRank => "per-rank",
            Exchange::PerExpert => "per-expert",
        }
    }
}

impl fmt::Display for Exchange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Exchange {
    type Err = PlanError;

    fn from_str(name: &str) -> Result<Self, PlanError> {
        Exchange::ALL.into_iter().find(|e| e.name() == name).ok_or_else(|| {
            let expected = Exchange::ALL.map(Exchange::name).join(", ");
            PlanError::range("exchange", format!("one of {expected}"), name)
        })
    }
}

/// One exchange: dispatch or combine.
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct ExchangeTime {
    /// Over the links between nodes (where there are several), then over those within a node (where it has several ranks).
    pub steps: Vec<ExchangeStep>,
    /// Sum of the steps.
    pub seconds: f64,
}

/// What one kind of link carries.
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct ExchangeStep {
    /// Between nodes rather than within one.
    pub between_nodes: bool,
    /// Others that an end talks to.
    pub peers: usize,
    /// The link of an end.
    pub link: Link,
    /// Bytes that leave each end in dispatch (and arrive in combine), `[W]`, or `[num_nodes]` for links shared by a node.
    pub out_bytes: Vec<f64>,
    /// Bytes that arrive at each end in dispatch (and leave it in combine).
    pub in_bytes: Vec<f64>,
    /// The end with the most bytes in one direction, the lowest among equals.
    pub busiest: usize,
    /// Those bytes.
    pub busiest_bytes: f64,
    /// `latency * peers + busiest_bytes / bandwidth`.
    pub seconds: f64,
}

/// Rows, with the (token, expert) pairs that they carry, in and out of each rank over one kind of link.
struct Flow {
    /// `[W]` of (rows, pairs).
    out: Vec<[f64; 2]>,
    into: Vec<[f64; 2]>,
}

impl Flow {
    /// `ends(source, destination)`: the ranks that send and receive an entry, or `None` when it uses no such link.
    fn of(
        num_ranks: usize,
        rows: &PairRows,
        pairs: &PairRows,
        ends: impl Fn(usize, usize) -> Option<(usize, usize)>,
    ) -> Self {
        let mut flow = Flow { out: vec![[0.0; 2]; num_ranks], into: vec![[0.0; 2]; num_ranks] };
        for source in 0..rows.num_sources() {
            for destination in 0..rows.num_destinations() {
                let Some((from, to)) = ends(source, destination) else { continue };
                for (i, table) in [rows, pairs].into_iter().enumerate() {
                    let n = table.get(source, destination);
                    flow.out[from][i] += n;
                    flow.into[to][i] += n;
                }
            }
        }
        flow
    }

    fn step(
        &self,
        between_nodes: bool,
        peers: usize,
        (link, ranks_per_end): (Link, usize),
        [row_bytes, pair_bytes]: [f64; 2],
    ) -> ExchangeStep {
        let bytes = |flows: &[[f64; 2]]| -> Vec<f64> {
            let of_rank = |&[rows, pairs]: &[f64; 2]| rows * row_bytes + pairs * pair_bytes;
            flows.chunks(ranks_per_end).map(|end| end.iter().map(of_rank).sum()).collect()
        };
        let (out_bytes, in_bytes) = (bytes(&self.out), bytes(&self.into));
        let (mut busiest, mut busiest_bytes) = (0, 0.0);
        for (end, (&out, &into)) in out_bytes.iter().zip(&in_bytes).enumerate() {
            if out.max(into) > busiest_bytes {
                (busiest, busiest_bytes) = (end, out.max(into));
            }
        }
        let seconds = link.latency_s * peers as f64 + busiest_bytes / link.bandwidth_bytes_per_s;
        ExchangeStep { between_nodes, peers, link, out_bytes, in_bytes, busiest, busiest_bytes, seconds }
    }
}

/// The flows of one layer under one kind of exchange, from which every exchange of a step is timed.
pub(super) struct Flows<'a> {
    cluster: &'a Cluster,
    between: Flow,
    within: Flow,
    peers: [usize; 2],
}

impl<'a> Flows<'a> {
    /// The traffic must have the cluster's topology.
    pub(super) fn new(cluster: &'a Cluster, traffic: &LayerTraffic, exchange: Exchange) -> Self {
        let (nodes, per_node) = (cluster.nodes, cluster.ranks_per_node);
        let num_ranks = nodes * per_node;
        let node = |rank: usize| rank / per_node;
        let pairs = traffic.rank_pairs();
        let (between, within) = if exchange == Exchange::PerNode {
            // To the rank of the same position in the node, and from there on.
            let gateway = |source: usize, to: usize| to * per_node + source % per_node;
            let between =
                Flow::of(num_ranks, traffic.rank_node_rows(), &pairs.fold_destinations(per_node), |s, n| {
                    (node(s) != n).then(|| (s, gateway(s, n)))
                });
            let pairs = pairs.fold_sources(|r| r % per_node, per_node);
            let within = Flow::of(num_ranks, &traffic.forwarded_rows(), &pairs, |position, to| {
                let from = gateway(position, node(to));
                (from != to).then_some((from, to))
            });
            (between, within)
        } else {
            let rows = if exchange == Exchange::PerExpert { pairs } else { traffic.rank_rows() };
            (
                Flow::of(num_ranks, rows, pairs, |s, d| (node(s) != node(d)).then_some((s, d))),
                Flow::of(num_ranks, rows, pairs, |s, d| (node(s) == node(d) && s != d).then_some((s, d))),
            )
        };
        let remote = if exchange == Exchange::PerNode { nodes - 1 } else { num_ranks - per_node };
        Self { cluster, between, within, peers: [remote, per_node - 1] }
    }

    /// One exchange with rows and pairs of these sizes.
    pub(super) fn time(&self, row_bytes: f64, pair_bytes: f64) -> ExchangeTime {
        let mut steps = Vec::new();
        if let Some(inter) = self.cluster.inter.filter(|_| self.cluster.nodes > 1) {
            let ranks = if inter.per == LinkEnd::Node { self.cluster.ranks_per_node } else { 1 };
            let link = (inter.link, ranks);
            steps.push(self.between.step(true, self.peers[0], link, [row_bytes, pair_bytes]));
        }
        if self.cluster.ranks_per_node > 1 {
            let link = (self.cluster.intra, 1);
            steps.push(self.within.step(false, self.peers[1], link, [row_bytes, pair_bytes]));
        }
        let seconds = steps.iter().map(|s| s.seconds).sum();
        ExchangeTime { steps, seconds }
    }
}

//! How a layer runs.

use std::sync::Arc;

use occult_comm::{Buffer, Communicator};
use occult_plan::cost::Cluster;
use occult_plan::{Budget, Rule, SimilarityTable, Topology};

use crate::error::{MoeError, Result};
use crate::exchange::Rows;

/// What travels between ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mode {
    /// One row per (token, expert), nothing added up before it returns: what other frameworks send. To compare with.
    Conventional,
    /// One row per (token, rank), copies of a rank's experts added up there.
    #[default]
    Dedup,
}

impl Mode {
    pub(crate) fn rows(self) -> Rows {
        match self {
            Mode::Conventional => Rows::PerExpert,
            Mode::Dedup => Rows::PerRank,
        }
    }
}

/// Two-level exchange: to the node, then to the rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TwoLevel {
    /// Rows go straight to their rank.
    Off,
    /// Where the topology has several nodes of several ranks and the mode is [`Mode::Dedup`].
    #[default]
    Auto,
}

/// Whether the exchanges of one part of the tokens run while another part is computed.
#[derive(Debug, Clone, PartialEq, Default)]
pub enum Overlap {
    /// All tokens at once.
    #[default]
    Off,
    /// As many parts as the cost model finds best for this cluster.
    Auto(Box<Cluster>),
    /// So many parts, at least 1.
    Chunks(usize),
}

/// Collaboration pruning, as occult-plan's `prune` does it, active in training and inference.
#[derive(Debug, Clone, PartialEq)]
pub struct Pruning {
    /// What takes the place of experts outside the allowed ranks.
    pub rule: PruneRule,
    /// Ranks that a token may visit.
    pub budget: Budget,
}

/// [`Rule`], owned.
#[derive(Debug, Clone, PartialEq)]
pub enum PruneRule {
    /// [`Rule::RouterScore`]
    RouterScore,
    /// [`Rule::Similarity`]
    Similarity(Arc<SimilarityTable>),
    /// [`Rule::BestMass`]
    BestMass,
    /// [`Rule::LeastError`]
    LeastError,
}

impl PruneRule {
    /// The rule as [`prune`](occult_plan::prune()) takes it.
    pub fn rule(&self) -> Rule<'_> {
        match self {
            PruneRule::RouterScore => Rule::RouterScore,
            PruneRule::Similarity(table) => Rule::Similarity(table),
            PruneRule::BestMass => Rule::BestMass,
            PruneRule::LeastError => Rule::LeastError,
        }
    }
}

/// Everything that can be chosen about a layer.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerOptions {
    /// What travels.
    pub mode: Mode,
    /// Ranks and nodes; [`topology_of`] reads them off a communicator.
    pub topology: Topology,
    /// One copy per node on the links between nodes.
    pub two_level: TwoLevel,
    /// Exchange beside compute.
    pub overlap: Overlap,
    /// Limits the ranks a token visits.
    pub pruning: Option<Pruning>,
    /// Ranks that a token visits on average, before pruning, where that was measured: for [`Overlap::Auto`]. `None`: as with
    /// uniform routing.
    pub copies_per_token: Option<f64>,
    /// Inference steps in which no rank has more tokens use one message per peer, without a round of counts. 0: never.
    pub small_batch_tokens: usize,
}

impl LayerOptions {
    /// Deduplicated, exact, not overlapped; small batches are up to 64 tokens.
    pub fn new(topology: Topology) -> Self {
        Self {
            mode: Mode::default(),
            topology,
            two_level: TwoLevel::default(),
            overlap: Overlap::default(),
            pruning: None,
            copies_per_token: None,
            small_batch_tokens: 64,
        }
    }

    /// Whether rows travel to the node first and to the rank from there.
    pub fn has_two_levels(&self) -> bool {
        let levels = self.topology.num_nodes() > 1 && self.topology.ranks_per_node() > 1;
        levels && self.two_level == TwoLevel::Auto && self.mode == Mode::Dedup
    }
}

/// The topology that a communicator's hosts make: nodes are hosts when these are equal runs of consecutive ranks,
/// otherwise all ranks count as one node.
pub fn topology_of(comm: &dyn Communicator) -> Result<Topology> {
    let hosts = comm.host_of_rank();
    let runs: Vec<&[usize]> = hosts.chunk_by(|a, b| a == b).collect();
    let mut distinct: Vec<usize> = runs.iter().map(|run| run[0]).collect();
    distinct.sort_unstable();
    distinct.dedup();
    let equal = runs.iter().all(|run| run.len() == runs[0].len()) && distinct.len() == runs.len();
    Ok(Topology::new(hosts.len(), if equal { runs.len() } else { 1 })?)
}

/// How many tokens every rank has in one step: agreed once, used by all layers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    tokens: Vec<usize>,
}

impl Step {
    /// From counts that are known, by rank; every rank must give the same.
    pub fn new(tokens: Vec<usize>) -> Self {
        Self { tokens }
    }

    /// Asks every rank (collective).
    pub fn agree(comm: &dyn Communicator, num_tokens: usize) -> Result<Self> {
        let all = comm.all_gather("moe tokens of a step", Buffer::from_slice(&[num_tokens as u64]))?;
        let mut tokens = Vec::with_capacity(all.len());
        for (peer, buffer) in all.iter().enumerate() {
            let Some(&[n]) = buffer.try_as_slice::<u64>() else {
                let found = format!("{} bytes", buffer.len_bytes());
                return Err(MoeError::Message {
                    what: "token count",
                    peer,
                    expected: "8 bytes".into(),
                    found,
                });
            };
            tokens.push(n as usize);
        }
        Ok(Self { tokens })
    }

    /// Tokens of every rank.
    pub fn tokens(&self) -> &[usize] {
        &self.tokens
    }

    /// Of the rank that has most.
    pub fn max_tokens(&self) -> usize {
        self.tokens.iter().copied().max().unwrap_or(0)
    }
}

//! Counting, one chunk of tokens at a time.

use super::{CopyBounds, HomeRanks, LayerTraffic, PairRows, copy_bounds, uniform_copies};
use crate::{ExpertId, LayerPlacement, PlanError, Rank, ReplicaChooser, Result, Routing, Topology};

/// `HomeRanks::Blocks` keeps a table of all pairs of ranks; a larger world is refused rather than allocated.
const MAX_BLOCK_RANKS: usize = 4096;

/// Measures one layer in one pass: [`new`](Self::new), [`add`](Self::add) each chunk of tokens in their order,
/// [`finish`](Self::finish). No memory is allocated per token. Replicas are chosen by [`ReplicaChooser`].
#[derive(Debug, Clone)]
pub struct TrafficMeter<'p> {
    placement: &'p LayerPlacement,
    topology: Topology,
    homes: Homes,
    chooser: ReplicaChooser<'p>,
    /// Of the first chunk; 0 before it.
    top_k: usize,
    num_tokens: u64,
    num_rows: usize,
    ranks_per_token: Vec<u64>,
    intra_pairs: u64,
    slot_offsets: Vec<usize>,
    slot_tokens: Vec<u64>,
    /// Slot of each expert, `[E]`, when nothing is replicated; empty otherwise.
    slot_of: Vec<usize>,
    node_of: Vec<usize>,
    rank_rows: PairRows,
    rank_pairs: PairRows,
    node_rows: PairRows,
    scratch: Scratch,
}

/// Of the token at hand. The counts are all zero between tokens.
#[derive(Debug, Clone)]
struct Scratch {
    /// Serving rank of each of its experts, `[K]`.
    serving: Vec<Rank>,
    /// Its experts on each rank, `[W]`, and the ranks where that is not 0.
    on_rank: Vec<u64>,
    ranks: Vec<usize>,
    on_node: Vec<bool>,
    nodes: Vec<usize>,
}

impl<'p> TrafficMeter<'p> {
    /// Nothing counted yet. Errors when the placement has another number of ranks than the topology, or when block homes
    /// are asked for on more than 4096 ranks.
    pub fn new(placement: &'p LayerPlacement, topology: Topology, home: HomeRanks) -> Result<Self> {
        let (num_ranks, num_nodes) = (topology.num_ranks(), topology.num_nodes());
        if placement.num_ranks() != num_ranks {
            return Err(PlanError::Placement(format!(
                "it has {} ranks, the topology has {num_ranks}",
                placement.num_ranks()
            )));
        }
        let homes = match home {
            HomeRanks::Uniform => Homes::uniform(),
            HomeRanks::Blocks { num_rows } if num_ranks <= MAX_BLOCK_RANKS => {
                Homes::blocks(num_rows, num_ranks)
            }
            HomeRanks::Blocks { .. } => {
                let expected = format!("at most {MAX_BLOCK_RANKS} for homes in blocks");
                return Err(PlanError::range("number of ranks", expected, num_ranks));
            }
        };
        let alike = home == HomeRanks::Uniform;
        let mut slot_offsets = vec![0];
        let mut slot_of = vec![0; if placement.has_replicas() { 0 } else { placement.num_experts() }];
        for rank in 0..num_ranks {
            let start = slot_offsets[rank];
            let experts = placement.experts_of(rank as Rank);
            if !placement.has_replicas() {
                for (i, &e) in experts.iter().enumerate() {
                    slot_of[usize::from(e)] = start + i;
                }
            }
            slot_offsets.push(start + experts.len());
        }
        Ok(Self {
            placement,
            topology,
            homes,
            chooser: ReplicaChooser::new(placement, topology),
            top_k: 0,
            num_tokens: 0,
            num_rows: 0,
            ranks_per_token: Vec::new(),
            intra_pairs: 0,
            slot_offsets,
            slot_tokens: vec![0; placement.num_slots()],
            slot_of,
            node_of: (0..num_ranks).map(|r| topology.node_of(r as Rank)).collect(),
            rank_rows: PairRows::zero(num_ranks, num_ranks, alike),
            rank_pairs: PairRows::zero(num_ranks, num_ranks, alike),
            node_rows: PairRows::zero(num_ranks, num_nodes, alike),
            scratch: Scratch {
                serving: Vec::new(),
                on_rank: vec![0; num_ranks],
                ranks: Vec::new(),
                on_node: vec![false; num_nodes],
                nodes: Vec::new(),
            },
        })
    }

    /// Counts one chunk. Errors, and counts nothing of it, when it is of another number of experts than the placement,
    /// of another `top_k` than the chunks before, or goes beyond the rows that were announced.
    pub fn add(&mut self, routing: &Routing<'_>) -> Result<()> {
        if routing.num_experts() != self.placement.num_experts() {
            return Err(PlanError::Placement(format!(
                "it places {} experts, the routing has {}",
                self.placement.num_experts(),
                routing.num_experts()
            )));
        }
        if self.top_k != 0 && routing.top_k() != self.top_k {
            let expected = format!("{} as in the chunks before", self.top_k);
            return Err(PlanError::range("top_k", expected, routing.top_k()));
        }
        let num_rows = self.num_rows + routing.num_tokens();
        if let Some(expected) = self.homes.num_rows
            && num_rows > expected
        {
            return Err(PlanError::Shape { what: "rows of the layer", expected, found: num_rows });
        }
        if self.top_k == 0 {
            self.top_k = routing.top_k();
            self.ranks_per_token = vec![0; self.top_k.min(self.topology.num_ranks()) + 1];
            self.scratch.serving = vec![0; self.top_k];
        }
        for (ids, n) in routing.weighted_rows() {
            let home = self.homes.next();
            self.add_token(ids, n, home);
        }
        self.num_rows = num_rows;
        Ok(())
    }

    fn add_token(&mut self, ids: &[ExpertId], n: u64, home: usize) {
        let Scratch { serving, on_rank, ranks, on_node, nodes } = &mut self.scratch;
        self.num_tokens += n;
        self.chooser.assign(ids, n, serving);
        for (&id, &rank) in ids.iter().zip(&*serving) {
            let slot = match self.slot_of.get(usize::from(id)) {
                Some(&slot) => slot,
                // Replicated: the slot depends on the rank.
                None => {
                    let local = self.placement.experts_of(rank).partition_point(|&e| e < id);
                    self.slot_offsets[usize::from(rank)] + local
                }
            };
            self.slot_tokens[slot] += n;
            let rank = usize::from(rank);
            if on_rank[rank] == 0 {
                ranks.push(rank);
            }
            on_rank[rank] += 1;
        }
        let (rows, pairs) = (self.rank_rows.row_mut(home), self.rank_pairs.row_mut(home));
        for &rank in &*ranks {
            let experts = std::mem::take(&mut on_rank[rank]);
            rows[rank] += n;
            pairs[rank] += n * experts;
            self.intra_pairs += n * (experts * (experts - 1) / 2);
            let node = self.node_of[rank];
            if !std::mem::replace(&mut on_node[node], true) {
                nodes.push(node);
            }
        }
        self.ranks_per_token[ranks.len()] += n;
        let rows = self.node_rows.row_mut(home);
        for &node in &*nodes {
            on_node[node] = false;
            rows[node] += n;
        }
        ranks.clear();
        nodes.clear();
    }

    /// What was counted. Errors when there were no tokens, or fewer rows than were announced.
    pub fn finish(self) -> Result<LayerTraffic> {
        if let Some(expected) = self.homes.num_rows
            && self.num_rows != expected
        {
            return Err(PlanError::Shape { what: "rows of the layer", expected, found: self.num_rows });
        }
        if self.num_tokens == 0 {
            return Err(PlanError::NoTokens);
        }
        let mut touched = vec![false; self.placement.num_experts()];
        for rank in 0..self.topology.num_ranks() {
            let experts = self.placement.experts_of(rank as Rank);
            for (&e, &n) in experts.iter().zip(&self.slot_tokens[self.slot_offsets[rank]..]) {
                touched[usize::from(e)] |= n > 0;
            }
        }
        let bounds: CopyBounds = copy_bounds(self.placement, self.top_k);
        Ok(LayerTraffic {
            topology: self.topology,
            top_k: self.top_k,
            num_tokens: self.num_tokens,
            bounds,
            uniform_copies: uniform_copies(self.placement, self.topology, self.top_k),
            slot_offsets: self.slot_offsets,
            ranks_per_token: self.ranks_per_token,
            intra_pairs: self.intra_pairs,
            slot_tokens: self.slot_tokens,
            num_experts_touched: touched.into_iter().filter(|&t| t).count(),
            rank_rows: self.rank_rows,
            rank_pairs: self.rank_pairs,
            node_rows: self.node_rows,
        })
    }
}

/// Home rank of row after row.
#[derive(Debug, Clone)]
struct Homes {
    /// Announced rows; `None` when homes are uniform, and every row is counted at home 0.
    num_rows: Option<usize>,
    num_ranks: usize,
    rank: usize,
    left: usize,
}

impl Homes {
    fn uniform() -> Self {
        Self { num_rows: None, num_ranks: 1, rank: 0, left: 0 }
    }

    fn blocks(num_rows: usize, num_ranks: usize) -> Self {
        let mut homes = Self { num_rows: Some(num_rows), num_ranks, rank: 0, left: 0 };
        homes.left = homes.block(0);
        homes
    }

    /// Rows of a rank.
    fn block(&self, rank: usize) -> usize {
        let rows = self.num_rows.unwrap_or(0);
        rows / self.num_ranks + usize::from(rank < rows % self.num_ranks)
    }

    fn next(&mut self) -> usize {
        if self.num_rows.is_some() {
            while self.left == 0 && self.rank + 1 < self.num_ranks {
                self.rank += 1;
                self.left = self.block(self.rank);
            }
            self.left = self.left.saturating_sub(1);
        }
        self.rank
    }
}

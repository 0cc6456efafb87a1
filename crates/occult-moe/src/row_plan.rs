//! Rows of one hop: which copies go to which group, and how they come back.

use std::ops::Range;

use occult_plan::{DispatchPlan, LayerPlacement, Rank, RowExperts, Topology};

use crate::error::{MoeError, Result};
use crate::room;

/// The highest bit of an expert id on the wire says that it is the last of its row, so that a message needs no counts
/// per row. A rank (on two levels: a node) therefore holds at most this many experts.
pub(crate) const LAST_OF_ROW: u16 = 1 << 15;

/// What one rank sends over one hop. *Sources* are the rows it has (its tokens, or rows that it passes on), *rows* are
/// the copies it sends, grouped by destination; a (row, expert) *pair* carries an id and a routing weight.
///
/// The same tables read the other way are the merge: which returned rows belong to a source.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RowPlan {
    /// `[G + 1]`: rows of each destination.
    pub group_offsets: Vec<u32>,
    /// `[S]`: the source of each row.
    pub row_source: Vec<u32>,
    /// `[sources + 1]` offsets into `source_rows`.
    pub source_offsets: Vec<u32>,
    /// `[S]`: rows of each source, groups ascending: the order of additions of the merge.
    pub source_rows: Vec<u32>,
    /// `[S + 1]`: pairs of each row.
    pub pair_offsets: Vec<u32>,
    /// `[P]`: expert of each pair, as the destination numbers them, ascending in a row.
    pub ids: Vec<u16>,
    /// `[P]`: the source's pair behind each pair. A permutation.
    pub entry_idx: Vec<u32>,
}

/// A (source, expert) pair on its way: where to, as which expert, and which pair of the source it is.
#[derive(Debug, Clone, Copy)]
struct Pair {
    group: u32,
    id: u16,
    entry: u32,
}

impl RowPlan {
    /// One row per (token, rank), of some consecutive tokens: of all of them, a plan of occult-plan as it is.
    pub fn dedup(plan: &DispatchPlan, tokens: Range<usize>) -> Self {
        if tokens.len() != plan.num_tokens() {
            let (offsets, pairs) = pairs_by_token(plan, tokens, |rank, id| (u32::from(rank), id));
            return Self::group(plan.num_ranks(), &offsets, &pairs, false);
        }
        Self {
            group_offsets: plan.rank_offsets().to_vec(),
            row_source: plan.row_token().to_vec(),
            source_offsets: plan.token_offsets().to_vec(),
            source_rows: plan.token_rows().to_vec(),
            pair_offsets: plan.row_experts().offsets().to_vec(),
            ids: plan.row_experts().local_experts().to_vec(),
            entry_idx: plan.entry_idx().to_vec(),
        }
    }

    /// One row per (token, expert): what conventional frameworks send. Additions of a token: ranks ascending, then
    /// experts ascending.
    pub fn conventional(plan: &DispatchPlan, tokens: Range<usize>) -> Self {
        let (offsets, pairs) = pairs_by_token(plan, tokens, |rank, id| (u32::from(rank), id));
        Self::group(plan.num_ranks(), &offsets, &pairs, true)
    }

    /// One row per (token, node); ids are the node's slots ([`NodeSlots`]).
    pub(crate) fn per_node(plan: &DispatchPlan, tokens: Range<usize>, slots: &NodeSlots) -> Self {
        let (offsets, pairs) = pairs_by_token(plan, tokens, |rank, id| {
            (slots.topology.node_of(rank) as u32, slots.base[usize::from(rank)] + id)
        });
        Self::group(slots.topology.num_nodes(), &offsets, &pairs, false)
    }

    /// The second hop of the two-level exchange: rows that arrived at this rank for its node, to the ranks of the node.
    pub(crate) fn within_node(received: &RowExperts, node: usize, slots: &NodeSlots) -> Result<Self> {
        let homes = slots.homes_of(node);
        let mut pairs = Vec::with_capacity(received.num_pairs());
        for (entry, &slot) in (0u32..).zip(received.local_experts()) {
            let Some(&(group, id)) = homes.get(usize::from(slot)) else {
                return Err(MoeError::argument("slot of a forwarded row", homes.len(), slot));
            };
            pairs.push(Pair { group, id, entry });
        }
        for row in received.offsets().windows(2) {
            let row = &received.local_experts()[row[0] as usize..row[1] as usize];
            if !row.is_sorted_by(|a, b| a < b) {
                return Err(MoeError::argument("slots of a forwarded row", "ascending", format!("{row:?}")));
            }
        }
        Ok(Self::group(slots.topology.ranks_per_node(), received.offsets(), &pairs, false))
    }

    /// Groups the pairs of every source (groups ascending, then ids) into rows: one per (source, group), or one per pair.
    fn group(num_groups: usize, offsets: &[u32], pairs: &[Pair], row_per_pair: bool) -> Self {
        let sources = || offsets.windows(2).map(|o| &pairs[o[0] as usize..o[1] as usize]);
        let starts_row = |i: usize, of: &[Pair]| row_per_pair || i == 0 || of[i - 1].group != of[i].group;
        // Rows and pairs of every group, then where each group starts.
        let mut cursors = vec![[0u32; 2]; num_groups];
        for of in sources() {
            for (i, pair) in of.iter().enumerate() {
                let [rows, pairs] = &mut cursors[pair.group as usize];
                *rows += u32::from(starts_row(i, of));
                *pairs += 1;
            }
        }
        let (mut rows, mut num_pairs) = (0, 0);
        let mut plan = Self { group_offsets: vec![0], source_offsets: vec![0], ..Self::default() };
        for cursor in &mut cursors {
            let [r, p] = *cursor;
            *cursor = [rows, num_pairs];
            (rows, num_pairs) = (rows + r, num_pairs + p);
            plan.group_offsets.push(rows);
        }
        plan.row_source = vec![0; rows as usize];
        plan.source_rows = Vec::with_capacity(rows as usize);
        plan.pair_offsets = vec![0; rows as usize + 1];
        plan.ids = vec![0; pairs.len()];
        plan.entry_idx = vec![0; pairs.len()];
        for (source, of) in sources().enumerate() {
            for (i, pair) in of.iter().enumerate() {
                let [row, at] = &mut cursors[pair.group as usize];
                if starts_row(i, of) {
                    plan.row_source[*row as usize] = source as u32;
                    plan.source_rows.push(*row);
                    *row += 1;
                }
                plan.ids[*at as usize] = pair.id;
                plan.entry_idx[*at as usize] = pair.entry;
                *at += 1;
                plan.pair_offsets[*row as usize] = *at;
            }
            plan.source_offsets.push(plan.source_rows.len() as u32);
        }
        plan
    }

    /// Number of sources.
    pub fn num_sources(&self) -> usize {
        self.source_offsets.len().saturating_sub(1)
    }

    /// `S`.
    pub fn num_rows(&self) -> usize {
        self.row_source.len()
    }

    /// `P`.
    pub fn num_pairs(&self) -> usize {
        self.ids.len()
    }

    /// Rows and pairs for each destination, `[G]`.
    pub fn counts(&self) -> Vec<[u32; 2]> {
        let pairs = |row: u32| self.pair_offsets.get(row as usize).copied().unwrap_or(0);
        self.group_offsets.windows(2).map(|o| [o[1] - o[0], pairs(o[1]) - pairs(o[0])]).collect()
    }

    /// Appends the sums of the returned rows `[S, D]` of every source in the stated order, `[sources, D]`.
    pub(crate) fn merge(&self, rows: &[f32], d: usize, out: &mut Vec<f32>) -> Result<()> {
        room::reserve("sums of the rows that returned", out, self.num_sources() * d)?;
        for of in self.source_offsets.windows(2) {
            let start = out.len();
            match self.source_rows[of[0] as usize..of[1] as usize] {
                [] => out.resize(start + d, 0.0),
                [first, ref rest @ ..] => {
                    out.extend_from_slice(&rows[first as usize * d..][..d]);
                    for &row in rest {
                        for (y, v) in out[start..].iter_mut().zip(&rows[row as usize * d..][..d]) {
                            *y += v;
                        }
                    }
                }
            }
        }
        Ok(())
    }

    /// Values of this hop's pairs `[P]`, put where the source has its pairs.
    pub(crate) fn to_entries(&self, values: &[f32]) -> Vec<f32> {
        let mut out = vec![0.0; values.len()];
        for (&entry, &value) in self.entry_idx.iter().zip(values) {
            out[entry as usize] = value;
        }
        out
    }
}

/// The pairs of some tokens, ranks ascending, then experts; with offsets. Entries count from the first of these tokens.
fn pairs_by_token(
    plan: &DispatchPlan,
    tokens: Range<usize>,
    to: impl Fn(Rank, u16) -> (u32, u16),
) -> (Vec<u32>, Vec<Pair>) {
    let top_k = plan.entry_idx().len().checked_div(plan.num_tokens()).unwrap_or(0);
    let first_entry = (tokens.start * top_k) as u32;
    let mut rank_of_row = vec![0; plan.num_rows()];
    for rank in 0..plan.num_ranks() {
        rank_of_row[plan.rows_for(rank as Rank)].fill(rank as Rank);
    }
    let experts = plan.row_experts();
    let (mut offsets, mut pairs) = (vec![0], Vec::with_capacity(experts.num_pairs()));
    for rows in plan.token_offsets()[tokens.start..=tokens.end].windows(2) {
        for &row in &plan.token_rows()[rows[0] as usize..rows[1] as usize] {
            let row = row as usize;
            for pair in experts.pairs(row..row + 1) {
                let (group, id) = to(rank_of_row[row], experts.local_experts()[pair]);
                pairs.push(Pair { group, id, entry: plan.entry_idx()[pair] - first_entry });
            }
        }
        offsets.push(pairs.len() as u32);
    }
    (offsets, pairs)
}

/// Numbers of the experts of a node: those of its first rank, then of its second, and so on.
#[derive(Debug, Clone)]
pub(crate) struct NodeSlots {
    pub(crate) topology: Topology,
    /// `[W]`: the first slot of each rank in its node.
    base: Vec<u16>,
    /// `[W]`: experts of each rank.
    sizes: Vec<u16>,
}

impl NodeSlots {
    pub(crate) fn new(placement: &LayerPlacement, topology: Topology) -> Result<Self> {
        let (mut base, mut sizes) = (Vec::new(), Vec::new());
        let mut next = 0usize;
        for rank in 0..topology.num_ranks() {
            if rank % topology.ranks_per_node() == 0 {
                next = 0;
            }
            let size = placement.experts_of(rank as Rank).len();
            base.push(next as u16);
            sizes.push(size as u16);
            next += size;
            check_experts(next)?;
        }
        Ok(Self { topology, base, sizes })
    }

    /// Rank in the node, and local expert there, of every slot.
    fn homes_of(&self, node: usize) -> Vec<(u32, u16)> {
        let per_node = self.topology.ranks_per_node();
        let ranks = (0u32..).zip(&self.sizes[node * per_node..(node + 1) * per_node]);
        ranks.flat_map(|(rank, &size)| (0..size).map(move |id| (rank, id))).collect()
    }
}

/// Ids must leave [`LAST_OF_ROW`] free.
pub(crate) fn check_experts(num_experts: usize) -> Result<()> {
    if num_experts < usize::from(LAST_OF_ROW) {
        return Ok(());
    }
    Err(MoeError::argument("experts at one place", format!("below {LAST_OF_ROW}"), num_experts))
}

//! Who gets a copy of which token: the sender's side of a layer, deduplicated to one row per (token, rank).

mod order;
mod row_experts;

use std::ops::Range;

use crate::{Brim, LayerPlacement, LocalExpert, PlanError, Rank, ReplicaChooser, Result, Routing, Topology};
use order::SlotOrder;
pub use row_experts::RowExperts;

/// What one rank sends in one layer.
///
/// An SFD row is one (token, rank) pair. Rows are grouped by destination rank, ascending, and stand in token order
/// within a rank; so a rank's rows are contiguous and their number is the send count. The same tables read the other way
/// are the combine: which returned rows belong to a token, ranks ascending.
///
/// Every row carries its local experts (ascending, as numbered by the destination) and their weights: [`RowExperts`].
#[derive(Debug, Clone, Default)]
pub struct DispatchPlan {
    brim: Brim,
    row_experts: RowExperts,
    entry_idx: Vec<u32>,
    scratch: Scratch,
}

#[derive(Debug, Clone, Default)]
struct Scratch {
    /// Physical slot of every entry, `[T, K]`. Slots are numbered rank after rank, experts ascending within a rank.
    slots: Vec<u32>,
    /// Slot of each expert, `[E]`; used when nothing is replicated.
    expert_slot: Vec<u32>,
    /// Rank and local expert of each slot.
    homes: Vec<(Rank, LocalExpert)>,
    ranks: Vec<RankCursor>,
    chosen: Vec<Rank>,
    order: SlotOrder,
}

#[derive(Debug, Clone, Copy, Default)]
struct RankCursor {
    first_slot: u32,
    rows: u32,
    pairs: u32,
    last_token: u32,
}

/// Two plans are equal when they send the same; working memory does not count.
impl PartialEq for DispatchPlan {
    fn eq(&self, other: &Self) -> bool {
        self.brim == other.brim && self.row_experts == other.row_experts && self.entry_idx == other.entry_idx
    }
}

impl DispatchPlan {
    /// Plans the dispatch of `routing`'s tokens (each row is one token; its `occurrences` are not used).
    ///
    /// Where an expert has replicas, a [`ReplicaChooser`] that starts without load picks the rank, so the plan depends on
    /// its arguments only. Errors when the placement is not one of these experts on the topology's ranks, and when there
    /// are more than `u32::MAX` (token, expert) pairs.
    pub fn build(routing: &Routing<'_>, placement: &LayerPlacement, topology: Topology) -> Result<Self> {
        let mut plan = Self::default();
        plan.build_into(routing, placement, topology)?;
        Ok(plan)
    }

    /// Like [`DispatchPlan::build`], in the memory of an earlier plan: without replicas a warm training step allocates
    /// nothing. The plan is left as it was when there is an error.
    pub fn build_into(
        &mut self,
        routing: &Routing<'_>,
        placement: &LayerPlacement,
        topology: Topology,
    ) -> Result<()> {
        check(routing, placement, topology)?;
        self.scratch.set_homes(placement);
        self.scratch.set_slots(routing, placement, topology);
        let num_rows = self.count(routing);
        self.fill(routing, num_rows);
        Ok(())
    }

    /// Counts rows and pairs of every rank, then turns the counts into the place where each rank starts.
    fn count(&mut self, routing: &Routing<'_>) -> usize {
        let Scratch { slots, homes, ranks, .. } = &mut self.scratch;
        for (token, slots) in slots.chunks_exact(routing.top_k()).enumerate() {
            for &slot in slots {
                let rank = &mut ranks[usize::from(homes[slot as usize].0)];
                // `last_token` starts at u32::MAX, which is never a token: there are fewer than u32::MAX.
                rank.rows += u32::from(rank.last_token != token as u32);
                rank.last_token = token as u32;
                rank.pairs += 1;
            }
        }
        let (mut rows, mut pairs) = (0, 0);
        self.brim.group_offsets.clear();
        self.brim.group_offsets.push(0);
        for rank in ranks {
            (rank.rows, rows) = (rows, rows + rank.rows);
            (rank.pairs, pairs) = (pairs, pairs + rank.pairs);
            self.brim.group_offsets.push(rows);
        }
        rows as usize
    }

    /// Writes every table. Nothing in here branches on the routing: what a row's later pairs write again is either the
    /// same value or the one that has to stand.
    fn fill(&mut self, routing: &Routing<'_>, num_rows: usize) {
        let Self { brim, row_experts, entry_idx, scratch } = self;
        let (top_k, num_pairs) = (routing.top_k(), routing.expert_ids().len());
        let Scratch { slots, homes, ranks, order, .. } = scratch;
        brim.scatter_idx.resize(num_rows, 0);
        brim.merge_idx.resize(num_rows, 0);
        brim.merge_offsets.clear();
        brim.merge_offsets.push(0);
        row_experts.offsets.resize(num_rows + 1, 0);
        row_experts.local_experts.resize(num_pairs, 0);
        entry_idx.resize(num_pairs, 0);
        order.reset(homes.len());

        let (scatter_idx, merge_idx) = (&mut brim.scatter_idx[..], &mut brim.merge_idx[..]);
        let row_ends = &mut row_experts.offsets[1..];
        let (local_experts, entry_idx) = (&mut row_experts.local_experts[..], &mut entry_idx[..]);
        let mut merged = 0;
        for (token, slots) in slots.chunks_exact(top_k).enumerate() {
            let mut previous = None;
            order.for_each(slots, (token * top_k) as u32, |slot, entry| {
                let (rank, local) = homes[slot];
                let cursor = &mut ranks[usize::from(rank)];
                let starts_row = u32::from(previous != Some(rank));
                previous = Some(rank);
                cursor.rows += starts_row;
                merged += starts_row;
                let (row, pair) = (cursor.rows - 1, cursor.pairs as usize);
                cursor.pairs += 1;
                scatter_idx[row as usize] = token as u32;
                merge_idx[merged as usize - 1] = row;
                row_ends[row as usize] = cursor.pairs;
                local_experts[pair] = local;
                entry_idx[pair] = entry;
            });
            brim.merge_offsets.push(merged);
        }
        row_experts.weights.clear();
        if let Some(weights) = routing.weights() {
            row_experts.weights.extend(entry_idx.iter().map(|&entry| weights[entry as usize]));
        }
    }

    /// BRIM_0: sources are tokens, targets are SFD rows, groups are ranks.
    pub fn brim(&self) -> &Brim {
        &self.brim
    }

    /// `T`.
    pub fn num_tokens(&self) -> usize {
        self.brim.num_sources()
    }

    /// `W`.
    pub fn num_ranks(&self) -> usize {
        self.brim.num_groups()
    }

    /// `S`, the rows sent to all ranks, the own rank included.
    pub fn num_rows(&self) -> usize {
        self.brim.num_targets()
    }

    /// `[W + 1]`: the rows for each rank.
    pub fn rank_offsets(&self) -> &[u32] {
        self.brim.group_offsets()
    }

    /// The rows for one rank: as many are sent to it. Panics when there is no such rank.
    pub fn rows_for(&self, rank: Rank) -> Range<usize> {
        self.brim.group(usize::from(rank))
    }

    /// `[S]`: the token of each row.
    pub fn row_token(&self) -> &[u32] {
        self.brim.scatter_idx()
    }

    /// `[T + 1]` offsets into [`DispatchPlan::token_rows`].
    pub fn token_offsets(&self) -> &[u32] {
        self.brim.merge_offsets()
    }

    /// `[S]`: the rows of each token, ranks ascending. The order of additions in the combine.
    pub fn token_rows(&self) -> &[u32] {
        self.brim.merge_idx()
    }

    /// The local experts and weights that travel with each row.
    pub fn row_experts(&self) -> &RowExperts {
        &self.row_experts
    }

    /// `[T * K]`: for each (row, expert) pair of [`DispatchPlan::row_experts`] its entry in the routing's `[T, K]`
    /// arrays. A permutation; gradients of routing weights come back through it.
    pub fn entry_idx(&self) -> &[u32] {
        &self.entry_idx
    }
}

impl Scratch {
    fn set_homes(&mut self, placement: &LayerPlacement) {
        self.homes.clear();
        self.ranks.clear();
        for rank in 0..placement.num_ranks() as Rank {
            let first_slot = self.homes.len() as u32;
            self.ranks.push(RankCursor { first_slot, last_token: u32::MAX, ..RankCursor::default() });
            self.homes
                .extend((0..placement.experts_of(rank).len()).map(|local| (rank, local as LocalExpert)));
        }
    }

    fn set_slots(&mut self, routing: &Routing<'_>, placement: &LayerPlacement, topology: Topology) {
        self.slots.clear();
        if placement.has_replicas() {
            let mut chooser = ReplicaChooser::new(placement, topology);
            self.chosen.resize(routing.top_k(), 0);
            for ids in routing.rows() {
                chooser.assign(ids, 1, &mut self.chosen);
                for (&id, &rank) in ids.iter().zip(&self.chosen) {
                    let local = placement.experts_of(rank).partition_point(|&e| e < id);
                    self.slots.push(self.ranks[usize::from(rank)].first_slot + local as u32);
                }
            }
            return;
        }
        self.expert_slot.resize(placement.num_experts(), 0);
        let experts = (0..placement.num_ranks() as Rank).flat_map(|rank| placement.experts_of(rank));
        for (&expert, slot) in experts.zip(0..) {
            self.expert_slot[usize::from(expert)] = slot;
        }
        self.slots.extend(routing.expert_ids().iter().map(|&id| self.expert_slot[usize::from(id)]));
    }
}

fn check(routing: &Routing<'_>, placement: &LayerPlacement, topology: Topology) -> Result<()> {
    check_placement(routing, placement, topology)?;
    if u32::try_from(routing.expert_ids().len()).is_err() {
        let found = routing.expert_ids().len();
        return Err(PlanError::range(
            "number of (token, expert) pairs",
            format!("at most {}", u32::MAX),
            found,
        ));
    }
    Ok(())
}

/// The placement must be one of the routing's experts on the topology's ranks.
pub(crate) fn check_placement(
    routing: &Routing<'_>,
    placement: &LayerPlacement,
    topology: Topology,
) -> Result<()> {
    if placement.num_experts() != routing.num_experts() {
        let (of, routed) = (placement.num_experts(), routing.num_experts());
        return Err(PlanError::Placement(format!("it is of {of} experts, the routing is of {routed}")));
    }
    if placement.num_ranks() != topology.num_ranks() {
        let (of, ranks) = (placement.num_ranks(), topology.num_ranks());
        return Err(PlanError::Placement(format!("it is on {of} ranks, the topology has {ranks}")));
    }
    Ok(())
}

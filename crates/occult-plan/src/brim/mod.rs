//! BRIM, the bidirectional re-index matrix: how rows of one state become rows of the next, and come back.
//!
//! `brim.md`, beside this file, has the picture and the example. A BRIM connects *source* rows (few) with *target* rows
//! (more), and its targets belong to groups:
//!
//! | | sources | targets | groups | built by |
//! |---|---|---|---|---|
//! | BRIM_0 | ORI: the tokens of this rank | SFD: one row per (token, rank) | destination ranks | [`DispatchPlan`](crate::DispatchPlan) |
//! | BRIM_1 | SFD: the rows received | EPD: one row per (SFD row, local expert) | local experts | [`ExpertRows`] |
//!
//! *scatter* reads sources and writes targets; *merge* reads targets and adds them into sources. The matrix by which the
//! paper defines a BRIM is almost empty, so [`Brim`] keeps it condensed, as index lists in both directions;
//! [`DenseBrim`] is the definition.

mod dense;
mod expert_rows;

use std::ops::Range;

pub use dense::DenseBrim;
pub use expert_rows::ExpertRows;

/// A re-index matrix, condensed: index lists for both directions.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Brim {
    pub(crate) group_offsets: Vec<u32>,
    pub(crate) scatter_idx: Vec<u32>,
    pub(crate) merge_offsets: Vec<u32>,
    pub(crate) merge_idx: Vec<u32>,
}

impl Brim {
    /// Number of groups: ranks, or local experts.
    pub fn num_groups(&self) -> usize {
        self.group_offsets.len().saturating_sub(1)
    }

    /// Number of source rows, the few.
    pub fn num_sources(&self) -> usize {
        self.merge_offsets.len().saturating_sub(1)
    }

    /// Number of target rows, the many.
    pub fn num_targets(&self) -> usize {
        self.scatter_idx.len()
    }

    /// `[groups + 1]`: group `g` owns the target rows `group_offsets[g]..group_offsets[g + 1]`. Empty before the first
    /// build.
    pub fn group_offsets(&self) -> &[u32] {
        &self.group_offsets
    }

    /// `[targets]`: the source row that each target row is a copy of. Ascending within a group.
    pub fn scatter_idx(&self) -> &[u32] {
        &self.scatter_idx
    }

    /// `[sources + 1]` offsets into [`Brim::merge_idx`]. Empty before the first build.
    pub fn merge_offsets(&self) -> &[u32] {
        &self.merge_offsets
    }

    /// `[targets]`: the target rows of each source row, groups ascending. The order of additions when merging.
    pub fn merge_idx(&self) -> &[u32] {
        &self.merge_idx
    }

    /// Target rows of a group. Panics when there is no such group.
    pub fn group(&self, group: usize) -> Range<usize> {
        self.group_offsets[group] as usize..self.group_offsets[group + 1] as usize
    }

    /// Target rows of a source row, groups ascending. Panics when there is no such row.
    pub fn targets_of(&self, source: usize) -> &[u32] {
        &self.merge_idx[self.merge_offsets[source] as usize..self.merge_offsets[source + 1] as usize]
    }
}

//! What travels with every row: the experts it is for, and their weights.

use std::ops::Range;

use crate::{LocalExpert, PlanError, Result};

/// Local experts and routing weights of SFD rows, as (row, expert) *pairs*: row after row, experts ascending in a row.
///
/// The sender's is part of its [`DispatchPlan`](crate::DispatchPlan); the receiver [appends](RowExperts::append) what
/// arrives from each rank, ranks ascending.
#[derive(Debug, Clone, PartialEq)]
pub struct RowExperts {
    pub(super) offsets: Vec<u32>,
    pub(super) local_experts: Vec<LocalExpert>,
    pub(super) weights: Vec<f32>,
}

impl Default for RowExperts {
    fn default() -> Self {
        Self { offsets: vec![0], local_experts: Vec::new(), weights: Vec::new() }
    }
}

impl RowExperts {
    /// No rows.
    pub fn new() -> Self {
        Self::default()
    }

    /// Number of SFD rows.
    pub fn num_rows(&self) -> usize {
        self.offsets.len() - 1
    }

    /// Number of (row, expert) pairs.
    pub fn num_pairs(&self) -> usize {
        self.local_experts.len()
    }

    /// `[rows + 1]` offsets into the pairs.
    pub fn offsets(&self) -> &[u32] {
        &self.offsets
    }

    /// `[pairs]` experts by their position on the rank that the row is for.
    pub fn local_experts(&self) -> &[LocalExpert] {
        &self.local_experts
    }

    /// `[pairs]` routing weights; empty when the routing has none.
    pub fn weights(&self) -> &[f32] {
        &self.weights
    }

    /// Number of experts of each of these rows. Panics when there are no such rows.
    pub fn counts(&self, rows: Range<usize>) -> impl ExactSizeIterator<Item = u32> + '_ {
        self.offsets[rows.start..=rows.end].windows(2).map(|o| o[1] - o[0])
    }

    /// The pairs of consecutive rows. Panics when there are no such rows.
    pub fn pairs(&self, rows: Range<usize>) -> Range<usize> {
        self.offsets[rows.start] as usize..self.offsets[rows.end] as usize
    }

    /// Forgets all rows, keeps the memory.
    pub fn clear(&mut self) {
        self.offsets.truncate(1);
        self.local_experts.clear();
        self.weights.clear();
    }

    /// Adds the rows that came from one rank: the number of experts of each row, then all their pairs.
    ///
    /// `weights` is as long as `local_experts`, or empty in every call. An error leaves `self` as it was.
    pub fn append(
        &mut self,
        counts: impl IntoIterator<Item = u32>,
        local_experts: &[LocalExpert],
        weights: &[f32],
    ) -> Result<()> {
        let (num_rows, start) = (self.num_rows(), self.num_pairs());
        let without = weights.is_empty() && self.weights.is_empty();
        if !without && (weights.len() != local_experts.len() || self.weights.len() != start) {
            let (expected, found) = (start + local_experts.len(), self.weights.len() + weights.len());
            return Err(PlanError::Shape { what: "weights of the rows received", expected, found });
        }
        let mut end = Some(start as u32);
        for count in counts {
            end = end.and_then(|end| end.checked_add(count));
            self.offsets.push(end.unwrap_or(0));
        }
        let expected = end.map_or(u32::MAX as usize, |end| end as usize);
        let found = start + local_experts.len();
        if end.is_none() || expected != found {
            self.offsets.truncate(num_rows + 1);
            return Err(PlanError::Shape { what: "local experts of the rows received", expected, found });
        }
        self.local_experts.extend_from_slice(local_experts);
        self.weights.extend_from_slice(weights);
        Ok(())
    }
}

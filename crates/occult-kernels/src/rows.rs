use std::ops::Range;

use crate::{KernelError, Result};

/// The rows each expert works on: what a sparse matmul has to know about routing.
///
/// Expanded rows are grouped by expert; expanded row `n` reads, or adds into, row `row_idx[n]` of the R received rows.
/// Within an expert `row_idx` ascends strictly, so an expert meets a row at most once and merging has a stated order:
/// experts ascending.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SparseRows {
    num_rows: usize,
    expert_offsets: Vec<u32>,
    row_idx: Vec<u32>,
}

impl SparseRows {
    /// Checks the tables and takes them.
    ///
    /// - `num_rows`: R
    /// - `expert_offsets` `[e + 1]`: expanded rows of expert i are `expert_offsets[i] .. expert_offsets[i + 1]`
    /// - `row_idx` `[N]`
    ///
    /// # Errors
    /// [`KernelError::Rows`] when the offsets do not rise from 0 to N, a row is outside R, or rows of an expert do not
    /// ascend strictly.
    pub fn new(num_rows: usize, expert_offsets: Vec<u32>, row_idx: Vec<u32>) -> Result<Self> {
        let refuse = |reason: String| Err(KernelError::Rows { reason });
        if expert_offsets.first() != Some(&0) {
            return refuse("expert_offsets must start with 0".to_owned());
        }
        if expert_offsets.last().map(|&last| last as usize) != Some(row_idx.len()) {
            return refuse(format!("expert_offsets must end with the {} expanded rows", row_idx.len()));
        }
        for (expert, bounds) in expert_offsets.windows(2).enumerate() {
            if bounds[0] > bounds[1] {
                return refuse(format!("expert_offsets fall after expert {expert}"));
            }
            let rows = &row_idx[bounds[0] as usize..bounds[1] as usize];
            if rows.windows(2).any(|pair| pair[0] >= pair[1]) {
                return refuse(format!("rows of expert {expert} do not ascend strictly"));
            }
            if let Some(&last) = rows.last().filter(|&&last| last as usize >= num_rows) {
                return refuse(format!("expert {expert} reads row {last} of {num_rows}"));
            }
        }
        Ok(Self { num_rows, expert_offsets, row_idx })
    }

    /// R: rows received.
    #[must_use]
    pub fn num_rows(&self) -> usize {
        self.num_rows
    }

    /// e: experts.
    #[must_use]
    pub fn num_experts(&self) -> usize {
        self.expert_offsets.len() - 1
    }

    /// N: expanded rows.
    #[must_use]
    pub fn num_expanded(&self) -> usize {
        self.row_idx.len()
    }

    /// `[e + 1]`: where the expanded rows of an expert begin.
    #[must_use]
    pub fn expert_offsets(&self) -> &[u32] {
        &self.expert_offsets
    }

    /// `[N]`: the received row of each expanded row.
    #[must_use]
    pub fn row_idx(&self) -> &[u32] {
        &self.row_idx
    }

    /// The expanded rows of `expert`.
    ///
    /// # Panics
    /// When there is no such expert.
    #[must_use]
    pub fn expanded_of(&self, expert: usize) -> Range<usize> {
        self.expert_offsets[expert] as usize..self.expert_offsets[expert + 1] as usize
    }

    /// Received rows that `expert` works on, ascending.
    ///
    /// # Panics
    /// When there is no such expert.
    #[must_use]
    pub fn rows_of(&self, expert: usize) -> &[u32] {
        &self.row_idx[self.expanded_of(expert)]
    }
}

//! BRIM_1: the receiver's rows, expanded to one row per local expert.

use super::Brim;
use crate::{PlanError, Result, dispatch_plan::RowExperts};

/// BRIM_1 of one rank: SFD rows received -> EPD rows grouped by local expert.
///
/// Expert `i` of this rank computes the EPD rows `expert_offsets()[i]..expert_offsets()[i + 1]`; within an expert they
/// are in the order in which the SFD rows arrived.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ExpertRows {
    brim: Brim,
    pair_idx: Vec<u32>,
    next: Vec<u32>,
}

impl ExpertRows {
    /// Builds BRIM_1 from the local experts that travelled with `received`'s rows. See [`ExpertRows::build_into`].
    pub fn build(num_local_experts: usize, received: &RowExperts) -> Result<Self> {
        let mut rows = Self::default();
        rows.build_into(num_local_experts, received)?;
        Ok(rows)
    }

    /// Like [`ExpertRows::build`], in the memory of an earlier build: a warm training step allocates nothing.
    ///
    /// A counting sort, linear in the number of pairs. Errors when a local expert is not below `num_local_experts` or
    /// the experts of a row do not ascend; the contents are those of an empty build then.
    pub fn build_into(&mut self, num_local_experts: usize, received: &RowExperts) -> Result<()> {
        let result = self.try_build(num_local_experts, received);
        if result.is_err() {
            *self = Self::default();
        }
        result
    }

    fn try_build(&mut self, num_local_experts: usize, received: &RowExperts) -> Result<()> {
        let (offsets, experts) = (received.offsets(), received.local_experts());
        let brim = &mut self.brim;

        // Count one place to the right, so that the prefix sum below leaves the start of each expert.
        self.next.clear();
        self.next.resize(num_local_experts + 1, 0);
        for (pair, &expert) in experts.iter().enumerate() {
            match self.next.get_mut(usize::from(expert) + 1) {
                Some(n) => *n += 1,
                None => return Err(out_of_range(received, pair, num_local_experts)),
            }
        }
        for i in 1..=num_local_experts {
            self.next[i] += self.next[i - 1];
        }
        brim.group_offsets.clone_from(&self.next);

        // A row's pairs stand in ascending expert order, so the pairs themselves are the merge order.
        brim.merge_offsets.clear();
        brim.merge_offsets.extend_from_slice(offsets);
        brim.merge_idx.resize(experts.len(), 0);
        brim.scatter_idx.resize(experts.len(), 0);
        self.pair_idx.resize(experts.len(), 0);
        let mut pair = 0;
        for (row, &end) in offsets[1..].iter().enumerate() {
            let mut previous = None;
            for &expert in &experts[pair..end as usize] {
                if previous >= Some(expert) {
                    return Err(not_ascending(row, previous, expert));
                }
                previous = Some(expert);
                let target = self.next[usize::from(expert)];
                self.next[usize::from(expert)] += 1;
                brim.merge_idx[pair] = target;
                brim.scatter_idx[target as usize] = row as u32;
                self.pair_idx[target as usize] = pair as u32;
                pair += 1;
            }
        }
        Ok(())
    }

    /// BRIM_1: sources are SFD rows, targets are EPD rows, groups are local experts.
    pub fn brim(&self) -> &Brim {
        &self.brim
    }

    /// `[e + 1]`: the EPD rows of each local expert.
    pub fn expert_offsets(&self) -> &[u32] {
        self.brim.group_offsets()
    }

    /// `[N]`: for each EPD row its (row, expert) pair, the index into [`RowExperts::local_experts`] and
    /// [`RowExperts::weights`]. Gradients of routing weights go back to the sender in that order.
    pub fn pair_idx(&self) -> &[u32] {
        &self.pair_idx
    }
}

#[cold]
fn out_of_range(received: &RowExperts, pair: usize, num_experts: usize) -> PlanError {
    let row = received.offsets().partition_point(|&o| o as usize <= pair).saturating_sub(1);
    PlanError::ExpertOutOfRange { row, id: i64::from(received.local_experts()[pair]), num_experts }
}

#[cold]
fn not_ascending(row: usize, previous: Option<u16>, expert: u16) -> PlanError {
    let found = format!("{expert} after {} in row {row}", previous.unwrap_or_default());
    PlanError::range("order of a received row's local experts", "ascending", found)
}

use std::sync::Arc;

use candle_core::{Device, Result, Tensor, bail};

use super::ABSENT;
use crate::SparseRows;

/// A routing turned around: from tokens with experts to experts with tokens, all on one rank.
#[derive(Debug, Clone)]
pub struct Grouped {
    /// R = T rows, N = choices that are there.
    pub rows: Arc<SparseRows>,
    /// `[N]`: the place in `[T, K]` that each expanded row comes from.
    pub slots: Vec<u32>,
}

impl Grouped {
    /// Groups `expert_ids` `[T, K]`, which may hold [`ABSENT`].
    ///
    /// # Errors
    /// Ids outside `num_experts`, an expert twice in a token, a number of ids that is no multiple of `top_k`.
    pub fn new(expert_ids: &[u32], top_k: usize, num_experts: usize) -> Result<Self> {
        if top_k == 0 || expert_ids.len() % top_k != 0 || u32::try_from(expert_ids.len()).is_err() {
            bail!("router: {} ids of tokens of {top_k}", expert_ids.len());
        }
        let there = || expert_ids.iter().enumerate().filter(|(_, id)| **id != ABSENT);
        let mut offsets = vec![0u32; num_experts + 1];
        for (_, &id) in there() {
            match offsets.get_mut(id as usize + 1) {
                Some(count) => *count += 1,
                None => bail!("router: expert {id} of {num_experts}"),
            }
        }
        for e in 0..num_experts {
            offsets[e + 1] += offsets[e];
        }
        let mut next = offsets.clone();
        let mut slots = vec![0u32; offsets[num_experts] as usize];
        for (slot, &id) in there() {
            slots[next[id as usize] as usize] = slot as u32;
            next[id as usize] += 1;
        }
        let row_idx = slots.iter().map(|slot| slot / top_k as u32).collect();
        let rows =
            SparseRows::new(expert_ids.len() / top_k, offsets, row_idx).map_err(crate::ops::tensor::core)?;
        Ok(Self { rows: Arc::new(rows), slots })
    }

    /// Routing weights `[T, K]` as row weights `[N]`, differentiable.
    ///
    /// # Errors
    /// Weights of another routing.
    pub fn row_weights(&self, weights: &Tensor) -> Result<Tensor> {
        weights
            .flatten_all()?
            .index_select(&Tensor::from_slice(&self.slots, self.slots.len(), &Device::Cpu)?, 0)
    }
}

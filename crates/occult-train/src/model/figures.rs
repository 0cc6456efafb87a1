//! What a batch's routing says: copies per token, load.

use std::collections::BTreeMap;

use occult_plan::RoutingBuf;

use crate::balance::balancedness;
use crate::error::{Result, TrainError};
use crate::model::ranks::ExpertRanks;

/// Adds `C_T` (ranks a token visits, mean over tokens and layers), `rank_load` (rows of the busiest rank over the mean of
/// ranks, mean over layers) where the placement has several ranks, and `balancedness` of experts (mean over layers).
pub(super) fn routing(
    layers: &[RoutingBuf],
    ranks: &ExpertRanks,
    is_token: Option<&[bool]>,
    figures: &mut BTreeMap<String, f64>,
) -> Result<()> {
    let world = ranks.topology().num_ranks();
    let (mut copies, mut load, mut balance) = (0.0, 0.0, 0.0);
    for (moe_layer, routing) in layers.iter().enumerate() {
        let placement = ranks.layer(moe_layer)?;
        let first: Vec<usize> =
            (0..routing.num_experts).map(|e| usize::from(placement.first_rank_of(e as u16))).collect();
        let mut per_expert = vec![0u64; routing.num_experts];
        let mut per_rank = vec![0u64; world];
        let mut visits = 0u64;
        let mut tokens = 0u64;
        let mut seen = vec![usize::MAX; world];
        for (t, row) in routing.expert_ids.chunks_exact(routing.top_k.max(1)).enumerate() {
            if is_token.is_some_and(|m| !m.get(t).copied().unwrap_or(true)) {
                continue;
            }
            tokens += 1;
            for &e in row {
                let e = usize::from(e);
                let rank = first.get(e).copied().ok_or_else(|| TrainError::request("expert out of range"))?;
                per_expert[e] += 1;
                per_rank[rank] += 1;
                if std::mem::replace(&mut seen[rank], t) != t {
                    visits += 1;
                }
            }
        }
        copies += visits as f64 / tokens.max(1) as f64;
        load += balancedness(&per_rank).map_or(1.0, f64::recip);
        balance += balancedness(&per_expert).unwrap_or(1.0);
    }
    let n = layers.len().max(1) as f64;
    if world > 1 {
        figures.insert("C_T".into(), copies / n);
        figures.insert("rank_load".into(), load / n);
    }
    figures.insert("balancedness".into(), balance / n);
    Ok(())
}

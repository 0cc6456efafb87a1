//! What a batch's routing says: copies per token, load, and how far the router has moved away from the placement.

use std::collections::BTreeMap;

use occult_plan::{ExpertId, LayerPlacement, Rank, RoutingBuf};

use crate::balance::balancedness;
use crate::error::{Result, TrainError};
use crate::model::ranks::ExpertRanks;

/// Ranks a token visits, mean over tokens and layers.
pub(super) const COPIES: &str = "C_T";
/// Those it would visit if every expert that its routers chose were computed: what the placement does for the model now.
pub(super) const UNLIMITED: &str = "C_T_unlimited";
/// [`UNLIMITED`] over the value that it had at the first step, or that the placement promised.
pub(super) const DRIFT: &str = "C_T_drift";

/// Adds [`COPIES`], [`UNLIMITED`] and `rank_load` (rows of the busiest rank over the mean of ranks, mean over layers) where
/// the placement has several ranks, and `balancedness` of experts (mean over layers). `chosen`: per layer what the routers
/// chose, where a limit changed it. Returns the number of tokens, and those of every expert of every layer.
pub(super) fn routing(
    layers: &[RoutingBuf],
    chosen: &[Option<Vec<ExpertId>>],
    ranks: &ExpertRanks,
    is_token: Option<&[bool]>,
    figures: &mut BTreeMap<String, f64>,
) -> Result<(usize, Vec<Vec<u64>>)> {
    let world = ranks.topology().num_ranks();
    let (mut copies, mut unlimited, mut load, mut balance) = (0.0, 0.0, 0.0, 0.0);
    let (mut num_tokens, mut per_expert) = (0, Vec::with_capacity(layers.len()));
    for (moe_layer, routing) in layers.iter().enumerate() {
        let placement = ranks.layer(moe_layer)?;
        let counts = Counts::of(&routing.expert_ids, routing, placement, is_token)?;
        let visits = match chosen.get(moe_layer) {
            Some(Some(ids)) => Counts::of(ids, routing, placement, is_token)?.visits,
            _ => counts.visits,
        };
        num_tokens = counts.tokens;
        copies += counts.visits as f64 / counts.tokens.max(1) as f64;
        unlimited += visits as f64 / counts.tokens.max(1) as f64;
        load += balancedness(&counts.per_rank).map_or(1.0, f64::recip);
        balance += balancedness(&counts.per_expert).unwrap_or(1.0);
        per_expert.push(counts.per_expert);
    }
    let n = layers.len().max(1) as f64;
    if world > 1 {
        figures.insert(COPIES.into(), copies / n);
        figures.insert(UNLIMITED.into(), unlimited / n);
        figures.insert("rank_load".into(), load / n);
    }
    figures.insert("balancedness".into(), balance / n);
    Ok((num_tokens, per_expert))
}

/// One layer's routing under its placement.
pub(super) struct Counts {
    pub(super) tokens: usize,
    /// Ranks visited by all tokens.
    pub(super) visits: u64,
    per_expert: Vec<u64>,
    per_rank: Vec<u64>,
}

impl Counts {
    /// Of expert ids `[T, K]`, which are those of `routing` or what it was before a limit.
    pub(super) fn of(
        expert_ids: &[ExpertId],
        routing: &RoutingBuf,
        placement: &LayerPlacement,
        is_token: Option<&[bool]>,
    ) -> Result<Self> {
        let world = placement.num_ranks();
        let first: Vec<Rank> =
            (0..routing.num_experts).map(|e| placement.first_rank_of(e as ExpertId)).collect();
        let (mut tokens, mut visits) = (0, 0);
        let (mut per_expert, mut per_rank) = (vec![0u64; routing.num_experts], vec![0u64; world]);
        let mut seen = vec![usize::MAX; world];
        for (t, row) in expert_ids.chunks_exact(routing.top_k.max(1)).enumerate() {
            if is_token.is_some_and(|m| !m.get(t).copied().unwrap_or(true)) {
                continue;
            }
            tokens += 1;
            for &e in row {
                let e = usize::from(e);
                let rank = first.get(e).ok_or_else(|| TrainError::request("expert out of range"))?;
                let rank = usize::from(*rank);
                per_expert[e] += 1;
                per_rank[rank] += 1;
                if std::mem::replace(&mut seen[rank], t) != t {
                    visits += 1;
                }
            }
        }
        Ok(Self { tokens, visits, per_expert, per_rank })
    }
}

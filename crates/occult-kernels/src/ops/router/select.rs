use std::sync::Arc;

use candle_core::{Result, bail};

/// Which experts a token gets.
#[derive(Debug, Clone, PartialEq)]
pub struct Selection {
    /// K: experts of a token.
    pub top_k: usize,
    /// Only experts of the best groups can be chosen.
    pub groups: Option<Groups>,
    /// `[E]`, added to the scores for the choice only, not for the weights (DeepSeek-V3's balancing).
    pub bias: Option<Arc<[f32]>>,
}

/// Group-limited routing: equal groups of neighbouring experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Groups {
    /// All groups.
    pub num_groups: usize,
    /// Groups a token can use.
    pub top_groups: usize,
    /// What makes a group good.
    pub score: GroupScore,
}

/// What makes a group good.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GroupScore {
    /// Its best expert (DeepSeek-V2).
    Best,
    /// The sum of its two best experts (DeepSeek-V3).
    BestTwo,
}

/// `[T, K]` ids of the best experts by `scores` `[T, E]`, descending; of equal scores the lower id first.
///
/// # Errors
/// A score that is NaN; a choice that E or the groups do not allow.
pub fn select_experts(scores: &[f32], num_experts: usize, how: &Selection) -> Result<Vec<u32>> {
    check(scores.len(), num_experts, how)?;
    let mut chosen = Vec::with_capacity(scores.len() / num_experts * how.top_k);
    let mut choice = vec![0.0; num_experts];
    let mut order: Vec<u32> = Vec::with_capacity(num_experts);
    for (token, scores) in scores.chunks_exact(num_experts).enumerate() {
        choice.copy_from_slice(scores);
        if let Some(bias) = &how.bias {
            choice.iter_mut().zip(&bias[..]).for_each(|(c, b)| *c += b);
        }
        if let Some(expert) = choice.iter().position(|c| c.is_nan()) {
            bail!("router: the score of expert {expert} for token {token} is NaN");
        }
        if let Some(groups) = how.groups {
            leave_best_groups(&mut choice, groups);
        }
        order.clear();
        order.extend(0..num_experts as u32);
        let best = |a: &u32, b: &u32| choice[*b as usize].total_cmp(&choice[*a as usize]).then(a.cmp(b));
        if how.top_k < num_experts {
            order.select_nth_unstable_by(how.top_k - 1, best);
            order.truncate(how.top_k);
        }
        order.sort_unstable_by(best);
        chosen.extend_from_slice(&order);
    }
    Ok(chosen)
}

fn check(len: usize, num_experts: usize, how: &Selection) -> Result<()> {
    if num_experts == 0 || len % num_experts != 0 {
        bail!("router: {len} scores of {num_experts} experts");
    }
    if how.top_k == 0 || how.top_k > num_experts {
        bail!("router: {} of {num_experts} experts", how.top_k);
    }
    if how.bias.as_ref().is_some_and(|b| b.len() != num_experts) {
        bail!("router: a bias of another number of experts than {num_experts}");
    }
    if let Some(Groups { num_groups, top_groups, .. }) = how.groups {
        let fits = num_groups > 0 && num_experts % num_groups == 0 && top_groups <= num_groups;
        if !fits || top_groups * (num_experts / num_groups) < how.top_k {
            bail!("router: {top_groups} of {num_groups} groups for {} of {num_experts} experts", how.top_k);
        }
    }
    Ok(())
}

/// Takes the experts of all other groups out of the choice.
fn leave_best_groups(choice: &mut [f32], groups: Groups) {
    let size = choice.len() / groups.num_groups;
    let score = |group: &[f32]| {
        let (mut first, mut second) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
        for &score in group {
            if score > first {
                (first, second) = (score, first);
            } else if score > second {
                second = score;
            }
        }
        match groups.score {
            GroupScore::BestTwo if group.len() > 1 => first + second,
            _ => first,
        }
    };
    let scores: Vec<f32> = choice.chunks_exact(size).map(score).collect();
    let mut order: Vec<usize> = (0..groups.num_groups).collect();
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
    for &group in &order[groups.top_groups..] {
        choice[group * size..(group + 1) * size].fill(f32::NEG_INFINITY);
    }
}

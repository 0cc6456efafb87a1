//! Which limits on the ranks of a token make sense for a placement.

use crate::{ExpertId, LayerPlacement, PlanError, Rank, Result};

/// Groups of consecutive experts that a router limits its choice to (DeepSeek-V2 and -V3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RoutingGroups {
    /// Groups of `E / num_groups` experts.
    pub num_groups: usize,
    /// Groups that a token may use.
    pub top_groups: usize,
}

/// Errors when a token could not keep its experts within `max_ranks` ranks of a layer:
/// - some set of so many ranks holds fewer than `top_k` experts;
/// - the router chooses among `top_groups` groups, groups are placed whole, and they lie on more ranks than that: every
///   token would lose a group that its router wanted.
pub fn check_limit(
    layer: &LayerPlacement,
    max_ranks: usize,
    top_k: usize,
    groups: Option<RoutingGroups>,
) -> Result<()> {
    let limit = "the limit on a token's ranks";
    // Nobody is sent to a rank without experts.
    let mut held: Vec<usize> = (0..layer.num_ranks()).map(|r| layer.experts_of(r as Rank).len()).collect();
    held.retain(|&n| n > 0);
    held.sort_unstable();
    let fewest: usize = held.iter().take(max_ranks).sum();
    if fewest < top_k {
        let expected = format!("more: it leaves as few as {fewest} experts, a token needs {top_k}");
        return Err(PlanError::range(limit, expected, max_ranks));
    }
    let Some(groups) = groups else { return Ok(()) };
    match ranks_of_groups(layer, groups) {
        Some(needed) if max_ranks < needed => {
            let expected = format!(
                "at least the {needed} that the {} routing groups of a token can lie on",
                groups.top_groups
            );
            Err(PlanError::range(limit, expected, max_ranks))
        }
        _ => Ok(()),
    }
}

/// The most ranks that `top_groups` groups lie on, where every group lies on one rank; `None` where groups are spread.
fn ranks_of_groups(layer: &LayerPlacement, groups: RoutingGroups) -> Option<usize> {
    let size = layer.num_experts().checked_div(groups.num_groups).filter(|&n| n > 0)?;
    let mut ranks = Vec::with_capacity(groups.num_groups);
    for group in 0..groups.num_groups {
        let mut of = (group * size..(group + 1) * size).map(|e| layer.first_rank_of(e as ExpertId));
        let first = of.next()?;
        if of.any(|rank| rank != first) {
            return None;
        }
        ranks.push(first);
    }
    ranks.sort_unstable();
    ranks.dedup();
    Some(ranks.len().min(groups.top_groups))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_groups_need_a_rank_each_and_spread_ones_do_not() {
        let groups = Some(RoutingGroups { num_groups: 4, top_groups: 3 });
        let layer = |ranks: &[Rank]| LayerPlacement::from_expert_ranks(4, ranks).expect("layer");
        let whole = layer(&[0, 0, 1, 1, 2, 2, 3, 3]);
        for max_ranks in 1..=4 {
            assert_eq!(check_limit(&whole, max_ranks, 2, groups).is_ok(), max_ranks >= 3, "{max_ranks}");
            assert!(check_limit(&whole, max_ranks, 2, None).is_ok());
        }
        let error = check_limit(&whole, 2, 2, groups).expect_err("refused").to_string();
        assert!(error.contains("is 2, expected at least the 3 that the 3 routing groups"), "{error}");
        // Two groups on one rank: three of them can still lie on three ranks.
        assert!(check_limit(&layer(&[0, 0, 0, 0, 1, 1, 2, 2]), 2, 2, groups).is_err());
        assert!(check_limit(&layer(&[0, 0, 0, 0, 1, 1, 1, 1]), 2, 2, groups).is_ok());
        assert!(check_limit(&layer(&[0, 1, 0, 1, 2, 3, 2, 3]), 1, 2, groups).is_ok());
        let error = check_limit(&whole, 1, 3, None).expect_err("refused").to_string();
        assert!(error.contains("as few as 2 experts, a token needs 3"), "{error}");
    }
}

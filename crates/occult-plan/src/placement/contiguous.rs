//! Blocks of consecutive experts: the placement that engines use unless they are told otherwise.

use crate::{ExpertId, LayerPlacement, PlanError, Result};

/// Cuts `0..num_experts` into `num_ranks` consecutive blocks whose sizes differ by at most one, larger blocks first
/// (60 experts on 8 ranks: four blocks of 8, then four of 7). Errors unless `1 <= num_ranks <= num_experts`.
pub fn place(num_experts: usize, num_ranks: usize) -> Result<LayerPlacement> {
    let experts: Vec<ExpertId> = all_experts(num_experts)?;
    deal(&experts, num_ranks)
}

/// Number of experts of each rank when they are shared out evenly: sizes differ by at most one, larger first, `[W]`.
pub fn even_shares(num_experts: usize, num_ranks: usize) -> Result<Vec<usize>> {
    if num_ranks == 0 || num_ranks > num_experts {
        let expected = format!("1 to {num_experts} (the number of experts)");
        return Err(PlanError::range("number of ranks", expected, num_ranks));
    }
    let (share, larger) = (num_experts / num_ranks, num_experts % num_ranks);
    Ok((0..num_ranks).map(|rank| share + usize::from(rank < larger)).collect())
}

/// `0..num_experts` as ids.
pub(super) fn all_experts(num_experts: usize) -> Result<Vec<ExpertId>> {
    if num_experts == 0 || num_experts > usize::from(ExpertId::MAX) {
        return Err(PlanError::range("number of experts", "1 to 65535", num_experts));
    }
    Ok((0..num_experts).map(|e| e as ExpertId).collect())
}

/// Gives `experts`, in their order, to rank after rank in even shares.
pub(super) fn deal(experts: &[ExpertId], num_ranks: usize) -> Result<LayerPlacement> {
    let mut rest = experts;
    let mut ranks = Vec::with_capacity(num_ranks.min(experts.len()));
    for share in even_shares(experts.len(), num_ranks)? {
        let (mine, others) = rest.split_at(share);
        ranks.push(mine);
        rest = others;
    }
    LayerPlacement::from_rank_experts(experts.len(), &ranks)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sixty_experts_on_eight_ranks() {
        let placement = place(60, 8).unwrap();
        let sizes: Vec<usize> = (0..8).map(|r| placement.experts_of(r).len()).collect();
        assert_eq!(sizes, [8, 8, 8, 8, 7, 7, 7, 7]);
        let in_order: Vec<u16> = (0..8).flat_map(|r| placement.experts_of(r).to_vec()).collect();
        assert_eq!(in_order, (0..60).collect::<Vec<u16>>());
    }

    #[test]
    fn one_expert_per_rank_is_the_most_ranks() {
        assert_eq!(place(4, 4).unwrap().expert_ranks().unwrap(), [0, 1, 2, 3]);
        let error = place(4, 5).unwrap_err().to_string();
        assert_eq!(error, "number of ranks is 5, expected 1 to 4 (the number of experts)");
        assert!(place(4, 0).is_err());
        assert!(place(0, 1).is_err());
        assert!(place(70_000, 2).unwrap_err().to_string().contains("number of experts is 70000"));
    }
}

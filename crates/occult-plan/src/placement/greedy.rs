//! Algorithm 1 of the paper: ranks grown greedily from pairs of experts that work together.
//!
//! "Occult: Optimizing Collaborative Communication across Experts for Accelerated Parallel MoE Training and Inference",
//! Luo et al., ICML 2025 (PMLR 267:41235-41253), section on expert placement. The printed loop bound is off by one; here a
//! rank is filled while it holds *fewer* experts than its share.
//!
//! 1. Rank 0 starts with the strongest pair.
//! 2. Every later rank starts with the unused expert of smallest mean `P` to all experts used so far.
//! 3. Rank after rank takes the unused expert of highest mean `P` to the experts it holds, until it holds its share.
//!
//! Ties go to the lowest ids. There is no term for load, so the ranks that hold popular groups become hot.

use super::contiguous::even_shares;
use crate::{CoActivation, ExpertId, LayerPlacement, Result};

/// Places one layer from its co-activation counts, without replicas. Shares differ by at most one, larger shares first
/// (the paper has equal shares only); a rank 0 whose share is one expert takes the lower id of the strongest pair.
///
/// `P = counts / max` and the size of the group are common to all candidates of a step, so sums of counts are compared:
/// exact, and the same on every machine. Errors unless `1 <= num_ranks <= num_experts`.
pub fn place(graph: &CoActivation, num_ranks: usize) -> Result<LayerPlacement> {
    let num_experts = graph.num_experts();
    let shares = even_shares(num_experts, num_ranks)?;
    let mut unused = vec![true; num_experts];
    let mut ranks: Vec<Vec<ExpertId>> = Vec::with_capacity(num_ranks);

    let (i, j) = strongest_pair(graph);
    let mut first = vec![i as ExpertId, j as ExpertId];
    first.truncate(shares[0].min(if num_experts == 1 { 1 } else { 2 }));
    let mut to_used = vec![0; num_experts];
    for &e in &first {
        take(graph, usize::from(e), &mut unused, &mut to_used);
    }
    ranks.push(first);
    for _ in 1..num_ranks {
        let Some(e) = candidates(&unused).min_by_key(|&e| (to_used[e], e)) else { break };
        take(graph, e, &mut unused, &mut to_used);
        ranks.push(vec![e as ExpertId]);
    }

    for (rank, &share) in ranks.iter_mut().zip(&shares) {
        let mut to_rank = vec![0; num_experts];
        for &e in rank.iter() {
            add_row(graph, usize::from(e), &mut to_rank);
        }
        while rank.len() < share {
            let best = candidates(&unused).max_by_key(|&e| (to_rank[e], std::cmp::Reverse(e)));
            let Some(e) = best else { break };
            take(graph, e, &mut unused, &mut to_rank);
            rank.push(e as ExpertId);
        }
    }
    LayerPlacement::from_rank_experts(num_experts, &ranks)
}

/// The pair with the largest count, the lowest ids first among equals; `(0, 0)` when there is one expert.
fn strongest_pair(graph: &CoActivation) -> (usize, usize) {
    let num_experts = graph.num_experts();
    let pairs = (0..num_experts).flat_map(|i| (i + 1..num_experts).map(move |j| (i, j)));
    pairs.max_by_key(|&(i, j)| (graph.get(i, j), std::cmp::Reverse((i, j)))).unwrap_or((0, 0))
}

fn candidates(unused: &[bool]) -> impl Iterator<Item = usize> + '_ {
    (0..unused.len()).filter(|&e| unused[e])
}

/// Marks an expert used and adds its counts to the sums of the group that it joins.
fn take(graph: &CoActivation, e: usize, unused: &mut [bool], sums: &mut [u64]) {
    unused[e] = false;
    add_row(graph, e, sums);
}

fn add_row(graph: &CoActivation, e: usize, sums: &mut [u64]) {
    for (sum, &n) in sums.iter_mut().zip(graph.row(e)) {
        *sum += n;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Algorithm 1 with every mean computed anew, as the fraction (sum, size).
    fn reference(graph: &CoActivation, shares: &[usize]) -> Vec<Vec<u16>> {
        let n = graph.num_experts();
        let mean_to = |e: usize, group: &[u16]| -> (u64, u64) {
            (group.iter().map(|&g| graph.get(e, usize::from(g))).sum(), group.len() as u64)
        };
        let less = |a: (u64, u64), b: (u64, u64)| a.0 * b.1 < b.0 * a.1;
        let mut pair = (0, 1);
        for i in 0..n {
            for j in i + 1..n {
                if graph.get(i, j) > graph.get(pair.0, pair.1) {
                    pair = (i, j);
                }
            }
        }
        let mut ranks =
            vec![if shares[0] == 1 { vec![pair.0 as u16] } else { vec![pair.0 as u16, pair.1 as u16] }];
        while ranks.len() < shares.len() {
            let used = ranks.concat();
            let mut best: Option<usize> = None;
            for e in (0..n).filter(|&e| !used.contains(&(e as u16))) {
                if best.is_none_or(|b| less(mean_to(e, &used), mean_to(b, &used))) {
                    best = Some(e);
                }
            }
            ranks.push(vec![best.unwrap() as u16]);
        }
        for r in 0..shares.len() {
            while ranks[r].len() < shares[r] {
                let used = ranks.concat();
                let mut best: Option<usize> = None;
                for e in (0..n).filter(|&e| !used.contains(&(e as u16))) {
                    if best.is_none_or(|b| less(mean_to(b, &ranks[r]), mean_to(e, &ranks[r]))) {
                        best = Some(e);
                    }
                }
                ranks[r].push(best.unwrap() as u16);
            }
        }
        ranks
    }

    fn symmetric(n: usize, upper: &[u64]) -> CoActivation {
        let mut counts = vec![0; n * n];
        let mut next = upper.iter();
        for i in 0..n {
            for j in i + 1..n {
                let c = *next.next().unwrap();
                (counts[i * n + j], counts[j * n + i]) = (c, c);
            }
        }
        CoActivation::from_counts(n, counts).unwrap()
    }

    proptest! {
        #[test]
        fn same_as_the_obvious_one(
            n in 2usize..13,
            num_ranks in 1usize..13,
            // Few distinct counts, so that ties are common.
            upper in prop::collection::vec(0u64..6, 66),
        ) {
            let num_ranks = num_ranks.min(n);
            let graph = symmetric(n, &upper);
            let expected = reference(&graph, &even_shares(n, num_ranks).unwrap());
            let expected = LayerPlacement::from_rank_experts(n, &expected).unwrap();
            prop_assert_eq!(place(&graph, num_ranks).unwrap(), expected);
        }
    }

    /// Worked by hand, 6 experts on 3 ranks. The strongest pair is (1, 4) with 9: rank 0. Sums to {1, 4}: expert 0 has
    /// 2 + 1, 2 has 0 + 3, 3 has 1 + 1, 5 has 4 + 5: rank 1 starts with 3. Sums to {1, 4, 3}: 0 has 3 + 8,
    /// 2 has 3 + 2, 5 has 9 + 7; rank 2 starts with 2. Rank 0 is full; rank 1 takes the best of 0 (8) and 5 (7) with 3:
    /// expert 0; rank 2 the rest.
    #[test]
    fn golden_example() {
        #[rustfmt::skip]
        let counts = vec![
            0, 2, 1, 8, 1, 1,
            2, 0, 0, 1, 9, 4,
            1, 0, 0, 2, 3, 6,
            8, 1, 2, 0, 1, 7,
            1, 9, 3, 1, 0, 5,
            1, 4, 6, 7, 5, 0,
        ];
        let placement = place(&CoActivation::from_counts(6, counts).unwrap(), 3).unwrap();
        let ranks: Vec<&[u16]> = (0..3).map(|r| placement.experts_of(r)).collect();
        assert_eq!(ranks, [[1, 4], [0, 3], [2, 5]]);
    }

    #[test]
    fn small_worlds() {
        assert_eq!(place(&CoActivation::new(1), 1).unwrap().expert_ranks().unwrap(), [0]);
        // Nothing is co-active: ties go to the lowest ids.
        assert_eq!(place(&CoActivation::new(5), 2).unwrap().expert_ranks().unwrap(), [0, 0, 1, 0, 1]);
        assert_eq!(place(&CoActivation::new(3), 3).unwrap().expert_ranks().unwrap(), [0, 1, 2]);
        assert!(place(&CoActivation::new(3), 4).is_err());
        assert!(place(&CoActivation::new(0), 1).is_err());
    }
}

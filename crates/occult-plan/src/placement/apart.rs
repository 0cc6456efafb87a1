//! Experts that are chosen together lie on different ranks: for decoding a few tokens at a time.
//!
//! Such a step reads every chosen expert's weights once and moves next to nothing over the wire. It lasts as long as the rank
//! with the most chosen experts reads, and is shortest where each token's experts are spread evenly: the opposite of what saves
//! copies. A token with `n_r` experts on rank `r` has `sum over r of n_r (n_r - 1) / 2` pairs on one rank, least where the `n_r` are
//! even; summed over tokens these are the co-activation counts within ranks. So they are what is minimised.

use rand_core::SeedableRng;
use rand_pcg::Pcg64Mcg;

use super::{contiguous, random};
use crate::{CoActivation, ExpertId, LayerPlacement, Rank, Result};

/// Starts of the descent besides the experts as numbered.
const RESTARTS: u64 = 8;

/// Places one layer from its co-activation counts, without replicas, in shares that differ by at most one: from the experts as
/// numbered and from random placements, swaps pairs of experts as long as one lowers the number of pairs that share a rank, and
/// takes the best. The same counts and seed give the same placement. Errors unless `1 <= num_ranks <= num_experts`.
pub fn place(graph: &CoActivation, num_ranks: usize, seed: u64) -> Result<LayerPlacement> {
    let num_experts = graph.num_experts();
    let mut seeds = Pcg64Mcg::seed_from_u64(seed);
    let mut best: Option<Search<'_>> = None;
    for restart in 0..=RESTARTS {
        let start = match restart {
            0 => contiguous::place(num_experts, num_ranks)?,
            _ => random::place(num_experts, num_ranks, rand_core::Rng::next_u64(&mut seeds))?,
        };
        let mut search = Search::new(graph, &start);
        search.descend();
        if best.as_ref().is_none_or(|best| search.together < best.together) {
            best = Some(search);
        }
    }
    LayerPlacement::from_expert_ranks(num_ranks, &best.map_or_else(Vec::new, |best| best.rank_of))
}

/// A placement with what each swap would change.
struct Search<'g> {
    graph: &'g CoActivation,
    num_ranks: usize,
    rank_of: Vec<Rank>,
    /// `[E, W]`: tokens that chose the expert together with one of the rank, once for each.
    with_rank: Vec<u64>,
    /// Twice the pairs that share a rank, summed over tokens.
    together: u64,
}

impl<'g> Search<'g> {
    fn new(graph: &'g CoActivation, start: &LayerPlacement) -> Self {
        let (e, w) = (graph.num_experts(), start.num_ranks());
        let rank_of: Vec<Rank> = (0..e).map(|expert| start.first_rank_of(expert as ExpertId)).collect();
        let mut with_rank = vec![0; e * w];
        for (sums, expert) in with_rank.chunks_exact_mut(w).zip(0..e) {
            for (&rank, &n) in rank_of.iter().zip(graph.row(expert)) {
                sums[usize::from(rank)] += n;
            }
        }
        let together = (0..e).map(|expert| with_rank[expert * w + usize::from(rank_of[expert])]).sum();
        Self { graph, num_ranks: w, rank_of, with_rank, together }
    }

    fn with(&self, expert: usize, rank: Rank) -> u64 {
        self.with_rank[expert * self.num_ranks + usize::from(rank)]
    }

    /// By how much `together / 2` falls when two experts change places; negative where it rises.
    fn gain(&self, a: usize, b: usize) -> i64 {
        let (at_a, at_b) = (self.rank_of[a], self.rank_of[b]);
        let now = self.with(a, at_a) + self.with(b, at_b);
        let then = self.with(a, at_b) + self.with(b, at_a) - 2 * self.graph.get(a, b);
        now as i64 - then as i64
    }

    fn swap(&mut self, a: usize, b: usize) {
        let (at_a, at_b) = (usize::from(self.rank_of[a]), usize::from(self.rank_of[b]));
        self.together = (self.together as i64 - 2 * self.gain(a, b)) as u64;
        let rows = self.graph.row(a).iter().zip(self.graph.row(b));
        for (sums, (&with_a, &with_b)) in self.with_rank.chunks_exact_mut(self.num_ranks).zip(rows) {
            sums[at_a] = sums[at_a] + with_b - with_a;
            sums[at_b] = sums[at_b] + with_a - with_b;
        }
        self.rank_of.swap(a, b);
    }

    /// Swaps until no swap helps. Every one lowers a whole number, so it ends.
    fn descend(&mut self) {
        let mut changed = true;
        while changed {
            changed = false;
            for a in 0..self.rank_of.len() {
                for b in 0..a {
                    if self.rank_of[a] != self.rank_of[b] && self.gain(a, b) > 0 {
                        self.swap(a, b);
                        changed = true;
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Routing;
    use proptest::prelude::*;

    /// Twice the pairs of experts of a token on one rank, summed over tokens: the definition.
    fn together(placement: &LayerPlacement, routing: &Routing<'_>) -> u64 {
        let tokens = routing.weighted_rows().map(|(ids, n)| {
            let mut on_rank = vec![0u64; placement.num_ranks()];
            ids.iter().for_each(|&id| on_rank[usize::from(placement.first_rank_of(id))] += 1);
            n * on_rank.iter().map(|n| n * n.saturating_sub(1)).sum::<u64>()
        });
        tokens.sum()
    }

    proptest! {
        #[test]
        fn swaps_change_what_the_definition_says_and_never_make_it_worse(
            draws in prop::collection::vec(any::<u32>(), 1..40),
            swaps in prop::collection::vec((0usize..9, 0usize..9), 0..20),
            num_ranks in 1usize..=9,
            seed: u64,
        ) {
            let mut ids = Vec::new();
            for draw in &draws {
                let mut set: Vec<u16> = (0..9).collect();
                set.sort_by_key(|&e| (draw.rotate_left(3 * u32::from(e)) & 0xff, e));
                ids.extend_from_slice(&set[..4]);
            }
            let routing = Routing::new(9, 4, &ids).unwrap();
            let graph = CoActivation::of(&routing);
            let start = contiguous::place(9, num_ranks).unwrap();
            let mut search = Search::new(&graph, &start);
            prop_assert_eq!(search.together, together(&start, &routing));
            for (a, b) in swaps {
                if search.rank_of[a] != search.rank_of[b] {
                    search.swap(a, b);
                    let now = LayerPlacement::from_expert_ranks(num_ranks, &search.rank_of).unwrap();
                    prop_assert_eq!(search.together, together(&now, &routing));
                }
            }
            let placed = place(&graph, num_ranks, seed).unwrap();
            prop_assert_eq!(&placed, &place(&graph, num_ranks, seed).unwrap());
            prop_assert!(together(&placed, &routing) <= together(&start, &routing));
            let sizes = (0..num_ranks).map(|r| placed.experts_of(r as Rank).len());
            prop_assert!(sizes.clone().max().unwrap() - sizes.min().unwrap() <= 1);
        }
    }

    #[test]
    fn pairs_that_always_meet_are_parted() {
        // Experts 2i and 2i + 1 are always chosen together.
        let ids = [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 6, 7];
        let routing = Routing::new(8, 2, &ids).unwrap();
        let placed = place(&CoActivation::of(&routing), 2, 0).unwrap();
        for pair in 0..4u16 {
            assert_ne!(placed.ranks_of(2 * pair), placed.ranks_of(2 * pair + 1));
        }
        assert!(place(&CoActivation::new(3), 4, 0).is_err());
        assert_eq!(place(&CoActivation::new(3), 3, 0).unwrap().expert_ranks().unwrap(), [0, 1, 2]);
    }
}

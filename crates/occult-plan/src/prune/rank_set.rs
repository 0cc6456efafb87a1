//! The ranks a token is allowed to visit, and the searches for them.

use crate::{ExpertId, LayerPlacement, Rank};

/// Rank subsets of a token whose experts have replicas are tried one by one up to this many, beyond it greedily.
pub(super) const MAX_SUBSETS: usize = 2_000;

/// A set of ranks. An expert is *reachable* when at least one of its holders is in the set.
#[derive(Debug, Clone)]
pub(super) struct RankSet<'p> {
    placement: &'p LayerPlacement,
    /// `[W]`: what mass on each rank counts for.
    weights: Vec<f64>,
    contains: Vec<bool>,
    ranks: Vec<Rank>,
    search: Search,
}

/// Working memory of the search for the subset with the largest mass.
#[derive(Debug, Clone, Default)]
struct Search {
    /// Holders of the token's experts, ascending.
    candidates: Vec<Rank>,
    path: Vec<usize>,
    best: Vec<usize>,
}

impl<'p> RankSet<'p> {
    pub(super) fn new(placement: &'p LayerPlacement) -> Self {
        let num_ranks = placement.num_ranks();
        let weights = match placement.rank_weights() {
            Some(weights) => weights.iter().map(|&w| f64::from(w)).collect(),
            None => vec![1.0; num_ranks],
        };
        let (contains, ranks) = (vec![false; num_ranks], Vec::new());
        Self { placement, weights, contains, ranks, search: Search::default() }
    }

    pub(super) fn clear(&mut self) {
        for rank in self.ranks.drain(..) {
            self.contains[usize::from(rank)] = false;
        }
    }

    pub(super) fn insert(&mut self, rank: Rank) {
        self.contains[usize::from(rank)] = true;
        self.ranks.push(rank);
    }

    pub(super) fn len(&self) -> usize {
        self.ranks.len()
    }

    pub(super) fn reaches(&self, expert: ExpertId) -> bool {
        self.placement.ranks_of(expert).iter().any(|&rank| self.contains[usize::from(rank)])
    }

    /// Probability of the experts that are reachable, summed in their order.
    pub(super) fn mass(&self, ids: &[ExpertId], p: &[f64]) -> f64 {
        ids.iter().filter(|&&id| self.reaches(id)).map(|&id| p[usize::from(id)]).sum()
    }

    /// The same with every expert's probability times the largest weight of its holders in the set.
    fn weighted_mass(&self, ids: &[ExpertId], p: &[f64]) -> f64 {
        let weight = |id: ExpertId| {
            let held = self.placement.ranks_of(id).iter().map(|&rank| usize::from(rank));
            held.filter(|&rank| self.contains[rank]).map(|rank| self.weights[rank]).fold(0.0, f64::max)
        };
        ids.iter().map(|&id| weight(id) * p[usize::from(id)]).sum()
    }

    /// Ranks in the order in which the token's experts, `ids` by descending score, ask for them. A replicated expert asks
    /// for the holder with the most probability of experts that are not reachable yet (ties: the lower rank).
    pub(super) fn walk(&mut self, ids: &[ExpertId], p: &[f64], max_ranks: usize) {
        self.clear();
        for &id in ids {
            if !self.reaches(id) {
                if self.len() == max_ranks {
                    return;
                }
                if let Some(rank) = self.best_gain(self.placement.ranks_of(id).iter().copied(), ids, p) {
                    self.insert(rank);
                }
            }
        }
    }

    /// At most `max_ranks` ranks on which the token's experts have the most mass, where `p` `[E]` is what each counts for,
    /// times the weight of the rank.
    ///
    /// Without replicas the ranks' masses simply add up, so the heaviest ranks are the best, in any world. With replicas
    /// every subset is tried when there are at most [`MAX_SUBSETS`]; otherwise the rank that adds most is taken, again
    /// and again, which keeps at least `1 - 1/e` (63 %) of the best subset's mass. Ties: more experts, then lower ranks.
    pub(super) fn best_mass(&mut self, ids: &[ExpertId], p: &[f64], max_ranks: usize) {
        self.clear();
        let mut search = std::mem::take(&mut self.search);
        search.candidates.clear();
        search.candidates.extend(ids.iter().flat_map(|&id| self.placement.ranks_of(id)));
        search.candidates.sort_unstable();
        search.candidates.dedup();
        let size = max_ranks.min(search.candidates.len());
        if self.placement.has_replicas() && subsets(search.candidates.len(), size) <= MAX_SUBSETS {
            self.try_all(ids, p, size, &mut search);
        } else {
            while self.len() < size {
                match self.best_gain(search.candidates.iter().copied(), ids, p) {
                    Some(rank) => self.insert(rank),
                    None => break,
                }
            }
        }
        self.search = search;
    }

    /// Every subset of `size` candidates, lower ranks first.
    fn try_all(&mut self, ids: &[ExpertId], p: &[f64], size: usize, search: &mut Search) {
        let Search { candidates, path, best } = search;
        let mut best_mass = None;
        path.clear();
        path.extend(0..size);
        loop {
            self.clear();
            path.iter().for_each(|&i| self.insert(candidates[i]));
            let reached = ids.iter().filter(|&&id| self.reaches(id)).count();
            let mass = (self.weighted_mass(ids, p), reached);
            if best_mass.is_none_or(|best| mass > best) {
                best_mass = Some(mass);
                best.clone_from(path);
            }
            // The next combination in lexicographic order: move the last index that can move.
            let Some(at) = (0..size).rev().find(|&at| path[at] < candidates.len() - size + at) else { break };
            path[at] += 1;
            for i in at + 1..size {
                path[i] = path[i - 1] + 1;
            }
        }
        self.clear();
        best.iter().for_each(|&i| self.insert(candidates[i]));
    }

    /// The rank not in the set that makes the most probability, times its weight, reachable (ties: more experts, then the
    /// lower rank), or `None` when no rank adds an expert. `ranks` ascend.
    fn best_gain(&self, ranks: impl Iterator<Item = Rank>, ids: &[ExpertId], p: &[f64]) -> Option<Rank> {
        let mut best = None;
        let mut best_gain = (0.0, 0);
        for rank in ranks {
            let mut gain = (0.0, 0);
            for &id in ids {
                if self.placement.ranks_of(id).contains(&rank) && !self.reaches(id) {
                    gain.0 += self.weights[usize::from(rank)] * p[usize::from(id)];
                    gain.1 += 1;
                }
            }
            if gain > best_gain {
                (best, best_gain) = (Some(rank), gain);
            }
        }
        best
    }
}

/// Number of subsets of `size` out of `n`, saturating.
fn subsets(n: usize, size: usize) -> usize {
    (0..size.min(n - size))
        .try_fold(1usize, |c, i| Some(c.checked_mul(n - i)? / (i + 1)))
        .unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::subsets;

    #[test]
    fn number_of_subsets() {
        assert_eq!([subsets(8, 0), subsets(8, 1), subsets(8, 3), subsets(8, 8)], [1, 8, 56, 1]);
        assert_eq!(subsets(500, 250), usize::MAX);
    }
}

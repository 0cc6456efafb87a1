//! Which replica serves a token, when an expert lives on several ranks.
//!
//! The rule, per token: visit as few ranks as possible; among those choices prefer ranks on nodes that are visited
//! anyway, then ranks with less load so far, then the lower rank. With the ranks fixed, each expert goes to its least
//! loaded visited holder (ties: the lower rank). "Load so far" is what this chooser assigned since it was made, so the
//! outcome depends on the order of tokens and on nothing else.

use crate::{ExpertId, LayerPlacement, Rank, Topology};

/// Visited ranks of a token are searched exactly up to this many steps, then the best found so far is taken.
const MAX_STEPS: u32 = 2_000;

/// Assigns experts to ranks token by token, keeping the load it has given to each rank.
#[derive(Debug, Clone)]
pub struct ReplicaChooser<'p> {
    placement: &'p LayerPlacement,
    topology: Topology,
    load: Vec<u64>,
    /// `visits[rank]` > 0 when the current token visits it; likewise for nodes.
    visits: Vec<u32>,
    node_visits: Vec<u32>,
    path: Vec<Rank>,
    best: Vec<Rank>,
    steps: u32,
}

impl<'p> ReplicaChooser<'p> {
    /// A chooser with no load yet. The placement must have the topology's ranks.
    pub fn new(placement: &'p LayerPlacement, topology: Topology) -> Self {
        assert_eq!(placement.num_ranks(), topology.num_ranks(), "placement of another number of ranks");
        Self {
            placement,
            topology,
            load: vec![0; topology.num_ranks()],
            visits: vec![0; topology.num_ranks()],
            node_visits: vec![0; topology.num_nodes()],
            path: Vec::new(),
            best: Vec::new(),
            steps: 0,
        }
    }

    /// (token, expert) pairs given to each rank so far, `[W]`.
    pub fn load(&self) -> &[u64] {
        &self.load
    }

    /// Writes the rank that serves each expert of a row that stands for `occurrences` tokens. `ranks` is as long as `ids`.
    pub fn assign(&mut self, ids: &[ExpertId], occurrences: u64, ranks: &mut [Rank]) {
        debug_assert_eq!(ids.len(), ranks.len());
        let placement = self.placement;
        if placement.has_replicas() {
            self.choose_visited(ids);
            for (rank, &id) in ranks.iter_mut().zip(ids) {
                let visited =
                    placement.ranks_of(id).iter().copied().filter(|&r| self.visits[usize::from(r)] > 0);
                *rank =
                    visited.min_by_key(|&r| (self.load[usize::from(r)], r)).expect("a visited rank holds it");
                self.load[usize::from(*rank)] += occurrences;
            }
            self.clear(ids);
        } else {
            for (rank, &id) in ranks.iter_mut().zip(ids) {
                *rank = placement.first_rank_of(id);
                self.load[usize::from(*rank)] += occurrences;
            }
        }
    }

    fn choose_visited(&mut self, ids: &[ExpertId]) {
        for &id in ids {
            if let &[only] = self.placement.ranks_of(id) {
                self.visit(only);
            }
        }
        self.path.clear();
        self.best.clear();
        self.steps = 0;
        let mut found = false;
        self.cover(ids, &mut found);
        let best = std::mem::take(&mut self.best);
        for &rank in &best {
            self.visit(rank);
        }
        self.best = best;
    }

    /// Depth-first search for the fewest further ranks: branches over the holders of the first expert that no visited
    /// rank holds, most covering first, so that the first leaf is the greedy set cover and later ones only improve it.
    fn cover(&mut self, ids: &[ExpertId], found: &mut bool) {
        let uncovered = |this: &Self, id: ExpertId| {
            !this.placement.ranks_of(id).iter().any(|&r| this.visits[usize::from(r)] > 0)
        };
        let Some(&next) = ids.iter().find(|&&id| uncovered(self, id)) else {
            if !*found || self.path.len() < self.best.len() {
                self.best.clone_from(&self.path);
                *found = true;
            }
            return;
        };
        // At least one more rank is needed; stop where that cannot improve on what was found.
        if *found && (self.path.len() + 1 >= self.best.len() || self.steps >= MAX_STEPS) {
            return;
        }
        let placement = self.placement;
        let mut candidates: Vec<(usize, bool, u64, Rank)> = placement
            .ranks_of(next)
            .iter()
            .map(|&r| {
                let covers =
                    ids.iter().filter(|&&id| uncovered(self, id) && placement.ranks_of(id).contains(&r));
                let new_node = self.node_visits[self.topology.node_of(r)] == 0;
                (usize::MAX - covers.count(), new_node, self.load[usize::from(r)], r)
            })
            .collect();
        candidates.sort_unstable();
        for (_, _, _, rank) in candidates {
            self.steps += 1;
            self.visit(rank);
            self.path.push(rank);
            self.cover(ids, found);
            self.path.pop();
            self.leave(rank);
        }
    }

    fn visit(&mut self, rank: Rank) {
        self.visits[usize::from(rank)] += 1;
        self.node_visits[self.topology.node_of(rank)] += 1;
    }

    fn leave(&mut self, rank: Rank) {
        self.visits[usize::from(rank)] -= 1;
        self.node_visits[self.topology.node_of(rank)] -= 1;
    }

    fn clear(&mut self, ids: &[ExpertId]) {
        for &id in ids {
            for &rank in self.placement.ranks_of(id) {
                self.visits[usize::from(rank)] = 0;
                self.node_visits[self.topology.node_of(rank)] = 0;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The fewest ranks that hold all of `ids`, by trying every subset.
    fn fewest_ranks(placement: &LayerPlacement, ids: &[ExpertId]) -> u32 {
        (0u32..1 << placement.num_ranks())
            .filter(|set| ids.iter().all(|&id| placement.ranks_of(id).iter().any(|&r| set >> r & 1 == 1)))
            .map(u32::count_ones)
            .min()
            .unwrap()
    }

    proptest! {
        #[test]
        fn visits_as_few_ranks_as_any_subset_would(
            num_ranks in 1usize..7,
            holders in prop::collection::vec(1u32..64, 12),
            ids in prop::sample::subsequence((0u16..12).collect::<Vec<_>>(), 1..9),
        ) {
            let mut ranks = vec![Vec::new(); num_ranks];
            for (e, mask) in holders.iter().enumerate() {
                let mask = mask % (1 << num_ranks);
                let mask = if mask == 0 { 1 } else { mask };
                for (r, list) in ranks.iter_mut().enumerate() {
                    if mask >> r & 1 == 1 { list.push(e as u16); }
                }
            }
            let placement = LayerPlacement::from_rank_experts(12, &ranks).unwrap();
            let mut chooser = ReplicaChooser::new(&placement, Topology::flat(num_ranks).unwrap());
            let mut chosen = vec![0; ids.len()];
            for _ in 0..3 {
                chooser.assign(&ids, 1, &mut chosen);
                for (&id, rank) in ids.iter().zip(&chosen) {
                    prop_assert!(placement.ranks_of(id).contains(rank));
                }
                let mut distinct = chosen.clone();
                distinct.sort_unstable();
                distinct.dedup();
                prop_assert!(distinct.len() as u32 <= fewest_ranks(&placement, &ids));
            }
            prop_assert_eq!(chooser.load().iter().sum::<u64>(), 3 * ids.len() as u64);
        }
    }

    #[test]
    fn equal_choices_go_to_the_less_loaded_rank_in_turn() {
        let placement = LayerPlacement::from_rank_experts(1, &[[0], [0]]).unwrap();
        let mut chooser = ReplicaChooser::new(&placement, Topology::flat(2).unwrap());
        let mut rank = [9];
        let served: Vec<Rank> = (0..4)
            .map(|_| {
                chooser.assign(&[0], 1, &mut rank);
                rank[0]
            })
            .collect();
        assert_eq!(served, [0, 1, 0, 1]);
    }
}

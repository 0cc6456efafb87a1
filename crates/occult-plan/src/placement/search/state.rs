//! A placement under search: copies at rank and node level, loads, and what its limits cost.

use super::hypergraph::Hypergraph;
use super::level::Level;
use crate::{Rank, Topology};

/// What a placement must respect.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Largest load of a rank, in (token, expert) pairs. May be broken while annealing, at a price.
    pub(super) max_load: i64,
    /// Most experts on a rank. Never broken.
    pub(super) max_experts: usize,
    /// Fewest experts on a rank: no change takes one away below it.
    pub(super) min_experts: usize,
}

/// What a copy costs at each level.
#[derive(Debug, Clone, Copy)]
pub(super) struct Costs {
    pub(super) rank: f64,
    pub(super) node: f64,
}

/// One change of a placement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Change {
    Move { expert: usize, to: usize },
    Swap { a: usize, b: usize },
}

/// An assignment of experts to ranks with everything needed to know what a [`Change`] would cost, in constant time.
pub(super) struct State<'h> {
    graph: &'h Hypergraph,
    topology: Topology,
    costs: Costs,
    limits: Limits,
    ranks: Level<'h>,
    /// Absent when a node costs nothing or there is only one: every token visits it.
    nodes: Option<Level<'h>>,
    rank_load: Vec<i64>,
    rank_experts: Vec<usize>,
}

impl<'h> State<'h> {
    pub(super) fn new(
        graph: &'h Hypergraph,
        topology: Topology,
        costs: Costs,
        limits: Limits,
        expert_ranks: &[Rank],
    ) -> Self {
        let mut rank_load = vec![0; topology.num_ranks()];
        let mut rank_experts = vec![0; topology.num_ranks()];
        for (e, &r) in expert_ranks.iter().enumerate() {
            rank_load[usize::from(r)] += graph.load(e);
            rank_experts[usize::from(r)] += 1;
        }
        let nodes = (topology.num_nodes() > 1 && costs.node > 0.0).then(|| {
            let node_of = expert_ranks.iter().map(|&r| topology.node_of(r) as u16).collect();
            Level::new(graph, topology.num_nodes(), node_of)
        });
        let ranks = Level::new(graph, topology.num_ranks(), expert_ranks.to_vec());
        Self { graph, topology, costs, limits, ranks, nodes, rank_load, rank_experts }
    }

    pub(super) fn num_experts(&self) -> usize {
        self.graph.num_experts()
    }

    pub(super) fn num_ranks(&self) -> usize {
        self.topology.num_ranks()
    }

    fn rank_of(&self, expert: usize) -> usize {
        self.ranks.group_of(expert)
    }

    fn node_of(&self, rank: usize) -> usize {
        self.topology.node_of(rank as Rank)
    }

    pub(super) fn expert_ranks(&self) -> Vec<Rank> {
        (0..self.num_experts()).map(|e| self.rank_of(e) as Rank).collect()
    }

    /// Cost of the copies, summed over tokens.
    pub(super) fn cost(&self) -> f64 {
        let nodes = self.nodes.as_ref().map_or(0, Level::copies);
        self.costs.rank * self.ranks.copies() as f64 + self.costs.node * nodes as f64
    }

    /// Load above the limit, summed over ranks: 0 when feasible.
    pub(super) fn overload(&self) -> i64 {
        self.rank_load.iter().map(|&load| (load - self.limits.max_load).max(0)).sum()
    }

    /// Change of the cost, with `price` for every (token, expert) pair above the load limit; `None` where the change does
    /// nothing or leaves a rank with too many experts or too few.
    #[inline]
    pub(super) fn delta(&self, change: Change, price: f64) -> Option<f64> {
        match change {
            Change::Move { expert, to } => {
                let from = self.rank_of(expert);
                let full = self.rank_experts[to] >= self.limits.max_experts;
                let last = self.rank_experts[from] <= self.limits.min_experts;
                if from == to || full || last {
                    return None;
                }
                let mut delta = self.costs.rank * self.ranks.move_delta(expert, to) as f64
                    + price * self.overload_delta(from, to, self.graph.load(expert)) as f64;
                if let Some(nodes) = &self.nodes {
                    let node = self.node_of(to);
                    if nodes.group_of(expert) != node {
                        delta += self.costs.node * nodes.move_delta(expert, node) as f64;
                    }
                }
                Some(delta)
            }
            Change::Swap { a, b } => {
                let (rank_a, rank_b) = (self.rank_of(a), self.rank_of(b));
                if rank_a == rank_b {
                    return None;
                }
                let shifted = self.graph.load(a) - self.graph.load(b);
                let mut delta = self.costs.rank * self.ranks.swap_delta(a, b) as f64
                    + price * self.overload_delta(rank_a, rank_b, shifted) as f64;
                if let Some(nodes) = &self.nodes
                    && nodes.group_of(a) != nodes.group_of(b)
                {
                    delta += self.costs.node * nodes.swap_delta(a, b) as f64;
                }
                Some(delta)
            }
        }
    }

    /// Change of [`overload`](Self::overload) when `load` goes from one rank to another.
    #[inline]
    fn overload_delta(&self, from: usize, to: usize, load: i64) -> i64 {
        let over = |load: i64| (load - self.limits.max_load).max(0);
        let (at_from, at_to) = (self.rank_load[from], self.rank_load[to]);
        over(at_from - load) + over(at_to + load) - over(at_from) - over(at_to)
    }

    /// Carries a change out.
    pub(super) fn apply(&mut self, change: Change) {
        match change {
            Change::Move { expert, to } => self.apply_move(expert, to),
            Change::Swap { a, b } => {
                let (rank_a, rank_b) = (self.rank_of(a), self.rank_of(b));
                self.apply_move(a, rank_b);
                self.apply_move(b, rank_a);
            }
        }
    }

    fn apply_move(&mut self, expert: usize, to: usize) {
        let from = self.rank_of(expert);
        self.ranks.apply_move(expert, to);
        let node = self.node_of(to);
        if let Some(nodes) = &mut self.nodes
            && nodes.group_of(expert) != node
        {
            nodes.apply_move(expert, node);
        }
        self.rank_load[from] -= self.graph.load(expert);
        self.rank_load[to] += self.graph.load(expert);
        self.rank_experts[from] -= 1;
        self.rank_experts[to] += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Routing;
    use proptest::prelude::*;

    /// Cost and overload by their definitions.
    fn by_definition(
        graph: &Hypergraph,
        topology: Topology,
        costs: Costs,
        limits: Limits,
        ranks: &[Rank],
    ) -> (f64, i64) {
        let mut cost = 0.0;
        for s in 0..graph.num_sets() {
            let rank_of = |&e: &u16| usize::from(ranks[usize::from(e)]);
            let distinct = |groups: Vec<usize>| std::collections::BTreeSet::from_iter(groups).len() as f64;
            let visited: Vec<usize> = graph.set(s).iter().map(rank_of).collect();
            let nodes: Vec<usize> = visited.iter().map(|&r| topology.node_of(r as Rank)).collect();
            let node_copies = if topology.num_nodes() > 1 { distinct(nodes) } else { 0.0 };
            cost += graph.weight(s) as f64 * (costs.rank * distinct(visited) + costs.node * node_copies);
        }
        let mut load = vec![0; topology.num_ranks()];
        for (e, &r) in ranks.iter().enumerate() {
            load[usize::from(r)] += graph.load(e);
        }
        (cost, load.iter().map(|l| (l - limits.max_load).max(0)).sum())
    }

    proptest! {
        #[test]
        fn every_change_costs_what_the_definition_says(
            seed in prop::collection::vec(any::<u16>(), 12..60),
            start in prop::collection::vec(0u16..6, 9),
            changes in prop::collection::vec((any::<bool>(), 0usize..9, 0usize..9), 1..40),
        ) {
            let mut ids = Vec::new();
            for chunk in seed.chunks_exact(3) {
                let mut set: Vec<u16> = (0..9).collect();
                set.sort_by_key(|&e| (chunk[usize::from(e) % 3].rotate_left(u32::from(e)), e));
                ids.extend_from_slice(&set[..3]);
            }
            let occurrences: Vec<u32> = (0..ids.len() / 3).map(|i| u32::from(seed[i]) % 5).collect();
            prop_assume!(occurrences.iter().any(|&n| n > 0));
            let routing = Routing::new(9, 3, &ids).unwrap().with_occurrences(&occurrences).unwrap();
            let graph = Hypergraph::new(&routing).unwrap();
            let topology = Topology::new(6, 3).unwrap();
            let costs = Costs { rank: 0.25, node: 0.75 };
            let limits = Limits { max_load: graph.total_load() / 5, max_experts: 4, min_experts: 1 };
            let mut state = State::new(&graph, topology, costs, limits, &start);
            for (is_swap, a, b) in changes {
                let change =
                    if is_swap { Change::Swap { a, b } } else { Change::Move { expert: a, to: b % 6 } };
                let before = by_definition(&graph, topology, costs, limits, &state.expert_ranks());
                let Some(delta) = state.delta(change, 2.0) else { continue };
                state.apply(change);
                let after = by_definition(&graph, topology, costs, limits, &state.expert_ranks());
                prop_assert!((after.0 - before.0 + 2.0 * (after.1 - before.1) as f64 - delta).abs() < 1e-6);
                prop_assert!((state.cost() - after.0).abs() < 1e-6);
                prop_assert_eq!(state.overload(), after.1);
            }
        }
    }
}

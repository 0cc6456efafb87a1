//! Replicas under a budget, and the simulation that tells what a placement with replicas costs.

use super::Problem;
use super::hypergraph::Hypergraph;
use crate::{ExpertId, LayerPlacement, Rank, ReplicaChooser, Result, Routing};

/// Candidates that are simulated for each replica.
const TRIALS: usize = 8;

/// What tokens do under a placement, replicas chosen by [`ReplicaChooser`].
#[derive(Debug, Clone, Copy)]
pub(super) struct Simulated {
    pub(super) rank_copies: i64,
    pub(super) node_copies: i64,
    pub(super) max_load: i64,
    pub(super) overload: i64,
}

/// Runs the tokens of a layer through the placement in their order, as `TrafficMeter` does: which replica serves a token
/// depends on the tokens before it.
pub(super) fn simulate(routing: &Routing<'_>, problem: &Problem, placement: &LayerPlacement) -> Simulated {
    run(routing.weighted_rows().map(|(ids, n)| (ids, n as i64)), problem, placement, |_, _, _| {})
}

/// Ranks visited, summed over tokens, without replicas.
pub(super) fn rank_copies(graph: &Hypergraph, expert_ranks: &[Rank], num_ranks: usize) -> f64 {
    let mut last_seen = vec![usize::MAX; num_ranks];
    let mut copies = 0;
    for s in 0..graph.num_sets() {
        for &e in graph.set(s) {
            let seen = &mut last_seen[usize::from(expert_ranks[usize::from(e)])];
            copies += if *seen == s { 0 } else { graph.weight(s) };
            *seen = s;
        }
    }
    copies as f64
}

/// Adds up to `budget` replicas, one by one: each time the most promising (expert, rank) pairs are simulated and the best
/// is kept; stops early when none helps. Promising is what would save copies with every other choice left as it is, or
/// take load off ranks above the cap. What helps is found out on a sample, so the best of 0, 1, ... replicas that is
/// within the cap for all tokens is returned, and what the tokens do under it.
pub(super) fn add_replicas(
    graph: &Hypergraph,
    routing: &Routing<'_>,
    problem: &Problem,
    placement: LayerPlacement,
    budget: usize,
) -> Result<(LayerPlacement, Simulated)> {
    let mut steps = one_by_one(graph, problem, placement.clone(), budget)?;
    let value = |s: &Simulated| problem.value(s.rank_copies, s.node_copies, s.overload);
    let of_base = simulate(routing, problem, &placement);
    let mut best = (placement, of_base);
    while let Some(placement) = steps.pop() {
        let outcome = simulate(routing, problem, &placement);
        let fits = outcome.overload == 0;
        if value(&outcome) < value(&best.1) {
            best = (placement, outcome);
        }
        // The more replicas the fewer copies: those before it have nothing to offer.
        if fits {
            break;
        }
    }
    Ok(best)
}

/// The placements with 1, 2, ... replicas more, each the best found from the one before on a sample.
fn one_by_one(
    graph: &Hypergraph,
    problem: &Problem,
    mut placement: LayerPlacement,
    budget: usize,
) -> Result<Vec<LayerPlacement>> {
    let sample = graph.sample((40 * graph.num_experts()).max(4_000), 0.5);
    let problem = problem.scaled(sample.num_tokens() as f64 / graph.num_tokens() as f64);
    let value = |s: &Simulated| problem.value(s.rank_copies, s.node_copies, s.overload);
    let simulate = |placement: &LayerPlacement| run(sample.sets(), &problem, placement, |_, _, _| {});
    let mut current = value(&simulate(&placement));
    let mut steps = Vec::new();
    for _ in 0..budget {
        let mut best: Option<(f64, LayerPlacement)> = None;
        for (expert, rank) in candidates(&sample, &problem, &placement) {
            let trial = with_replica(&placement, expert, rank)?;
            let trial_value = value(&simulate(&trial));
            if trial_value < best.as_ref().map_or(current, |(v, _)| *v) {
                best = Some((trial_value, trial));
            }
        }
        match best {
            Some((v, better)) => {
                (current, placement) = (v, better);
                steps.push(placement.clone());
            }
            None => break,
        }
    }
    Ok(steps)
}

fn with_replica(placement: &LayerPlacement, expert: ExpertId, rank: Rank) -> Result<LayerPlacement> {
    let mut ranks: Vec<Vec<ExpertId>> =
        (0..placement.num_ranks()).map(|r| placement.experts_of(r as Rank).to_vec()).collect();
    ranks[usize::from(rank)].push(expert);
    LayerPlacement::from_rank_experts(placement.num_experts(), &ranks)
}

/// The pairs with the largest estimated gain, best first.
fn candidates(graph: &Hypergraph, problem: &Problem, placement: &LayerPlacement) -> Vec<(ExpertId, Rank)> {
    let (e, w, topology) = (graph.num_experts(), placement.num_ranks(), problem.topology);
    let mut gain = vec![0.0f64; e * w];
    // moved[expert, rank]: tokens that would be served there instead, because they visit that rank anyway.
    let mut moved = vec![0.0f64; e * w];
    // served[expert, rank]: tokens of the expert that this rank serves now.
    let mut served = vec![0i64; e * w];
    let mut on_rank = vec![0u32; w];
    let mut on_node = vec![0u32; topology.num_nodes()];
    run(graph.sets(), problem, placement, |set, ranks, weight| {
        for &r in ranks {
            on_rank[usize::from(r)] += 1;
            on_node[topology.node_of(r)] += 1;
        }
        for (&id, &from) in set.iter().zip(ranks) {
            served[usize::from(id) * w + usize::from(from)] += weight;
            if on_rank[usize::from(from)] > 1 {
                continue;
            }
            for &to in ranks.iter().filter(|&&to| to != from) {
                let (node, other) = (topology.node_of(from), topology.node_of(to));
                let saves_node = on_node[node] == 1 && other != node;
                let saved = problem.costs.rank + if saves_node { problem.costs.node } else { 0.0 };
                // Several experts may share `to`: count it once.
                let tokens = weight as f64 / f64::from(on_rank[usize::from(to)]);
                gain[usize::from(id) * w + usize::from(to)] += tokens * saved;
                moved[usize::from(id) * w + usize::from(to)] += tokens;
            }
        }
        for &r in ranks {
            on_rank[usize::from(r)] = 0;
            on_node[topology.node_of(r)] = 0;
        }
    });
    let mut load = vec![0i64; w];
    served.chunks_exact(w).for_each(|row| row.iter().zip(&mut load).for_each(|(s, l)| *l += s));
    let max_load = problem.limits.max_load;
    let mut order: Vec<(f64, usize)> = Vec::new();
    for (i, &gain) in gain.iter().enumerate() {
        let (expert, to) = (i / w, i % w);
        let slots = placement.experts_of(to as Rank).len();
        if placement.ranks_of(expert as ExpertId).contains(&(to as Rank))
            || slots >= problem.limits.max_experts
        {
            continue;
        }
        let relief = placement.ranks_of(expert as ExpertId).iter().map(|&from| {
            let over = (load[usize::from(from)] - max_load).max(0);
            over.min(served[expert * w + usize::from(from)] / 2).min((max_load - load[to]).max(0))
        });
        let score = gain + problem.forbidden * relief.max().unwrap_or(0) as f64;
        let fits = load[to] as f64 + moved[i] <= max_load as f64;
        if score > 0.0 && fits {
            order.push((score, i));
        }
    }
    order.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    order.into_iter().take(TRIALS).map(|(_, i)| ((i / w) as ExpertId, (i % w) as Rank)).collect()
}

/// Chooses replicas for every (set, tokens) and hands on (set, rank of each member, tokens).
fn run<'a>(
    sets: impl Iterator<Item = (&'a [ExpertId], i64)>,
    problem: &Problem,
    placement: &LayerPlacement,
    mut each: impl FnMut(&[ExpertId], &[Rank], i64),
) -> Simulated {
    let topology = problem.topology;
    let mut chooser = ReplicaChooser::new(placement, topology);
    let mut ranks = Vec::new();
    let mut rank_seen = vec![usize::MAX; topology.num_ranks()];
    let mut node_seen = vec![usize::MAX; topology.num_nodes()];
    let (mut rank_copies, mut node_copies) = (0, 0);
    for (s, (set, weight)) in sets.enumerate() {
        ranks.resize(set.len(), 0);
        chooser.assign(set, weight as u64, &mut ranks);
        for &r in &ranks {
            if std::mem::replace(&mut rank_seen[usize::from(r)], s) != s {
                rank_copies += weight;
            }
            if std::mem::replace(&mut node_seen[topology.node_of(r)], s) != s {
                node_copies += weight;
            }
        }
        each(set, &ranks, weight);
    }
    let load = || chooser.load().iter().map(|&l| l as i64);
    Simulated {
        rank_copies,
        node_copies,
        max_load: load().max().unwrap_or(0),
        overload: load().map(|l| (l - problem.limits.max_load).max(0)).sum(),
    }
}

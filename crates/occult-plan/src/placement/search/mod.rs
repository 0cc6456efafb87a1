//! Our placement: the fewest expected token copies, under a hard cap on the load of every rank.
//!
//! The objective is the copies themselves on the recorded expert sets (the connectivity metric of a hypergraph), not pair
//! weights, with a cost per rank visited and a cost per node visited:
//!
//! `cost = sum over tokens of (rank_cost * ranks visited + node_cost * nodes visited)`
//!
//! 1. Merge equal expert sets. Each restart anneals on a systematic *sample* of them: node by node first where nodes
//!    cost something, then all ranks, swapping experts and moving single ones. A change is evaluated exactly in constant
//!    time (`level.rs`); load above the cap is allowed at a price that rises until it is forbidden.
//! 2. Descend to a local optimum on *all* sets; the best restart wins (less overload first, then less cost).
//! 3. With a replica budget, add the replicas that save most (`replicate.rs`).
//! 4. Bound the optimum from below (`bound.rs`).

mod anneal;
mod bound;
mod groups;
mod hypergraph;
mod level;
mod replicate;
mod state;

use rand_core::SeedableRng;
use rand_pcg::Pcg64Mcg;

use crate::{LayerPlacement, PlanError, Rank, Result, Routing, Topology};
use anneal::{Schedule, anneal, descend, unit};
use hypergraph::Hypergraph;
use state::{Costs, Limits, State};

/// What to minimise, under which limits, how hard.
#[derive(Debug, Clone, PartialEq)]
pub struct SearchOptions {
    /// Largest max/mean load of a rank, at least 1.
    pub load_cap: f64,
    /// Where no placement within the cap is found, take the least loaded one found instead of failing.
    pub relax_cap: bool,
    /// Most experts (slots, with replicas) on a rank; `None`: as many as the load allows.
    pub max_experts_per_rank: Option<usize>,
    /// Cost of a rank visited.
    pub rank_cost: f64,
    /// Cost of a node visited.
    pub node_cost: f64,
    /// Extra slots for replicas, all ranks together.
    pub replicas: usize,
    /// Consecutive equal blocks of experts that must stay whole (group-limited routers), when the checkpoint itself is to
    /// be permuted.
    pub num_groups: Option<usize>,
    /// Annealing runs; `None`: 24, down to 2 for large layers.
    pub restarts: Option<usize>,
    /// Seed of the search: same input and seed, same placement.
    pub seed: u64,
}

impl Default for SearchOptions {
    fn default() -> Self {
        Self {
            load_cap: 1.25,
            relax_cap: false,
            max_experts_per_rank: None,
            rank_cost: 1.0,
            node_cost: 8.0,
            replicas: 0,
            num_groups: None,
            restarts: None,
            seed: 0,
        }
    }
}

/// A placement of one layer and how good it is on the routing it was made from.
#[derive(Debug, Clone, PartialEq)]
pub struct SearchOutcome {
    /// The table.
    pub placement: LayerPlacement,
    /// `C_T`: ranks visited per token.
    pub copies_per_token: f64,
    /// Nodes visited per token.
    pub node_copies_per_token: f64,
    /// Load of the busiest rank over the mean.
    pub load_max_over_mean: f64,
    /// No placement without replicas within the same limits has fewer copies per token.
    pub copies_lower_bound: f64,
    /// Likewise for nodes.
    pub node_copies_lower_bound: f64,
    /// Copies per token of every restart, without replicas: their spread tells how settled the search is.
    pub restart_copies: Vec<f64>,
    /// Number of distinct expert sets.
    pub num_sets: usize,
}

/// Places the experts of one layer. `keep_going` is asked now and then; when it says no the best placement so far is
/// returned (the outcome then depends on when), and restarts go on until it does if their number is `usize::MAX`.
///
/// Errors when there is no token, when options are out of range, and with [`PlanError::Infeasible`] when no placement
/// within the load cap is found (unless `relax_cap`).
pub fn place(
    routing: &Routing<'_>,
    topology: Topology,
    options: &SearchOptions,
    keep_going: &mut dyn FnMut() -> bool,
) -> Result<SearchOutcome> {
    let graph = Hypergraph::new(routing)?;
    let problem = Problem::new(&graph, topology, options)?;
    let mut restart_copies = Vec::new();
    let (placement, outcome) = if options.replicas == 0 {
        let placement = without_replicas(&graph, &problem, options, keep_going, &mut restart_copies)?;
        let outcome = replicate::simulate(routing, &problem, &placement);
        (placement, outcome)
    } else {
        // Where the cap is used up to the last token no replica fits, so a more even base competes too; and so does one
        // made as if the experts that are too hot for a rank were spread already.
        let even = 1.0 + (options.load_cap - 1.0) / 2.0;
        let spread = graph.with_hot_experts_spread(problem.limits.max_load, problem.mean_load / 2.0);
        let spread_problem = Problem::new(&spread, topology, options)?;
        let bases =
            [(&graph, problem), (&graph, problem.with_cap(even)), (&spread, spread_problem.with_cap(even))];
        let mut found = Vec::new();
        for (graph_of_base, base) in bases {
            let placement = without_replicas(graph_of_base, &base, options, keep_going, &mut restart_copies)?;
            found.push(replicate::add_replicas(&graph, routing, &problem, placement, options.replicas)?);
        }
        let value = |o: &replicate::Simulated| problem.value(o.rank_copies, o.node_copies, o.overload);
        found.into_iter().min_by(|a, b| value(&a.1).total_cmp(&value(&b.1))).expect("three candidates")
    };
    if outcome.overload > 0 && !options.relax_cap {
        return Err(infeasible(&graph, &problem, options, outcome.max_load));
    }
    let tokens = graph.num_tokens() as f64;
    let node_limits = problem.node_limits(1.0);
    Ok(SearchOutcome {
        placement,
        copies_per_token: outcome.rank_copies as f64 / tokens,
        node_copies_per_token: outcome.node_copies as f64 / tokens,
        load_max_over_mean: outcome.max_load as f64 / problem.mean_load,
        copies_lower_bound: bound::copies_lower_bound(&graph, problem.limits) / tokens,
        node_copies_lower_bound: bound::copies_lower_bound(&graph, node_limits) / tokens,
        restart_copies,
        num_sets: graph.num_sets(),
    })
}

fn without_replicas(
    graph: &Hypergraph,
    problem: &Problem,
    options: &SearchOptions,
    keep_going: &mut dyn FnMut() -> bool,
    restart_copies: &mut Vec<f64>,
) -> Result<LayerPlacement> {
    let expert_ranks = match options.num_groups {
        Some(num_groups) => groups::place(graph, problem, num_groups, options, keep_going)?,
        None => best_of_restarts(graph, problem, options, keep_going, restart_copies),
    };
    LayerPlacement::from_expert_ranks(problem.topology.num_ranks(), &expert_ranks)
}

/// The options in the units of the search.
#[derive(Debug, Clone, Copy)]
struct Problem {
    topology: Topology,
    costs: Costs,
    limits: Limits,
    mean_load: f64,
    /// Price of a (token, expert) pair above the load limit that no saving of copies is worth.
    forbidden: f64,
}

impl Problem {
    fn new(graph: &Hypergraph, topology: Topology, options: &SearchOptions) -> Result<Self> {
        let (e, w) = (graph.num_experts(), topology.num_ranks());
        if w > e {
            let expected = format!("at most {e}, the number of experts");
            return Err(PlanError::range("number of ranks", expected, w));
        }
        if !(options.load_cap >= 1.0 && options.load_cap.is_finite()) {
            return Err(PlanError::range("load cap (max/mean)", "a number from 1", options.load_cap));
        }
        let total = options.rank_cost + options.node_cost;
        if !(options.rank_cost >= 0.0 && options.node_cost >= 0.0 && total > 0.0 && total.is_finite()) {
            let found = format!("{} and {}", options.rank_cost, options.node_cost);
            return Err(PlanError::range("rank and node cost", "two numbers from 0, not both 0", found));
        }
        let max_experts = options.max_experts_per_rank.unwrap_or(usize::from(u16::MAX));
        if max_experts.saturating_mul(w) < e {
            let expected = format!("at least {} for {e} experts on {w} ranks", e.div_ceil(w));
            return Err(PlanError::range("most experts per rank", expected, max_experts));
        }
        // One unit is one copy at the level that counts, so that temperatures and prices mean the same everywhere.
        let costs = if topology.num_nodes() > 1 {
            Costs { rank: options.rank_cost / total, node: options.node_cost / total }
        } else {
            Costs { rank: 1.0, node: 0.0 }
        };
        let mean_load = graph.total_load() as f64 / w as f64;
        let limits = Limits { max_load: 0, max_experts, min_experts: 1 };
        let forbidden = 1.0 + graph.most_copies() as f64;
        Ok(Self { topology, costs, limits, mean_load, forbidden }.with_cap(options.load_cap))
    }

    /// The same problem under another load cap (max/mean).
    fn with_cap(&self, load_cap: f64) -> Self {
        let max_load = libm::floor(self.mean_load * load_cap + 1e-6) as i64;
        Self { limits: Limits { max_load, ..self.limits }, ..*self }
    }

    /// What the search minimises: the cost of the copies, load above the cap first.
    fn value(&self, rank_copies: i64, node_copies: i64, overload: i64) -> f64 {
        self.costs.rank * rank_copies as f64
            + self.costs.node * node_copies as f64
            + self.forbidden * overload as f64
    }

    /// Limits of a node, its load limit scaled by `slack`.
    fn node_limits(&self, slack: f64) -> Limits {
        let ranks = self.topology.ranks_per_node();
        Limits {
            max_load: libm::floor(self.limits.max_load as f64 * ranks as f64 * slack) as i64,
            max_experts: self.limits.max_experts.saturating_mul(ranks),
            min_experts: self.limits.min_experts * ranks,
        }
    }

    /// The same problem on a sample: loads scaled by `scale`.
    fn scaled(&self, scale: f64) -> Self {
        let max_load = libm::floor(self.limits.max_load as f64 * scale) as i64;
        Self { limits: Limits { max_load, ..self.limits }, mean_load: self.mean_load * scale, ..*self }
    }
}

/// Rank of each expert after the best restart. Appends the copies per token of every restart.
fn best_of_restarts(
    graph: &Hypergraph,
    problem: &Problem,
    options: &SearchOptions,
    keep_going: &mut dyn FnMut() -> bool,
    restart_copies: &mut Vec<f64>,
) -> Vec<Rank> {
    let (e, w) = (graph.num_experts(), problem.topology.num_ranks());
    let changes = (e * e / 2 + e * w) as u64;
    let proposals = (60 * changes).clamp(20_000, 500_000);
    let restarts = options.restarts.unwrap_or((60_000 / changes).clamp(2, 24) as usize).max(1);
    // The balanced start is a candidate too: it is feasible where annealing, in a tight corner, may not be.
    let balanced = spread(graph, problem.topology, problem.limits.max_experts, None);
    let mut best: Option<(i64, f64, Vec<Rank>)> = None;
    for restart in 0..restarts {
        let mut rng = Pcg64Mcg::seed_from_u64(options.seed.wrapping_add((restart as u64) << 32));
        let start = match restart {
            0 if !keep_going() => balanced.clone(),
            _ => anneal_sample(graph, problem, &balanced, proposals, &mut rng, keep_going),
        };
        let mut state = State::new(graph, problem.topology, problem.costs, problem.limits, &start);
        descend(&mut state, problem.forbidden);
        restart_copies
            .push(replicate::rank_copies(graph, &state.expert_ranks(), w) / graph.num_tokens() as f64);
        let (overload, cost) = (state.overload(), state.cost());
        if best.as_ref().is_none_or(|(o, c, _)| (overload, cost) < (*o, *c)) {
            best = Some((overload, cost, state.expert_ranks()));
        }
        if !keep_going() {
            break;
        }
    }
    let (overload, _, ranks) = best.expect("there is at least one restart");
    if overload == 0 {
        return ranks;
    }
    let mut state = State::new(graph, problem.topology, problem.costs, problem.limits, &balanced);
    descend(&mut state, problem.forbidden);
    if state.overload() < overload { state.expert_ranks() } else { ranks }
}

/// One annealing run on a sample of the sets.
fn anneal_sample(
    graph: &Hypergraph,
    problem: &Problem,
    balanced: &[Rank],
    proposals: u64,
    rng: &mut Pcg64Mcg,
    keep_going: &mut dyn FnMut() -> bool,
) -> Vec<Rank> {
    let e = graph.num_experts();
    let sample = graph.sample((40 * e).max(2_000), unit(rng));
    let problem = problem.scaled(sample.num_tokens() as f64 / graph.num_tokens() as f64);
    // A change touches the sets of an expert or two: its cost is of the order of a mean expert's load.
    let mean_expert_load = sample.total_load() as f64 / e as f64;
    let schedule = |heat: f64| Schedule {
        proposals,
        temperature: (0.08 * heat * mean_expert_load, 0.008 * mean_expert_load),
        overload_price: (0.3, 30.0),
    };
    let (start, heat) = if problem.topology.num_nodes() > 1 && problem.costs.node > 0.0 {
        // Nodes first: crossing a node later is an uphill walk over many ranks.
        let nodes = Topology::flat(problem.topology.num_nodes()).expect("a topology has nodes");
        let limits = problem.node_limits(0.97);
        let start = spread(&sample, nodes, limits.max_experts, None);
        let mut state = State::new(&sample, nodes, Costs { rank: 1.0, node: 0.0 }, limits, &start);
        anneal(&mut state, rng, schedule(1.0), keep_going);
        descend(&mut state, problem.forbidden);
        (spread(&sample, problem.topology, problem.limits.max_experts, Some(&state.expert_ranks())), 0.5)
    } else {
        (balanced.to_vec(), 1.0)
    };
    let mut state = State::new(&sample, problem.topology, problem.costs, problem.limits, &start);
    anneal(&mut state, rng, schedule(heat), keep_going);
    state.expert_ranks()
}

/// Experts by falling load, each to the least loaded rank (of its node, where `nodes` `[E]` says one) with room.
fn spread(graph: &Hypergraph, topology: Topology, max_experts: usize, nodes: Option<&[Rank]>) -> Vec<Rank> {
    let mut order: Vec<usize> = (0..graph.num_experts()).collect();
    order.sort_by_key(|&e| (std::cmp::Reverse(graph.load(e)), e));
    let mut load = vec![(0i64, 0usize); topology.num_ranks()];
    let mut ranks = vec![0; graph.num_experts()];
    for e in order {
        let fits = |r: &usize| {
            load[*r].1 < max_experts
                && nodes.is_none_or(|n| usize::from(n[e]) == topology.node_of(*r as Rank))
        };
        let rank = (0..load.len()).filter(fits).min_by_key(|&r| (load[r], r));
        let rank = rank.expect("the limits leave room for every expert");
        ranks[e] = rank as Rank;
        load[rank].0 += graph.load(e);
        load[rank].1 += 1;
    }
    ranks
}

fn infeasible(graph: &Hypergraph, problem: &Problem, options: &SearchOptions, found: i64) -> PlanError {
    let hottest = (0..graph.num_experts()).max_by_key(|&e| graph.load(e)).unwrap_or(0);
    let ratio = |load: i64| load as f64 / problem.mean_load;
    let alone = ratio(graph.load(hottest));
    let reason = if alone > options.load_cap {
        format!(
            "expert {hottest} alone is {alone:.3} times the mean load of a rank: raise the cap or add replicas"
        )
    } else {
        format!("the most even placement found is at {:.3}: raise the cap or add replicas", ratio(found))
    };
    PlanError::Infeasible(format!("load cap {} (max/mean): {reason}", options.load_cap))
}

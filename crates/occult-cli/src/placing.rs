//! From rows of a layer and a method to a placement of that layer.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use occult_plan::cost::Cluster;
use occult_plan::placement::search::{self, SearchOptions, SearchOutcome};
use occult_plan::placement::{Method, apart, contiguous, eplb, greedy, random};
use occult_plan::{CoActivation, LayerPlacement, PlanError, RoutingBuf, Topology, tokens_per_expert};

use crate::args::SearchArgs;

/// Default cap on max/mean load. A layer whose hottest expert alone is above it gets the least cap found instead.
pub(crate) const DEFAULT_LOAD_CAP: f64 = 1.1;

/// What a placement of one layer is made from.
pub(crate) enum LayerInput<'a> {
    /// Token sets.
    Tokens(&'a RoutingBuf),
    /// Counts only.
    Counts { counts: &'a [u64], coactivation: Option<&'a CoActivation> },
}

impl LayerInput<'_> {
    fn num_experts(&self) -> usize {
        match self {
            LayerInput::Tokens(rows) => rows.num_experts,
            LayerInput::Counts { counts, .. } => counts.len(),
        }
    }

    fn counts(&self) -> Result<Vec<u64>> {
        Ok(match self {
            LayerInput::Tokens(rows) => tokens_per_expert(&rows.view()?),
            LayerInput::Counts { counts, .. } => counts.to_vec(),
        })
    }
}

/// A placed layer; `search` has what only the search knows.
pub(crate) struct Placed {
    pub(crate) placement: LayerPlacement,
    pub(crate) search: Option<SearchOutcome>,
    /// Wall-clock seconds that the method took.
    pub(crate) seconds: f64,
}

/// How to place, for all layers.
#[derive(Debug, Clone)]
pub(crate) struct Placer {
    pub(crate) topology: Topology,
    pub(crate) options: SearchOptions,
    /// Wall clock for all layers, and how many of them run at a time.
    time_limit: Option<Duration>,
    layers_at_a_time: f64,
}

impl Placer {
    pub(crate) fn new(
        args: &SearchArgs,
        topology: Topology,
        cluster: Option<&Cluster>,
        num_experts: usize,
    ) -> Result<Self> {
        let [rank_cost, node_cost] = costs(args, cluster);
        let slots = num_experts.saturating_add(args.replicas);
        if args.equal && !slots.is_multiple_of(topology.num_ranks()) {
            bail!(
                "--equal: {num_experts} experts and {} replicas cannot be shared out equally among {} ranks",
                args.replicas,
                topology.num_ranks()
            );
        }
        let equal = args.equal.then(|| slots / topology.num_ranks());
        let time_limit = match args.time_limit {
            Some(s) => match Duration::try_from_secs_f64(s) {
                Ok(limit) if !limit.is_zero() => Some(limit),
                _ => bail!("--time-limit is {s:e}, expected a number of seconds above 0"),
            },
            None => None,
        };
        let options = SearchOptions {
            load_cap: args.load_cap.unwrap_or(DEFAULT_LOAD_CAP),
            relax_cap: args.load_cap.is_none(),
            max_experts_per_rank: equal.or(args.max_experts_per_rank),
            rank_cost,
            node_cost,
            replicas: args.replicas,
            num_groups: args.keep_groups,
            restarts: args.restarts.or(time_limit.map(|_| usize::MAX)),
            seed: args.seed,
        };
        Ok(Self { topology, options, time_limit, layers_at_a_time: 1.0 })
    }

    /// Tells how many layers share the time limit on how many threads.
    pub(crate) fn share_time(&mut self, num_layers: usize, threads: usize) {
        self.layers_at_a_time = threads.min(num_layers) as f64 / num_layers.max(1) as f64;
    }

    /// Places one layer, the `layer`-th of the profile.
    pub(crate) fn place(&self, method: Method, layer: usize, input: &LayerInput<'_>) -> Result<Placed> {
        let (e, topology) = (input.num_experts(), self.topology);
        let w = topology.num_ranks();
        // EPLB would fill the ranks with replicas that nobody asked for.
        if w > e {
            return Err(PlanError::range(
                "number of ranks",
                format!("at most {e}, the number of experts"),
                w,
            )
            .into());
        }
        let start = Instant::now();
        let done = |placement| Ok(Placed { placement, search: None, seconds: start.elapsed().as_secs_f64() });
        match (method, input) {
            (Method::Contiguous, _) => done(contiguous::place(e, w)?),
            (Method::Random, _) => done(random::place(e, w, self.seed_of(layer))?),
            (Method::Greedy | Method::Apart, LayerInput::Tokens(rows)) => {
                done(self.of_pairs(method, layer, &CoActivation::of(&rows.view()?))?)
            }
            (Method::Greedy | Method::Apart, LayerInput::Counts { coactivation: Some(pairs), .. }) => {
                done(self.of_pairs(method, layer, pairs)?)
            }
            (Method::Eplb, _) => {
                let slots =
                    e.saturating_add(self.options.replicas).checked_next_multiple_of(w).unwrap_or(usize::MAX);
                let num_groups = self.options.num_groups.unwrap_or(1);
                let config = eplb::EplbConfig {
                    num_replicas: slots,
                    num_groups,
                    num_nodes: topology.num_nodes(),
                    num_gpus: w,
                };
                done(eplb::place(&input.counts()?, config)?.to_placement()?)
            }
            (Method::Search, LayerInput::Tokens(rows)) => {
                let allowed = self.time_limit.map(|limit| limit.mul_f64(self.layers_at_a_time));
                let mut keep_going = || allowed.is_none_or(|allowed| start.elapsed() < allowed);
                let outcome = search::place(&rows.view()?, topology, &self.options, &mut keep_going)?;
                let seconds = start.elapsed().as_secs_f64();
                Ok(Placed { placement: outcome.placement.clone(), search: Some(outcome), seconds })
            }
            (Method::Greedy | Method::Apart | Method::Search, _) => {
                let what = match method {
                    Method::Search => "method search",
                    Method::Apart => "method apart",
                    _ => "method greedy",
                };
                let missing = if method == Method::Search {
                    "token-level expert ids (this profile has counts only; eplb, contiguous and random need no more)"
                } else {
                    "co-activation counts (this profile has counts of single experts only)"
                };
                Err(PlanError::Missing { what, missing }.into())
            }
        }
    }

    /// Layers need different seeds to differ.
    fn seed_of(&self, layer: usize) -> u64 {
        self.options.seed.wrapping_add(layer as u64)
    }

    /// A method that needs no more than pairs of experts.
    fn of_pairs(
        &self,
        method: Method,
        layer: usize,
        pairs: &CoActivation,
    ) -> occult_plan::Result<LayerPlacement> {
        let num_ranks = self.topology.num_ranks();
        match method {
            Method::Apart => apart::place(pairs, num_ranks, self.seed_of(layer)),
            _ => greedy::place(pairs, num_ranks),
        }
    }
}

/// Cost of a rank and of a node visited: what was given, or proportional to the time a byte takes on their links.
fn costs(args: &SearchArgs, cluster: Option<&Cluster>) -> [f64; 2] {
    let of_links = cluster.and_then(|c| {
        let inter = c.inter.as_ref()?;
        let ranks = match inter.per {
            occult_plan::cost::LinkEnd::Rank => 1.0,
            occult_plan::cost::LinkEnd::Node => c.ranks_per_node as f64,
        };
        let per_rank = inter.link.bandwidth_bytes_per_s / ranks;
        Some([1.0, c.intra.bandwidth_bytes_per_s / per_rank])
    });
    let [rank, node] = of_links.unwrap_or([1.0, SearchOptions::default().node_cost]);
    [args.rank_cost.unwrap_or(rank), args.node_cost.unwrap_or(node)]
}

//! What every rank knows before anything is measured: sizes, routing, placements, modes.

use std::ops::Range;
use std::sync::Arc;

use anyhow::{Result, bail};
use occult_comm::{Buffer, Communicator, Meter, Metered};
use occult_kernels::Threads;
use occult_moe::{ExpertParallelLayer, LayerOptions, Mode, Overlap, PruneRule, Pruning, Step, topology_of};
use occult_plan::placement::search::{self, SearchOptions};
use occult_plan::placement::{apart, contiguous};
use occult_plan::prune::balance;
use occult_plan::{
    Budget, CoActivation, HomeRanks, LayerPlacement, LayerTraffic, PruneSpec, Rank, RoutingBuf, Topology,
};

use super::args::{ModeName, ShapeArgs};
use super::routing::{BenchRouting, routing};
use crate::exit::Usage;

/// Annealing runs of a searched placement: enough for one layer, soon done.
const RESTARTS: usize = 8;
/// Of the modes that prune.
const PRUNE_RULE: PruneRule = PruneRule::BestMass;

/// One rank's view.
pub(crate) struct Setting {
    pub(crate) comm: Arc<dyn Communicator>,
    pub(crate) meter: Arc<Meter>,
    pub(crate) topology: Topology,
    pub(crate) routing: Arc<BenchRouting>,
    /// Tokens of every rank.
    pub(crate) step: Step,
    pub(crate) hidden: usize,
    pub(crate) ffn: usize,
    pub(crate) contiguous: LayerPlacement,
    pub(crate) searched: LayerPlacement,
    pub(crate) apart: LayerPlacement,
    /// The searched one with weights of its ranks, for modes that want some.
    balanced: Vec<(ModeName, LayerPlacement)>,
}

/// Errors on sizes that leave nothing to do.
pub(crate) fn check(args: &ShapeArgs) -> Result<()> {
    if args.hidden == 0 || args.ffn == 0 || args.reps == 0 || args.tokens.iter().sum::<usize>() == 0 {
        return Err(Usage("--tokens, --hidden, --ffn and --reps must be at least 1".to_owned()).into());
    }
    if args.load_cap.is_nan() || args.load_cap < 1.0 {
        return Err(Usage(format!("--load-cap {}, expected at least 1", args.load_cap)).into());
    }
    Ok(())
}

/// Tokens of every rank: shared out evenly, or as given.
fn tokens_of_ranks(tokens: &[usize], world: usize) -> Result<Vec<usize>> {
    match *tokens {
        [all] => Ok((0..world).map(|r| all / world + usize::from(r < all % world)).collect()),
        _ if tokens.len() == world => Ok(tokens.to_vec()),
        _ => Err(Usage(format!("--tokens has {} numbers for {world} ranks", tokens.len())).into()),
    }
}

impl Setting {
    /// Collective.
    pub(crate) fn new(
        comm: Box<dyn Communicator>,
        args: &ShapeArgs,
        routing: Arc<BenchRouting>,
    ) -> Result<Self> {
        let metered = Metered::new(comm);
        let meter = metered.meter();
        let comm: Arc<dyn Communicator> = Arc::new(metered);
        let world = comm.world_size();
        let topology = match args.nodes {
            Some(nodes) => Topology::new(world, nodes).map_err(|e| Usage(e.to_string()))?,
            None => topology_of(&*comm)?,
        };
        let experts = routing.router.num_experts;
        if world > experts {
            return Err(Usage(format!("{world} ranks for {experts} experts")).into());
        }
        let contiguous = contiguous::place(experts, world)?;
        let searched = match args.modes.iter().any(|mode| mode.searched()) {
            true => search_once(&*comm, args, &routing.profiled, topology)?,
            false => contiguous.clone(),
        };
        let apart = match args.modes.contains(&ModeName::DedupApart) {
            true => place_apart(&routing.profiled, world, args.seed)?,
            false => contiguous.clone(),
        };
        let mut balanced = Vec::new();
        for &mode in args.modes.iter().filter(|mode| mode.balanced()) {
            balanced.push((mode, balance_once(&*comm, args.load_cap, mode, &routing, &searched, topology)?));
        }
        let step = Step::new(tokens_of_ranks(&args.tokens, world)?);
        let (hidden, ffn) = (args.hidden, args.ffn);
        Ok(Self { comm, meter, topology, routing, step, hidden, ffn, contiguous, searched, apart, balanced })
    }

    pub(crate) fn world(&self) -> usize {
        self.comm.world_size()
    }

    pub(crate) fn placement(&self, mode: ModeName) -> &LayerPlacement {
        match mode {
            ModeName::DedupApart => &self.apart,
            _ if mode.balanced() => {
                let found = self.balanced.iter().find(|(of, _)| *of == mode);
                found.map_or(&self.searched, |(_, placement)| placement)
            }
            _ if mode.searched() => &self.searched,
            _ => &self.contiguous,
        }
    }

    /// Tokens of a rank among all measured tokens.
    pub(crate) fn tokens_of(&self, rank: usize) -> Range<usize> {
        let start = self.step.tokens()[..rank].iter().sum();
        start..start + self.step.tokens()[rank]
    }

    /// Router logits of a rank's tokens.
    pub(crate) fn logits_of(&self, rank: usize) -> &[f32] {
        let (tokens, e) = (self.tokens_of(rank), self.routing.router.num_experts);
        &self.routing.logits[tokens.start * e..tokens.end * e]
    }

    /// How a mode runs.
    pub(crate) fn options(
        &self,
        mode: ModeName,
        overlap: &Overlap,
        small_batch: usize,
    ) -> Result<LayerOptions> {
        let (placement, profiled) = (self.placement(mode), self.routing.profiled.view()?);
        let traffic =
            LayerTraffic::measure(placement, self.topology, HomeRanks::Uniform, &profiled)?.summary();
        let prune = |max_ranks| Pruning { rule: PRUNE_RULE, budget: Budget::Fixed { max_ranks } };
        Ok(LayerOptions {
            mode: if mode == ModeName::Conventional { Mode::Conventional } else { Mode::Dedup },
            pruning: mode.max_ranks().map(prune),
            overlap: overlap.clone(),
            small_batch_tokens: small_batch,
            copies_per_token: Some(traffic.copies_per_token),
            ..LayerOptions::new(self.topology)
        })
    }

    /// The layer of a mode.
    pub(crate) fn layer(
        &self,
        mode: ModeName,
        options: LayerOptions,
        threads: &Threads,
    ) -> Result<ExpertParallelLayer> {
        let (comm, router) = (Arc::clone(&self.comm), self.routing.router.clone());
        let placement = self.placement(mode).clone();
        Ok(ExpertParallelLayer::new(comm, router, placement, options, threads.clone())?)
    }

    /// Experts of this rank under every placement in use.
    pub(crate) fn expert_counts(&self) -> Vec<usize> {
        let rank = self.comm.rank() as Rank;
        [&self.contiguous, &self.searched, &self.apart].map(|p| p.experts_of(rank).len()).to_vec()
    }

    /// Everybody's numbers, equally many, by rank (collective).
    pub(crate) fn gather(&self, mine: &[f64]) -> Result<Vec<Vec<f64>>> {
        let all = self.comm.all_gather("bench figures", Buffer::from_slice(mine))?;
        let of = |buffer: &Buffer| match buffer.try_as_slice::<f64>() {
            Some(values) if values.len() == mine.len() => Ok(values.to_vec()),
            _ => bail!("ranks measured different things"),
        };
        all.iter().map(of).collect()
    }
}

/// Every rank finds the same: it takes no time.
fn place_apart(profiled: &RoutingBuf, num_ranks: usize, seed: u64) -> Result<LayerPlacement> {
    Ok(apart::place(&CoActivation::of(&profiled.view()?), num_ranks, seed)?)
}

/// Rank 0 searches, the others are told.
fn search_once(
    comm: &dyn Communicator,
    args: &ShapeArgs,
    profiled: &RoutingBuf,
    topology: Topology,
) -> Result<LayerPlacement> {
    let mut ranks: Vec<Rank> = Vec::new();
    if comm.rank() == 0 {
        let (e, w) = (profiled.num_experts, topology.num_ranks());
        let options = SearchOptions {
            load_cap: args.load_cap,
            relax_cap: true,
            max_experts_per_rank: args.equal.then(|| e.div_ceil(w)).or(args.max_experts_per_rank),
            restarts: Some(RESTARTS),
            seed: args.seed,
            ..SearchOptions::default()
        };
        let found = search::place(&profiled.view()?, topology, &options, &mut || true)?;
        ranks = found.placement.expert_ranks().unwrap_or_default();
    }
    let buffer = comm.broadcast("bench placement", 0, Buffer::from_slice(&ranks))?;
    Ok(LayerPlacement::from_expert_ranks(topology.num_ranks(), buffer.as_slice())?)
}

/// Rank 0 finds the weights of the ranks, the others are told.
fn balance_once(
    comm: &dyn Communicator,
    load_cap: f64,
    mode: ModeName,
    routing: &BenchRouting,
    searched: &LayerPlacement,
    topology: Topology,
) -> Result<LayerPlacement> {
    let mut weights = Vec::new();
    if comm.rank() == 0 {
        let budget = Budget::Fixed { max_ranks: mode.max_ranks().unwrap_or(topology.num_ranks()) };
        let spec = PruneSpec { rule: PRUNE_RULE.rule(), budget, router: &routing.router.rule };
        let found = balance(&routing.profiled.view()?, searched, topology, spec, load_cap)?;
        weights = found.placement.rank_weights().unwrap_or_default().to_vec();
    }
    let buffer = comm.broadcast("bench weights of ranks", 0, Buffer::from_slice(&weights))?;
    Ok(searched.clone().with_rank_weights(buffer.as_slice().to_vec())?)
}

/// Routing for all ranks' tokens.
pub(crate) fn routing_of(args: &ShapeArgs) -> Result<Arc<BenchRouting>> {
    Ok(Arc::new(routing(args, args.tokens.iter().sum())?))
}

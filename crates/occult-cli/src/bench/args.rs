//! Arguments of `occult bench exchange`, `layer` and `step`.

use clap::{Args, ValueEnum};
use occult_moe::{Overlap, Pass};

use super::machine::Machine;
use crate::model_args::{Dtype, at_least_one};
use crate::world::WorldArgs;

/// The layer, its tokens and who holds what: shared by all three.
#[derive(Debug, Args)]
pub(crate) struct ShapeArgs {
    #[command(flatten)]
    pub(crate) world: WorldArgs,
    /// Tokens of one step: one number is all ranks together, shared out evenly; several (T0,T1,..) are each rank's own
    #[arg(long, value_name = "T", value_delimiter = ',', default_value = "1024")]
    pub(crate) tokens: Vec<usize>,
    /// Width of a token row
    #[arg(long, value_name = "D", default_value_t = 512)]
    pub(crate) hidden: usize,
    /// Intermediate size of one expert
    #[arg(long, value_name = "F", default_value_t = 256)]
    pub(crate) ffn: usize,
    /// Experts of a layer [default: those of the routing; 64 where it is synthetic]
    #[arg(long, value_name = "E")]
    pub(crate) experts: Option<usize>,
    /// Experts of a token [default: those of the routing; 8 where it is synthetic]
    #[arg(long, value_name = "K")]
    pub(crate) top_k: Option<usize>,
    /// Hosts that the ranks count as being on, for the two-level exchange [default: as they are]
    #[arg(long, value_name = "M")]
    pub(crate) nodes: Option<usize>,
    /// Routing: `synthetic` (with co-activation), `bundled` (gpt-oss-20b: 32 experts, top-4), or a routing profile. One half
    /// of it makes the placement, the other is measured
    #[arg(long, value_name = "WHAT", default_value = "synthetic")]
    pub(crate) routing: String,
    /// Layer of the routing, counted from 0 [default: the one in the middle]
    #[arg(long, value_name = "L")]
    pub(crate) layer: Option<usize>,
    /// Most load of a rank over the mean that a searched placement may have
    #[arg(long, value_name = "X", default_value_t = crate::placing::DEFAULT_LOAD_CAP)]
    pub(crate) load_cap: f64,
    /// The same number of experts on every rank
    #[arg(long)]
    pub(crate) equal: bool,
    /// Most experts on a rank: each costs reading its weights, however few its tokens
    #[arg(long, value_name = "N", conflicts_with = "equal")]
    pub(crate) max_experts_per_rank: Option<usize>,
    /// Seed of everything random
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
    /// What is compared
    #[arg(
        long,
        value_enum,
        value_name = "MODE",
        value_delimiter = ',',
        default_value = "conventional,dedup,dedup-search,prune-2,prune-1"
    )]
    pub(crate) modes: Vec<ModeName>,
    /// Measured rounds of all modes, every second one in reverse order, after one that is not measured; medians count
    #[arg(long, value_name = "N", default_value_t = 9)]
    pub(crate) reps: usize,
    /// Also counts what this network interface of every rank's host sends in the measured steps (Linux)
    #[arg(long, value_name = "NAME")]
    pub(crate) interface: Option<String>,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// How ranks compute.
#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    /// Number format of the experts' weights; rows and arithmetic are f32
    #[arg(long, value_enum, value_name = "DTYPE", default_value = "f32")]
    pub(crate) dtype: Dtype,
    /// Measure forward and backward, too
    #[arg(long)]
    pub(crate) backward: bool,
    /// Threads of one rank [default: the cores shared out among the ranks of this machine, at least 1]
    #[arg(long, value_name = "N")]
    pub(crate) threads_per_rank: Option<usize>,
    /// Exchanges beside compute: on (in --chunks parts), off, or as many parts as the cost model finds best. Several
    /// (off,auto) take turns like modes
    #[arg(long, value_enum, value_name = "WHEN", value_delimiter = ',', default_value = "auto")]
    pub(crate) overlap: Vec<OverlapArg>,
    /// Parts of a step with --overlap on
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = at_least_one)]
    pub(crate) chunks: usize,
    /// Steps in which no rank has more tokens use one message per peer, without a round of counts (inference)
    #[arg(long, value_name = "T", default_value_t = 64)]
    pub(crate) small_batch: usize,
}

impl RunArgs {
    /// Every mode with every overlap.
    pub(crate) fn lanes(&self, modes: &[ModeName]) -> Vec<(ModeName, OverlapArg)> {
        self.overlap.iter().flat_map(|&overlap| modes.iter().map(move |&mode| (mode, overlap))).collect()
    }

    pub(crate) fn overlap(&self, overlap: OverlapArg, machine: &Machine, pass: Pass) -> Overlap {
        match overlap {
            OverlapArg::Off => Overlap::Off,
            // Nothing to hide behind.
            OverlapArg::Auto if machine.pooled => Overlap::Off,
            OverlapArg::On => Overlap::Chunks(self.chunks),
            OverlapArg::Auto => Overlap::Auto(Box::new(machine.cluster_in(pass))),
        }
    }
}

/// `occult bench layer`
#[derive(Debug, Args)]
pub(crate) struct BenchLayerArgs {
    #[command(flatten)]
    pub(crate) shape: ShapeArgs,
    #[command(flatten)]
    pub(crate) run: RunArgs,
}

/// `occult bench exchange`
#[derive(Debug, Args)]
pub(crate) struct BenchExchangeArgs {
    #[command(flatten)]
    pub(crate) shape: ShapeArgs,
    /// Bytes to each peer of the all-to-alls
    #[arg(long, value_name = "N", value_delimiter = ',', default_value = "64,4096,65536,524288,2097152",
          value_parser = at_least_one)]
    pub(crate) bytes: Vec<usize>,
}

/// `occult bench step`
#[derive(Debug, Args)]
pub(crate) struct BenchStepArgs {
    #[command(flatten)]
    pub(crate) shape: ShapeArgs,
    #[command(flatten)]
    pub(crate) run: RunArgs,
    /// Layers: attention over the rank's own tokens, then experts
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = at_least_one)]
    pub(crate) layers: usize,
}

/// When exchanges run beside compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum OverlapArg {
    On,
    Off,
    Auto,
}

impl OverlapArg {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::On => "on",
            Self::Off => "off",
            Self::Auto => "auto",
        }
    }
}

/// What is compared: exchange, placement, pruning.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ModeName {
    /// One row per (token, expert), consecutive experts on a rank
    Conventional,
    /// One row per (token, rank), the same placement
    Dedup,
    /// One row per (token, rank), placement searched on other tokens of the same routing
    DedupSearch,
    /// One row per (token, rank), experts chosen together on different ranks: for steps of one or a few tokens
    DedupApart,
    /// As `dedup-search`, and at most two ranks per token
    #[value(name = "prune-2")]
    Prune2,
    /// As `dedup-search`, and at most one rank per token
    #[value(name = "prune-1")]
    Prune1,
    /// As `prune-2`, ranks chosen so that loads are even (`occult prune --balance` at --load-cap)
    #[value(name = "prune-2-balanced")]
    Prune2Balanced,
    /// As `prune-1`, likewise
    #[value(name = "prune-1-balanced")]
    Prune1Balanced,
}

impl ModeName {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Conventional => "conventional",
            Self::Dedup => "dedup",
            Self::DedupSearch => "dedup-search",
            Self::DedupApart => "dedup-apart",
            Self::Prune2 => "prune-2",
            Self::Prune1 => "prune-1",
            Self::Prune2Balanced => "prune-2-balanced",
            Self::Prune1Balanced => "prune-1-balanced",
        }
    }

    /// Whether it runs on the searched placement.
    pub(crate) fn searched(self) -> bool {
        self == Self::DedupSearch || self.max_ranks().is_some()
    }

    /// Most ranks of a token.
    pub(crate) fn max_ranks(self) -> Option<usize> {
        match self {
            Self::Prune2 | Self::Prune2Balanced => Some(2),
            Self::Prune1 | Self::Prune1Balanced => Some(1),
            _ => None,
        }
    }

    /// Whether the ranks have weights that make their loads even when pruned.
    pub(crate) fn balanced(self) -> bool {
        matches!(self, Self::Prune2Balanced | Self::Prune1Balanced)
    }
}

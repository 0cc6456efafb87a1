//! The command line: names, defaults and help. What the arguments mean is decided in [`crate::setup`] and the commands.

use std::ops::RangeInclusive;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use occult_formats::{ExportFormat, ImportFormat};
use occult_plan::Budget;
use occult_plan::graph::MAX_THRESHOLDS;
use occult_plan::placement::Method;

use crate::exit;
use crate::model_args::{
    BenchArgs, ConvertArgs, EvalArgs, GenerateArgs, LogitsArgs, PermuteArgs, ProfileArgs,
};
use crate::train_args::{PretrainArgs, TuneArgs};

/// Makes expert-parallel Mixture-of-Experts models faster by keeping experts that work together on one device.
#[derive(Debug, Parser)]
#[command(name = "occult", version, after_help = exit::HELP, max_term_width = 110)]
#[command(arg_required_else_help = true)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run the whole pipeline on the bundled model: profile, place, read and write with experts on several ranks, prune, report
    #[command(after_help = "Example:\n  occult demo\n  occult demo --ranks 8 --out-dir demo8")]
    Demo(DemoArgs),
    /// Turn routing records or expert statistics of other engines into a routing profile
    #[command(
        after_help = "Examples:\n  occult import routing.safetensors --experts 64 -o profile.safetensors\n  \
                            occult import expert_distribution_recorder_*.pt -o profile.safetensors\n  \
                            occult import trace/ --format gpt-oss-trace -o profile.safetensors"
    )]
    Import(ImportArgs),
    /// Measure a profile: copies per token, collaboration, load, connected sub-graphs
    #[command(after_help = "Examples:\n  occult stats profile.safetensors --ranks 8\n  \
                            occult stats profile.safetensors --ranks 8 --json")]
    Stats(StatsArgs),
    /// Measure a placement on a profile: rows and bytes per rank pair, load, predicted time
    #[command(
        after_help = "Example:\n  occult traffic profile.safetensors placement.json --hidden 2048 --cluster 8xa6000-pcie"
    )]
    Traffic(TrafficArgs),
    /// Decide which rank holds which expert
    #[command(after_help = "Examples:\n  occult place profile.safetensors --ranks 4 -o placement.json\n  \
                            occult place profile.safetensors --ranks 64 --nodes 8 --holdout 0.5 --explain\n  \
                            occult place profile.safetensors --ranks 8 --method greedy")]
    Place(PlaceArgs),
    /// Write a placement as an expert map of another engine, or as a checkpoint permutation
    #[command(
        after_help = "Example:\n  occult export placement.json --format sglang --profile profile.safetensors -o map.json"
    )]
    Export(ExportArgs),
    /// Say what a file or a model directory is
    #[command(
        after_help = "Examples:\n  occult inspect profile.safetensors\n  occult inspect OLMoE-1B-7B-0924/"
    )]
    Inspect(InspectArgs),
    /// Limit the ranks a token visits, and report what that keeps
    #[command(
        after_help = "Examples:\n  occult prune profile.safetensors placement.json --max-ranks 2 --rule best-mass\n  \
                            occult prune profile.safetensors placement.json --max-ranks 4 --keep-mass 0.9\n  \
                            occult prune profile.safetensors placement.json --max-ranks 1 --balance 1.1 -o balanced.json"
    )]
    Prune(PruneArgs),
    /// Compare placements and write one self-contained HTML page
    #[command(after_help = "Examples:\n  occult report profile.safetensors --ranks 8 -o report.html\n  \
                            occult report profile.safetensors mine.json other.json --ranks 8 -o report.html")]
    Report(ReportArgs),
    /// Run text through a model and record which experts every token visits, with all router scores
    #[command(
        after_help = "Examples:\n  occult profile OLMoE-1B-7B-0924/ --text web.txt code.txt -o profile.safetensors\n  \
                            occult profile OLMoE-1B-7B-0924/ --text web.txt --max-tokens 100000 -o profile.safetensors\n\n\
                            Every file is one domain of the profile, named like the file without its extension."
    )]
    Profile(ProfileArgs),
    /// Measure speed on this machine, beside what the machine can do
    #[command(after_help = "Example:\n  \
                            occult bench model OLMoE-1B-7B-0924/ --what prefill,decode\n\n\
                            The limit is the time for all arithmetic at the measured peak of multiply-adds, or for reading\n\
                            every weight that is needed once at the measured speed of memory, whichever is longer.")]
    Bench(BenchArgs),
    /// Compute the logits and router choices of a model for token ids
    #[command(after_help = "Example:\n  echo '[[1, 5, 7], [9]]' > ids.json\n  \
                            occult logits OLMoE-1B-7B-0924/ --ids ids.json --out logits.safetensors\n\n\
                            The result has `logits` [batch, len, vocab] f32 and `expert_ids` [MoE layers, batch, len, top_k] i64.\n\
                            Sequences shorter than the longest are aligned at the end: the positions before them have\n\
                            logits 0 and expert_ids -1. A safetensors input may have an `attention_mask` [batch, len]\n\
                            that is 0 at the start of shorter sequences.")]
    Logits(LogitsArgs),
    /// Continue a prompt
    #[command(after_help = "Examples:\n  occult generate OLMoE-1B-7B-0924/ --prompt 'The sea is'\n  \
                            occult generate OLMoE-1B-7B-0924-Instruct/ --chat --prompt 'Why is the sea salty?' --temperature 0.7\n  \
                            echo '[1, 5, 7]' > ids.json && occult generate OLMoE-1B-7B-0924/ --ids ids.json")]
    Generate(GenerateArgs),
    /// Measure a model: perplexity of text, accuracy on multiple-choice tasks
    #[command(after_help = "Examples:\n  occult eval OLMoE-1B-7B-0924/ --text web.txt code.txt\n  \
                            occult eval OLMoE-1B-7B-0924/ --tasks questions.jsonl --json\n\n\
                            A task file has one question per line: \
                            {\"context\": \"...\", \"choices\": [\"...\", \"...\"], \"answer\": 0}")]
    Eval(EvalArgs),
    /// Write a model directory back, with the other expert names or another number format
    #[command(after_help = "Examples:\n  occult convert OLMoE-1B-7B-0924/ -o copy/\n  \
                            occult convert OLMoE-1B-7B-0924/ --layout fused --dtype bf16 -o fused/\n  \
                            occult convert OLMoE-1B-7B-0924/ --quantize q8 -o q8/")]
    Convert(ConvertArgs),
    /// Reorder the experts of a model so that a contiguous split over ranks is a placement
    #[command(
        after_help = "Example:\n  occult place profile.safetensors --ranks 4 --equal -o placement.json\n  \
                            occult permute OLMoE-1B-7B-0924/ placement.json -o permuted/\n\n\
                            The new directory appears only when its logits agree with those of the model."
    )]
    Permute(PermuteArgs),
    /// Train a model from random weights
    #[command(after_help = "Example:\n  \
                            occult pretrain models/recipe/ --data corpus/*.train.jsonl --eval-data corpus/*.val.jsonl \\\n    \
                            --steps 3000 --batch-tokens 16384 -o model/\n\n\
                            Stopped or killed, it goes on with the same command and --resume.")]
    Pretrain(PretrainArgs),
    /// Go on training a model: all of it, its experts, or low-rank updates; with a limit on the ranks a token visits
    #[command(after_help = "Examples:\n  occult tune OLMoE-1B-7B-0924/ --data alpaca.json -o tuned/\n  \
                            occult tune OLMoE-1B-7B-0924/ --data alpaca.json --placement placement.json --max-ranks 2 \\\n    \
                            --train experts -o tuned/")]
    Tune(TuneArgs),
}

#[derive(Debug, Args)]
pub(crate) struct TopologyArgs {
    /// Ranks (devices) that share the experts
    #[arg(long, default_value_t = 4, value_parser = at_least::<1>, value_name = "N")]
    pub(crate) ranks: usize,
    /// Nodes (hosts) that the ranks are on, equally many on each
    #[arg(long, default_value_t = 1, value_parser = at_least::<1>, value_name = "M")]
    pub(crate) nodes: usize,
}

#[derive(Debug, Args)]
pub(crate) struct ShapeArgs {
    /// Width of a token row
    #[arg(long, default_value_t = 2048, value_parser = at_least::<1>, value_name = "D")]
    pub(crate) hidden: usize,
    /// Intermediate size of one expert
    #[arg(long, default_value_t = 1024, value_parser = at_least::<1>, value_name = "F")]
    pub(crate) ffn: usize,
    /// Element type of rows and weights
    #[arg(long, default_value = "bf16", value_parser = ["f32", "bf16", "f16", "fp8", "int8"])]
    pub(crate) dtype: String,
    /// Tokens of the step that times are predicted for, over all ranks
    #[arg(long, default_value_t = 16384, value_parser = clap::value_parser!(u64).range(1..), value_name = "T")]
    pub(crate) step_tokens: u64,
}

#[derive(Debug, Args)]
pub(crate) struct ClusterArgs {
    /// Cluster to predict times for: 8xa6000-pcie, 8xh100-nvlink, 16x8xh100-400g, or a TOML file
    #[arg(long, value_parser = cluster, value_name = "NAME|FILE")]
    pub(crate) cluster: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct SearchArgs {
    /// Hard cap on max/mean load [default: 1.1, or what the hottest expert of a layer needs]
    #[arg(long, value_parser = load_cap, value_name = "X")]
    pub(crate) load_cap: Option<f64>,
    /// Extra expert slots per layer for replicas, all ranks together
    #[arg(long, default_value_t = 0, value_name = "SLOTS")]
    pub(crate) replicas: usize,
    /// The same number of experts on every rank (what engines' expert maps and checkpoint permutations need)
    #[arg(long)]
    pub(crate) equal: bool,
    /// Most experts (with replicas) on a rank
    #[arg(long, value_name = "N", conflicts_with = "equal")]
    pub(crate) max_experts_per_rank: Option<usize>,
    /// Keep the routing groups of a group-limited router whole, for a checkpoint permutation [number of groups]
    #[arg(long, value_name = "GROUPS", conflicts_with = "replicas")]
    pub(crate) keep_groups: Option<usize>,
    /// Cost of a rank that a token visits [default: 1, or from --cluster]
    #[arg(long, value_parser = cost, value_name = "COST")]
    pub(crate) rank_cost: Option<f64>,
    /// Cost of a node that a token visits [default: 8, or from --cluster]
    #[arg(long, value_parser = cost, value_name = "COST")]
    pub(crate) node_cost: Option<f64>,
    /// Search this many seconds in all instead of a fixed amount of work (the result then depends on the machine)
    #[arg(long, value_parser = time_limit, value_name = "SECONDS")]
    pub(crate) time_limit: Option<f64>,
    /// Annealing runs per layer [default: 24, down to 2 for large layers]
    #[arg(long, value_parser = at_least::<1>, value_name = "N")]
    pub(crate) restarts: Option<usize>,
    /// Seed of everything random
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
    /// Rows per layer that are read at most, evenly spaced
    #[arg(long, default_value_t = 200_000, value_parser = at_least::<1>, value_name = "ROWS")]
    pub(crate) max_tokens: usize,
    /// Share of the rows to hold out: placements are made from the others and measured on these
    #[arg(long, default_value_t = 0.0, value_parser = holdout, value_name = "SHARE")]
    pub(crate) holdout: f64,
    /// Worker threads [default: the cores of this machine]
    #[arg(long, value_parser = at_least::<1>, value_name = "N")]
    pub(crate) threads: Option<usize>,
}

impl Default for SearchArgs {
    /// What the command line gives when nothing is said.
    fn default() -> Self {
        Self {
            load_cap: None,
            replicas: 0,
            equal: false,
            max_experts_per_rank: None,
            keep_groups: None,
            rank_cost: None,
            node_cost: None,
            time_limit: None,
            restarts: None,
            seed: 0,
            max_tokens: 200_000,
            holdout: 0.0,
            threads: None,
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct ImportArgs {
    /// Files or folders, all of one format
    #[arg(required = true)]
    pub(crate) inputs: Vec<PathBuf>,
    /// Profile to write
    #[arg(short, long, value_name = "PROFILE")]
    pub(crate) output: PathBuf,
    /// Format of the inputs [default: found out from their contents]
    #[arg(long, value_parser = parse::<ImportFormat>, value_name = "FORMAT")]
    pub(crate) format: Option<ImportFormat>,
    /// Number of experts of a layer, where the files do not say it
    #[arg(long, value_name = "E")]
    pub(crate) experts: Option<usize>,
    /// Experts per token, for sources that hold only counts
    #[arg(long, value_name = "K")]
    pub(crate) top_k: Option<usize>,
    /// The model's numbers of the MoE layers, comma-separated
    #[arg(long, value_delimiter = ',', value_name = "IDS")]
    pub(crate) layer_ids: Option<Vec<u32>>,
    /// Hidden layers of the model, dense ones included
    #[arg(long, value_name = "N")]
    pub(crate) hidden_layers: Option<u32>,
    /// Name of the model
    #[arg(long)]
    pub(crate) model: Option<String>,
    /// Whether the router renormalises the weights of the chosen experts
    #[arg(long, value_name = "true|false")]
    pub(crate) norm_topk_prob: Option<bool>,
    /// Routing groups of a group-limited router
    #[arg(long, value_name = "N")]
    pub(crate) groups: Option<usize>,
    /// Which part to read of a file that holds several
    #[arg(long)]
    pub(crate) section: Option<String>,
    /// Print what was made as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Home {
    /// Any rank, equally likely: expectations
    Uniform,
    /// Rows cut into one consecutive block per rank: exact counts
    Blocks,
}

#[derive(Debug, Args)]
pub(crate) struct StatsArgs {
    /// Routing profile
    pub(crate) profile: PathBuf,
    #[command(flatten)]
    pub(crate) topology: TopologyArgs,
    /// Where tokens live between layers
    #[arg(long, value_enum, default_value_t = Home::Uniform)]
    pub(crate) home: Home,
    /// Points of the connected sub-graph curve
    #[arg(long, default_value_t = 21, value_parser = subgraph_points, value_name = "N")]
    pub(crate) subgraph_points: usize,
    /// Worker threads [default: the cores of this machine]
    #[arg(long, value_parser = at_least::<1>, value_name = "N")]
    pub(crate) threads: Option<usize>,
    /// Print the figures as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct TrafficArgs {
    /// Routing profile
    pub(crate) profile: PathBuf,
    /// Placement
    pub(crate) placement: PathBuf,
    #[command(flatten)]
    pub(crate) shape: ShapeArgs,
    #[command(flatten)]
    pub(crate) cluster: ClusterArgs,
    /// Where tokens live between layers
    #[arg(long, value_enum, default_value_t = Home::Uniform)]
    pub(crate) home: Home,
    /// Show the formula of the predicted time with its numbers (first layer)
    #[arg(long)]
    pub(crate) explain: bool,
    /// Worker threads [default: the cores of this machine]
    #[arg(long, value_parser = at_least::<1>, value_name = "N")]
    pub(crate) threads: Option<usize>,
    /// Print the figures as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct PlaceArgs {
    /// Routing profile
    pub(crate) profile: PathBuf,
    #[command(flatten)]
    pub(crate) topology: TopologyArgs,
    /// Placement method: contiguous, random, greedy (the paper's Algorithm 1), eplb (load only), search (ours: fewest
    /// copies), apart (ours, for decoding one or a few tokens at a time: a token's experts on as many ranks as possible)
    #[arg(long, default_value_t = Method::Search, value_parser = parse::<Method>)]
    pub(crate) method: Method,
    #[command(flatten)]
    pub(crate) search: SearchArgs,
    #[command(flatten)]
    pub(crate) cluster: ClusterArgs,
    /// Placement file to write
    #[arg(short, long, value_name = "PLACEMENT")]
    pub(crate) output: Option<PathBuf>,
    /// Show the formula with its numbers
    #[arg(long)]
    pub(crate) explain: bool,
    /// Print the figures as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ExportArgs {
    /// Placement
    pub(crate) placement: PathBuf,
    /// Format: sglang, vllm, vllm-ascend, tensorrt-llm, eplb or permutation
    #[arg(long, value_parser = parse::<ExportFormat>)]
    pub(crate) format: ExportFormat,
    /// File to write [default: standard output]
    #[arg(short, long, value_name = "FILE")]
    pub(crate) output: Option<PathBuf>,
    /// Profile that says which experts are hot: needed where ranks hold different numbers of experts
    #[arg(long)]
    pub(crate) profile: Option<PathBuf>,
    /// Slots on every rank [default: the most that any rank needs]
    #[arg(long, value_name = "N")]
    pub(crate) slots_per_rank: Option<usize>,
    /// Hidden layers of the model, dense ones included, where the placement does not say it
    #[arg(long, value_name = "N")]
    pub(crate) hidden_layers: Option<u32>,
    /// Routing groups of a group-limited router, which a permutation must keep whole [default: what --profile says]
    #[arg(long, value_name = "N")]
    pub(crate) groups: Option<usize>,
}

#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    /// Any file or folder
    pub(crate) file: PathBuf,
    /// Print the facts as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum PruneRule {
    /// Best scores on the ranks of the best experts
    RouterScore,
    /// Replace by the most similar expert on those ranks
    Similarity,
    /// The ranks that keep most of the routing mass
    BestMass,
    /// The ranks that keep most of the squared routing weights: the layer's output changes least
    LeastError,
}

/// What of a token's routing the fewest ranks must keep, up to the most ranks it may visit.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct AdaptiveArgs {
    /// Adaptive: per token the fewest ranks (up to --max-ranks) that keep this share of its routing mass
    #[arg(long, value_parser = keep_mass, value_name = "SHARE", requires = "max_ranks")]
    keep_mass: Option<f64>,
    /// Adaptive: per token the fewest ranks (up to --max-ranks) that lose at most so much routing weight (the root of the
    /// sum of the squared weights of its experts on other ranks)
    #[arg(long, value_parser = max_error, value_name = "WEIGHT", requires = "max_ranks", conflicts_with = "keep_mass")]
    max_error: Option<f64>,
}

impl AdaptiveArgs {
    pub(crate) fn budget(self, max_ranks: usize) -> Budget {
        match (self.keep_mass, self.max_error) {
            (Some(share), _) => Budget::Adaptive { max_ranks, share },
            (None, Some(error)) => Budget::Bounded { max_ranks, error },
            (None, None) => Budget::Fixed { max_ranks },
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct PruneArgs {
    /// Routing profile with router logits of all experts
    pub(crate) profile: PathBuf,
    /// Placement
    pub(crate) placement: PathBuf,
    /// Most ranks a token may visit
    #[arg(long, value_parser = at_least::<1>, value_name = "N")]
    pub(crate) max_ranks: usize,
    /// How ranks and replacements are chosen
    #[arg(long, value_enum, default_value_t = PruneRule::BestMass)]
    pub(crate) rule: PruneRule,
    #[command(flatten)]
    pub(crate) adaptive: AdaptiveArgs,
    /// Only choose ranks, name no replacements: works on profiles with weights but without all scores (best-mass only)
    #[arg(long)]
    pub(crate) ranks_only: bool,
    /// Let pruning load the ranks evenly: no rank more than so many times the mean, as near as can be. Writes the placement
    /// with weights of its ranks to --output (best-mass and least-error)
    #[arg(long, value_parser = load_cap, value_name = "CAP", requires = "output", conflicts_with = "ranks_only")]
    pub(crate) balance: Option<f64>,
    /// The placement with weights of its ranks, for this rule and budget: give it to tune and to commands that run the model
    #[arg(short, long, requires = "balance", value_name = "PLACEMENT")]
    pub(crate) output: Option<PathBuf>,
    /// Tokens per layer that --balance looks at
    #[arg(long, default_value_t = 16_384, value_parser = at_least::<1>, value_name = "N")]
    pub(crate) max_tokens: usize,
    /// Whether the router renormalises the weights of the chosen experts [default: what the profile says, else false]
    #[arg(long, value_name = "true|false")]
    pub(crate) norm_topk_prob: Option<bool>,
    /// Worker threads [default: the cores of this machine]
    #[arg(long, value_parser = at_least::<1>, value_name = "N")]
    pub(crate) threads: Option<usize>,
    /// Print the figures as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ReportArgs {
    /// Routing profile
    pub(crate) profile: PathBuf,
    /// Placements to show beside the methods
    pub(crate) placements: Vec<PathBuf>,
    #[command(flatten)]
    pub(crate) topology: TopologyArgs,
    #[command(flatten)]
    pub(crate) search: SearchArgs,
    #[command(flatten)]
    pub(crate) shape: ShapeArgs,
    /// Clusters to predict times for: presets or TOML files, comma-separated
    #[arg(long, value_delimiter = ',', default_value = "8xa6000-pcie,8xh100-nvlink", value_parser = cluster, value_name = "NAMES")]
    pub(crate) clusters: Vec<String>,
    /// Also show the run that trained the model: the output directory of `pretrain` or `tune`, or its folder `training`
    #[arg(long, value_name = "DIR")]
    pub(crate) training: Option<PathBuf>,
    /// Heading of the page [default: the model's name]
    #[arg(long)]
    pub(crate) title: Option<String>,
    /// HTML file to write
    #[arg(short, long, default_value = "report.html", value_name = "FILE")]
    pub(crate) output: PathBuf,
    /// Also write the data that the page shows
    #[arg(long, value_name = "FILE")]
    pub(crate) data: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    #[command(flatten)]
    pub(crate) topology: TopologyArgs,
    /// Folder for the model, its texts, the profile, the placement and the report
    #[arg(long, default_value = "occult-demo", value_name = "DIR")]
    pub(crate) out_dir: PathBuf,
    /// Print the figures of the report, and what was measured, as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// A count from `MIN`.
fn at_least<const MIN: usize>(text: &str) -> Result<usize, String> {
    count(text, MIN..=usize::MAX)
}

fn subgraph_points(text: &str) -> Result<usize, String> {
    count(text, 2..=MAX_THRESHOLDS)
}

fn count(text: &str, possible: RangeInclusive<usize>) -> Result<usize, String> {
    let number = parse::<usize>(text)?;
    match (possible.start(), possible.end()) {
        _ if possible.contains(&number) => Ok(number),
        (min, &usize::MAX) => Err(format!("expected {min} or more")),
        (min, max) => Err(format!("expected {min} to {max}")),
    }
}

/// A number for which `possible` is true; it is false for NaN.
fn number(text: &str, expected: &str, possible: impl Fn(f64) -> bool) -> Result<f64, String> {
    Some(parse::<f64>(text)?).filter(|&x| possible(x)).ok_or_else(|| format!("expected {expected}"))
}

fn holdout(text: &str) -> Result<f64, String> {
    number(text, "a share from 0 to below 1", |x| (0.0..1.0).contains(&x))
}

fn keep_mass(text: &str) -> Result<f64, String> {
    number(text, "a share above 0, at most 1", |x| x > 0.0 && x <= 1.0)
}

fn max_error(text: &str) -> Result<f64, String> {
    number(text, "a finite number above 0", |x| x > 0.0 && x.is_finite())
}

fn load_cap(text: &str) -> Result<f64, String> {
    number(text, "a finite number from 1", |x| x >= 1.0 && x.is_finite())
}

fn time_limit(text: &str) -> Result<f64, String> {
    number(text, "seconds above 0, at most a year", |x| x > 0.0 && x <= 366.0 * 86_400.0)
}

fn cost(text: &str) -> Result<f64, String> {
    number(text, "a finite number from 0", |x| x >= 0.0 && x.is_finite())
}

/// The name of a preset, or a path.
fn cluster(text: &str) -> Result<String, String> {
    if !occult_formats::cluster::is_path(text) {
        occult_formats::cluster::preset(text).map_err(|e| e.to_string())?;
    }
    Ok(text.to_owned())
}

fn parse<T: std::str::FromStr<Err: std::fmt::Display>>(text: &str) -> Result<T, String> {
    text.parse().map_err(|e: T::Err| e.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent_and_every_command_has_an_example() {
        let command = Cli::command();
        command.clone().debug_assert();
        for sub in command.get_subcommands() {
            let help = sub.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(
                help.contains("occult ") && help.starts_with("Example"),
                "{} has no example",
                sub.get_name()
            );
        }
    }
}

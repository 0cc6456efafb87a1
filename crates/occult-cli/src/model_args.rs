//! Arguments of the commands that read a model.

use std::path::PathBuf;

use crate::bench::args::{BenchExchangeArgs, BenchLayerArgs, BenchStepArgs};
use clap::{Args, Subcommand, ValueEnum};
use occult_model::hf::ExpertLayout;
use occult_model::quant::Format;
use occult_model::{PASS_ROWS, StoredDtype};

/// Number formats of weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Dtype {
    F32,
    Bf16,
    F16,
}

impl Dtype {
    pub(crate) fn stored(self) -> StoredDtype {
        match self {
            Dtype::F32 => StoredDtype::F32,
            Dtype::Bf16 => StoredDtype::Bf16,
            Dtype::F16 => StoredDtype::F16,
        }
    }
}

/// Bits of quantised weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Quantize {
    /// 8 bits, a scale for every 32 columns: 8.5 bits per weight
    Q8,
    /// 4 bits, a scale for every 32 columns: 4.5 bits per weight; the output layer keeps 8
    Q4,
}

impl Quantize {
    pub(crate) fn format(self) -> Format {
        match self {
            Quantize::Q8 => Format::Q8,
            Quantize::Q4 => Format::Q4,
        }
    }
}

/// How the experts of a layer are named.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Layout {
    /// Three matrices for every expert: the released names
    PerExpert,
    /// Two tensors with all experts
    Fused,
}

impl Layout {
    pub(crate) fn expert_layout(self) -> ExpertLayout {
        match self {
            Layout::PerExpert => ExpertLayout::PerExpert,
            Layout::Fused => ExpertLayout::Fused,
        }
    }
}

/// A count of which none would leave nothing to do.
pub(crate) fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse::<usize>() {
        Ok(0) => Err("expected at least 1".to_owned()),
        Ok(n) => Ok(n),
        Err(e) => Err(e.to_string()),
    }
}

#[derive(Debug, Args)]
pub(crate) struct LoadArgs {
    /// Model directory: config.json, safetensors files, tokenizer.json
    pub(crate) model: PathBuf,
    /// Number format in which weights are held; arithmetic is f32 [default: as stored]
    #[arg(long, value_enum, value_name = "DTYPE")]
    pub(crate) dtype: Option<Dtype>,
    /// Worker threads [default: the cores of this machine]
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    pub(crate) threads: Option<usize>,
}

/// Parts of inference.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Phase {
    /// A prompt of 512 tokens, and eight of 128
    Prefill,
    /// New tokens after a prompt, for several batch sizes
    Decode,
}

#[derive(Debug, Args)]
pub(crate) struct BenchArgs {
    #[command(subcommand)]
    pub(crate) what: BenchWhat,
}

#[derive(Debug, Subcommand)]
pub(crate) enum BenchWhat {
    /// Measure how fast a model computes, beside what the machine can do
    Model(BenchModelArgs),
    /// Measure one MoE layer with its experts over ranks: conventional and deduplicated exchange, placement, pruning
    Layer(BenchLayerArgs),
    /// Measure the all-to-all alone, and a layer's rows over it under every mode
    Exchange(BenchExchangeArgs),
    /// Measure whole steps of several layers: attention, experts over ranks, gradients of what all ranks hold
    Step(BenchStepArgs),
}

#[derive(Debug, Args)]
pub(crate) struct BenchModelArgs {
    #[command(flatten)]
    pub(crate) load: LoadArgs,
    /// What to measure
    #[arg(long, value_enum, value_name = "PHASE", value_delimiter = ',', default_value = "prefill,decode")]
    pub(crate) what: Vec<Phase>,
    /// Batch sizes of decoding
    #[arg(long, value_name = "N", value_delimiter = ',', default_value = "1,8,32")]
    pub(crate) batches: Vec<usize>,
    /// Tokens of the prompt before decoding
    #[arg(long, value_name = "N", default_value_t = 32)]
    pub(crate) prompt: usize,
    /// Tokens that are decoded
    #[arg(long, value_name = "N", default_value_t = 16)]
    pub(crate) new_tokens: usize,
    /// Measured runs of each, after one that is not; the median counts
    #[arg(long, value_name = "N", default_value_t = 3)]
    pub(crate) runs: usize,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct LogitsArgs {
    #[command(flatten)]
    pub(crate) load: LoadArgs,
    /// Token ids: a JSON list of lists, or safetensors with `input_ids` [batch, len]
    #[arg(long, value_name = "FILE")]
    pub(crate) ids: PathBuf,
    /// Rows that are computed at a time: short sequences share them, longer ones are cut
    #[arg(long, default_value_t = PASS_ROWS, value_name = "N", value_parser = at_least_one)]
    pub(crate) batch_tokens: usize,
    /// safetensors file to write
    #[arg(long, short, value_name = "FILE")]
    pub(crate) out: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct ProfileArgs {
    #[command(flatten)]
    pub(crate) load: LoadArgs,
    /// Text files
    #[arg(long, num_args = 1.., value_name = "FILE", required_unless_present = "ids")]
    pub(crate) text: Vec<PathBuf>,
    /// Files of token ids (as `occult logits` reads them), which need no tokenizer
    #[arg(long, num_args = 1.., value_name = "FILE")]
    pub(crate) ids: Vec<PathBuf>,
    /// Profile to write
    #[arg(short, long, value_name = "PROFILE")]
    pub(crate) output: PathBuf,
    /// Tokens that a text is cut into and that see each other [default: 2048, or the model's context if that is less]
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    pub(crate) context: Option<usize>,
    /// Most tokens of every file
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    pub(crate) max_tokens: Option<usize>,
    /// Rows that are computed at a time: short sequences share them, longer ones are cut
    #[arg(long, default_value_t = PASS_ROWS, value_name = "N", value_parser = at_least_one)]
    pub(crate) batch_tokens: usize,
    /// Compute without recording or writing anything: what the recording costs is measured against this
    #[arg(long, hide = true)]
    pub(crate) no_record: bool,
    /// Name of the model in the profile [default: the name of its directory]
    #[arg(long, value_name = "NAME")]
    pub(crate) model_name: Option<String>,
    /// Print what was made as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct GenerateArgs {
    #[command(flatten)]
    pub(crate) load: LoadArgs,
    /// Text to continue, or with --chat what the user says
    #[arg(long, value_name = "TEXT", required_unless_present = "ids", conflicts_with = "ids")]
    pub(crate) prompt: Option<String>,
    /// Token ids to continue instead of text: a JSON list, a list of lists, or a file as `occult logits` reads it. Prints
    /// the new ids, a JSON list for every prompt, and needs no tokenizer
    #[arg(long, value_name = "FILE")]
    pub(crate) ids: Option<PathBuf>,
    /// Put the prompt into the model's chat template
    #[arg(long, conflicts_with = "ids")]
    pub(crate) chat: bool,
    /// What the chat's system message says
    #[arg(long, value_name = "TEXT", requires = "chat")]
    pub(crate) system: Option<String>,
    /// 0 takes the most probable token [default: what the model's authors recommend, else 0]
    #[arg(long, value_name = "T")]
    pub(crate) temperature: Option<f32>,
    /// Draw from this many of the most probable tokens; 0 is all [default: what the authors recommend, else 0]
    #[arg(long, value_name = "K")]
    pub(crate) top_k: Option<usize>,
    /// Draw from the most probable tokens that make up this share [default: what the authors recommend, else 1]
    #[arg(long, value_name = "P")]
    pub(crate) top_p: Option<f32>,
    /// Most tokens to generate
    #[arg(long, default_value_t = 256, value_name = "N", value_parser = at_least_one)]
    pub(crate) max_tokens: usize,
    /// Seed of everything random
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
    /// Print text, ids and figures as JSON at the end instead of text as it comes
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct EvalArgs {
    #[command(flatten)]
    pub(crate) load: LoadArgs,
    /// Text files to measure the perplexity of
    #[arg(long, num_args = 1.., value_name = "FILE", required_unless_present_any = ["ids", "tasks"])]
    pub(crate) text: Vec<PathBuf>,
    /// Files of token ids (as `occult logits` reads them) to measure the perplexity of
    #[arg(long, num_args = 1.., value_name = "FILE")]
    pub(crate) ids: Vec<PathBuf>,
    /// Multiple-choice questions, JSONL
    #[arg(long, num_args = 1.., value_name = "FILE")]
    pub(crate) tasks: Vec<PathBuf>,
    /// Tokens of a window of text [default: 2048, or the model's context if that is less]
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    pub(crate) context: Option<usize>,
    /// Most tokens of every text
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    pub(crate) max_tokens: Option<usize>,
    /// Print the figures as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ConvertArgs {
    /// Model directory
    pub(crate) model: PathBuf,
    /// New directory
    #[arg(short, long, value_name = "DIR")]
    pub(crate) output: PathBuf,
    /// How experts are named [default: as they are]
    #[arg(long, value_enum)]
    pub(crate) layout: Option<Layout>,
    /// Number format of the weights [default: as stored]
    #[arg(long, value_enum)]
    pub(crate) dtype: Option<Dtype>,
    /// Write experts and dense matrices in few bits, for `occult` alone; print the errors
    #[arg(long, value_enum, conflicts_with_all = ["layout", "dtype"])]
    pub(crate) quantize: Option<Quantize>,
}

#[derive(Debug, Args)]
pub(crate) struct PermuteArgs {
    /// Model directory
    pub(crate) model: PathBuf,
    /// Placement with equally many experts on every rank (`occult place --equal`)
    pub(crate) placement: PathBuf,
    /// New directory
    #[arg(short, long, value_name = "DIR")]
    pub(crate) output: PathBuf,
    /// Token ids to compare the logits on: the first sequence of the file [default: made-up ones]
    #[arg(long, value_name = "FILE")]
    pub(crate) ids: Option<PathBuf>,
    /// Print the figures as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

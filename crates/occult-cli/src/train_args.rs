//! Arguments of `pretrain` and `tune`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use occult_model::hf::BalanceLoss;
use occult_plan::Budget;
use occult_train::schedule::Decay;

use crate::args::{AdaptiveArgs, PruneRule};
use crate::model_args::Dtype;
use crate::overlap::OverlapArgs;
use crate::world::WorldArgs;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ScheduleKind {
    Constant,
    Cosine,
    Linear,
}

impl ScheduleKind {
    pub(crate) fn decay(self) -> Decay {
        match self {
            ScheduleKind::Constant => Decay::Constant,
            ScheduleKind::Cosine => Decay::Cosine,
            ScheduleKind::Linear => Decay::Linear,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Trained {
    /// Every parameter
    All,
    /// The routed experts; the rest is frozen
    Experts,
    /// Low-rank updates of attention, dense networks and experts, merged in the output
    Lora,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum AuxLossOver {
    /// Choices of all layers together, as the released code of OLMoE, Qwen-MoE and Mixtral: experts of the same number in
    /// different layers can make up for each other
    AllLayers,
    /// Every layer by itself
    Layers,
    /// Every layer and sequence by itself
    Sequences,
}

impl AuxLossOver {
    pub(crate) fn loss(self) -> BalanceLoss {
        match self {
            AuxLossOver::AllLayers => BalanceLoss::AllLayers,
            AuxLossOver::Layers => BalanceLoss::Layers,
            AuxLossOver::Sequences => BalanceLoss::Sequences,
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct PretrainArgs {
    /// Directory with config.json and tokenizer.json
    pub(crate) config: PathBuf,
    #[command(flatten)]
    pub(crate) train: TrainArgs,
}

#[derive(Debug, Args)]
pub(crate) struct TuneArgs {
    /// Model directory: config.json, safetensors files, tokenizer.json
    pub(crate) model: PathBuf,
    #[command(flatten)]
    pub(crate) train: TrainArgs,
}

#[derive(Debug, Args)]
pub(crate) struct TrainArgs {
    /// Training data: text, JSON lines with `text`, Alpaca-style JSON or chat JSON lines; or one token store (a directory)
    #[arg(long, required = true, num_args = 1.., value_name = "FILE")]
    pub(crate) data: Vec<PathBuf>,
    /// Held-out data, each file a domain of its own; its loss is measured every --eval-every steps
    #[arg(long, num_args = 1.., value_name = "FILE")]
    pub(crate) eval_data: Vec<PathBuf>,
    /// Directory for the model; its folder `training` has checkpoints and the log
    #[arg(short, long, value_name = "DIR")]
    pub(crate) output: PathBuf,
    /// Go on from the latest checkpoint in the output directory
    #[arg(long)]
    pub(crate) resume: bool,

    /// Steps of the whole run [default: what --epochs makes]
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..), value_name = "N", conflicts_with = "epochs")]
    pub(crate) steps: Option<u64>,
    /// Passes over the data
    #[arg(long, default_value_t = 1.0, value_parser = positive, value_name = "N")]
    pub(crate) epochs: f64,
    /// Take sequences in the order of the files instead of shuffled
    #[arg(long)]
    pub(crate) in_order: bool,
    /// Stop after so many steps of this call, with a checkpoint to resume
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..), value_name = "N")]
    pub(crate) stop_after: Option<u64>,
    /// Tokens of a sequence
    #[arg(long, default_value_t = 512, value_parser = at_least_one, value_name = "L")]
    pub(crate) length: usize,
    /// Tokens of a step, all ranks together
    #[arg(long, default_value_t = 16_384, value_parser = at_least_one, value_name = "T")]
    pub(crate) batch_tokens: usize,
    /// Sequences that a rank computes at once; gradients of a step are accumulated
    #[arg(long, default_value_t = 8, value_parser = at_least_one, value_name = "B")]
    pub(crate) micro_batch: usize,

    /// Highest learning rate [default: 1e-3 for pretrain, 1e-4 for tune]
    #[arg(long, value_parser = positive, value_name = "RATE")]
    pub(crate) lr: Option<f64>,
    /// How the learning rate falls after warm-up
    #[arg(long, value_enum, default_value_t = ScheduleKind::Cosine)]
    pub(crate) schedule: ScheduleKind,
    /// Steps of linear rise [default: 2 % of all]
    #[arg(long, value_name = "N")]
    pub(crate) warm_up: Option<u64>,
    /// Learning rate at the end, as a share of the highest
    #[arg(long, default_value_t = 0.1, value_parser = share, value_name = "SHARE")]
    pub(crate) final_lr: f64,
    /// Decoupled weight decay
    #[arg(long, default_value_t = 0.1, value_parser = not_negative, value_name = "X")]
    pub(crate) weight_decay: f64,
    /// Gradients are scaled down to this norm; 0: never
    #[arg(long, default_value_t = 1.0, value_parser = not_negative, value_name = "NORM")]
    pub(crate) clip: f64,
    /// Stop when the loss is above so many times its recent median, or the perplexity of a short stretch above so many
    /// times that of the best one
    #[arg(long, default_value_t = 3.0, value_parser = positive, value_name = "X")]
    pub(crate) diverged_above: f64,
    /// Seed of weights and of the order of the data
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,

    /// What is trained
    #[arg(long = "train", value_enum, default_value_t = Trained::All, value_name = "WHAT")]
    pub(crate) trained: Trained,
    /// Rank of low-rank updates
    #[arg(long, default_value_t = 8, value_parser = at_least_one, value_name = "R")]
    pub(crate) lora_rank: usize,
    /// Low-rank updates are multiplied by this over their rank
    #[arg(long, default_value_t = 16.0, value_parser = positive, value_name = "ALPHA")]
    pub(crate) lora_alpha: f64,
    /// Coefficient of the loss that keeps experts evenly used [default: that of the configuration]
    #[arg(long, value_parser = not_negative, value_name = "X")]
    pub(crate) aux_loss: Option<f64>,
    /// What that loss makes even by itself [default: as the family's released code]
    #[arg(long, value_name = "WHAT")]
    pub(crate) aux_loss_over: Option<AuxLossOver>,
    /// Balance experts without a loss: a bias on the routers' choices, moved by this after every step against the load.
    /// It is added to probabilities, which are one over the number of experts on average: choose a rate well below that.
    /// No checkpoint format of the supported models holds it: occult.json does, and transformers routes without it
    #[arg(long, value_parser = positive, value_name = "RATE")]
    pub(crate) balance_bias: Option<f64>,
    /// Coefficient of the router's z-loss
    #[arg(long, default_value_t = 0.0, value_parser = not_negative, value_name = "X")]
    pub(crate) router_z_loss: f64,
    /// Coefficient of the z-loss of the output
    #[arg(long, default_value_t = 0.0, value_parser = not_negative, value_name = "X")]
    pub(crate) z_loss: f64,
    /// Compute layers again in the backward pass instead of keeping their insides: less memory, more time
    #[arg(long)]
    pub(crate) recompute: bool,

    /// Which rank holds which expert: visits are counted and limited by it [default: equal runs over --ranks]
    #[arg(long, value_name = "PLACEMENT")]
    pub(crate) placement: Option<PathBuf>,
    /// Most ranks a token may visit, forward and backward
    #[arg(long, value_parser = at_least_one, value_name = "N")]
    pub(crate) max_ranks: Option<usize>,
    /// Share of the run over which the limit falls from all ranks to --max-ranks
    #[arg(long, default_value_t = 0.0, value_parser = share, value_name = "SHARE", requires = "max_ranks")]
    pub(crate) anneal: f64,
    /// How ranks and replacements are chosen
    #[arg(long, value_enum, default_value_t = PruneRule::BestMass, requires = "max_ranks")]
    pub(crate) rule: PruneRule,
    #[command(flatten)]
    pub(crate) adaptive: AdaptiveArgs,
    /// For --rule similarity: a routing profile with router logits to compare experts by
    #[arg(long, value_name = "PROFILE", requires = "max_ranks")]
    pub(crate) similar_by: Option<PathBuf>,

    /// At every checkpoint, search a placement for what the routers chose in the last step, and go on with it when it saves
    /// this share of the copies per token on held-out tokens of that step; where the model would then give other logits,
    /// experts stay, with a warning
    #[arg(long, value_parser = share, value_name = "SHARE")]
    pub(crate) replace_placement: Option<f64>,
    /// Steps between checkpoints
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u64).range(1..), value_name = "N")]
    pub(crate) checkpoint_every: u64,
    /// Checkpoints to keep
    #[arg(long, default_value_t = 2, value_parser = at_least_one, value_name = "N")]
    pub(crate) keep: usize,
    /// Steps between measurements of --eval-data
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u64).range(1..), value_name = "N")]
    pub(crate) eval_every: u64,
    /// Most sequences of a domain that are measured
    #[arg(long, default_value_t = 32, value_parser = at_least_one, value_name = "N")]
    pub(crate) eval_sequences: usize,
    /// Number format of the output [default: bf16 for pretrain, that of the model for tune]
    #[arg(long, value_enum, value_name = "DTYPE")]
    pub(crate) dtype: Option<Dtype>,
    #[command(flatten)]
    pub(crate) world: WorldArgs,
    #[command(flatten)]
    pub(crate) overlap: OverlapArgs,
    /// Worker threads, all ranks of this process together [default: the cores of this machine]
    #[arg(long, value_parser = at_least_one, value_name = "N")]
    pub(crate) threads: Option<usize>,
    /// Print the result as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

impl TrainArgs {
    /// What is trained and how, as far as these options alone decide a run's numbers beyond rounding (--ranks and --overlap
    /// do not): by option.
    pub(crate) fn identity(&self) -> Vec<(&'static str, String)> {
        let name = |value: &dyn std::fmt::Debug| format!("{value:?}").to_lowercase();
        let mut all = vec![
            ("--train", name(&self.trained)),
            ("--length", self.length.to_string()),
            ("--in-order", self.in_order.to_string()),
            ("--router-z-loss", self.router_z_loss.to_string()),
            ("--z-loss", self.z_loss.to_string()),
        ];
        if self.trained == Trained::Lora {
            all.push(("--lora-rank", self.lora_rank.to_string()));
            all.push(("--lora-alpha", self.lora_alpha.to_string()));
        }
        if let Some(max_ranks) = self.max_ranks {
            all.push(("--rule", name(&self.rule)));
            let (option, bound) = match self.adaptive.budget(max_ranks) {
                Budget::Fixed { .. } => ("--keep-mass", "none".to_owned()),
                Budget::Adaptive { share, .. } => ("--keep-mass", share.to_string()),
                Budget::Bounded { error, .. } => ("--max-error", error.to_string()),
            };
            all.push((option, bound));
        }
        if let Some(rate) = self.balance_bias {
            all.push(("--balance-bias", rate.to_string()));
        }
        if let Some(share) = self.replace_placement {
            all.push(("--replace-placement", share.to_string()));
            all.push(("--checkpoint-every", self.checkpoint_every.to_string()));
        }
        all
    }
}

fn at_least_one(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|n| *n > 0).ok_or_else(|| "expected a whole number from 1".to_owned())
}

fn number(text: &str, expected: &str, good: impl Fn(f64) -> bool) -> Result<f64, String> {
    text.parse().ok().filter(|x| good(*x)).ok_or_else(|| format!("expected {expected}"))
}

fn positive(text: &str) -> Result<f64, String> {
    number(text, "a finite number above 0", |x| x > 0.0 && x.is_finite())
}

fn not_negative(text: &str) -> Result<f64, String> {
    number(text, "a finite number from 0", |x| x >= 0.0 && x.is_finite())
}

fn share(text: &str) -> Result<f64, String> {
    number(text, "a share from 0 to 1", |x| (0.0..=1.0).contains(&x))
}

//! From arguments to a trained model.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, anyhow, bail};
use indicatif::ProgressBar;
use occult_comm::Communicator;
use occult_model::hf::{ExpertLayout, TrainingDefaults, read_spec};
use occult_model::{LoadOptions, ModelFiles, ModelSpec, StoredDtype, Threads};
use occult_plan::SimilarityTable;
use occult_train::TrainError;
use occult_train::checkpoint::DiskFiles;
use occult_train::data::Loader;
use occult_train::log::Entry;
use occult_train::lora::Lora;
use occult_train::model::{CommGroup, ExpertRanks, ModelOptions, MoeModel, Replacement, Scope};
use occult_train::optim::AdamW;
use occult_train::random::hash_bytes;
use occult_train::schedule::{LimitSchedule, Schedule};
use occult_train::trainer::{Guard, Options, Outcome, Trainer, Validation};
use serde_json::json;

use super::waiting::on_first;
use super::{data, output, placement};
use crate::args::PruneRule;
use crate::exit::Usage;
use crate::output::{print, print_json, seconds};
use crate::train_args::{AuxLossOver, TrainArgs, Trained};
use crate::world::{needs_ranks, run_world};
use crate::{progress, pruning, setup};

/// Where weights come from.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Start<'a> {
    /// Random, for the configuration in this directory.
    Random(&'a Path),
    /// A model directory.
    Model(&'a Path),
}

impl<'a> Start<'a> {
    pub(super) fn dir(self) -> &'a Path {
        match self {
            Start::Random(dir) | Start::Model(dir) => dir,
        }
    }
}

/// Trains on the ranks that were asked for.
pub(crate) fn run(start: Start<'_>, args: &TrainArgs) -> Result<()> {
    if args.overlap.needs_ranks() && !args.world.is_parallel() {
        return Err(needs_ranks("--overlap"));
    }
    let spec = read_spec(start.dir())?;
    if spec.moe_layers().next().is_none() {
        bail!("{}: has no MoE layer", start.dir().display());
    }
    output::check(start, &args.output)?;
    if args.resume && !args.output.join("training").is_dir() {
        bail!("{}: has no run to resume", args.output.display());
    }
    // At once where this process has all ranks: an error then speaks of no rank.
    if !args.world.is_mpi() {
        build(args, start.dir(), &spec, &args.output.join("training"))?;
    }
    // Weights that stay as they are, and those that low-rank updates are added to, are not in checkpoints.
    let base = match start {
        Start::Model(dir) if args.trained != Trained::All => Some(data::weights_fingerprint(dir)?),
        _ => None,
    };
    let similarity = similarity(args, &spec)?;
    let stop = interrupts()?;
    run_world(&args.world, |comm| train(start, args, &spec, &similarity, base, Arc::from(comm), &stop))
        .map(|_| ())
}

/// Set by the first interrupt; the second one ends the program at once.
fn interrupts() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    #[cfg(unix)]
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register_conditional_shutdown(signal, 130, stop.clone())
            .and_then(|_| signal_hook::flag::register(signal, stop.clone()))
            .context("setting an interrupt handler")?;
    }
    Ok(stop)
}

/// What the rule `similarity` replaces by; nothing with another rule.
fn similarity(args: &TrainArgs, spec: &ModelSpec) -> Result<Vec<Arc<SimilarityTable>>> {
    match (args.rule, &args.similar_by) {
        (PruneRule::Similarity, Some(path)) => pruning::similarity_tables(path, spec),
        (PruneRule::Similarity, None) => Err(Usage(pruning::NO_TABLE.to_owned()).into()),
        _ => Ok(Vec::new()),
    }
}

fn options(
    args: &TrainArgs,
    start: Start<'_>,
    ranks: &ExpertRanks,
    loader: &Loader,
    data: String,
    more: BTreeMap<String, String>,
    spec: &ModelSpec,
) -> Result<Options> {
    let batch = (args.batch_tokens / args.length).max(1);
    let sequences = loader.packed().num_sequences() as f64;
    let steps = args.steps.unwrap_or_else(|| ((sequences * args.epochs / batch as f64).ceil() as u64).max(1));
    let warm_up = args.warm_up.unwrap_or(steps.div_ceil(50)).min(steps);
    let peak = args.lr.unwrap_or(match start {
        Start::Random(_) => 1e-3,
        Start::Model(_) => 1e-4,
    });
    let limit = args.max_ranks.map(|target| LimitSchedule {
        ranks: ranks.topology().num_ranks(),
        target,
        steps,
        fraction: args.anneal,
    });
    Ok(Options {
        schedule: Schedule { peak, steps, warm_up, decay: args.schedule.decay(), final_ratio: args.final_lr },
        adamw: AdamW { weight_decay: args.weight_decay, ..AdamW::default() },
        max_norm: (args.clip > 0.0).then_some(args.clip),
        limit,
        batch,
        seed: args.seed,
        data,
        more,
        micro_batch: args.micro_batch,
        checkpoint_every: args.checkpoint_every,
        keep: args.keep,
        guard: Guard {
            factor: args.diverged_above,
            uniform: Some((spec.vocab_size as f64).ln()),
            ..Guard::default()
        },
    })
}

fn model_options(args: &TrainArgs, defaults: TrainingDefaults) -> ModelOptions {
    ModelOptions {
        scope: match args.trained {
            Trained::All => Scope::All,
            Trained::Experts => Scope::Experts,
            Trained::Lora => {
                Scope::Lora(Lora { rank: args.lora_rank, alpha: args.lora_alpha, rank_stabilised: false })
            }
        },
        balance: args.aux_loss_over.map_or(defaults.balance, AuxLossOver::loss),
        balance_coefficient: args.aux_loss.unwrap_or(defaults.balance_coefficient),
        balance_bias: args.balance_bias.unwrap_or(0.0) as f32,
        router_z_coefficient: args.router_z_loss,
        z_coefficient: args.z_loss as f32,
        recompute: args.recompute,
        seed: args.seed,
    }
}

fn train(
    start: Start<'_>,
    args: &TrainArgs,
    spec: &ModelSpec,
    similarity: &[Arc<SimilarityTable>],
    base: Option<u64>,
    comm: Arc<dyn Communicator>,
    stop: &AtomicBool,
) -> Result<()> {
    let begun = std::time::Instant::now();
    let lead = comm.rank() == 0;
    let dir = start.dir();
    let training = args.output.join("training");
    let (ranks, placement) = placement::ranks(args, &crate::model::name(dir), spec, &training, comm.clone())?;
    let ranks = if similarity.is_empty() { ranks } else { ranks.with_similarity(similarity.to_vec())? };
    // Rank 0 encodes; the others open what it has left.
    on_first(&*comm, "encoding data", || build(args, dir, spec, &training))?;
    let store = data::build(&args.data, dir, spec, &training)?;
    let seed = (!args.in_order).then_some(args.seed);
    let data = data::open(&store, None, args.length, seed, spec)?;
    let mut sets = vec![];
    if !args.eval_data.is_empty() {
        let store = data::build(&args.eval_data, dir, spec, &training)?;
        for (name, source) in data::domains(&args.eval_data) {
            let held_out = data::open(&store, source, args.length, seed, spec)?;
            sets.push((name, held_out.loader));
        }
    }
    if lead && data.truncated > 0 {
        eprintln!("occult: {} documents are longer than --length and lose their end", data.truncated);
    }

    let defaults = TrainingDefaults::read(dir)?;
    let how = model_options(args, defaults);
    let mut more: BTreeMap<String, String> =
        args.identity().into_iter().map(|(option, value)| (option.to_owned(), value)).collect();
    more.insert("--aux-loss".into(), how.balance_coefficient.to_string());
    more.insert("--aux-loss-over".into(), format!("{:?}", how.balance));
    more.insert("--placement".into(), placement::identity(&placement));
    if !similarity.is_empty() {
        let values: Vec<u8> =
            similarity.iter().flat_map(|t| t.as_slice().iter().flat_map(|v| v.to_le_bytes())).collect();
        more.insert("--similar-by".into(), format!("{:016x}", hash_bytes(&values)));
    }
    if let Some(base) = base {
        more.insert("weights of MODEL".into(), format!("{base:016x}"));
    }
    let options = options(args, start, &ranks, &data.loader, data.description, more, spec)?;
    let here = comm.host_of_rank();
    let sharing = here.iter().filter(|host| **host == here[comm.rank()]).count();
    let threads = Threads::new((setup::threads(args.threads) / sharing).max(1));
    let spinner = progress::spinner("making the model");
    type Make = Box<dyn Fn(ExpertRanks) -> occult_train::Result<MoeModel>>;
    let (make, layout, dtype): (Make, _, _) = match start {
        Start::Random(_) => {
            let (spec, threads, range) = (spec.clone(), threads.clone(), defaults.initializer_range);
            let make = move |ranks| MoeModel::random(&spec, &threads, range, ranks, how);
            (Box::new(make), ExpertLayout::PerExpert, StoredDtype::Bf16)
        }
        Start::Model(dir) => {
            let files = crate::model::open(dir, LoadOptions { dtype: None, threads: Some(threads.clone()) })?;
            let layout = files.names().layout;
            let dtype = stored_dtype(&files);
            (Box::new(move |ranks| MoeModel::read(&files, ranks, how)), layout, dtype)
        }
    };
    let mut model = make(ranks)?;
    if let Some(share) = args.replace_placement {
        model = model.with_replacement(Replacement::new(share, args.max_ranks, make));
    }
    spinner.finish_and_clear();
    let dtype = args.dtype.map_or(dtype, |d| d.stored());

    let group = CommGroup(comm.clone());
    let steps = options.schedule.steps;
    let mut trainer =
        Trainer::new(&mut model, &data.loader, &group, options, &training, &DiskFiles, args.resume)?
            .with_threads(threads.count());
    if !sets.is_empty() {
        trainer = trainer.with_validation(Validation {
            sets: sets.iter().map(|(name, loader)| (name.clone(), loader)).collect(),
            every: args.eval_every,
            sequences: args.eval_sequences,
        });
    }
    // Not before it is certain that no other run is there.
    if lead && !args.resume {
        placement.write(&placement::kept(&training))?;
    }
    if let (true, Some(warning)) = (lead, trainer.warning()) {
        eprintln!("occult: {warning}");
    }
    let from = trainer.state().step;
    let bar = if lead { progress::training(steps, from) } else { ProgressBar::hidden() };
    let mut last = None;
    let outcome = trainer.run(stop, &mut |entry| {
        show(&bar, entry);
        // Also where there is no terminal for a bar.
        if let (true, Some(warning)) = (lead, &entry.warning) {
            bar.suspend(|| eprintln!("occult: step {}: {warning}", entry.step));
        }
        if args.stop_after.is_some_and(|n| entry.step >= from + n) {
            stop.store(true, Ordering::Relaxed);
        }
        last = Some(entry.clone());
    });
    let outcome = outcome.map_err(|e| match e {
        TrainError::NotSaved { last_good: Some(_), .. } => anyhow!("{e}; go on from it with --resume"),
        e => e.into(),
    })?;
    let state = trainer.state().clone();
    bar.finish_and_clear();

    let (finished, checkpoint) = match outcome {
        Outcome::Finished(path) => (true, path),
        Outcome::Stopped(path) => (false, path),
    };
    // Each file appears complete; the limit comes last, for the weights that it is about.
    if lead {
        output::configuration(start, &args.output, dtype)?;
    }
    model.write(&args.output, layout, dtype)?;
    if lead {
        output::limit(&args.output, &model, &placement, args)?;
    }
    comm.barrier("writing the model")?;
    if !lead {
        return Ok(());
    }
    let took = begun.elapsed().as_secs_f64();
    let val = |e: &Entry| e.figures.get("val_loss").copied();
    if args.json {
        return print_json(&json!({
            "model": args.output, "finished": finished, "step": state.step, "tokens": state.tokens,
            "loss": last.as_ref().and_then(|e| e.loss), "val_loss": last.as_ref().and_then(val),
            "checkpoint": checkpoint, "placement_replaced": model.was_replaced(), "seconds": took,
        }));
    }
    let loss = last.as_ref().and_then(|e| e.loss).map_or_else(String::new, |l| format!(", loss {l:.4}"));
    let rest = if finished { String::new() } else { "; stopped, go on with --resume".to_owned() };
    print(&format!(
        "{} steps, {} tokens{loss}, {}: {}{rest}\n",
        state.step,
        state.tokens,
        seconds(took),
        args.output.display()
    ))
}

/// Encodes all data files under the output directory.
fn build(args: &TrainArgs, model: &Path, spec: &ModelSpec, cache: &Path) -> Result<()> {
    data::build(&args.data, model, spec, cache)?;
    if !args.eval_data.is_empty() {
        data::build(&args.eval_data, model, spec, cache)?;
    }
    Ok(())
}

fn show(bar: &ProgressBar, entry: &Entry) {
    let mut text = entry.loss.map_or_else(|| "loss ?".to_owned(), |l| format!("loss {l:.3}"));
    text += &format!("  {:.0} tokens/s", entry.tokens_per_s);
    for (name, label) in [("C_T", "C_T"), ("rank_load", "load"), ("val_loss", "val")] {
        if let Some(value) = entry.figures.get(name) {
            text += &format!("  {label} {value:.2}");
        }
    }
    if entry.figures.get("replaced") == Some(&1.0) {
        let copies = |name| entry.figures.get(name).copied().unwrap_or_default();
        bar.println(format!(
            "step {}: experts move; {:.2} copies per token on held-out routing instead of {:.2}",
            entry.step,
            copies("C_T_searched"),
            copies("C_T_held_out")
        ));
    }
    bar.set_message(text);
    bar.set_position(entry.step);
}

/// The format of the embedding table, that of the whole model mostly.
fn stored_dtype(files: &ModelFiles) -> StoredDtype {
    let table = files.checkpoint().weight("model.embed_tokens.weight");
    table.map_or(StoredDtype::F32, |w| w.dtype())
}

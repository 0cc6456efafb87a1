//! Steps, checkpoints and the end of a run.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::checkpoint::{Checkpoint, Files, Kind, Saved, State, Writer, latest, name, remove_partial};
use crate::data::{Loader, share};
use crate::error::{Result, TrainError};
use crate::log::{Entry, Log};
use crate::optim::{AdamW, Clip, Moments, StepRates, clip, squared_norm};
use crate::schedule::{LimitSchedule, Schedule};
use crate::trainer::{BatchReport, Group, Guard, Losses, TrainableModel};

/// What a run does.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Options {
    /// Learning rate and number of steps.
    pub schedule: Schedule,
    /// Optimiser.
    pub adamw: AdamW,
    /// Gradients are scaled down to this global norm.
    pub max_norm: Option<f64>,
    /// Pruning limit.
    pub limit: Option<LimitSchedule>,
    /// Sequences of a step, all ranks together.
    pub batch: usize,
    /// Seed of everything that is random.
    pub seed: u64,
    /// What the data are, in words: it must be the same when a run is resumed.
    pub data: String,
    /// Whatever else decides the numbers of a run, by name.
    pub more: BTreeMap<String, String>,
    /// Sequences that a rank takes at once; bounds memory. Not part of a run's identity.
    pub micro_batch: usize,
    /// Steps between checkpoints; one more at the end and when stopped.
    pub checkpoint_every: u64,
    /// Checkpoints to keep.
    pub keep: usize,
    /// When to stop as diverged.
    pub guard: Guard,
}

impl Options {
    /// Errors for values without a meaning.
    pub fn check(&self) -> Result<()> {
        self.schedule.check()?;
        self.adamw.check()?;
        self.limit.map_or(Ok(()), |l| l.check())?;
        let sizes = [("batch", self.batch as u64), ("micro-batch", self.micro_batch as u64)];
        for (name, value) in sizes.into_iter().chain([("checkpoint interval", self.checkpoint_every)]) {
            if value == 0 {
                return Err(TrainError::request(format!("{name} is 0")));
            }
        }
        if self.max_norm.is_some_and(|n| n.is_nan() || n <= 0.0)
            || self.guard.factor.is_nan()
            || self.guard.factor < 1.0
        {
            let (norm, factor) = (self.max_norm, self.guard.factor);
            return Err(TrainError::request(format!("clipping norm {norm:?}, divergence factor {factor}")));
        }
        Ok(())
    }

    /// The options that decide the numbers of a run, by name.
    pub fn identity(&self) -> BTreeMap<String, String> {
        let Self { schedule, adamw, max_norm, limit, batch, seed, data, more, .. } = self;
        let Schedule { peak, steps, warm_up, decay, final_ratio } = schedule;
        let limited = |l: &LimitSchedule| format!("{} of {}, annealing {}", l.target, l.ranks, l.fraction);
        let own = [
            ("learning rate", peak.to_string()),
            ("steps", steps.to_string()),
            ("warm-up", warm_up.to_string()),
            ("schedule", format!("{decay:?}").to_lowercase()),
            ("final learning rate", final_ratio.to_string()),
            ("optimiser", serde_json::json!(adamw).to_string()),
            ("clipping norm", max_norm.map_or("none".into(), |n| n.to_string())),
            ("limit", limit.as_ref().map_or("none".into(), limited)),
            ("sequences of a step", batch.to_string()),
            ("seed", seed.to_string()),
            ("data", data.clone()),
        ];
        own.into_iter().map(|(name, value)| (name.to_owned(), value)).chain(more.clone()).collect()
    }
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// All steps are taken; the last checkpoint.
    Finished(PathBuf),
    /// Stopped on request; the checkpoint to go on from.
    Stopped(PathBuf),
}

/// A run: model, data and where it stands.
pub struct Trainer<'a> {
    model: &'a mut dyn TrainableModel,
    loader: &'a Loader,
    group: &'a dyn Group,
    options: Options,
    moments: Vec<Moments>,
    state: State,
    dir: PathBuf,
    files: &'a dyn Files,
    saved: Option<PathBuf>,
    log: Option<Log>,
    validation: Option<Validation<'a>>,
    threads: usize,
    warning: Option<String>,
}

/// What is measured while training: mean loss per set of held-out sequences.
#[derive(Debug)]
pub struct Validation<'a> {
    /// Name and sequences of each set.
    pub sets: Vec<(String, &'a Loader)>,
    /// Steps between measurements; one more at the end.
    pub every: u64,
    /// Most sequences of a set.
    pub sequences: usize,
}

impl<'a> Trainer<'a> {
    /// Begins a run in `dir` (which must have no checkpoint), or goes on from its latest one with `resume`. All ranks together.
    pub fn new(
        model: &'a mut dyn TrainableModel,
        loader: &'a Loader,
        group: &'a dyn Group,
        options: Options,
        dir: &Path,
        files: &'a dyn Files,
        resume: bool,
    ) -> Result<Self> {
        options.check()?;
        let moments = model.parameters().iter().map(|p| Moments::new(p.shape.iter().product())).collect();
        let state = State {
            step: 0,
            consumed: 0,
            tokens: 0,
            seed: options.seed,
            model: model.identity(),
            config: options.identity(),
            losses: Losses::default(),
            good: None,
            skipped: 0,
            extra: serde_json::Value::Null,
        };
        let saved = latest(dir)?;
        let (log, validation, threads) = (None, None, 1);
        let mut new = Self {
            model,
            loader,
            group,
            options,
            moments,
            state,
            dir: dir.into(),
            files,
            saved,
            log,
            validation,
            threads,
            warning: None,
        };
        match (new.saved.clone(), resume) {
            (Some(path), true) => new.restore(&path)?,
            (Some(path), false) => {
                let message =
                    format!("{} holds a run: resume it or choose another directory", path.display());
                return Err(TrainError::request(message));
            }
            (None, true) => {
                return Err(TrainError::request(format!(
                    "{}: there is no checkpoint to resume",
                    dir.display()
                )));
            }
            (None, false) => {}
        }
        // Everybody has read before anything is removed.
        new.agree("reading a checkpoint", Ok(()))?;
        if new.group.rank() == 0 {
            files.create_dir(dir).map_err(|e| TrainError::io("create", dir, e))?;
            remove_partial(dir, files)?;
            new.log = Some(Log::open(&dir.join("log.jsonl"), new.state.step)?);
        }
        new.agree("opening the log", Ok(()))?;
        Ok(new)
    }

    /// How many threads of this rank change weights at the same time. Changes no bit.
    pub fn with_threads(self, threads: usize) -> Self {
        Self { threads: threads.max(1), ..self }
    }

    /// Measures held-out sequences while training; the log then has `val_loss` and `val_loss/NAME` at these steps.
    pub fn with_validation(self, validation: Validation<'a>) -> Self {
        Self { validation: Some(validation), ..self }
    }

    /// Mean loss of the held-out sequences, in all and per set. All ranks together.
    pub fn evaluate(&mut self) -> Result<BTreeMap<String, f64>> {
        let mut figures = BTreeMap::new();
        let Some(validation) = &self.validation else { return Ok(figures) };
        let (rank, world) = (self.group.rank(), self.group.world_size());
        let at_once = self.options.micro_batch * world;
        let mut all = [0.0, 0.0];
        for (name, loader) in &validation.sets {
            let sequences = loader.packed().num_sequences().min(validation.sequences);
            let mut sums = [0.0, 0.0];
            for from in (0..sequences).step_by(at_once) {
                let batch = loader.batch(from as u64, at_once.min(sequences - from), rank, world)?;
                sums[0] += self.model.loss(&batch)?;
                sums[1] += batch.num_targets() as f64;
            }
            self.group.sum_f64(&mut sums)?;
            all = [all[0] + sums[0], all[1] + sums[1]];
            figures.insert(format!("val_loss/{name}"), sums[0] / sums[1].max(1.0));
        }
        figures.insert("val_loss".into(), all[0] / all[1].max(1.0));
        Ok(figures)
    }

    fn restore(&mut self, path: &Path) -> Result<()> {
        let mut checkpoint = Checkpoint::open(path)?;
        checkpoint.check(&self.state.model, &self.state.config)?;
        self.read_weights(&mut checkpoint)?;
        self.state = checkpoint.state().clone();
        self.model.restore_extra(&self.state.extra)?;
        self.warning = self.model.restored(&mut self.moments)?;
        Ok(())
    }

    /// What a resumed run could not do as its checkpoint says.
    pub fn warning(&self) -> Option<&str> {
        self.warning.as_deref()
    }

    fn read_weights(&mut self, checkpoint: &mut Checkpoint) -> Result<()> {
        let infos = self.model.parameters().to_vec();
        let moments = &mut self.moments;
        self.model.visit(&mut |i, weights, _| {
            let info = &infos[i];
            let [w, mean, square] = checkpoint.parameter(&info.name, &info.shape, &info.kind)?;
            weights.copy_from_slice(&w);
            moments[i] = Moments { mean, square };
            Ok(())
        })
    }

    /// Whether a checkpoint is due after the steps taken, other than the last one.
    fn is_due(&self) -> bool {
        let step = self.state.step;
        step.is_multiple_of(self.options.checkpoint_every) && step < self.options.schedule.steps
    }

    /// Where the run stands.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// One rank's failure is everybody's: the failing rank returns its error, the others one that says so.
    fn agree<T>(&self, what: &str, result: Result<T>) -> Result<T> {
        let mut failed = [f64::from(u8::from(result.is_err()))];
        self.group.sum_f64(&mut failed)?;
        match result {
            Ok(_) if failed[0] > 0.0 => Err(TrainError::request(format!("{what} failed on another rank"))),
            result => result,
        }
    }

    fn path_of(&self, step: u64) -> PathBuf {
        self.dir.join(name(step))
    }

    fn diverged(&self, reason: String) -> TrainError {
        let last_good = self.state.good.map(|step| self.path_of(step)).filter(|p| p.is_dir());
        TrainError::Diverged { step: self.state.step + 1, reason, last_good }
    }

    /// Takes one step. An error leaves the weights as they were before it.
    pub fn step(&mut self) -> Result<Entry> {
        let begun = Instant::now();
        let (rank, world) = (self.group.rank(), self.group.world_size());
        let step = self.state.step;
        let limit = self.options.limit.map(|l| l.limit(step));
        let batch = self.loader.batch(self.state.consumed, self.options.batch, rank, world);
        let batch = self.agree("reading data", batch)?;
        let mut counts = [batch.num_targets() as f64, batch.num_inputs() as f64];
        self.group.sum_f64(&mut counts)?;
        let [targets, tokens] = counts;

        self.model.begin_step(step, limit)?;
        self.model.clear_gradients()?;
        // As many micro-batches as the rank with most sequences needs.
        let pieces = share(self.options.batch, 0, world).len().div_ceil(self.options.micro_batch);
        let mut total = BatchReport::default();
        for piece in batch.split(pieces) {
            let report = self.model.loss_and_gradients(&piece, 1.0 / targets.max(1.0));
            // A model whose numbers have left their range says so itself.
            let report = report.map_err(|e| match e {
                TrainError::NotFinite(reason) => self.diverged(reason),
                other => other,
            })?;
            total.loss_sum += report.loss_sum;
            total.weight += report.weight;
            for (name, value) in report.figures {
                *total.figures.entry(name).or_default() += value * report.weight;
            }
        }
        let (squared, loss) = self.reduce(&mut total)?;
        self.model.complete(&mut total.figures);
        let loss = loss / targets.max(1.0);

        let lr = self.options.schedule.rate(step);
        let mut norm = None;
        let skipped = match clip(squared, self.options.max_norm) {
            Clip::Scale { norm: n, scale } if loss.is_finite() => {
                // Targets can be absent when every answer of a batch is cut off: nothing to judge.
                if targets > 0.0
                    && let Some(reason) = self.options.guard.judge(loss, &mut self.state.losses)
                {
                    return Err(self.diverged(reason));
                }
                norm = Some(n);
                self.update(lr, scale, step + 1)?;
                self.model.end_step()?;
                self.state.skipped = 0;
                false
            }
            _ => {
                self.state.skipped += 1;
                if self.state.skipped > self.options.guard.max_skipped {
                    let times = self.state.skipped;
                    let reason = format!(
                        "loss {loss}, gradient norm {}: not finite, {times} steps in a row",
                        squared.sqrt()
                    );
                    return Err(self.diverged(reason));
                }
                true
            }
        };
        self.state.step += 1;
        self.state.consumed += self.options.batch as u64;
        self.state.tokens += tokens as u64;
        let tokens_per_s = tokens / begun.elapsed().as_secs_f64().max(1e-9);
        let due = self.validation.as_ref().is_some_and(|v| {
            self.state.step.is_multiple_of(v.every.max(1)) || self.state.step == self.options.schedule.steps
        });
        if due {
            total.figures.extend(self.evaluate()?);
        }
        let mut warning = None;
        if self.is_due() && !skipped {
            warning = self.model.at_checkpoint(&mut self.moments, &mut total.figures)?;
        }
        let entry = Entry {
            step: self.state.step,
            loss: loss.is_finite().then_some(loss),
            lr,
            grad_norm: norm,
            skipped,
            tokens: tokens as u64,
            tokens_per_s,
            limit,
            figures: total.figures,
            warning,
        };
        let logged = self.log.as_mut().map_or(Ok(()), |log| log.push(&entry));
        self.agree("writing the log", logged)?;
        Ok(entry)
    }

    /// Sums gradients, losses and figures over ranks; returns the squared norm of all gradients and the sum of losses.
    fn reduce(&mut self, total: &mut BatchReport) -> Result<(f64, f64)> {
        let kinds: Vec<bool> = self.model.parameters().iter().map(|p| p.kind == Kind::Replicated).collect();
        let (mut replicated, mut sharded) = (0.0, 0.0);
        let group = self.group;
        self.model.visit(&mut |i, _, gradient| {
            if kinds[i] {
                group.sum_f32(gradient)?;
                replicated += squared_norm(gradient);
            } else {
                sharded += squared_norm(gradient);
            }
            Ok(())
        })?;
        let mut sums = vec![total.loss_sum, sharded, total.weight];
        sums.extend(total.figures.values());
        group.sum_f64(&mut sums)?;
        if sums[2] == 0.0 {
            total.figures.clear();
        }
        for (value, sum) in total.figures.values_mut().zip(&sums[3..]) {
            *value = sum / sums[2];
        }
        Ok((replicated + sums[1], sums[0]))
    }

    fn update(&mut self, lr: f64, scale: f32, step: u64) -> Result<()> {
        let infos: Vec<(f64, bool)> =
            self.model.parameters().iter().map(|p| (p.lr_scale, p.decays)).collect();
        let (adamw, moments, threads) = (self.options.adamw, &mut self.moments, self.threads);
        self.model.visit(&mut |i, weights, gradient| {
            let (lr_scale, decays) = infos[i];
            let rates = StepRates { step, lr: lr * lr_scale, decays, gradient_scale: scale };
            adamw.step_on(threads, weights, gradient, &mut moments[i], rates)
        })
    }

    /// Writes a checkpoint of the present state, on all ranks together. After an error the last good one is still there.
    pub fn save(&mut self) -> Result<PathBuf> {
        let step = self.state.step;
        let path = self.path_of(step);
        // Nothing has changed since: a finished run that is resumed needs no room on the disk.
        if self.saved.as_ref() == Some(&path) {
            return Ok(path);
        }
        self.state.extra = self.model.extra();
        if self.state.skipped == 0 && self.options.guard.is_calm(&self.state.losses) {
            self.state.good = Some(step);
        }
        let dir = self.dir.clone();
        let not_saved = |e| {
            let last_good = latest(&dir).ok().flatten();
            TrainError::NotSaved { step, source: Box::new(e), last_good }
        };
        let writer = Writer::new(&self.dir, self.options.keep, self.files);
        let rank = self.group.rank();
        let written = self.write_shard(&writer, rank);
        self.agree("writing a checkpoint", written).map_err(not_saved)?;
        let committed =
            if rank == 0 { writer.commit(self.group.world_size(), &self.state).map(|_| ()) } else { Ok(()) };
        self.agree("completing a checkpoint", committed).map_err(not_saved)?;
        self.saved = Some(path.clone());
        Ok(path)
    }

    fn write_shard(&self, writer: &Writer<'_>, rank: usize) -> Result<()> {
        let saved: Vec<Saved<'_>> = self
            .model
            .parameters()
            .iter()
            .zip(&self.moments)
            .map(|(info, moments)| Saved {
                name: &info.name,
                shape: &info.shape,
                kind: &info.kind,
                mean: &moments.mean,
                square: &moments.square,
            })
            .collect();
        let most = |own: u64| {
            let mut all = vec![0.0; self.group.world_size()];
            all[rank] = own as f64;
            self.group.sum_f64(&mut all)?;
            Ok(all.into_iter().fold(0.0, f64::max) as u64)
        };
        let mut meet = || self.group.sum_f64(&mut [0.0]);
        let weights = |i: usize| self.model.weights(i);
        writer.write_shard(self.state.step, rank, &saved, &weights, &most, &mut meet)
    }

    /// Steps until all are taken or `stop` is set on any rank (an interrupt handler sets it); then a last checkpoint.
    /// `each` sees every step.
    pub fn run(&mut self, stop: &AtomicBool, each: &mut dyn FnMut(&Entry)) -> Result<Outcome> {
        loop {
            let mut stops = [f64::from(u8::from(stop.load(Ordering::Relaxed)))];
            self.group.sum_f64(&mut stops)?;
            let (done, stopped) = (self.state.step >= self.options.schedule.steps, stops[0] > 0.0);
            if done || stopped {
                let path = self.save()?;
                return Ok(if done { Outcome::Finished(path) } else { Outcome::Stopped(path) });
            }
            let entry = self.step()?;
            each(&entry);
            if self.is_due() {
                self.save()?;
            }
        }
    }
}

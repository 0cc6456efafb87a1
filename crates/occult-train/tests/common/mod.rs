//! A small model with experts, and ranks as threads.
#![allow(dead_code)]

use std::borrow::Cow;
use std::path::Path;
use std::sync::{Barrier, Mutex};

use occult_train::Result;
use occult_train::checkpoint::{DiskFiles, Files, Kind};
use occult_train::data::*;
use occult_train::optim::AdamW;
use occult_train::random::{mix, unit};
use occult_train::schedule::{Decay, LimitSchedule, Schedule};
use occult_train::trainer::*;

pub(crate) const V: usize = 11;
pub(crate) const E: usize = 6;

/// Logits of the next token: a row of `table` [V, V] for the token plus the row of expert (token mod E) of `experts` [e, V].
pub(crate) struct Bigram {
    infos: Vec<ParameterInfo>,
    weights: [Vec<f32>; 2],
    gradients: [Vec<f32>; 2],
    ids: Vec<u32>,
    group: Box<dyn Group>,
    /// After how many steps gradients become NaN.
    pub(crate) breaks_at: Option<u64>,
    /// Losses are multiplied by this after ten steps.
    pub(crate) jump: f64,
    step: u64,
    steps_done: u64,
}

impl Bigram {
    pub(crate) fn new(ids: Vec<u32>, group: Box<dyn Group>) -> Self {
        let info = |name: &str, shape: Vec<usize>, kind: Kind, decays| ParameterInfo {
            name: name.into(),
            shape,
            kind,
            decays,
            lr_scale: if decays { 1.0 } else { 0.5 },
        };
        let infos = vec![
            info("table", vec![V, V], Kind::Replicated, true),
            info("experts", vec![ids.len(), V], Kind::Experts(ids.clone()), false),
        ];
        let start = |i: usize| unit(mix(i as u64)) as f32 - 0.5;
        let table = (0..V * V).map(start).collect();
        let experts = ids.iter().flat_map(|id| (0..V).map(|v| start(1000 + *id as usize * V + v))).collect();
        let gradients = [vec![0.0; V * V], vec![0.0; ids.len() * V]];
        let weights = [table, experts];
        Self { infos, weights, gradients, ids, group, breaks_at: None, jump: 1.0, step: 0, steps_done: 0 }
    }

    pub(crate) fn bits(&self) -> Vec<u32> {
        self.weights.iter().flatten().map(|w| w.to_bits()).collect()
    }

    /// Weights of all experts in the order of their ids, then the table.
    pub(crate) fn values(&self) -> Vec<(u32, Vec<f32>)> {
        let rows = self.ids.iter().zip(self.weights[1].chunks(V)).map(|(id, w)| (*id, w.to_vec()));
        rows.chain([(u32::MAX, self.weights[0].clone())]).collect()
    }
}

impl TrainableModel for Bigram {
    fn identity(&self) -> String {
        format!("bigram of {V} tokens and {E} experts")
    }
    fn parameters(&self) -> &[ParameterInfo] {
        &self.infos
    }
    fn weights(&self, index: usize) -> Result<Cow<'_, [f32]>> {
        Ok(Cow::Borrowed(&self.weights[index]))
    }
    fn visit(&mut self, each: &mut Visitor<'_>) -> Result<()> {
        (0..2).try_for_each(|i| each(i, &mut self.weights[i], &mut self.gradients[i]))
    }
    fn clear_gradients(&mut self) -> Result<()> {
        self.gradients.iter_mut().for_each(|g| g.fill(0.0));
        Ok(())
    }
    fn loss_and_gradients(&mut self, batch: &Batch, scale: f64) -> Result<BatchReport> {
        // All experts' weights from their owners, then this rank's tokens, then each owner's gradients.
        let mut experts = vec![0f32; E * V];
        for (id, row) in self.ids.iter().zip(self.weights[1].chunks(V)) {
            experts[*id as usize * V..][..V].copy_from_slice(row);
        }
        self.group.sum_f32(&mut experts)?;
        let mut d_experts = vec![0f32; E * V];
        let mut report = BatchReport { weight: 1.0, ..BatchReport::default() };
        for (&token, &target) in batch.tokens.iter().zip(&batch.targets).filter(|(_, t)| **t != IGNORE) {
            let (token, target) = (token as usize, target as usize);
            let logit = |v: usize| f64::from(self.weights[0][token * V + v] + experts[token % E * V + v]);
            let total: f64 = (0..V).map(|v| logit(v).exp()).sum();
            report.loss_sum += total.ln() - logit(target);
            for v in 0..V {
                let d = (logit(v).exp() / total - f64::from(u8::from(v == target))) * scale;
                self.gradients[0][token * V + v] += d as f32;
                d_experts[token % E * V + v] += d as f32;
            }
        }
        self.group.sum_f32(&mut d_experts)?;
        for (id, row) in self.ids.iter().zip(self.gradients[1].chunks_mut(V)) {
            row.iter_mut().zip(&d_experts[*id as usize * V..]).for_each(|(g, d)| *g += d);
        }
        if self.breaks_at.is_some_and(|at| self.step >= at) {
            self.gradients[1][0] = f32::NAN;
        }
        if self.step >= 10 {
            report.loss_sum *= self.jump;
        }
        report.figures.insert("sequences".into(), batch.num_sequences as f64);
        Ok(report)
    }
    fn begin_step(&mut self, step: u64, _: Option<usize>) -> Result<()> {
        self.step = step;
        Ok(())
    }
    fn end_step(&mut self) -> Result<()> {
        self.steps_done += 1;
        Ok(())
    }
    fn extra(&self) -> serde_json::Value {
        self.steps_done.into()
    }
    fn restore_extra(&mut self, extra: &serde_json::Value) -> Result<()> {
        self.steps_done = extra.as_u64().unwrap_or_default();
        Ok(())
    }
}

/// What the threads of a group share.
pub(crate) struct Shared {
    barrier: Barrier,
    slots: Mutex<Vec<Vec<f64>>>,
}

/// A rank that is a thread.
#[derive(Clone)]
pub(crate) struct Thread {
    rank: usize,
    world: usize,
    shared: std::sync::Arc<Shared>,
}

pub(crate) fn threads(world: usize) -> Vec<Thread> {
    let shared = Shared { barrier: Barrier::new(world), slots: Mutex::new(vec![vec![]; world]) };
    let shared = std::sync::Arc::new(shared);
    (0..world).map(|rank| Thread { rank, world, shared: shared.clone() }).collect()
}

impl Group for Thread {
    fn rank(&self) -> usize {
        self.rank
    }
    fn world_size(&self) -> usize {
        self.world
    }
    fn sum_f32(&self, values: &mut [f32]) -> Result<()> {
        let mut wide: Vec<f64> = values.iter().map(|v| f64::from(*v)).collect();
        self.sum_f64(&mut wide)?;
        values.iter_mut().zip(wide).for_each(|(v, w)| *v = w as f32);
        Ok(())
    }
    fn sum_f64(&self, values: &mut [f64]) -> Result<()> {
        self.shared.slots.lock().unwrap()[self.rank] = values.to_vec();
        self.shared.barrier.wait();
        let slots = self.shared.slots.lock().unwrap().clone();
        for (i, v) in values.iter_mut().enumerate() {
            *v = slots.iter().map(|s| s[i]).sum();
        }
        self.shared.barrier.wait();
        Ok(())
    }
}

pub(crate) fn loader(seed: u64) -> Loader {
    let documents = (0..40u64).map(|i| {
        let mut token = mix(i) % V as u64;
        let next = |j| {
            token = (token * 3 + 1 + u64::from(mix(i * 9 + j).is_multiple_of(4))) % V as u64;
            token as u32
        };
        let ids: Vec<u32> = (0..9).map(next).collect();
        let learn = vec![true; 9];
        (Encoded { ids, learn }, 0, mix(i))
    });
    let store = TokenStore::in_memory(documents);
    let options = PackOptions {
        length: 12,
        long: LongDocument::Split,
        validation: 0.0,
        validation_part: false,
        source: None,
    };
    let packed = Packed::new(&store, &options).unwrap();
    Loader::new(store, packed, Some(seed))
}

pub(crate) fn options(steps: u64) -> Options {
    Options {
        schedule: Schedule { peak: 0.05, steps, warm_up: 3, decay: Decay::Cosine, final_ratio: 0.1 },
        adamw: AdamW { weight_decay: 0.01, ..AdamW::default() },
        max_norm: Some(0.5),
        limit: Some(LimitSchedule { ranks: 4, target: 2, steps, fraction: 0.5 }),
        batch: 6,
        seed: 1,
        data: "test".into(),
        more: Default::default(),
        micro_batch: 2,
        checkpoint_every: 4,
        keep: 2,
        guard: Guard::default(),
    }
}

/// Ids of the experts of a rank: round robin, or blocks.
pub(crate) fn experts_of(rank: usize, world: usize, blocks: bool) -> Vec<u32> {
    let owner = |id: usize| if blocks { id * world / E } else { id % world };
    (0..E).filter(|id| owner(*id) == rank).map(|id| id as u32).collect()
}

pub(crate) fn solo() -> Bigram {
    Bigram::new((0..E as u32).collect(), Box::new(Solo))
}

/// Trains alone until `stop_at` steps (or all); returns weights' bits and the losses.
pub(crate) fn train(
    dir: &Path,
    files: &dyn Files,
    steps: u64,
    stop_at: u64,
    resume: bool,
) -> Result<(Vec<u32>, Vec<f64>)> {
    let mut model = solo();
    let loader = loader(3);
    let mut losses = vec![];
    {
        let mut trainer = Trainer::new(&mut model, &loader, &Solo, options(steps), dir, files, resume)?;
        let stop = std::sync::atomic::AtomicBool::new(false);
        trainer.run(&stop, &mut |entry| {
            losses.push(entry.loss.unwrap());
            stop.store(entry.step >= stop_at, std::sync::atomic::Ordering::Relaxed);
        })?;
    }
    Ok((model.bits(), losses))
}

pub(crate) fn on_disk(dir: &Path, steps: u64, stop_at: u64, resume: bool) -> Result<(Vec<u32>, Vec<f64>)> {
    train(dir, &DiskFiles, steps, stop_at, resume)
}

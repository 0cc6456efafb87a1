//! Steps of a layer, timed.

use std::time::Instant;

use anyhow::Result;
use candle_core::{Device, Tensor, Var};
use occult_moe::{ExpertParallelLayer, PhaseSeconds};

use super::experts::Experts;
use super::random::Random;
use super::setting::Setting;

/// One timed step of one rank.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct StepSeconds {
    /// From the moment all ranks had come to the end of this one's part.
    pub(crate) total: f64,
    pub(crate) phases: PhaseSeconds,
}

impl StepSeconds {
    pub(crate) const FIGURES: usize = 6;

    pub(crate) fn figures(&self) -> [f64; Self::FIGURES] {
        let p = &self.phases;
        [self.total, p.plan, p.moving, p.compute, p.wire, p.weights]
    }

    pub(crate) fn from_figures(figures: &[f64]) -> Self {
        let at = |i: usize| figures.get(i).copied().unwrap_or(0.0);
        Self {
            total: at(0),
            phases: PhaseSeconds { plan: at(1), moving: at(2), compute: at(3), wire: at(4), weights: at(5) },
        }
    }
}

/// This rank's rows, and the logits that route them.
pub(crate) struct Rows {
    pub(crate) x: Var,
    pub(crate) logits: Var,
}

impl Rows {
    pub(crate) fn new(setting: &Setting, logits: &[f32]) -> Result<Self> {
        let (e, d) = (setting.routing.router.num_experts, setting.hidden);
        let tokens = logits.len() / e;
        let x = Random::new(5, setting.comm.rank() as u64).normals(tokens * d, 1.0);
        Ok(Self {
            x: Var::from_vec(x, (tokens, d), &Device::Cpu)?,
            logits: Var::from_vec(logits.to_vec(), (tokens, e), &Device::Cpu)?,
        })
    }
}

/// Inference of one step (collective).
pub(crate) fn forward(
    setting: &Setting,
    layer: &ExpertParallelLayer,
    experts: &Experts,
    rows: &Rows,
) -> Result<(StepSeconds, Vec<f32>)> {
    let count = layer.local_experts().len();
    let x = values(&rows.x)?;
    let logits = values(&rows.logits)?;
    experts.with_matrices(count, |matrices| {
        start(setting, layer)?;
        let begin = Instant::now();
        let (y, _) =
            layer.forward_inference(&x, &logits, experts.dims, matrices, Some(&setting.step), None)?;
        Ok((finish(layer, begin), y))
    })
}

/// Forward and backward of one step (collective).
pub(crate) fn forward_backward(
    setting: &Setting,
    layer: &ExpertParallelLayer,
    experts: &Experts,
    rows: &Rows,
) -> Result<StepSeconds> {
    let tensors = experts.tensors(layer.local_experts().len())?;
    experts.forget_gradients();
    start(setting, layer)?;
    let begin = Instant::now();
    let (y, _) = layer.forward(&rows.x, &rows.logits, tensors, Some(&setting.step), None)?;
    let gradients = y.sum_all()?.backward()?;
    let step = finish(layer, begin);
    drop(gradients);
    Ok(step)
}

fn start(setting: &Setting, layer: &ExpertParallelLayer) -> Result<()> {
    layer.take_seconds();
    Ok(setting.comm.barrier("bench step")?)
}

fn finish(layer: &ExpertParallelLayer, begin: Instant) -> StepSeconds {
    let total = begin.elapsed().as_secs_f64();
    StepSeconds { total, phases: layer.take_seconds() }
}

/// Copied out.
pub(crate) fn values(tensor: &Tensor) -> Result<Vec<f32>> {
    Ok(tensor.flatten_all()?.to_vec1()?)
}

/// The middle one of some numbers, or the mean of the middle two.
pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => 0.0,
        n => (values[(n - 1) / 2] + values[n / 2]) / 2.0,
    }
}

/// A pass over many steps, of all ranks.
#[derive(Debug, Clone, Default)]
pub(crate) struct PassSeconds {
    /// Median over steps of the slowest rank.
    pub(crate) seconds: f64,
    /// Median over steps of the mean over ranks.
    pub(crate) phases: PhaseSeconds,
    /// Of every step, the slowest rank.
    pub(crate) steps: Vec<f64>,
}

impl PassSeconds {
    /// The fastest step.
    pub(crate) fn least(&self) -> f64 {
        self.steps.iter().copied().fold(f64::INFINITY, f64::min)
    }
}

impl PassSeconds {
    /// From the steps of every rank `[W][steps]`.
    pub(crate) fn of(ranks: &[Vec<StepSeconds>]) -> Self {
        let steps = ranks.first().map_or(0, Vec::len);
        let slowest = |i: usize| ranks.iter().map(|rank| rank[i].total).fold(0.0, f64::max);
        let mean = |of: &dyn Fn(&PhaseSeconds) -> f64| {
            let one = |i: usize| ranks.iter().map(|rank| of(&rank[i].phases)).sum::<f64>();
            median((0..steps).map(|i| one(i) / ranks.len() as f64).collect())
        };
        let seconds: Vec<f64> = (0..steps).map(slowest).collect();
        Self {
            seconds: median(seconds.clone()),
            phases: PhaseSeconds {
                plan: mean(&|p| p.plan),
                moving: mean(&|p| p.moving),
                compute: mean(&|p| p.compute),
                wire: mean(&|p| p.wire),
                weights: mean(&|p| p.weights),
            },
            steps: seconds,
        }
    }
}

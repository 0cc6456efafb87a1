//! `occult bench step`: whole steps of several layers. A layer is attention over the rank's own tokens as one sequence, and
//! experts over the ranks; the backward pass ends with the sum over ranks of the gradients of what all of them hold.

use std::time::Instant;

use anyhow::Result;
use candle_core::{Device, Tensor, Var};
use occult_kernels::Threads;
use occult_kernels::ops::{AttentionShape, attention, linear, rms_norm};
use occult_kernels::smm::ExpertDims;
use occult_moe::{ExpertParallelLayer, Pass, PhaseSeconds, all_reduce_gradients};

use super::args::{BenchStepArgs, RunArgs, ShapeArgs};
use super::experts::Experts;
use super::layer::{layers, share_cores, threads_of};
use super::machine::{machine, peak_gflops};
use super::measure::{PassSeconds, Rows, StepSeconds, values};
use super::predict;
use super::random::Random;
use super::report::{Measured, Outcome};
use super::rounds::{How, gather, rounds};
use super::setting::{Setting, check, routing_of};
use crate::output::{print, print_json};
use crate::world::run_world;

const EPS: f32 = 1e-5;
/// Values of a head, where the width is a multiple.
const HEAD: usize = 64;
const PROBES: usize = 3;

pub(crate) fn run(args: &BenchStepArgs) -> Result<()> {
    check(&args.shape)?;
    let routing = routing_of(&args.shape)?;
    let outcome = run_world(&args.shape.world, |comm| {
        measure(&Setting::new(comm, &args.shape, routing.clone())?, &args.shape, &args.run, args.layers)
    })?;
    let Some(outcome) = outcome else { return Ok(()) };
    if args.shape.json {
        return print_json(&outcome.json(&args.shape, &args.run));
    }
    print(&outcome.text(&args.shape))
}

/// What all ranks hold of one layer.
struct Dense {
    norms: [Var; 2],
    /// Query, key, value, output: `[D, D]`.
    projections: [Var; 4],
}

impl Dense {
    fn new(d: usize, random: &mut Random) -> Result<Self> {
        let norm = || Var::ones(d, candle_core::DType::F32, &Device::Cpu);
        let scale = 1.0 / (d as f32).sqrt();
        let mut square = || Var::from_vec(random.normals(d * d, scale), (d, d), &Device::Cpu);
        Ok(Self { norms: [norm()?, norm()?], projections: [square()?, square()?, square()?, square()?] })
    }

    fn vars(&self) -> impl Iterator<Item = &Var> {
        self.norms.iter().chain(&self.projections)
    }

    /// `x` `[T, D]` to `x` with attention added, and that normalised for the experts.
    fn forward(&self, threads: &Threads, x: &Tensor, track: bool) -> Result<(Tensor, Tensor)> {
        let (t, d) = x.dims2()?;
        let weight = |var: &Var| if track { var.as_tensor().clone() } else { var.as_detached_tensor() };
        let (heads, size) = if d.is_multiple_of(HEAD) { (d / HEAD, HEAD) } else { (1, d) };
        let [q, k, v, o] = self.projections.each_ref().map(weight);
        let normed = rms_norm(x, &weight(&self.norms[0]), EPS)?;
        let project = |w: &Tensor| -> Result<Tensor> {
            Ok(linear(threads, &normed, w)?.reshape((1, t, heads, size))?.transpose(1, 2)?)
        };
        let shape = AttentionShape::causal(1.0 / (size as f32).sqrt(), 0);
        let seen = attention(threads, &project(&q)?, &project(&k)?, &project(&v)?, &shape)?;
        let seen = seen.transpose(1, 2)?.reshape((t, d))?;
        let h = (x + linear(threads, &seen, &o)?)?;
        let normed = rms_norm(&h, &weight(&self.norms[1]), EPS)?;
        Ok((h, normed))
    }
}

/// This rank's part of the model.
struct Stack<'a> {
    setting: &'a Setting,
    threads: Threads,
    dense: Vec<Dense>,
    experts: Vec<Experts>,
    rows: Rows,
}

impl Stack<'_> {
    /// A step with a layer's exchange (collective), or of the dense part alone.
    fn step(&self, layer: Option<&ExpertParallelLayer>, pass: Pass) -> Result<StepSeconds> {
        layer.map(ExpertParallelLayer::take_seconds);
        self.experts.iter().for_each(Experts::forget_gradients);
        self.setting.comm.barrier("bench step")?;
        let begin = Instant::now();
        match pass {
            Pass::Inference => self.inference(layer)?,
            Pass::Training => self.train(layer)?,
        }
        let total = begin.elapsed().as_secs_f64();
        let phases = layer.map_or_else(PhaseSeconds::default, ExpertParallelLayer::take_seconds);
        Ok(StepSeconds { total, phases })
    }

    fn inference(&self, layer: Option<&ExpertParallelLayer>) -> Result<()> {
        let logits = values(&self.rows.logits)?;
        let mut x = self.rows.x.as_detached_tensor();
        for (dense, experts) in self.dense.iter().zip(&self.experts) {
            let (h, normed) = dense.forward(&self.threads, &x, false)?;
            let Some(layer) = layer else {
                x = h;
                continue;
            };
            let (step, rows) = (Some(&self.setting.step), values(&normed)?);
            let (y, _) = experts.with_matrices(layer.local_experts().len(), |matrices| {
                Ok(layer.forward_inference(&rows, &logits, experts.dims, matrices, step, None)?)
            })?;
            x = (&h + Tensor::from_vec(y, h.shape(), &Device::Cpu)?)?;
        }
        Ok(())
    }

    fn train(&self, layer: Option<&ExpertParallelLayer>) -> Result<()> {
        let mut x = self.rows.x.as_tensor().clone();
        for (dense, experts) in self.dense.iter().zip(&self.experts) {
            let (h, normed) = dense.forward(&self.threads, &x, true)?;
            x = match layer {
                None => (h + normed)?,
                Some(layer) => {
                    let tensors = experts.tensors(layer.local_experts().len())?;
                    let step = Some(&self.setting.step);
                    (h + layer.forward(&normed, &self.rows.logits, tensors, step, None)?.0)?
                }
            };
        }
        let mut gradients = x.sum_all()?.backward()?;
        let vars: Vec<&Var> = self.dense.iter().flat_map(Dense::vars).collect();
        all_reduce_gradients(&*self.setting.comm, &vars, &mut gradients, 1.0)?;
        Ok(())
    }

    /// Median seconds of the dense part alone (collective).
    fn dense_seconds(&self, pass: Pass) -> Result<f64> {
        let steps = (0..=PROBES).map(|_| self.step(None, pass)).collect::<Result<Vec<_>>>()?;
        Ok(PassSeconds::of(&gather(self.setting, &steps[1..])?).seconds)
    }
}

fn measure(setting: &Setting, args: &ShapeArgs, run: &RunArgs, num_layers: usize) -> Result<Outcome> {
    let rank = setting.comm.rank();
    let threads = Threads::new(threads_of(setting, run.threads_per_rank));
    let dims = ExpertDims { hidden: setting.hidden, intermediate: setting.ffn };
    let mut random = Random::new(args.seed, 100 + rank as u64);
    let mut same = Random::new(args.seed, 99);
    let counts = setting.expert_counts();
    let stack = Stack {
        setting,
        threads: threads.clone(),
        dense: (0..num_layers).map(|_| Dense::new(setting.hidden, &mut same)).collect::<Result<_>>()?,
        experts: (0..num_layers)
            .map(|_| Experts::new(&counts, dims, run.dtype, &mut random))
            .collect::<Result<_>>()?,
        rows: Rows::new(setting, setting.logits_of(rank))?,
    };
    let pooled = share_cores(setting, threads.count())?;
    let before = peak_gflops(setting, &threads)?;
    let machine = machine(setting, &stack.experts[0], &threads, run.small_batch, run.backward, pooled)?;
    let dense_forward = stack.dense_seconds(Pass::Inference)?;
    let dense_both = if run.backward { stack.dense_seconds(Pass::Training)? } else { 0.0 };
    let layers = layers(setting, args, run, &machine, &threads)?;
    let hows: Vec<How> = layers.iter().map(|lane| lane.how).collect();
    let step = |i: usize, pass| stack.step(Some(layers[i].layer(pass)), pass);
    let lanes = rounds(setting, &hows, args, run.backward, step)?;
    let after = peak_gflops(setting, &threads)?;
    let mut measured = Vec::with_capacity(lanes.len());
    for (lane, of) in lanes.into_iter().zip(&layers) {
        let predicted = predict::mode(setting, of.layer(Pass::Inference), &machine, of.how.parts)?;
        measured.push(Measured::checked(lane, predicted.times(num_layers, dense_forward, dense_both))?);
    }
    let outcome = Outcome::new(setting, threads.count(), before.max(after), machine, measured);
    Ok(outcome.with_layers(num_layers, dense_forward, run.backward.then_some(dense_both)))
}

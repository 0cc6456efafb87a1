//! `occult bench layer`: one layer's steps under every mode.

use anyhow::{Result, bail};
use occult_kernels::Threads;
use occult_kernels::smm::ExpertDims;
use occult_moe::{ExpertParallelLayer, Overlap};
use serde_json::{Value, json};

use super::args::{BenchLayerArgs, ModeName, OverlapArg, RunArgs, ShapeArgs};
use super::experts::Experts;
use super::machine::{Machine, machine, peak_gflops};
use super::measure::{PassSeconds, Rows, StepSeconds, forward, forward_backward};
use super::predict::{self, Parts, Predicted, Seconds, WireBytes};
use super::random::Random;
use super::setting::{Setting, check, routing_of};
use crate::exit::Usage;
use crate::output::{Table, bytes, figure, print, print_json};
use crate::setup;
use crate::world::run_world;

/// Of one mode.
struct Measured {
    mode: ModeName,
    bytes: WireBytes,
    predicted: Predicted,
    parts: Parts,
    forward: PassSeconds,
    both: Option<PassSeconds>,
}

/// What rank 0 tells.
struct Outcome {
    routing: String,
    ranks: usize,
    nodes: usize,
    experts: usize,
    top_k: usize,
    tokens: Vec<usize>,
    threads: usize,
    peak_gflops: f64,
    machine: Machine,
    modes: Vec<Measured>,
}

pub(crate) fn run(args: &BenchLayerArgs) -> Result<()> {
    check(&args.shape)?;
    if args.run.chunks == 0 {
        return Err(Usage("--chunks must be at least 1".to_owned()).into());
    }
    let routing = routing_of(&args.shape)?;
    let outcome = run_world(&args.shape.world, |comm| {
        measure(&Setting::new(comm, &args.shape, routing.clone())?, &args.shape, &args.run)
    })?;
    let Some(outcome) = outcome else { return Ok(()) };
    if args.shape.json {
        return print_json(&outcome.json(args));
    }
    print(&outcome.text(args))
}

/// Threads of this rank: what was asked for, or its share of this machine's cores.
pub(crate) fn threads_of(setting: &Setting, asked: Option<usize>) -> usize {
    let hosts = setting.comm.host_of_rank();
    let here = hosts.iter().filter(|&&host| host == hosts[setting.comm.rank()]).count();
    asked.unwrap_or(setup::threads(None) / here).max(1)
}

/// Whether all ranks are threads of this process, more than it has cores: their work then evens out (collective).
pub(crate) fn share_cores(setting: &Setting, threads: usize) -> Result<bool> {
    let me = f64::from(std::process::id());
    let one_process = setting.gather(&[me])?.iter().all(|rank| rank[0] == me);
    Ok(one_process && setting.world() * threads > setup::threads(None))
}

/// The layer of a mode, and the parts of its steps.
struct Subject {
    mode: ModeName,
    layer: ExpertParallelLayer,
    parts: Parts,
    bytes: WireBytes,
    forward: Vec<StepSeconds>,
    both: Vec<StepSeconds>,
}

fn measure(setting: &Setting, args: &ShapeArgs, run: &RunArgs) -> Result<Outcome> {
    let rank = setting.comm.rank();
    let threads = Threads::new(threads_of(setting, run.threads_per_rank));
    let dims = ExpertDims { hidden: setting.hidden, intermediate: setting.ffn };
    let mut random = Random::new(args.seed, 100 + rank as u64);
    let experts = Experts::new(&setting.expert_counts(), dims, run.dtype, &mut random)?;
    let pooled = share_cores(setting, threads.count())?;
    let before = peak_gflops(setting, &threads)?;
    let machine = machine(setting, &experts, &threads, run.small_batch, run.backward, pooled)?;
    let overlap = match run.overlap {
        OverlapArg::Off => Overlap::Off,
        OverlapArg::On => Overlap::Chunks(run.chunks),
        OverlapArg::Auto => Overlap::Auto(Box::new(machine.cluster.clone())),
    };
    let rows = Rows::new(setting, setting.logits_of(rank))?;
    let mut subjects = Vec::with_capacity(args.modes.len());
    for &mode in &args.modes {
        let options = setting.options(mode, &overlap, run.small_batch);
        let layer = setting.layer(mode, options, &threads)?;
        let tokens = setting.step.tokens()[rank];
        let chunks = layer.num_chunks(tokens, setting.hidden, setting.ffn, Some(&setting.step))?;
        let small = predict::is_small(setting, layer.options());
        let parts = Parts { forward: if small { 1 } else { chunks }, both: chunks };
        let (forward, both) = (Vec::new(), Vec::new());
        subjects.push(Subject { mode, layer, parts, bytes: WireBytes::default(), forward, both });
    }
    for round in 0..=args.reps {
        let order: Vec<usize> = match round % 2 {
            0 => (0..subjects.len()).collect(),
            _ => (0..subjects.len()).rev().collect(),
        };
        for i in order {
            let subject = &mut subjects[i];
            setting.meter.reset();
            let (step, _) = forward(setting, &subject.layer, &experts, &rows)?;
            if round == 0 {
                subject.bytes.forward = sent(setting)?;
            } else {
                subject.forward.push(step);
            }
            if run.backward {
                setting.meter.reset();
                let step = forward_backward(setting, &subject.layer, &experts, &rows)?;
                if round == 0 {
                    subject.bytes.both = sent(setting)?;
                } else {
                    subject.both.push(step);
                }
            }
        }
    }
    let after = peak_gflops(setting, &threads)?;
    let modes = subjects.into_iter().map(|subject| finish(setting, &machine, run, subject));
    Ok(Outcome {
        routing: setting.routing.name.clone(),
        ranks: setting.world(),
        nodes: setting.topology.num_nodes(),
        experts: setting.routing.router.num_experts,
        top_k: setting.routing.router.top_k,
        tokens: setting.step.tokens().to_vec(),
        threads: threads.count(),
        peak_gflops: before.max(after),
        modes: modes.collect::<Result<_>>()?,
        machine,
    })
}

/// Bytes of the layer's own exchanges that left their rank since the meter was reset, all ranks (collective).
fn sent(setting: &Setting) -> Result<u64> {
    let snapshot = setting.meter.reset();
    let layers = snapshot.operations.keys().filter(|what| what.starts_with("moe "));
    let wire: u64 = layers.map(|what| snapshot.sent(what).wire()).sum();
    Ok(setting.gather(&[wire as f64])?.iter().map(|rank| rank[0] as u64).sum())
}

/// Gathers a mode's steps (collective).
fn finish(setting: &Setting, machine: &Machine, run: &RunArgs, subject: Subject) -> Result<Measured> {
    let Subject { mode, layer, parts, bytes, forward, both } = subject;
    let predicted = predict::mode(setting, &layer, machine, parts)?;
    let expected = &predicted.bytes;
    if bytes.forward != expected.forward || (run.backward && bytes.both != expected.both) {
        bail!("{}: sent {bytes:?}, predicted {expected:?}: this is a bug", mode.name());
    }
    let pass = |steps: &[StepSeconds]| -> Result<PassSeconds> {
        let figures: Vec<f64> = steps.iter().flat_map(StepSeconds::figures).collect();
        let ranks: Vec<Vec<StepSeconds>> = setting
            .gather(&figures)?
            .iter()
            .map(|rank| rank.chunks_exact(StepSeconds::FIGURES).map(StepSeconds::from_figures).collect())
            .collect();
        Ok(PassSeconds::of(&ranks))
    };
    let forward = pass(&forward)?;
    let both = if run.backward { Some(pass(&both)?) } else { None };
    Ok(Measured { mode, bytes, predicted, parts, forward, both })
}

impl Outcome {
    /// Useful operations of a forward pass: the same for every mode.
    fn flop(&self, args: &ShapeArgs) -> f64 {
        let tokens: usize = self.tokens.iter().sum();
        2.0 * 3.0 * (tokens * self.top_k) as f64 * (args.hidden * args.ffn) as f64
    }

    fn json(&self, args: &BenchLayerArgs) -> Value {
        let (shape, run) = (&args.shape, &args.run);
        let flop = self.flop(shape);
        let c = &self.machine.cluster;
        let modes: Vec<Value> = self.modes.iter().map(|m| m.json(flop)).collect();
        json!({
            "ranks": self.ranks,
            "nodes": self.nodes,
            "threads_per_rank": self.threads,
            "tokens": self.tokens.iter().sum::<usize>(),
            "tokens_per_rank": self.tokens,
            "hidden": shape.hidden,
            "ffn": shape.ffn,
            "experts": self.experts,
            "top_k": self.top_k,
            "dtype": format!("{:?}", run.dtype).to_lowercase(),
            "routing": self.routing,
            "reps": shape.reps,
            "peak_gflops": self.peak_gflops,
            "machine": {
                "latency_s": c.intra.latency_s,
                "bandwidth_bytes_per_s": c.intra.bandwidth_bytes_per_s,
                "inter_latency_s": c.inter.map(|i| i.link.latency_s),
                "inter_bandwidth_bytes_per_s": c.inter.map(|i| i.link.bandwidth_bytes_per_s),
                "expert_flops_per_s": c.compute.flops_per_s,
                "move_s_per_byte": self.machine.forward.move_per_byte,
                "plan_s_per_pair": self.machine.forward.plan_per_pair,
                "ranks_share_cores": self.machine.pooled,
            },
            "modes": modes,
        })
    }

    fn text(&self, args: &BenchLayerArgs) -> String {
        let shape = &args.shape;
        let flop = self.flop(shape);
        let c = &self.machine.cluster;
        let mut text = format!(
            "{} tokens, hidden {}, ffn {}, {} experts, top-{}, routing {}\n{} ranks of {} threads: multiply-add {:.0} \
             GFLOP/s, experts {:.0} GFLOP/s per rank, exchange {:.2} GB/s per rank, {:.0} us per peer\n\n",
            self.tokens.iter().sum::<usize>(),
            shape.hidden,
            shape.ffn,
            self.experts,
            self.top_k,
            self.routing,
            self.ranks,
            self.threads,
            self.peak_gflops,
            c.compute.flops_per_s / 1e9,
            c.intra.bandwidth_bytes_per_s / 1e9,
            c.intra.latency_s * 1e6,
        );
        let passes: [(&str, bool); 2] = [("forward", false), ("forward + backward", true)];
        for (name, backward) in passes {
            let Some(first) = self.modes.first().and_then(|m| m.pass(backward)) else { continue };
            let mut table = Table::new([
                name,
                "copies",
                "load",
                "wire bytes",
                "parts",
                "ms",
                "predicted",
                "x",
                "GFLOP/s",
                "of peak",
                "compute",
                "wire",
                "moving",
                "planning",
            ]);
            for m in &self.modes {
                let Some((pass, predicted, wire, parts)) = m.pass(backward) else { continue };
                let share = |s: f64| format!("{:.1} %", 100.0 * s / pass.seconds);
                let gflops = flop * if backward { 3.0 } else { 1.0 } / pass.seconds / 1e9;
                table.row([
                    m.mode.name().to_owned(),
                    figure(Some(m.predicted.copies_per_token), 2),
                    figure(Some(m.predicted.load_max_over_mean), 2),
                    bytes(wire as f64),
                    parts.to_string(),
                    figure(Some(pass.seconds * 1e3), 2),
                    figure(Some(predicted.total * 1e3), 2),
                    figure(Some(first.0.seconds / pass.seconds), 2),
                    figure(Some(gflops), 0),
                    format!("{:.0} %", 100.0 * gflops / self.peak_gflops),
                    share(pass.phases.compute),
                    share(pass.phases.wire),
                    share(pass.phases.moving),
                    share(pass.phases.plan),
                ]);
            }
            text.push_str(&table.render());
            text.push('\n');
        }
        text
    }
}

impl Measured {
    fn pass(&self, backward: bool) -> Option<(&PassSeconds, &Seconds, u64, usize)> {
        Some(match backward {
            false => (&self.forward, &self.predicted.forward, self.bytes.forward, self.parts.forward),
            true => (self.both.as_ref()?, self.predicted.both.as_ref()?, self.bytes.both, self.parts.both),
        })
    }

    fn json(&self, flop: f64) -> Value {
        let gflops = |pass: &PassSeconds, passes: f64| passes * flop / pass.seconds / 1e9;
        let (wire, predicted) = match self.both {
            Some(_) => (self.bytes.both, self.predicted.bytes.both),
            None => (self.bytes.forward, self.predicted.bytes.forward),
        };
        json!({
            "mode": self.mode.name(),
            "copies_per_token": self.predicted.copies_per_token,
            "load_max_over_mean": self.predicted.load_max_over_mean,
            "wire_bytes": wire,
            "predicted_wire_bytes": predicted,
            "forward_wire_bytes": self.bytes.forward,
            "forward_seconds": self.forward.seconds,
            "forward_gflops": gflops(&self.forward, 1.0),
            "forward_backward_seconds": self.both.as_ref().map(|b| b.seconds),
            "forward_backward_gflops": self.both.as_ref().map(|b| gflops(b, 3.0)),
            "forward": pass_json(&self.forward, &self.predicted.forward, self.parts.forward),
            "forward_backward": self.both.as_ref().zip(self.predicted.both.as_ref())
                .map(|(both, predicted)| pass_json(both, predicted, self.parts.both)),
        })
    }
}

/// Mean over ranks of where the time went (the exposed wire is time spent waiting for rows or for slower ranks), and the
/// cost model's.
pub(crate) fn pass_json(pass: &PassSeconds, predicted: &Seconds, parts: usize) -> Value {
    let p = &pass.phases;
    json!({
        "seconds": pass.seconds,
        "predicted_seconds": predicted.total,
        "parts": parts,
        "compute_seconds": p.compute,
        "exposed_wire_seconds": p.wire,
        "moving_seconds": p.moving,
        "planning_seconds": p.plan,
        "planning_share": p.plan / pass.seconds,
        "predicted": {
            "compute_seconds": predicted.compute,
            "wire_seconds": predicted.wire,
            "moving_seconds": predicted.moving,
            "planning_seconds": predicted.plan,
        },
        "steps": pass.steps,
    })
}

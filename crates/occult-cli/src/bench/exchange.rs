//! `occult bench exchange`: the wire alone, and a layer's rows over it without any experts.

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Result, bail};
use occult_moe::exchange::{Exchanger, Rows};
use occult_moe::{LayerOptions, Mode, Overlap, Timers};
use occult_plan::cost::{Cluster, Cut, Link};
use occult_plan::{DispatchPlan, Routing, RoutingBuf};
use serde_json::{Value, json};

use super::args::{BenchExchangeArgs, ModeName, OverlapArg, ShapeArgs};
use super::machine::{Pace, exchange_seconds, wire};
use super::measure::{PassSeconds, StepSeconds};
use super::predict::{Parts, forward_bytes, latency, wire_of};
use super::random::Random;
use super::rounds::{How, gather, rounds};
use super::setting::{Setting, check, routing_of};
use crate::output::{Table, bytes, figure, print, print_json};
use crate::world::run_world;

/// Steps of the probe of what packing costs, after one that does not count.
const PROBES: usize = 5;

/// One all-to-all.
struct Raw {
    bytes: usize,
    seconds: f64,
    predicted: f64,
}

/// Dispatch and combine of one mode.
struct LayerRows {
    mode: ModeName,
    bytes: u64,
    predicted_bytes: u64,
    pass: PassSeconds,
    predicted: f64,
}

struct Outcome {
    routing: String,
    ranks: usize,
    tokens: usize,
    cluster: Cluster,
    raw: Vec<Raw>,
    layer: Vec<LayerRows>,
}

pub(crate) fn run(args: &BenchExchangeArgs) -> Result<()> {
    check(&args.shape)?;
    let routing = routing_of(&args.shape)?;
    let outcome = run_world(&args.shape.world, |comm| {
        measure(&Setting::new(comm, &args.shape, routing.clone())?, &args.shape, &args.bytes)
    })?;
    let Some(outcome) = outcome else { return Ok(()) };
    print_or_json(&args.shape, &outcome)
}

/// The rows of one mode, ready to travel.
struct Subject {
    mode: ModeName,
    options: LayerOptions,
    exchanger: Exchanger,
    timers: Arc<Timers>,
    plan: DispatchPlan,
    weights: Vec<f32>,
    routing: RoutingBuf,
}

impl Subject {
    /// `logits` of all ranks' tokens.
    fn new(setting: &Setting, mode: ModeName, logits: &[f32]) -> Result<Self> {
        let options = setting.options(mode, &Overlap::Off, 0)?;
        let layer = setting.layer(mode, options.clone(), &occult_kernels::Threads::new(1))?;
        let routing = layer.decide(logits)?.routing;
        let k = routing.top_k;
        let tokens = setting.tokens_of(setting.comm.rank());
        let ids = &routing.expert_ids[tokens.start * k..tokens.end * k];
        let mine = Routing::new(routing.num_experts, k, ids)?;
        let plan = DispatchPlan::build(&mine, layer.placement(), setting.topology)?;
        let timers = Arc::new(Timers::default());
        let rows = if options.mode == Mode::Conventional { Rows::PerExpert } else { Rows::PerRank };
        let levels = options.has_two_levels();
        let comm = Arc::clone(&setting.comm);
        let exchanger =
            Exchanger::new(comm, layer.placement(), setting.topology, rows, levels, Arc::clone(&timers))?;
        let weights = vec![1.0; ids.len()];
        Ok(Self { mode, options, exchanger, timers, plan, weights, routing })
    }

    /// Rows there and back (collective).
    fn step(&self, setting: &Setting, x: &[f32]) -> Result<StepSeconds> {
        let d = setting.hidden;
        self.timers.take();
        setting.comm.barrier("bench step")?;
        let begin = Instant::now();
        let rows = self.exchanger.rows(&self.plan, 0..x.len() / d);
        let Some(counts) = self.exchanger.exchange_counts(std::slice::from_ref(&rows))?.pop() else {
            bail!("no counts came");
        };
        let (received, handle) =
            self.exchanger.start_dispatch(rows, counts, x, &self.weights, d)?.finish()?;
        let y = handle.start_combine(&received)?.finish()?;
        let total = begin.elapsed().as_secs_f64();
        drop(y);
        Ok(StepSeconds { total, phases: self.timers.take() })
    }

    /// Seconds of the wire, and bytes that a rank packs.
    fn wire(&self, setting: &Setting, cluster: &Cluster) -> Result<(f64, f64)> {
        let placement = setting.placement(self.mode);
        let of = wire_of(setting, placement, &self.options, cluster, &self.routing)?;
        Ok((of.step.forward.exchange_s() + latency(cluster), of.packed_bytes))
    }
}

fn measure(setting: &Setting, args: &ShapeArgs, sizes: &[usize]) -> Result<Outcome> {
    let (rank, world) = (setting.comm.rank(), setting.world());
    let cluster = wire(setting)?;
    let mut raw = Vec::with_capacity(sizes.len());
    for &size in sizes {
        let to: Vec<usize> = (0..world).map(|r| if r == rank { 0 } else { size }).collect();
        let seconds = exchange_seconds(setting, &to, args.reps, Pace::AtOnce)?;
        raw.push(Raw { bytes: size, seconds, predicted: all_to_all(&cluster, size) });
    }
    let mine = setting.step.tokens()[rank];
    let x = Random::new(5, rank as u64).normals(mine * setting.hidden, 1.0);
    // What packing costs beside the wire: from other tokens.
    let probe = Subject::new(setting, ModeName::Dedup, &setting.routing.probe_logits)?;
    let mut steps = Vec::with_capacity(PROBES);
    for i in 0..=PROBES {
        let step = probe.step(setting, &x)?;
        if i > 0 {
            steps.push(step);
        }
    }
    let (wire_seconds, packed) = probe.wire(setting, &cluster)?;
    let probed = PassSeconds::of(&gather(setting, &steps)?).seconds;
    let per_byte = (probed - wire_seconds).max(0.0) / packed.max(1.0);
    let logits = &setting.routing.logits;
    let subjects =
        args.modes.iter().map(|&mode| Subject::new(setting, mode, logits)).collect::<Result<Vec<_>>>()?;
    let parts = Parts { forward: Cut::WHOLE, both: Cut::WHOLE };
    let how = |&mode| How { mode, overlap: OverlapArg::Off, parts };
    let modes: Vec<_> = args.modes.iter().map(how).collect();
    let lanes = rounds(setting, &modes, args, false, |i, _| subjects[i].step(setting, &x))?;
    let mut layer = Vec::with_capacity(lanes.len());
    for (lane, subject) in lanes.into_iter().zip(&subjects) {
        let placement = setting.placement(subject.mode);
        let predicted_bytes = forward_bytes(setting, placement, &subject.options, &subject.routing, 1)?;
        if lane.bytes.forward != predicted_bytes {
            let sent = lane.bytes.forward;
            bail!("{}: sent {sent} bytes, predicted {predicted_bytes}: this is a bug", lane.how.mode.name());
        }
        let (wire_seconds, packed) = subject.wire(setting, &cluster)?;
        let predicted = wire_seconds + per_byte * packed;
        let (mode, bytes, pass) = (lane.how.mode, lane.bytes.forward, lane.forward);
        layer.push(LayerRows { mode, bytes, predicted_bytes, pass, predicted });
    }
    let (routing, tokens) = (setting.routing.name.clone(), setting.step.tokens().iter().sum());
    Ok(Outcome { routing, ranks: world, tokens, cluster, raw, layer })
}

/// So many bytes from every rank to every other.
fn all_to_all(cluster: &Cluster, size: usize) -> f64 {
    let own = cluster.ranks_per_node - 1;
    let others = (cluster.nodes - 1) * cluster.ranks_per_node;
    let time = |link: &Link, peers: usize| {
        peers as f64 * (link.latency_s + size as f64 / link.bandwidth_bytes_per_s)
    };
    time(&cluster.intra, own) + cluster.inter.map_or(0.0, |i| time(&i.link, others))
}

fn print_or_json(args: &ShapeArgs, outcome: &Outcome) -> Result<()> {
    let c = &outcome.cluster;
    if args.json {
        let raw = |r: &Raw| json!({ "bytes_per_peer": r.bytes, "seconds": r.seconds, "predicted_seconds": r.predicted });
        let layer = |l: &LayerRows| -> Value {
            json!({
                "mode": l.mode.name(),
                "wire_bytes": l.bytes,
                "predicted_wire_bytes": l.predicted_bytes,
                "seconds": l.pass.seconds,
                "predicted_seconds": l.predicted,
                "exposed_wire_seconds": l.pass.phases.wire,
                "moving_seconds": l.pass.phases.moving,
                "steps": l.pass.steps,
            })
        };
        return print_json(&json!({
            "ranks": outcome.ranks,
            "tokens": outcome.tokens,
            "hidden": args.hidden,
            "routing": outcome.routing,
            "latency_s": c.intra.latency_s,
            "bandwidth_bytes_per_s": c.intra.bandwidth_bytes_per_s,
            "inter_latency_s": c.inter.map(|i| i.link.latency_s),
            "inter_bandwidth_bytes_per_s": c.inter.map(|i| i.link.bandwidth_bytes_per_s),
            "all_to_all": outcome.raw.iter().map(raw).collect::<Vec<_>>(),
            "modes": outcome.layer.iter().map(layer).collect::<Vec<_>>(),
        }));
    }
    let mut table = Table::new(["all-to-all, bytes to each peer", "ms", "predicted", "GB/s per rank"]);
    for r in &outcome.raw {
        let rate = ((outcome.ranks - 1) * r.bytes) as f64 / r.seconds / 1e9;
        let ms = |s: f64| figure(Some(s * 1e3), 3);
        table.row([bytes(r.bytes as f64), ms(r.seconds), ms(r.predicted), figure(Some(rate), 3)]);
    }
    let mut text = format!(
        "{} ranks, {} tokens, hidden {}, routing {}\n\n{}\n",
        outcome.ranks,
        outcome.tokens,
        args.hidden,
        outcome.routing,
        table.render()
    );
    let mut table =
        Table::new(["rows there and back", "wire bytes", "ms", "predicted", "x", "wire", "moving"]);
    for l in &outcome.layer {
        let share = |s: f64| format!("{:.1} %", 100.0 * s / l.pass.seconds);
        table.row([
            l.mode.name().to_owned(),
            bytes(l.bytes as f64),
            figure(Some(l.pass.seconds * 1e3), 2),
            figure(Some(l.predicted * 1e3), 2),
            figure(Some(outcome.layer[0].pass.seconds / l.pass.seconds), 2),
            share(l.pass.phases.wire),
            share(l.pass.phases.moving),
        ]);
    }
    text.push_str(&table.render());
    print(&text)
}

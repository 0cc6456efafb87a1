//! What rank 0 tells: for people, and as JSON.

use anyhow::{Result, bail};
use occult_plan::cost::Cut;
use serde_json::{Value, json};

use super::args::{RunArgs, ShapeArgs};
use super::machine::Machine;
use super::measure::PassSeconds;
use super::predict::{Predicted, Seconds};
use super::rounds::Lane;
use super::setting::Setting;
use crate::output::{Table, bytes, figure};

/// Of one mode.
pub(crate) struct Measured {
    lane: Lane,
    predicted: Predicted,
}

/// What rank 0 tells.
pub(crate) struct Outcome {
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
    layers: usize,
    /// Seconds of everything but the experts and their exchange, measured alone.
    dense: Option<(f64, Option<f64>)>,
}

impl Outcome {
    pub(crate) fn new(
        setting: &Setting,
        threads: usize,
        peak_gflops: f64,
        machine: Machine,
        modes: Vec<Measured>,
    ) -> Self {
        Self {
            routing: setting.routing.name.clone(),
            ranks: setting.world(),
            nodes: setting.topology.num_nodes(),
            experts: setting.routing.router.num_experts,
            top_k: setting.routing.router.top_k,
            tokens: setting.step.tokens().to_vec(),
            threads,
            peak_gflops,
            machine,
            modes,
            layers: 1,
            dense: None,
        }
    }

    /// Of several layers, and what else a step does.
    pub(crate) fn with_layers(self, layers: usize, forward: f64, both: Option<f64>) -> Self {
        Self { layers, dense: Some((forward, both)), ..self }
    }

    /// Useful operations of the experts in a forward pass: the same for every mode.
    fn flop(&self, args: &ShapeArgs) -> f64 {
        let tokens: usize = self.tokens.iter().sum();
        2.0 * 3.0 * (self.layers * tokens * self.top_k) as f64 * (args.hidden * args.ffn) as f64
    }

    pub(crate) fn json(&self, shape: &ShapeArgs, run: &RunArgs) -> Value {
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
            "layers": self.layers,
            "dense_forward_seconds": self.dense.map(|(forward, _)| forward),
            "dense_forward_backward_seconds": self.dense.and_then(|(_, both)| both),
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

    pub(crate) fn text(&self, shape: &ShapeArgs) -> String {
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
            let several = self.modes.iter().any(|m| m.lane.how.overlap != self.modes[0].lane.how.overlap);
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
                    m.name(several),
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
    /// Errors when other bytes went over the wire than routing and placement say.
    pub(crate) fn checked(lane: Lane, predicted: Predicted) -> Result<Self> {
        let (sent, expected) = (lane.bytes, predicted.bytes);
        if sent.forward != expected.forward || (lane.both.is_some() && sent.both != expected.both) {
            bail!("{}: sent {sent:?}, predicted {expected:?}: this is a bug", lane.how.mode.name());
        }
        Ok(Self { lane, predicted })
    }

    fn name(&self, with_overlap: bool) -> String {
        let (mode, overlap) = (self.lane.how.mode.name(), self.lane.how.overlap.name());
        if with_overlap { format!("{mode}, overlap {overlap}") } else { mode.to_owned() }
    }

    fn pass(&self, backward: bool) -> Option<(&PassSeconds, &Seconds, u64, Cut)> {
        Some(match backward {
            false => (
                &self.lane.forward,
                &self.predicted.forward,
                self.lane.bytes.forward,
                self.lane.how.parts.forward,
            ),
            true => (
                self.lane.both.as_ref()?,
                self.predicted.both.as_ref()?,
                self.lane.bytes.both,
                self.lane.how.parts.both,
            ),
        })
    }

    fn json(&self, flop: f64) -> Value {
        let gflops = |pass: &PassSeconds, passes: f64| passes * flop / pass.seconds / 1e9;
        let (wire, predicted) = match self.lane.both {
            Some(_) => (self.lane.bytes.both, self.predicted.bytes.both),
            None => (self.lane.bytes.forward, self.predicted.bytes.forward),
        };
        json!({
            "mode": self.lane.how.mode.name(),
            "overlap": self.lane.how.overlap.name(),
            "copies_per_token": self.predicted.copies_per_token,
            "load_max_over_mean": self.predicted.load_max_over_mean,
            "wire_bytes": wire,
            "predicted_wire_bytes": predicted,
            "forward_wire_bytes": self.lane.bytes.forward,
            "interface_bytes": self.lane.interface_bytes.map(|[forward, both]| match self.lane.both {
                Some(_) => both,
                None => forward,
            }),
            "forward_interface_bytes": self.lane.interface_bytes.map(|[forward, _]| forward),
            "forward_seconds": self.lane.forward.seconds,
            "forward_gflops": gflops(&self.lane.forward, 1.0),
            "forward_backward_seconds": self.lane.both.as_ref().map(|b| b.seconds),
            "forward_backward_gflops": self.lane.both.as_ref().map(|b| gflops(b, 3.0)),
            "forward": pass_json(&self.lane.forward, &self.predicted.forward, self.lane.how.parts.forward),
            "forward_backward": self.lane.both.as_ref().zip(self.predicted.both.as_ref())
                .map(|(both, predicted)| pass_json(both, predicted, self.lane.how.parts.both)),
        })
    }
}

/// Mean over ranks of where the time went (the exposed wire is time spent waiting for rows or for slower ranks), and the
/// cost model's.
pub(crate) fn pass_json(pass: &PassSeconds, predicted: &Seconds, cut: Cut) -> Value {
    let p = &pass.phases;
    json!({
        "seconds": pass.seconds,
        "least_seconds": pass.least(),
        "predicted_seconds": predicted.total,
        "parts": cut.parts(),
        "inner_parts_times_as_large": cut.inner(),
        "compute_seconds": p.compute,
        "weight_gradient_seconds": p.weights,
        "exposed_wire_seconds": p.wire,
        "moving_seconds": p.moving,
        "planning_seconds": p.plan,
        "planning_share": p.plan / pass.seconds,
        "predicted": {
            "compute_seconds": predicted.compute,
            "wire_seconds": predicted.wire,
            "exposed_wire_seconds": predicted.exposed,
            "moving_seconds": predicted.moving,
            "planning_seconds": predicted.plan,
        },
        "steps": pass.steps,
    })
}

//! The formula with its numbers, for people.

use super::{Cluster, ExchangeTime, LayerShape, LinkEnd, StepTime};

/// Lines that show how a [`StepTime`] came about: each term of the formula with the numbers that went into it.
pub fn explain(cluster: &Cluster, shape: &LayerShape, step: &StepTime) -> Vec<String> {
    let mut lines = vec![
        format!(
            "{}: {} nodes x {} ranks, exchange {}, {:.0} tokens in the step",
            cluster.name, cluster.nodes, cluster.ranks_per_node, step.exchange, step.tokens
        ),
        format!(
            "row = hidden {} x {} bytes = {}",
            shape.hidden,
            shape.dtype_bytes,
            bytes(shape.hidden as f64 * shape.dtype_bytes)
        ),
    ];
    exchange(&mut lines, "dispatch", cluster, &step.forward.dispatch);
    if let Some(slowest) = step.ranks.get(step.slowest_rank) {
        lines.push(format!(
            "compute = max over ranks of max(flops / FLOP/s, weight bytes / memory bandwidth), rank {}: max({} / {}, {} / {}) = {}",
            step.slowest_rank,
            scaled(slowest.flops, "flop"),
            scaled(cluster.compute.flops_per_s, "FLOP/s"),
            bytes(slowest.weight_bytes),
            scaled(cluster.compute.memory_bandwidth_bytes_per_s, "B/s"),
            seconds(slowest.seconds),
        ));
        lines.push(format!(
            "  flops = 2 x {} matrices x {} x {} x {:.1} pairs; weights of {:.1} experts with a token x {} bytes",
            shape.num_matrices,
            shape.hidden,
            shape.ffn,
            slowest.pairs,
            slowest.experts_touched,
            shape.weight_dtype_bytes
        ));
    }
    exchange(&mut lines, "combine", cluster, &step.forward.combine);
    for (name, pass) in [("forward", &step.forward), ("backward", &step.backward)] {
        lines.push(format!(
            "{name} = dispatch {} + compute {} + combine {} = {}",
            seconds(pass.dispatch.seconds),
            seconds(pass.compute_s),
            seconds(pass.combine.seconds),
            seconds(pass.total_s)
        ));
    }
    lines
}

fn exchange(lines: &mut Vec<String>, name: &str, cluster: &Cluster, time: &ExchangeTime) {
    for step in &time.steps {
        let shared = cluster.inter.is_some_and(|i| i.per == LinkEnd::Node);
        let (level, end) = match (step.between_nodes, shared) {
            (true, true) => ("between nodes", "node"),
            (true, false) => ("between nodes", "rank"),
            (false, _) => ("within a node", "rank"),
        };
        lines.push(format!(
            "{name} {level} = {} x {} peers + {} of {end} {} / {} = {}",
            seconds(step.link.latency_s),
            step.peers,
            bytes(step.busiest_bytes),
            step.busiest,
            scaled(step.link.bandwidth_bytes_per_s, "B/s"),
            seconds(step.seconds)
        ));
    }
}

fn seconds(value: f64) -> String {
    match value {
        v if v >= 1.0 => format!("{v:.3} s"),
        v if v >= 1e-3 => format!("{:.3} ms", v * 1e3),
        v => format!("{:.1} us", v * 1e6),
    }
}

fn bytes(value: f64) -> String {
    scaled(value, "B")
}

fn scaled(value: f64, unit: &str) -> String {
    let prefixes = [(1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")];
    match prefixes.into_iter().find(|&(size, _)| value >= size) {
        Some((size, prefix)) => format!("{:.2} {prefix}{unit}", value / size),
        None => format!("{value:.0} {unit}"),
    }
}

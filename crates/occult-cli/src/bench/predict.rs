//! Bytes and seconds of a mode, from routing and placement alone.

use anyhow::Result;
use occult_moe::predict::{RankBytes, count_bytes, predict_bytes};
use occult_moe::{ExpertParallelLayer, LayerOptions, Mode, TwoLevel};
use occult_plan::cost::{Cluster, Exchange, LayerShape, predict};
use occult_plan::{HomeRanks, LayerPlacement, LayerTraffic, Routing, RoutingBuf};

use super::machine::{Machine, Rates};
use super::setting::Setting;

/// Bytes that leave their rank, all ranks together.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct WireBytes {
    /// Inference.
    pub(crate) forward: u64,
    /// Forward and backward in training.
    pub(crate) both: u64,
}

/// Seconds of one pass by the cost model.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Seconds {
    pub(crate) total: f64,
    pub(crate) plan: f64,
    pub(crate) moving: f64,
    /// The slowest rank (ranks that share cores: the mean).
    pub(crate) compute: f64,
    /// Nothing hidden.
    pub(crate) wire: f64,
}

/// What is known about a mode before it runs.
#[derive(Debug, Clone)]
pub(crate) struct Predicted {
    pub(crate) bytes: WireBytes,
    pub(crate) copies_per_token: f64,
    pub(crate) load_max_over_mean: f64,
    pub(crate) forward: Seconds,
    pub(crate) both: Option<Seconds>,
}

impl Predicted {
    /// Of several layers with other work around them.
    pub(crate) fn times(mut self, layers: usize, forward: f64, both: f64) -> Self {
        self.bytes =
            WireBytes { forward: self.bytes.forward * layers as u64, both: self.bytes.both * layers as u64 };
        let times = |s: Seconds, more: f64| {
            let n = layers as f64;
            let (plan, moving, compute, wire) = (n * s.plan, n * s.moving, n * s.compute, n * s.wire);
            Seconds { total: n * s.total + more, plan, moving, compute, wire }
        };
        self.forward = times(self.forward, forward);
        self.both = self.both.map(|s| times(s, both));
        self
    }
}

/// Parts that a step of a layer is cut into.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Parts {
    pub(crate) forward: usize,
    pub(crate) both: usize,
}

/// Predicts a mode.
pub(crate) fn mode(
    setting: &Setting,
    layer: &ExpertParallelLayer,
    machine: &Machine,
    parts: Parts,
) -> Result<Predicted> {
    let options = layer.options();
    let routing = layer.decide(&setting.routing.logits)?.routing;
    let home = HomeRanks::Blocks { num_rows: routing.num_tokens() };
    let traffic = LayerTraffic::measure(layer.placement(), setting.topology, home, &routing.view()?)?;
    let summary = traffic.summary();
    let small = is_small(setting, options);
    let straight = LayerOptions { two_level: TwoLevel::Off, ..options.clone() };
    let inference = if small { &straight } else { options };
    let placement = layer.placement();
    let bytes = WireBytes {
        forward: forward_bytes(setting, placement, inference, &routing, parts.forward)?,
        both: all_bytes(setting, placement, options, &routing, parts.both)?,
    };
    let levels = inference.has_two_levels();
    let exchange = match options.mode {
        Mode::Conventional => Exchange::PerExpert,
        Mode::Dedup if levels => Exchange::PerNode,
        Mode::Dedup => Exchange::PerRank,
    };
    let shape = LayerShape::gated(setting.hidden, setting.ffn, 4.0);
    let step = predict(&machine.cluster, &shape, &traffic, exchange, None)?;
    let world = setting.world() as f64;
    let pairs = routing.expert_ids.len() as f64 / world;
    let load = if machine.pooled { 1.0 } else { summary.load_max_over_mean };
    let rows = match options.mode {
        Mode::Conventional => traffic.rank_pairs().total(),
        Mode::Dedup => {
            traffic.rank_rows().total() + if levels { traffic.rank_node_rows().total() } else { 0 }
        }
    };
    let row_bytes = rows as f64 * (setting.hidden * 4) as f64 / world;
    let seconds = |rates: &Rates, wire: f64, rounds: usize, parts: usize, pairs_factor: f64| {
        let (plan, moving) = (rates.plan_per_pair * pairs, rates.move_per_byte * row_bytes);
        let again = rates.compute_per_part * (parts.max(1) - 1) as f64;
        let compute = rates.compute_per_pair * pairs * load * pairs_factor + again;
        let wire = wire + latency(&machine.cluster, rounds);
        let (long, short) = (wire.max(compute), wire.min(compute));
        Seconds { total: plan + moving + long + short / parts.max(1) as f64, plan, moving, compute, wire }
    };
    // Unless a part's messages carry their counts, a round of counts precedes; further parts add only latency.
    let rounds =
        |parts: usize, passes: usize, counts: bool| usize::from(counts) + 2 * passes * (parts.max(1) - 1);
    let forward = step.forward.exchange_s();
    Ok(Predicted {
        bytes,
        copies_per_token: summary.copies_per_token,
        load_max_over_mean: summary.load_max_over_mean,
        forward: seconds(&machine.forward, forward, rounds(parts.forward, 1, !small), parts.forward, 1.0),
        both: machine.both.map(|rates| {
            let wire = forward + step.backward.exchange_s();
            seconds(&rates, wire, rounds(parts.both, 2, true), parts.both, 1.0)
        }),
    })
}

/// Whether inference takes the small-batch path.
pub(crate) fn is_small(setting: &Setting, options: &LayerOptions) -> bool {
    setting.step.max_tokens() <= options.small_batch_tokens
}

/// Seconds of so many rounds of all-to-alls that carry next to nothing.
pub(crate) fn latency(cluster: &Cluster, rounds: usize) -> f64 {
    let own = cluster.intra.latency_s * (cluster.ranks_per_node - 1) as f64;
    let others = ((cluster.nodes - 1) * cluster.ranks_per_node) as f64;
    rounds as f64 * (own + cluster.inter.map_or(0.0, |i| i.link.latency_s * others))
}

/// Bytes of the forward pass of all ranks' tokens, in so many parts.
pub(crate) fn forward_bytes(
    setting: &Setting,
    placement: &LayerPlacement,
    options: &LayerOptions,
    routing: &RoutingBuf,
    parts: usize,
) -> Result<u64> {
    let mut sum = 0;
    for_ranks(setting, placement, options, routing, |of| sum += of.forward_wire())?;
    Ok(sum + setting.world() as u64 * count_bytes(options, parts).wire())
}

/// Bytes of forward and backward.
fn all_bytes(
    setting: &Setting,
    placement: &LayerPlacement,
    options: &LayerOptions,
    routing: &RoutingBuf,
    parts: usize,
) -> Result<u64> {
    let mut sum = 0;
    for_ranks(setting, placement, options, routing, |of| sum += of.forward_wire() + of.backward_wire())?;
    Ok(sum + setting.world() as u64 * count_bytes(options, parts).wire())
}

fn for_ranks(
    setting: &Setting,
    placement: &LayerPlacement,
    options: &LayerOptions,
    routing: &RoutingBuf,
    mut each: impl FnMut(RankBytes),
) -> Result<()> {
    let k = routing.top_k;
    for rank in 0..setting.world() {
        let tokens = setting.tokens_of(rank);
        let ids = &routing.expert_ids[tokens.start * k..tokens.end * k];
        let of_rank = Routing::new(routing.num_experts, k, ids)?;
        each(predict_bytes(rank, &of_rank, placement, options, setting.hidden)?);
    }
    Ok(())
}

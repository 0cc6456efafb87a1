//! Bytes and seconds of a mode, from routing and placement alone.

use anyhow::Result;
use occult_moe::predict::{count_bytes, predict_bytes};
use occult_moe::{ExpertParallelLayer, LayerOptions, Mode, TwoLevel};
use occult_plan::cost::{Exchange, LayerShape, predict};
use occult_plan::{HomeRanks, LayerTraffic, Routing, RoutingBuf};

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
    let bytes = bytes(setting, layer, &routing, parts)?;
    let home = HomeRanks::Blocks { num_rows: routing.num_tokens() };
    let traffic = LayerTraffic::measure(layer.placement(), setting.topology, home, &routing.view()?)?;
    let summary = traffic.summary();
    let small = is_small(setting, options);
    let levels = options.has_two_levels() && !small;
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
    let latency = |rounds: usize| {
        let c = &machine.cluster;
        let intra = c.intra.latency_s * (c.ranks_per_node - 1) as f64;
        let inter = c.inter.map_or(0.0, |i| i.link.latency_s * (world as usize - c.ranks_per_node) as f64);
        rounds as f64 * (intra + inter)
    };
    let seconds = |rates: &Rates, wire: f64, rounds: usize, parts: usize, pairs_factor: f64| {
        let (plan, moving) = (rates.plan_per_pair * pairs, rates.move_per_byte * row_bytes);
        let compute = rates.compute_per_pair * pairs * load * pairs_factor;
        let wire = wire + latency(rounds);
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

fn bytes(
    setting: &Setting,
    layer: &ExpertParallelLayer,
    routing: &RoutingBuf,
    parts: Parts,
) -> Result<WireBytes> {
    let options = layer.options();
    let small = is_small(setting, options);
    let straight = LayerOptions { two_level: TwoLevel::Off, ..options.clone() };
    let inference = if small { &straight } else { options };
    let (k, d) = (routing.top_k, setting.hidden);
    let mut sum = WireBytes::default();
    for rank in 0..setting.world() {
        let tokens = setting.tokens_of(rank);
        let ids = &routing.expert_ids[tokens.start * k..tokens.end * k];
        let routing = Routing::new(routing.num_experts, k, ids)?;
        let predicted = |options| predict_bytes(rank, &routing, layer.placement(), options, d);
        let forward = predicted(inference)?;
        let both = predicted(options)?;
        sum.forward += forward.forward_wire() + count_bytes(inference, parts.forward).wire();
        sum.both += both.forward_wire() + both.backward_wire() + count_bytes(options, parts.both).wire();
    }
    Ok(sum)
}

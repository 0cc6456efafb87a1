//! Bytes and seconds of a mode, from routing and placement alone.

use anyhow::Result;
use occult_moe::predict::{RankBytes, count_bytes, predict_bytes};
use occult_moe::{ExpertParallelLayer, LayerOptions, Mode, TwoLevel};
use occult_plan::cost::{
    Cluster, Cut, Exchange, ExchangeStep, LayerShape, PassTime, PassWork, StepTime, Timeline, Within, predict,
};
use occult_plan::{HomeRanks, LayerPlacement, LayerTraffic, Routing, RoutingBuf};

use super::machine::{Load, Machine};
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
    /// What the schedule cannot hide.
    pub(crate) exposed: f64,
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
            Seconds {
                total: n * s.total + more,
                plan: n * s.plan,
                moving: n * s.moving,
                compute: n * s.compute,
                wire: n * s.wire,
                exposed: n * s.exposed,
            }
        };
        self.forward = times(self.forward, forward);
        self.both = self.both.map(|s| times(s, both));
        self
    }
}

/// Parts that a step of a layer is cut into.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Parts {
    pub(crate) forward: Cut,
    pub(crate) both: Cut,
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
    let small = is_small(setting, options);
    let straight = LayerOptions { two_level: TwoLevel::Off, ..options.clone() };
    let inference = if small { &straight } else { options };
    let placement = layer.placement();
    let bytes = WireBytes {
        forward: forward_bytes(setting, placement, inference, &routing, parts.forward.parts())?,
        both: all_bytes(setting, placement, options, &routing, parts.both.parts())?,
    };
    let of_wire = wire_of(setting, placement, inference, &machine.cluster, &routing)?;
    let summary = of_wire.traffic.summary();
    let world = setting.world() as f64;
    let pairs = routing.expert_ids.len() as f64 / world;
    let load = |cut| Load::of(setting, placement, &routing, cut);
    // Unless a part's messages carry their counts, a round of counts precedes.
    let counts = if small { 0.0 } else { latency(&machine.cluster) };
    let [forward_wire, backward_wire] = [&of_wire.step.forward, &of_wire.step.backward];
    let before_s = machine.forward.plan_per_pair * pairs + counts;
    let [compute_s, _] = load(parts.forward).compute_seconds(&machine.forward, machine.pooled);
    let move_s = machine.forward.move_per_byte * of_wire.packed_bytes;
    let work = Work { before_s, move_s, compute_s, after_s: 0.0, shared: machine.pooled };
    let two_levels = inference.has_two_levels();
    let forward = work.with(forward_wire, two_levels, true);
    let forward = Seconds::of(&[forward], parts.forward, before_s - counts);
    let both = machine.both.map(|rates| {
        let plan = rates.plan_per_pair * pairs;
        let [compute_s, after_s] = load(parts.both).compute_seconds(&rates, machine.pooled);
        // Measured together: each pass moves as much and, but for the gradients of weights, computes as much.
        let (move_s, compute_s) = (rates.move_per_byte * of_wire.packed_bytes / 2.0, compute_s / 2.0);
        let before_s = plan + latency(&machine.cluster);
        let forward = Work { before_s, move_s, compute_s, after_s: 0.0, shared: machine.pooled };
        let backward = Work { before_s: 0.0, after_s, ..forward };
        let two_levels = options.has_two_levels();
        let passes =
            [forward.with(forward_wire, two_levels, true), backward.with(backward_wire, two_levels, false)];
        Seconds::of(&passes, parts.both, plan)
    });
    Ok(Predicted {
        bytes,
        copies_per_token: summary.copies_per_token,
        load_max_over_mean: summary.load_max_over_mean,
        forward,
        both,
    })
}

/// What a pass does beside the wire.
#[derive(Clone, Copy)]
struct Work {
    before_s: f64,
    move_s: f64,
    compute_s: f64,
    after_s: f64,
    shared: bool,
}

impl Work {
    /// `counts`: whether a round of counts precedes rows within the node.
    fn with(self, wire: &PassTime, two_levels: bool, counts: bool) -> PassWork {
        let Self { before_s, move_s, compute_s, after_s, shared } = self;
        // Seconds beside latency, and latency.
        let split = |steps: &[ExchangeStep]| {
            let latency: f64 = steps.iter().map(|step| step.link.latency_s * step.peers as f64).sum();
            (steps.iter().map(|step| step.seconds).sum::<f64>() - latency, latency)
        };
        // On two levels the first step is that between nodes.
        let (out, back) = (&wire.dispatch.steps, &wire.combine.steps);
        let first = if two_levels { 1 } else { out.len() };
        let ((out_s, latency_s), (back_s, _)) = (split(&out[..first]), split(&back[..first]));
        let within = two_levels.then(|| {
            let ((out_s, latency_s), (back_s, _)) = (split(&out[first..]), split(&back[first..]));
            Within { out_s, back_s, part_s: (2.0 + f64::from(u8::from(counts))) * latency_s }
        });
        // What the busiest end sends where it gets the most, or gets where it sends.
        let other = |step: &ExchangeStep| {
            let bytes = step.out_bytes[step.busiest].min(step.in_bytes[step.busiest]);
            bytes / step.link.bandwidth_bytes_per_s
        };
        PassWork {
            before_s,
            out_s,
            duplex_s: out[..first].iter().map(other).sum(),
            back_s,
            latency_s,
            move_s,
            compute_s,
            // In `compute_s`, from the experts that each part really has.
            part_s: 0.0,
            after_s,
            within,
            shared,
        }
    }
}

impl Seconds {
    fn of(passes: &[PassWork], cut: Cut, plan: f64) -> Self {
        let timeline = passes.iter().map(|p| p.timeline(cut)).fold(Timeline::default(), |sum, one| sum + one);
        let sum = |of: fn(&PassWork) -> f64| passes.iter().map(of).sum::<f64>();
        Self {
            total: timeline.total_s,
            plan,
            moving: sum(|p| p.move_s),
            compute: sum(|p| p.compute_s + p.after_s),
            wire: passes.iter().map(|p| p.wire_s(cut)).sum(),
            exposed: timeline.exposed_s,
        }
    }
}

/// What the exchanges of a mode carry, and how long the cost model says that takes.
pub(crate) struct OfWire {
    pub(crate) traffic: LayerTraffic,
    pub(crate) step: StepTime,
    /// Of the rows that a rank sends in one exchange (to itself, too), on average.
    pub(crate) packed_bytes: f64,
}

/// Exchanges of the routing of all ranks' tokens.
pub(crate) fn wire_of(
    setting: &Setting,
    placement: &LayerPlacement,
    options: &LayerOptions,
    cluster: &Cluster,
    routing: &RoutingBuf,
) -> Result<OfWire> {
    let home = HomeRanks::Blocks { num_rows: routing.num_tokens() };
    let traffic = LayerTraffic::measure(placement, setting.topology, home, &routing.view()?)?;
    let levels = options.has_two_levels();
    let (exchange, rows) = match options.mode {
        Mode::Conventional => (Exchange::PerExpert, traffic.rank_pairs().total()),
        Mode::Dedup if levels => {
            (Exchange::PerNode, traffic.rank_rows().total() + traffic.rank_node_rows().total())
        }
        Mode::Dedup => (Exchange::PerRank, traffic.rank_rows().total()),
    };
    let shape = LayerShape::gated(setting.hidden, setting.ffn, 4.0);
    let step = predict(cluster, &shape, &traffic, exchange, None)?;
    let packed_bytes = rows as f64 * (setting.hidden * 4) as f64 / setting.world() as f64;
    Ok(OfWire { traffic, step, packed_bytes })
}

/// Whether inference takes the small-batch path.
pub(crate) fn is_small(setting: &Setting, options: &LayerOptions) -> bool {
    setting.step.max_tokens() <= options.small_batch_tokens
}

/// Seconds of an all-to-all that carries next to nothing.
pub(crate) fn latency(cluster: &Cluster) -> f64 {
    let own = cluster.intra.latency_s * (cluster.ranks_per_node - 1) as f64;
    let others = ((cluster.nodes - 1) * cluster.ranks_per_node) as f64;
    own + cluster.inter.map_or(0.0, |i| i.link.latency_s * others)
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

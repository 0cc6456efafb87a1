//! What this machine and its wire can do, measured in the same run by small probes: the numbers of the cost model.

use std::time::{Duration, Instant};

use anyhow::Result;
use occult_comm::{Buffer, Expect};
use occult_kernels::{Threads, peak};
use occult_moe::{Overlap, Pass};
use occult_plan::cost::{Cluster, Compute, Cut, InterLink, Link, LinkEnd};
use occult_plan::{LayerPlacement, Rank, RoutingBuf};

use super::args::ModeName;
use super::experts::Experts;
use super::measure::{PassSeconds, Rows, StepSeconds, forward, forward_backward, median};
use super::predict;
use super::rounds::gather;
use super::setting::Setting;

/// Rounds of the loop of multiply-adds, of some 10 ms each.
const PEAK_ROUNDS: usize = 10;
/// What does not limit.
const UNLIMITED: f64 = 1e15;
const PROBES: usize = 5;
/// Of a step, in the probe of what parts cost.
const PARTS: usize = 4;
/// Rows' worth of time that an expert takes however few it has, at least: tiles of rows that are not full, weights that come
/// from memory. Probes whose steps take nearly the same do not show it.
const LEAST_ROWS: f64 = 3.0;
/// Bytes per peer of the large probe, at least and at most.
const LEAST_BYTES: usize = 1 << 12;
const MOST_BYTES: usize = 8 << 20;
/// The longest that links are left idle before a probe.
const REST: Duration = Duration::from_millis(20);

/// What one pass costs beside the wire, per unit of what it does.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Rates {
    /// Seconds of planning per (token, expert) pair of a rank's own tokens.
    pub(crate) plan_per_pair: f64,
    /// Seconds of packing, unpacking and adding per byte of the rows a rank sends (to itself, too).
    pub(crate) move_per_byte: f64,
    /// Seconds of expert products per (token, expert) pair a rank computes.
    pub(crate) compute_per_pair: f64,
    /// And per expert that has any token in a part of the step: its weights are read.
    pub(crate) compute_per_expert: f64,
    /// Seconds of gradients of the weights per such pair.
    pub(crate) weights_per_pair: f64,
}

/// The same on every rank.
#[derive(Debug, Clone)]
pub(crate) struct Machine {
    /// Its experts as in inference.
    pub(crate) cluster: Cluster,
    /// Experts in either half of training, where it was asked for.
    training: Option<Compute>,
    pub(crate) forward: Rates,
    /// Forward and backward together, where it was asked for.
    pub(crate) both: Option<Rates>,
    /// Ranks share cores: uneven load of ranks then evens out.
    pub(crate) pooled: bool,
}

impl Machine {
    /// What the layer chooses its parts by: expert products cost what they cost in this pass.
    pub(crate) fn cluster_in(&self, pass: Pass) -> Cluster {
        match (pass, &self.training) {
            (Pass::Training, Some(compute)) => Cluster { compute: *compute, ..self.cluster.clone() },
            _ => self.cluster.clone(),
        }
    }
}

/// GFLOP/s of multiply-adds, all ranks at once (collective).
pub(crate) fn peak_gflops(setting: &Setting, threads: &Threads) -> Result<f64> {
    let mut best = 0.0f64;
    for _ in 0..3 {
        setting.comm.barrier("bench peak")?;
        let begin = Instant::now();
        let flop = peak::fma_flop(threads, PEAK_ROUNDS);
        let all = setting.gather(&[flop, begin.elapsed().as_secs_f64()])?;
        let flop: f64 = all.iter().map(|rank| rank[0]).sum();
        let seconds = all.iter().map(|rank| rank[1]).fold(0.0, f64::max);
        best = best.max(flop / seconds.max(1e-9) / 1e9);
    }
    Ok(best)
}

/// When all-to-alls follow each other.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pace {
    AtOnce,
    /// As in a step, where links idle while experts compute: some kinds pass on at once what they could have sent meanwhile.
    Rested,
}

/// Median seconds of the slowest rank for an all-to-all with so many bytes to each peer (collective).
pub(crate) fn exchange_seconds(setting: &Setting, bytes: &[usize], times: usize, pace: Pace) -> Result<f64> {
    let mut seconds: Vec<f64> = Vec::with_capacity(times);
    for _ in 0..times {
        if let (Pace::Rested, Some(&last)) = (pace, seconds.last()) {
            std::thread::sleep(Duration::from_secs_f64(2.0 * last).min(REST));
        }
        let send = Buffer::zeroed::<u8>(bytes.iter().sum());
        setting.comm.barrier("bench probe")?;
        let begin = Instant::now();
        let expect = Expect::Bytes(bytes.to_vec());
        drop(setting.comm.exchange("bench probe", send, bytes, expect)?);
        seconds.push(begin.elapsed().as_secs_f64());
    }
    let all = setting.gather(&seconds)?;
    let slowest = |i: usize| all.iter().map(|rank| rank[i]).fold(0.0, f64::max);
    Ok(median((0..times).map(slowest).collect()))
}

/// The link to the peers that `reach` says, when all ranks send at once.
fn link(setting: &Setting, reach: impl Fn(usize) -> bool) -> Result<Link> {
    let (world, rank) = (setting.world(), setting.comm.rank());
    let peers = (0..world).filter(|&r| r != rank && reach(r)).count();
    if peers == 0 {
        return Ok(Link { bandwidth_bytes_per_s: UNLIMITED, latency_s: 0.0 });
    }
    let bytes =
        |n: usize| -> Vec<usize> { (0..world).map(|r| if r != rank && reach(r) { n } else { 0 }).collect() };
    // What the conventional mode sends, from the rank with most tokens.
    let pairs = setting.step.max_tokens() * setting.routing.router.top_k;
    let large = (pairs * setting.hidden * 4 / world).clamp(LEAST_BYTES, MOST_BYTES);
    let small = exchange_seconds(setting, &bytes(8), 4 * PROBES + 1, Pace::Rested)?;
    let long = exchange_seconds(setting, &bytes(large), PROBES, Pace::Rested)?;
    let bandwidth = (peers * large) as f64 / (long - small).max(long / 100.0);
    Ok(Link { bandwidth_bytes_per_s: bandwidth, latency_s: small / peers as f64 })
}

/// Links between all ranks; what ranks compute with is not known yet (collective).
pub(crate) fn wire(setting: &Setting) -> Result<Cluster> {
    let topology = setting.topology;
    let node = |r: usize| topology.node_of(r as Rank);
    let here = node(setting.comm.rank());
    let intra = link(setting, |r| node(r) == here)?;
    let inter = match topology.num_nodes() {
        1 => None,
        _ => Some(InterLink { link: link(setting, |r| node(r) != here)?, per: LinkEnd::Rank }),
    };
    Ok(Cluster {
        name: "this run".to_owned(),
        nodes: topology.num_nodes(),
        ranks_per_node: topology.ranks_per_node(),
        intra,
        inter,
        compute: Compute { flops_per_s: UNLIMITED, memory_bandwidth_bytes_per_s: UNLIMITED },
    })
}

/// Measures (collective). The layer's own code runs on tokens that placements are made from, so what it costs per token,
/// byte and pair is known before the measured tokens come.
pub(crate) fn machine(
    setting: &Setting,
    experts: &Experts,
    threads: &Threads,
    small_batch: usize,
    backward: bool,
    pooled: bool,
) -> Result<Machine> {
    let mut cluster = wire(setting)?;
    let (tokens, e) = (setting.tokens_of(setting.comm.rank()), setting.routing.router.num_experts);
    let logits = &setting.routing.probe_logits;
    let rows = Rows::new(setting, &logits[tokens.start * e..tokens.end * e])?;
    // The same in several parts: what differs is how often the weights are read.
    let layer = |overlap| {
        setting.layer(ModeName::Dedup, setting.options(ModeName::Dedup, &overlap, small_batch)?, threads)
    };
    let layers = [layer(Overlap::Off)?, layer(Overlap::Chunks(PARTS))?];
    let mut steps: [[Vec<StepSeconds>; 2]; 2] = Default::default();
    for probe in 0..=PROBES {
        for (layer, steps) in layers.iter().zip(&mut steps) {
            let (step, _) = forward(setting, layer, experts, &rows)?;
            if probe > 0 {
                steps[0].push(step);
            }
            if backward {
                let step = forward_backward(setting, layer, experts, &rows)?;
                if probe > 0 {
                    steps[1].push(step);
                }
            }
        }
    }
    let routing = layers[0].decide(logits)?.routing;
    let load = |cut| Load::of(setting, layers[0].placement(), &routing, cut);
    let small = predict::is_small(setting, layers[0].options());
    let (whole, cut) = (load(Cut::WHOLE), load(Cut::even(PARTS)));
    let wire = predict::wire_of(setting, layers[0].placement(), layers[0].options(), &cluster, &routing)?;
    let rates = |pass: usize, cut: &Load, wire: f64| -> Result<Rates> {
        let [one, many] = [gather(setting, &steps[0][pass])?, gather(setting, &steps[1][pass])?];
        Ok(rates(&one, &many, &whole, cut, setting.hidden, pooled.then_some(wire)))
    };
    let forward = rates(0, if small { &whole } else { &cut }, wire.step.forward.exchange_s())?;
    let both = if backward {
        Some(rates(1, &cut, wire.step.forward.exchange_s() + wire.step.backward.exchange_s())?)
    } else {
        None
    };
    let flop = 6.0 * (setting.hidden * setting.ffn) as f64;
    // `passes`: forward and backward are measured together, and taken to be alike.
    let compute = |rates: &Rates, passes: f64| Compute {
        flops_per_s: passes * flop / rates.compute_per_pair.max(1e-15),
        memory_bandwidth_bytes_per_s: passes * flop / 2.0 * 4.0 / rates.compute_per_expert.max(1e-15),
    };
    cluster.compute = compute(&forward, 1.0);
    let training = both.as_ref().map(|rates| compute(rates, 2.0));
    Ok(Machine { cluster, training, forward, both, pooled })
}

/// What a step asks of the ranks.
#[derive(Debug, Clone)]
pub(crate) struct Load {
    /// (token, expert) pairs that each rank computes.
    pub(crate) pairs: Vec<f64>,
    /// Experts with a token in each part, summed over the parts, of each rank.
    pub(crate) experts: Vec<f64>,
    /// (token, rank) pairs.
    copies: f64,
}

impl Load {
    /// Of the routing of all ranks' tokens, each rank's cut into parts.
    pub(crate) fn of(setting: &Setting, placement: &LayerPlacement, routing: &RoutingBuf, cut: Cut) -> Self {
        let (world, k) = (setting.world(), routing.top_k);
        let mut part_of_token = Vec::with_capacity(routing.num_tokens());
        for &tokens in setting.step.tokens() {
            for (part, range) in cut.ranges(tokens).enumerate() {
                part_of_token.extend(std::iter::repeat_n(part, range.len()));
            }
        }
        let mut seen = vec![false; cut.parts() * routing.num_experts];
        let mut load = Self { pairs: vec![0.0; world], experts: vec![0.0; world], copies: 0.0 };
        for (ids, part) in routing.expert_ids.chunks_exact(k).zip(part_of_token) {
            let mut ranks = Vec::with_capacity(k);
            for &id in ids {
                let rank = usize::from(placement.first_rank_of(id));
                load.pairs[rank] += 1.0;
                let seen = &mut seen[part * routing.num_experts + usize::from(id)];
                load.experts[rank] += f64::from(u8::from(!std::mem::replace(seen, true)));
                ranks.push(rank);
            }
            ranks.sort_unstable();
            ranks.dedup();
            load.copies += ranks.len() as f64;
        }
        load
    }

    /// Seconds of the slowest rank's expert products, and of its gradients of weights; of the mean where ranks share cores.
    pub(crate) fn compute_seconds(&self, rates: &Rates, pooled: bool) -> [f64; 2] {
        let ranks = self.pairs.iter().zip(&self.experts).map(|(pairs, experts)| {
            let rows = rates.compute_per_pair * pairs + rates.compute_per_expert * experts;
            [rows, rates.weights_per_pair * pairs]
        });
        if pooled {
            let sum = ranks.fold([0.0; 2], |sum, of| [sum[0] + of[0], sum[1] + of[1]]);
            return sum.map(|seconds| seconds / self.pairs.len() as f64);
        }
        ranks.fold([0.0; 2], |most, of| if of[0] + of[1] > most[0] + most[1] { of } else { most })
    }
}

/// From steps of all ranks `[W][steps]` in one part and in several. `wire`: seconds of the exchanges, where ranks share
/// cores and so everything else is somebody's compute.
fn rates(
    one: &[Vec<StepSeconds>],
    many: &[Vec<StepSeconds>],
    whole: &Load,
    cut: &Load,
    hidden: usize,
    wire: Option<f64>,
) -> Rates {
    let world = one.len() as f64;
    let (pass, parts) = (PassSeconds::of(one), PassSeconds::of(many));
    let (p, sum) = (pass.phases, |values: &[f64]| values.iter().sum::<f64>());
    let (pairs, experts) = (sum(&whole.pairs), sum(&whole.experts));
    // compute = per_pair * pairs + per_expert * experts, twice.
    let more = sum(&cut.experts) - experts;
    // Gradients of weights are made once, however many parts there are.
    let [compute, in_parts] = [p, parts.phases].map(|p| p.compute - p.weights);
    let most = compute * world / experts.max(1.0);
    let per_expert = match more >= 1.0 && pairs >= 2.0 * experts {
        true => ((in_parts - compute) * world / more)
            .clamp((LEAST_ROWS * compute * world / pairs).min(most), most),
        // Hardly more pairs than experts: it is all reading.
        false => most,
    };
    // What no phase says (allocation, autograd's own work) goes with the rows.
    let other = (mean_total(one) - p.plan - p.moving - p.compute - p.wire).max(0.0);
    let counted = p.plan + p.moving + other + p.compute;
    let factor = wire.map_or(1.0, |wire| ((pass.seconds - wire) / counted).max(1.0)) * world;
    Rates {
        plan_per_pair: p.plan * factor / pairs.max(1.0),
        move_per_byte: (p.moving + other) * factor / (whole.copies * (hidden * 4) as f64).max(1.0),
        compute_per_pair: (compute * factor - per_expert * factor / world * experts).max(0.0)
            / pairs.max(1.0),
        compute_per_expert: per_expert * factor / world,
        weights_per_pair: p.weights * factor / pairs.max(1.0),
    }
}

fn mean_total(ranks: &[Vec<StepSeconds>]) -> f64 {
    let steps = ranks.first().map_or(0, Vec::len);
    let one = |i: usize| ranks.iter().map(|rank| rank[i].total).sum::<f64>() / ranks.len() as f64;
    median((0..steps).map(one).collect())
}

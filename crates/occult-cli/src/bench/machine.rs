//! What this machine and its wire can do, measured in the same run by small probes: the numbers of the cost model.

use std::time::Instant;

use anyhow::Result;
use occult_comm::{Buffer, Expect};
use occult_kernels::{Threads, peak};
use occult_moe::{ExpertParallelLayer, Overlap};
use occult_plan::cost::{Cluster, Compute, InterLink, Link, LinkEnd};
use occult_plan::{Rank, RoutingBuf};

use super::args::ModeName;
use super::experts::Experts;
use super::measure::{PassSeconds, Rows, StepSeconds, forward, forward_backward, median};
use super::setting::Setting;

/// Rounds of the loop of multiply-adds, of some 10 ms each.
const PEAK_ROUNDS: usize = 10;
/// What does not limit.
const UNLIMITED: f64 = 1e15;
const PROBES: usize = 5;
/// Parts of the probe that tells what one more part costs, and how often it is taken.
const PROBE_PARTS: usize = 4;
const PART_PROBES: usize = 3;
/// Bytes per peer of the small and the large probe, at least and at most.
const LEAST_BYTES: usize = 1 << 16;
const MOST_BYTES: usize = 8 << 20;

/// What one pass costs beside the wire, per unit of what it does.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Rates {
    /// Seconds of planning per (token, expert) pair of a rank's own tokens.
    pub(crate) plan_per_pair: f64,
    /// Seconds of packing, unpacking and adding per byte of the rows a rank sends (to itself, too).
    pub(crate) move_per_byte: f64,
    /// Seconds of expert products per (token, expert) pair a rank computes.
    pub(crate) compute_per_pair: f64,
    /// Seconds of expert products for every further part that a step is cut into: weights are read again.
    pub(crate) compute_per_part: f64,
}

/// The same on every rank.
#[derive(Debug, Clone)]
pub(crate) struct Machine {
    pub(crate) cluster: Cluster,
    pub(crate) forward: Rates,
    /// Forward and backward together, where it was asked for.
    pub(crate) both: Option<Rates>,
    /// Ranks share cores: uneven load of ranks then evens out.
    pub(crate) pooled: bool,
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

/// Median seconds of the slowest rank for an all-to-all with so many bytes to each peer (collective).
pub(crate) fn exchange_seconds(setting: &Setting, bytes: &[usize], times: usize) -> Result<f64> {
    let mut seconds = Vec::with_capacity(times);
    for _ in 0..times {
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
    let pairs = setting.routing.chosen.expert_ids.len();
    let large = (pairs * setting.hidden * 4 / (world * world)).clamp(LEAST_BYTES, MOST_BYTES);
    let small = exchange_seconds(setting, &bytes(8), 4 * PROBES + 1)?;
    let long = exchange_seconds(setting, &bytes(large), PROBES)?;
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
    let logits = &setting.routing.probe_logits[tokens.start * e..tokens.end * e];
    let rows = Rows::new(setting, logits)?;
    let probe = |overlap, times| -> Result<(ExpertParallelLayer, [Vec<StepSeconds>; 2])> {
        let options = setting.options(ModeName::Dedup, &overlap, small_batch);
        let layer = setting.layer(ModeName::Dedup, options, threads)?;
        let mut steps: [Vec<StepSeconds>; 2] = Default::default();
        for probe in 0..=times {
            let (step, _) = forward(setting, &layer, experts, &rows)?;
            if probe > 0 {
                steps[0].push(step);
            }
            if backward {
                let step = forward_backward(setting, &layer, experts, &rows)?;
                if probe > 0 {
                    steps[1].push(step);
                }
            }
        }
        Ok((layer, steps))
    };
    let (layer, steps) = probe(Overlap::Off, PROBES)?;
    let decision = layer.decide(logits)?;
    let (_, in_parts) = probe(Overlap::Chunks(PROBE_PARTS), PART_PROBES)?;
    let work = Work::of(setting, &layer, &decision.routing)?;
    let forward = rates(setting, &steps[0], &in_parts[0], work)?;
    let both = if backward { Some(rates(setting, &steps[1], &in_parts[1], work)?) } else { None };
    let (d, f, e) = (setting.hidden as f64, setting.ffn as f64, setting.routing.router.num_experts as f64);
    cluster.compute.flops_per_s = 6.0 * d * f / forward.compute_per_pair.max(1e-15);
    // As the cost model has it: one more part reads all weights of a rank again.
    let weight_bytes = 3.0 * d * f * 4.0 * e / setting.world() as f64;
    let per_part = forward.compute_per_part.max(weight_bytes / UNLIMITED);
    cluster.compute.memory_bandwidth_bytes_per_s = weight_bytes / per_part;
    Ok(Machine { cluster, forward, both, pooled })
}

/// What all ranks do in a step.
#[derive(Debug, Clone, Copy)]
struct Work {
    pairs: f64,
    row_bytes: f64,
}

impl Work {
    fn of(setting: &Setting, layer: &ExpertParallelLayer, routing: &RoutingBuf) -> Result<Self> {
        let mut copies = 0;
        for ids in routing.expert_ids.chunks_exact(routing.top_k) {
            let mut ranks: Vec<Rank> = ids.iter().map(|&id| layer.placement().first_rank_of(id)).collect();
            ranks.sort_unstable();
            ranks.dedup();
            copies += ranks.len();
        }
        let all = setting.gather(&[routing.expert_ids.len() as f64, copies as f64])?;
        let sum = |i: usize| all.iter().map(|rank| rank[i]).sum::<f64>();
        Ok(Self { pairs: sum(0), row_bytes: sum(1) * (setting.hidden * 4) as f64 })
    }
}

fn rates(setting: &Setting, steps: &[StepSeconds], in_parts: &[StepSeconds], work: Work) -> Result<Rates> {
    let gather = |steps: &[StepSeconds]| -> Result<Vec<Vec<StepSeconds>>> {
        let figures: Vec<f64> = steps.iter().flat_map(StepSeconds::figures).collect();
        let all = setting.gather(&figures)?;
        let of = |rank: &Vec<f64>| {
            rank.chunks_exact(StepSeconds::FIGURES).map(StepSeconds::from_figures).collect()
        };
        Ok(all.iter().map(of).collect())
    };
    let ranks = gather(steps)?;
    let pass = PassSeconds::of(&ranks);
    let (p, world) = (pass.phases, setting.world() as f64);
    let more = PassSeconds::of(&gather(in_parts)?).phases.compute - p.compute;
    // What no phase says (allocation, autograd's own work) goes with the rows.
    let other = (mean_total(&ranks) - p.plan - p.moving - p.compute - p.wire).max(0.0);
    Ok(Rates {
        plan_per_pair: p.plan * world / work.pairs,
        move_per_byte: (p.moving + other) * world / work.row_bytes,
        compute_per_pair: p.compute * world / work.pairs,
        compute_per_part: (more / (PROBE_PARTS - 1) as f64).max(0.0),
    })
}

fn mean_total(ranks: &[Vec<StepSeconds>]) -> f64 {
    let steps = ranks.first().map_or(0, Vec::len);
    let one = |i: usize| ranks.iter().map(|rank| rank[i].total).sum::<f64>() / ranks.len() as f64;
    median((0..steps).map(one).collect())
}

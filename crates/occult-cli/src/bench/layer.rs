//! `occult bench layer`: one layer's steps under every mode.

use anyhow::Result;
use occult_kernels::Threads;
use occult_kernels::smm::ExpertDims;
use occult_moe::ExpertParallelLayer;
use occult_plan::cost::Cut;

use super::args::{BenchLayerArgs, RunArgs, ShapeArgs};
use super::experts::Experts;
use super::machine::{Machine, machine, peak_gflops};
use super::measure::{Rows, forward, forward_backward};
use super::predict::{self, Parts};
use super::random::Random;
use super::report::{Measured, Outcome};
use super::rounds::{How, Pass, rounds};
use super::setting::{Setting, check, routing_of};
use crate::output::{print, print_json};
use crate::setup;
use crate::world::run_world;

pub(crate) fn run(args: &BenchLayerArgs) -> Result<()> {
    check(&args.shape)?;
    let routing = routing_of(&args.shape)?;
    let outcome = run_world(&args.shape.world, |comm| {
        measure(&Setting::new(comm, &args.shape, routing.clone())?, &args.shape, &args.run)
    })?;
    let Some(outcome) = outcome else { return Ok(()) };
    if args.shape.json {
        return print_json(&outcome.json(&args.shape, &args.run));
    }
    print(&outcome.text(&args.shape))
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

/// The layer of every lane, and how its steps are cut.
pub(crate) fn layers(
    setting: &Setting,
    args: &ShapeArgs,
    run: &RunArgs,
    machine: &Machine,
    threads: &Threads,
) -> Result<Vec<(ExpertParallelLayer, How)>> {
    let lanes = run.lanes(&args.modes);
    let layers = lanes.into_iter().map(|(mode, overlap)| {
        let options = setting.options(mode, &run.overlap(overlap, machine), run.small_batch)?;
        let layer = setting.layer(mode, options, threads)?;
        let tokens = setting.step.tokens()[setting.comm.rank()];
        let (d, f, step) = (setting.hidden, setting.ffn, Some(&setting.step));
        let both = layer.cut(tokens, d, f, step, occult_moe::Pass::Training)?;
        let forward = match predict::is_small(setting, layer.options()) {
            true => Cut::WHOLE,
            false => layer.cut(tokens, d, f, step, occult_moe::Pass::Inference)?,
        };
        Ok((layer, How { mode, overlap, parts: Parts { forward, both } }))
    });
    layers.collect()
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
    let layers = layers(setting, args, run, &machine, &threads)?;
    let rows = Rows::new(setting, setting.logits_of(rank))?;
    let hows: Vec<How> = layers.iter().map(|(_, how)| *how).collect();
    let lanes = rounds(setting, &hows, args, run.backward, |i, pass| match pass {
        Pass::Forward => forward(setting, &layers[i].0, &experts, &rows).map(|(seconds, _)| seconds),
        Pass::Both => forward_backward(setting, &layers[i].0, &experts, &rows),
    })?;
    let after = peak_gflops(setting, &threads)?;
    let mut measured = Vec::with_capacity(lanes.len());
    for (lane, (layer, how)) in lanes.into_iter().zip(&layers) {
        let predicted = predict::mode(setting, layer, &machine, how.parts)?;
        measured.push(Measured::checked(lane, predicted)?);
    }
    Ok(Outcome::new(setting, threads.count(), before.max(after), machine, measured))
}

//! `occult bench layer`: one layer's steps under every mode.

use anyhow::Result;
use occult_kernels::Threads;
use occult_kernels::smm::ExpertDims;
use occult_moe::{ExpertParallelLayer, Pass};
use occult_plan::cost::Cut;

use super::args::{BenchLayerArgs, RunArgs, ShapeArgs};
use super::experts::Experts;
use super::machine::{Machine, machine, peak_gflops};
use super::measure::{Rows, forward, forward_backward};
use super::predict::{self, Parts};
use super::random::Random;
use super::report::{Measured, Outcome};
use super::rounds::{How, rounds};
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

/// A mode with an overlap: its layer for each pass (what parts cost differs), and how its steps are cut.
pub(crate) struct LaneLayers {
    pub(crate) how: How,
    inference: ExpertParallelLayer,
    training: ExpertParallelLayer,
}

impl LaneLayers {
    pub(crate) fn layer(&self, pass: Pass) -> &ExpertParallelLayer {
        match pass {
            Pass::Inference => &self.inference,
            Pass::Training => &self.training,
        }
    }
}

/// The layers of every lane.
pub(crate) fn layers(
    setting: &Setting,
    args: &ShapeArgs,
    run: &RunArgs,
    machine: &Machine,
    threads: &Threads,
) -> Result<Vec<LaneLayers>> {
    let tokens = setting.step.tokens()[setting.comm.rank()];
    let lanes = run.lanes(&args.modes).into_iter().map(|(mode, overlap)| {
        let layer = |pass| {
            let options = setting.options(mode, &run.overlap(overlap, machine, pass), run.small_batch)?;
            setting.layer(mode, options, threads)
        };
        let (inference, training) = (layer(Pass::Inference)?, layer(Pass::Training)?);
        let cut = |layer: &ExpertParallelLayer, pass| {
            layer.cut(tokens, setting.hidden, setting.ffn, Some(&setting.step), pass)
        };
        let forward = match predict::is_small(setting, inference.options()) {
            true => Cut::WHOLE,
            false => cut(&inference, Pass::Inference)?,
        };
        let parts = Parts { forward, both: cut(&training, Pass::Training)? };
        Ok(LaneLayers { how: How { mode, overlap, parts }, inference, training })
    });
    lanes.collect()
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
    let hows: Vec<How> = layers.iter().map(|lane| lane.how).collect();
    let lanes = rounds(setting, &hows, args, run.backward, |i, pass| {
        let layer = layers[i].layer(pass);
        match pass {
            Pass::Inference => forward(setting, layer, &experts, &rows).map(|(seconds, _)| seconds),
            Pass::Training => forward_backward(setting, layer, &experts, &rows),
        }
    })?;
    let after = peak_gflops(setting, &threads)?;
    let mut measured = Vec::with_capacity(lanes.len());
    for (lane, of) in lanes.into_iter().zip(&layers) {
        let predicted = predict::mode(setting, of.layer(Pass::Inference), &machine, of.how.parts)?;
        measured.push(Measured::checked(lane, predicted)?);
    }
    Ok(Outcome::new(setting, threads.count(), before.max(after), machine, measured))
}

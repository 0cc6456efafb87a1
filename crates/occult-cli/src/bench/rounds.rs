//! Lanes (a mode with an overlap) that take turns.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use occult_moe::Pass;

use super::args::{ModeName, OverlapArg, ShapeArgs};
use super::measure::{PassSeconds, StepSeconds};
use super::predict::{Parts, WireBytes};
use super::setting::Setting;

/// How a lane runs.
#[derive(Debug, Clone, Copy)]
pub(crate) struct How {
    pub(crate) mode: ModeName,
    pub(crate) overlap: OverlapArg,
    pub(crate) parts: Parts,
}

/// What was seen of one lane.
#[derive(Debug, Clone)]
pub(crate) struct Lane {
    pub(crate) how: How,
    /// Of the layers' own exchanges, all ranks.
    pub(crate) bytes: WireBytes,
    /// What the interfaces of all ranks' hosts sent in a forward and in a training step, on average.
    pub(crate) interface_bytes: Option<[f64; 2]>,
    pub(crate) forward: PassSeconds,
    pub(crate) both: Option<PassSeconds>,
}

/// Runs `reps` rounds of every lane (and one before that is not timed, in which bytes are counted): `step(lane, pass)` is a
/// step of this rank, begun when all ranks are there. Collective.
pub(crate) fn rounds(
    setting: &Setting,
    modes: &[How],
    args: &ShapeArgs,
    backward: bool,
    mut step: impl FnMut(usize, Pass) -> Result<StepSeconds>,
) -> Result<Vec<Lane>> {
    let passes: &[Pass] = if backward { &[Pass::Inference, Pass::Training] } else { &[Pass::Inference] };
    let mut bytes = vec![WireBytes::default(); modes.len()];
    let mut steps = vec![[Vec::new(), Vec::new()]; modes.len()];
    let mut left = vec![[0u64; 2]; modes.len()];
    let interface = args.interface.as_deref();
    for round in 0..=args.reps {
        for i in 0..modes.len() {
            let i = if round % 2 == 0 { i } else { modes.len() - 1 - i };
            for &pass in passes {
                setting.meter.reset();
                let before = interface.map(bytes_sent).transpose()?;
                let seconds = step(i, pass)?;
                if round > 0 {
                    steps[i][pass as usize].push(seconds);
                    if let (Some(interface), Some(before)) = (interface, before) {
                        // The others have what this rank sent.
                        setting.comm.barrier("bench interface")?;
                        left[i][pass as usize] += bytes_sent(interface)?.saturating_sub(before);
                    }
                    continue;
                }
                let sent = sent(setting)?;
                match pass {
                    Pass::Inference => bytes[i].forward = sent,
                    Pass::Training => bytes[i].both = sent,
                }
            }
        }
    }
    let mut lanes = Vec::with_capacity(modes.len());
    // Ranks of one host share its interface: one of them answers for it.
    let hosts = setting.comm.host_of_rank();
    let (rank, steps_of) = (setting.comm.rank(), args.reps.max(1) as f64);
    let first = !hosts[..rank].contains(&hosts[rank]);
    for (((&how, bytes), [forward, both]), left) in modes.iter().zip(bytes).zip(steps).zip(left) {
        let mine = left.map(|n| if first { n as f64 / steps_of } else { 0.0 });
        let interface_bytes = match interface {
            None => None,
            Some(_) => {
                let all = setting.gather(&mine)?;
                Some([0, 1].map(|pass: usize| all.iter().map(|rank| rank[pass]).sum()))
            }
        };
        let forward = PassSeconds::of(&gather(setting, &forward)?);
        let both = if backward { Some(PassSeconds::of(&gather(setting, &both)?)) } else { None };
        lanes.push(Lane { how, bytes, interface_bytes, forward, both });
    }
    Ok(lanes)
}

/// What an interface has sent since it came up.
fn bytes_sent(interface: &str) -> Result<u64> {
    let path = Path::new("/sys/class/net").join(interface).join("statistics/tx_bytes");
    let text = fs::read_to_string(&path).with_context(|| format!("--interface: {}", path.display()))?;
    text.trim().parse().with_context(|| format!("{}: expected a number, found {text:?}", path.display()))
}

/// Bytes of the layers' own exchanges that left their rank since the meter was reset, all ranks (collective).
pub(crate) fn sent(setting: &Setting) -> Result<u64> {
    let snapshot = setting.meter.reset();
    let wire: u64 = crate::sent::exchanges(&snapshot).map(|(_, bytes)| bytes).sum();
    Ok(setting.gather(&[wire as f64])?.iter().map(|rank| rank[0] as u64).sum())
}

/// Every rank's steps, by rank (collective).
pub(crate) fn gather(setting: &Setting, mine: &[StepSeconds]) -> Result<Vec<Vec<StepSeconds>>> {
    let figures: Vec<f64> = mine.iter().flat_map(StepSeconds::figures).collect();
    let steps = |rank: &Vec<f64>| {
        rank.chunks_exact(StepSeconds::FIGURES).map(StepSeconds::from_figures).collect::<Vec<_>>()
    };
    Ok(setting.gather(&figures)?.iter().map(steps).collect())
}

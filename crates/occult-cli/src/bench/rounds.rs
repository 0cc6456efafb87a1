//! Modes that take turns.

use anyhow::Result;

use super::args::ModeName;
use super::measure::{PassSeconds, StepSeconds};
use super::predict::{Parts, WireBytes};
use super::setting::Setting;

/// Which pass of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pass {
    /// Inference.
    Forward,
    /// Training: forward and backward.
    Both,
}

/// What was seen of one mode.
#[derive(Debug, Clone)]
pub(crate) struct Lane {
    pub(crate) mode: ModeName,
    pub(crate) parts: Parts,
    /// Of the layers' own exchanges, all ranks.
    pub(crate) bytes: WireBytes,
    pub(crate) forward: PassSeconds,
    pub(crate) both: Option<PassSeconds>,
}

/// Runs `reps` rounds of every mode (and one before that is not timed, in which bytes are counted): `step(mode, pass)` is a
/// step of this rank, begun when all ranks are there. Collective.
pub(crate) fn rounds(
    setting: &Setting,
    modes: &[(ModeName, Parts)],
    reps: usize,
    backward: bool,
    mut step: impl FnMut(usize, Pass) -> Result<StepSeconds>,
) -> Result<Vec<Lane>> {
    let passes: &[Pass] = if backward { &[Pass::Forward, Pass::Both] } else { &[Pass::Forward] };
    let mut bytes = vec![WireBytes::default(); modes.len()];
    let mut steps = vec![[Vec::new(), Vec::new()]; modes.len()];
    for round in 0..=reps {
        for i in 0..modes.len() {
            let i = if round % 2 == 0 { i } else { modes.len() - 1 - i };
            for &pass in passes {
                setting.meter.reset();
                let seconds = step(i, pass)?;
                if round > 0 {
                    steps[i][pass as usize].push(seconds);
                    continue;
                }
                let sent = sent(setting)?;
                match pass {
                    Pass::Forward => bytes[i].forward = sent,
                    Pass::Both => bytes[i].both = sent,
                }
            }
        }
    }
    let mut lanes = Vec::with_capacity(modes.len());
    for ((&(mode, parts), bytes), [forward, both]) in modes.iter().zip(bytes).zip(steps) {
        let forward = PassSeconds::of(&gather(setting, &forward)?);
        let both = if backward { Some(PassSeconds::of(&gather(setting, &both)?)) } else { None };
        lanes.push(Lane { mode, parts, bytes, forward, both });
    }
    Ok(lanes)
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

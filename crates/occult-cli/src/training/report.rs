//! The log of a run as the training section of a report.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Result, bail};
use occult_train::log::{self, Entry};

use crate::report::{Training, TrainingPoint};

/// Most points of a curve: more cannot be told apart on a page.
const POINTS: usize = 400;
const HELD_OUT: &str = "val_loss/";

/// Reads the log under an output directory, or under its folder `training`.
pub(crate) fn read(dir: &Path) -> Result<Training> {
    let places = [dir.join("training/log.jsonl"), dir.join("log.jsonl")];
    let Some(path) = places.iter().find(|p| p.is_file()) else {
        bail!("{}: has no training log (training/log.jsonl)", dir.display());
    };
    let entries = log::read(path)?;
    if entries.is_empty() {
        bail!("{}: has no steps", path.display());
    }
    Ok(training(&entries))
}

/// At most [`POINTS`] points, each the mean of equally many steps in a row.
fn training(entries: &[Entry]) -> Training {
    let names =
        |e: &Entry| e.figures.keys().filter_map(|k| Some(k.strip_prefix(HELD_OUT)?.to_owned())).collect();
    let domains: Vec<String> = entries
        .iter()
        .flat_map(|e| -> Vec<String> { names(e) })
        .collect::<BTreeSet<_>>()
        .into_iter()
        .collect();
    let each = entries.len().div_ceil(POINTS);
    Training {
        steps: entries.last().map_or(0, |e| e.step),
        tokens: entries.iter().map(|e| e.tokens).sum(),
        points: entries.chunks(each).map(|steps| point(steps, &domains)).collect(),
        domains,
    }
}

fn point(steps: &[Entry], domains: &[String]) -> TrainingPoint {
    let mean = |of: &dyn Fn(&Entry) -> Option<f64>| {
        let values: Vec<f64> = steps.iter().filter_map(of).collect();
        (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
    };
    let figure = |name: &'static str| mean(&|e| e.figures.get(name).copied());
    let held_out: Vec<Option<f64>> = domains
        .iter()
        .map(|d| steps.iter().rev().find_map(|e| e.figures.get(&format!("{HELD_OUT}{d}")).copied()))
        .collect();
    let last = steps.last();
    TrainingPoint {
        step: last.map_or(0, |e| e.step),
        loss: mean(&|e| e.loss),
        held_out: if held_out.iter().any(Option::is_some) { held_out } else { vec![] },
        copies_per_token: figure("C_T"),
        copies_unlimited: figure("C_T_unlimited"),
        drift: figure("C_T_drift"),
        load_max_over_mean: figure("rank_load"),
        balancedness: figure("balancedness"),
        limit: last.and_then(|e| e.limit).map(|n| n as u32),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(step: u64) -> Entry {
        let mut figures = std::collections::BTreeMap::from([("C_T".to_owned(), step as f64)]);
        if step.is_multiple_of(100) {
            figures.insert("val_loss".into(), 9.0);
            figures.insert("val_loss/prose".into(), step as f64 / 100.0);
        }
        Entry {
            step,
            loss: (step != 3).then_some(step as f64),
            lr: 1e-3,
            grad_norm: Some(1.0),
            skipped: step == 3,
            tokens: 10,
            tokens_per_s: 1.0,
            limit: Some(2),
            figures,
            warning: None,
        }
    }

    #[test]
    fn a_long_run_becomes_means_of_equally_many_steps() {
        let entries: Vec<Entry> = (1..=900).map(entry).collect();
        let found = training(&entries);
        assert_eq!((found.steps, found.tokens, found.points.len()), (900, 9000, 300));
        assert_eq!(found.domains, ["prose"]);
        // Steps 1, 2 and 3, of which the last has no loss.
        let first = &found.points[0];
        assert_eq!((first.step, first.loss, first.copies_per_token), (3, Some(1.5), Some(2.0)));
        assert_eq!((first.limit, first.drift, first.held_out.len()), (Some(2), None, 0));
        // Steps 199, 200 and 201.
        assert_eq!((found.points[66].step, &found.points[66].held_out), (201, &vec![Some(2.0)]));
        let short = training(&entries[..5]);
        assert_eq!((short.points.len(), short.points[2].loss), (5, None));
    }
}

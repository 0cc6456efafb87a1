//! C2R data as JSON: `{"base": [[[..]]], ..}` with co-activation counts `[layers][E][E]` of each pruning level, or
//! `{"layers": L, "experts": E, "rank": [[[..]]]}` with, for every expert, all experts by descending co-activation.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use occult_plan::CoActivation;
use serde::Deserialize;

use super::{ImportOptions, Layout, Sink};
use crate::error::{FormatError, Result};
use crate::{MAX_EXPERTS, MAX_LAYERS};

/// `[layers][E][E]`.
type Cube = Vec<Vec<Vec<i64>>>;

#[derive(Deserialize)]
#[serde(untagged)]
enum Json {
    Order { layers: usize, experts: usize, rank: Cube },
    Counts(BTreeMap<String, Cube>),
}

pub(crate) fn read(inputs: &[PathBuf], options: &ImportOptions, sink: &mut Sink<'_>) -> Result<()> {
    let [path] = inputs else {
        return Err(FormatError::Request(format!("expected one C2R file, found {}", inputs.len())));
    };
    let value: serde_json::Value = crate::io::read_json(path)?;
    let json = serde_json::from_value(value).map_err(|_| {
        let message = "expected {name: counts [layers][experts][experts]} or {layers, experts, rank}";
        FormatError::bad(path, "", message)
    })?;
    match json {
        Json::Order { layers, experts, rank } => {
            if rank.len() != layers || rank.first().is_some_and(|l| l.len() != experts) {
                let message = format!("says {layers} layers of {experts} experts, `rank` is something else");
                return Err(FormatError::bad(path, "", message));
            }
            write_order(path, rank, options, sink)
        }
        Json::Counts(mut variants) => {
            let names: Vec<String> = variants.keys().cloned().collect();
            let section = options.section.clone().unwrap_or_else(|| "base".to_owned());
            let cube = variants.remove(&section).ok_or_else(|| {
                let message = format!("has no section {section:?}; it has {}", names.join(", "));
                FormatError::bad(path, "", message)
            })?;
            if names.len() > 1 && options.section.is_none() {
                sink.warn(format!("the file holds {}: {section} was read", names.join(", ")));
            }
            write_counts(path, cube, options, sink)
        }
    }
}

/// `[layers][E][width]` with the same `E` everywhere; returns `E`.
fn check(path: &Path, cube: &Cube, widths: impl Fn(usize) -> [usize; 2]) -> Result<usize> {
    let experts = cube.first().map_or(0, Vec::len);
    if cube.is_empty() || cube.len() > MAX_LAYERS || !(2..=MAX_EXPERTS).contains(&experts) {
        let message = format!("has {} layers of {experts} experts", cube.len());
        return Err(FormatError::bad(path, "", message));
    }
    for (layer, rows) in cube.iter().enumerate() {
        let wrong = rows.iter().position(|r| !widths(experts).contains(&r.len()));
        if rows.len() != experts || wrong.is_some() {
            let message = format!("row {}: expected {experts} x {experts} values", wrong.unwrap_or(0));
            return Err(FormatError::bad(path, format!("layer {layer}"), message));
        }
    }
    Ok(experts)
}

/// Co-activation counts. A token that chose k experts adds one to k - 1 entries of each of their rows, so an expert's
/// tokens are its row's sum over k - 1. Shared with the pickle form of the same data.
pub(crate) fn write_counts(
    path: &Path,
    cube: Vec<Vec<Vec<i64>>>,
    options: &ImportOptions,
    sink: &mut Sink<'_>,
) -> Result<()> {
    let experts = check(path, &cube, |e| [e, e])?;
    let top_k = options.top_k.unwrap_or(2);
    if top_k < 2 || top_k > experts {
        return Err(FormatError::Request(format!("top_k is {top_k}, expected 2 to {experts}")));
    }
    if options.top_k.is_none() {
        sink.warn("co-activation counts do not say top_k: 2 was assumed (`--top-k K` to change it)");
    }
    let layer_ids = (0..cube.len() as u32).collect();
    sink.begin(Layout { num_experts: experts, top_k: Some(top_k), layer_ids, ..Layout::default() })?;
    sink.note("tokens per expert are sums of co-activation rows over (top_k - 1)");
    let mut rounded = false;
    for (layer, rows) in cube.iter().enumerate() {
        let mut pairs = Vec::with_capacity(experts * experts);
        let mut counts = Vec::with_capacity(experts);
        for (i, row) in rows.iter().enumerate() {
            let mut sum = 0_u64;
            for (j, &count) in row.iter().enumerate() {
                // The diagonal is -1 or 0 and means nothing.
                let count = if i == j { 0 } else { count };
                let bad = || {
                    let message = format!("row {i}: count {count} with expert {j} is negative or too large");
                    FormatError::bad(path, format!("layer {layer}"), message)
                };
                let count = u64::try_from(count).map_err(|_| bad())?;
                sum = sum.checked_add(count).ok_or_else(bad)?;
                pairs.push(count);
            }
            rounded |= !sum.is_multiple_of(top_k as u64 - 1);
            counts.push(sum / (top_k as u64 - 1));
        }
        let graph =
            CoActivation::from_counts(experts, pairs).map_err(|e| FormatError::plan(path, layer, 0, e))?;
        sink.set_counts(path, layer, counts, Some(graph))?;
    }
    if rounded {
        sink.warn(format!("row sums are no multiples of {}: top_k may be another number", top_k - 1));
    }
    sink.progress(1, 1);
    Ok(())
}

/// Collaborator lists `[layers][E][E or E-1]`; an expert in its own list is left out. Shared with the pickle form.
pub(crate) fn write_order(
    path: &Path,
    cube: Vec<Vec<Vec<i64>>>,
    options: &ImportOptions,
    sink: &mut Sink<'_>,
) -> Result<()> {
    let experts = check(path, &cube, |e| [e, e - 1])?;
    let layer_ids = (0..cube.len() as u32).collect();
    sink.begin(Layout { num_experts: experts, top_k: options.top_k, layer_ids, ..Layout::default() })?;
    for (layer, rows) in cube.iter().enumerate() {
        let mut order = Vec::with_capacity(experts * (experts - 1));
        for (i, row) in rows.iter().enumerate() {
            for &id in row.iter().filter(|&&id| id != i as i64) {
                let known = u16::try_from(id).ok().filter(|&id| usize::from(id) < experts);
                order.push(known.ok_or_else(|| {
                    let error = occult_plan::PlanError::ExpertOutOfRange { row: i, id, num_experts: experts };
                    FormatError::plan(path, layer, 0, error)
                })?);
            }
        }
        sink.set_order(path, layer, order)?;
    }
    sink.progress(1, 1);
    Ok(())
}

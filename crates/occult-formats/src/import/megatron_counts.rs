//! Megatron's tokens-per-expert log (`--save-tokens-per-experts-interval`): `tokens_per_expert/rank{r}.jsonl`, lines
//! `{"iter": 100, "block": "decoder", "layer": 3, "tpe": [[128, 64], [96, 80]]}` with the tokens of that rank's local experts
//! in each micro-batch.
//!
//! The files do not say which experts a rank holds. If each rank logs all experts, the counts of all ranks are added up; if the local lists of the ranks, in order of rank, make up all experts, they are joined; anything else is an
//! error.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::lines::{Lines, expand};
use super::{ImportOptions, Layout, Sink};
use crate::error::{FormatError, Result};
use crate::{MAX_EXPERTS, MAX_LAYERS};

#[derive(Deserialize)]
struct Record {
    #[serde(default)]
    block: Option<String>,
    layer: u32,
    tpe: Vec<Vec<u64>>,
}

pub(super) fn is_log_name(name: &str) -> bool {
    name.starts_with("rank") && name.ends_with(".jsonl")
}

pub(crate) fn read(inputs: &[PathBuf], options: &ImportOptions, sink: &mut Sink<'_>) -> Result<()> {
    let files = expand(inputs, &is_log_name, "rank*.jsonl")?;
    let mut layers: BTreeMap<u32, Vec<Vec<u64>>> = BTreeMap::new();
    let mut skipped = 0_u64;
    for path in &files {
        for (layer, counts) in local_counts(path, &mut skipped)? {
            layers.entry(layer).or_default().push(counts);
        }
    }
    let first = files.first().map(PathBuf::as_path).unwrap_or(Path::new(""));
    if layers.is_empty() || layers.len() > MAX_LAYERS {
        let message = format!("holds {} decoder layers, expected 1 to {MAX_LAYERS}", layers.len());
        return Err(FormatError::bad(first, "", message));
    }
    let num_experts = options.num_experts.ok_or_else(|| {
        FormatError::bad(first, "", "the log does not say the number of experts: give it (`--experts N`)")
    })?;
    let mut totals = Vec::new();
    for (layer, ranks) in &layers {
        totals.push(
            join(num_experts, ranks)
                .map_err(|m| FormatError::bad(first, format!("model layer {layer}"), m))?,
        );
    }
    if skipped > 0 {
        sink.warn(format!("{skipped} records of multi-token prediction layers were left out"));
    }
    let layer_ids = layers.keys().copied().collect();
    sink.begin(Layout { num_experts, top_k: options.top_k, layer_ids, ..Layout::default() })?;
    for (layer, counts) in totals.into_iter().enumerate() {
        sink.set_counts(first, layer, counts, None)?;
    }
    sink.progress(1, 1);
    Ok(())
}

/// Tokens per local expert and layer, added over iterations and micro-batches.
fn local_counts(path: &Path, skipped: &mut u64) -> Result<BTreeMap<u32, Vec<u64>>> {
    let mut lines = Lines::open(path)?;
    let mut layers: BTreeMap<u32, Vec<u64>> = BTreeMap::new();
    while let Some(record) = lines.next_json::<Record>()? {
        if record.block.as_deref().is_some_and(|b| b != "decoder") {
            *skipped += 1;
            continue;
        }
        for batch in &record.tpe {
            let sum = layers.entry(record.layer).or_insert_with(|| vec![0; batch.len()]);
            if batch.len() != sum.len() || batch.is_empty() || batch.len() > MAX_EXPERTS {
                let message =
                    format!("layer {}: {} local experts, expected {}", record.layer, batch.len(), sum.len());
                return Err(lines.bad(message));
            }
            for (a, &b) in sum.iter_mut().zip(batch) {
                *a = a.checked_add(b).ok_or_else(|| lines.bad("the counts are too large"))?;
            }
        }
        if layers.len() > MAX_LAYERS {
            return Err(lines.bad(format!("there are more than {MAX_LAYERS} layers")));
        }
    }
    Ok(layers)
}

/// Counts of all experts from the lists of all ranks.
fn join(num_experts: usize, ranks: &[Vec<u64>]) -> std::result::Result<Vec<u64>, String> {
    let held: usize = ranks.iter().map(Vec::len).sum();
    if ranks.iter().all(|r| r.len() == num_experts) {
        let mut sum = vec![0_u64; num_experts];
        for (slot, &count) in ranks.iter().flat_map(|rank| rank.iter().enumerate()) {
            let slot = sum.get_mut(slot).ok_or("more counts than experts")?;
            *slot = slot.checked_add(count).ok_or("the counts are too large")?;
        }
        Ok(sum)
    } else if held == num_experts {
        Ok(ranks.concat())
    } else {
        Err(format!(
            "the files hold {held} local experts of {} ranks, which are not {num_experts} experts in all: give the files of one \
             expert-parallel group",
            ranks.len()
        ))
    }
}

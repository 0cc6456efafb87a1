//! SGLang's older statistics: lines `layer_id,expert_id,count`; repeated pairs are added up.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::lines::Lines;
use super::{ImportOptions, Layout, Sink};
use crate::error::{FormatError, Result};
use crate::{MAX_EXPERTS, MAX_LAYERS};

/// The header line.
pub(super) const HEADER: &str = "layer_id,expert_id,count";

pub(crate) fn read(inputs: &[PathBuf], options: &ImportOptions, sink: &mut Sink<'_>) -> Result<()> {
    let mut layers: BTreeMap<u32, BTreeMap<usize, u64>> = BTreeMap::new();
    let mut largest = 0;
    for path in inputs {
        let mut lines = Lines::open(path)?;
        while let Some(line) = lines.next_line()? {
            if line == HEADER.as_bytes() {
                continue;
            }
            let text = String::from_utf8_lossy(line).into_owned();
            let fields: Vec<u64> = text.split(',').filter_map(|f| f.trim().parse().ok()).collect();
            let &[layer, expert, count] = &fields[..] else {
                return Err(lines.bad(format!("{text:?} is not layer_id,expert_id,count")));
            };
            let (Ok(layer), true) = (u32::try_from(layer), expert < MAX_EXPERTS as u64) else {
                return Err(lines.bad(format!("layer {layer} or expert {expert} is too large")));
            };
            largest = largest.max(expert as usize);
            let sum = layers.entry(layer).or_default().entry(expert as usize).or_default();
            *sum = sum.checked_add(count).ok_or_else(|| lines.bad("the counts are too large"))?;
            if layers.len() > MAX_LAYERS {
                return Err(lines.bad(format!("there are more than {MAX_LAYERS} layers")));
            }
        }
    }
    let Some(first) = inputs.first() else {
        return Ok(());
    };
    if layers.is_empty() {
        return Err(FormatError::bad(first, "", "holds no counts"));
    }
    let num_experts = options.num_experts.unwrap_or(largest + 1);
    if largest >= num_experts {
        return Err(FormatError::bad(
            first,
            "",
            format!("names expert {largest}, there are {num_experts} experts"),
        ));
    }
    if options.num_experts.is_none() {
        sink.warn(format!(
            "the file does not say the number of experts: {num_experts}, the largest id plus one, was taken"
        ));
    }
    let layer_ids = layers.keys().copied().collect();
    sink.begin(Layout { num_experts, top_k: options.top_k, layer_ids, ..Layout::default() })?;
    for (layer, counts) in layers.values().enumerate() {
        let row = (0..num_experts).map(|e| counts.get(&e).copied().unwrap_or(0)).collect();
        sink.set_counts(first, layer, row, None)?;
    }
    sink.progress(1, 1);
    Ok(())
}

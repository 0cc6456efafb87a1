//! vLLM: physical to logical `[layers][R]` as a list of lists, MoE layers only. Read as well: one flat list for one layer,
//! and `{"expert_to_ep_rank": [rank of each expert]}`.

use std::path::Path;

use serde_json::Value;

use super::maps::{ints, rows_of};
use super::physical::{Map, ranks_of_row};
use super::slots::Slots;
use super::{ExportOptions, Exported, MapOptions};
use crate::PlacementFile;
use crate::error::{FormatError, Result};

pub(super) const RANKS_KEY: &str = "expert_to_ep_rank";

pub(super) fn write(file: &PlacementFile, options: &ExportOptions) -> Result<Exported> {
    let slots = Slots::of(file, options)?;
    let rows: Vec<String> = slots.layers.iter().map(|row| format!("{row:?}")).collect();
    Ok(Exported { text: format!("[\n{}\n]\n", rows.join(",\n")), notes: slots.notes(file) })
}

pub(super) fn read(path: &Path, json: &Value, options: &MapOptions) -> Result<PlacementFile> {
    let layers = if let Some(list) = json.get(RANKS_KEY) {
        vec![by_rank(path, &ints(path, list)?, options)?]
    } else {
        let rows = match json.as_array() {
            Some(list) if list.first().is_some_and(Value::is_i64) => vec![ints(path, json)?],
            _ => rows_of(path, json)?,
        };
        let ranks = rows.iter().enumerate().map(|(i, row)| ranks_of_row(path, i, row, options));
        ranks.collect::<Result<_>>()?
    };
    Map { path, format: "vllm", layers, layer_ids: None, num_hidden_layers: None }.placement(options)
}

fn by_rank(path: &Path, ranks: &[i64], options: &MapOptions) -> Result<Vec<Vec<i64>>> {
    let largest = ranks.iter().copied().max().unwrap_or(-1);
    let num_ranks = options.num_ranks.map_or(largest + 1, |n| n as i64);
    let bad = |message: String| FormatError::bad(path, RANKS_KEY, message);
    if !(1..=i64::from(u16::MAX)).contains(&num_ranks) {
        return Err(bad(format!("the largest rank is {largest}")));
    }
    let mut lists = vec![Vec::new(); num_ranks as usize];
    for (expert, &rank) in (0_i64..).zip(ranks) {
        let list = usize::try_from(rank).ok().and_then(|r| lists.get_mut(r));
        list.ok_or_else(|| bad(format!("expert {expert} is on rank {rank}, there are {num_ranks} ranks")))?
            .push(expert);
    }
    Ok(lists)
}

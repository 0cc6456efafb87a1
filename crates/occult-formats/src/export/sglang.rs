//! SGLang's `--init-expert-location`: `{"physical_to_logical_map": [[..], ..]}`, a row of `R` slots for each hidden layer of
//! the model. Rows of dense layers are not used; they get the engine's own trivial row (slot `p` holds expert `p mod E`).

use std::path::Path;

use serde_json::Value;

use super::maps::rows_of;
use super::physical::{Map, ranks_of_row};
use super::slots::Slots;
use super::{ExportOptions, Exported, MapOptions};
use crate::PlacementFile;
use crate::error::{FormatError, Result};

pub(super) const KEY: &str = "physical_to_logical_map";

pub(super) fn write(file: &PlacementFile, options: &ExportOptions) -> Result<Exported> {
    let slots = Slots::of(file, options)?;
    let mut notes = slots.notes(file);
    let last = file.meta.layer_ids.last().copied().unwrap_or_default();
    let hidden = match (file.meta.num_hidden_layers, options.num_hidden_layers) {
        (Some(own), Some(given)) if own != given => {
            return Err(FormatError::Request(format!(
                "num_hidden_layers: the placement says {own}, the option says {given}"
            )));
        }
        (own, given) => own.or(given).unwrap_or_else(|| {
            notes.push(format!(
                "the number of hidden layers is not known: {} rows were written, up to the last MoE layer",
                last + 1
            ));
            last + 1
        }),
    };
    if hidden <= last || hidden > 4 * crate::MAX_LAYERS as u32 {
        return Err(FormatError::Request(format!(
            "num_hidden_layers is {hidden}, the placement has a layer {last}"
        )));
    }
    let experts = file.placement.num_experts();
    let mut moe = file.meta.layer_ids.iter().zip(&slots.layers).peekable();
    let rows = (0..hidden).map(|layer| match moe.next_if(|(id, _)| **id == layer) {
        Some((_, row)) => row.iter().map(|&e| usize::from(e)).collect::<Vec<_>>(),
        None => (0..slots.total()).map(|p| p % experts).collect(),
    });
    let rows: Vec<String> = rows.map(|row| format!("{row:?}")).collect();
    let redundant = slots.total() - experts;
    notes.push(format!(
        "start with --ep-size {} --ep-num-redundant-experts {redundant} --init-expert-location FILE",
        file.placement.topology().num_ranks()
    ));
    Ok(Exported { text: format!("{{\"{KEY}\": [\n{}\n]}}\n", rows.join(",\n")), notes })
}

pub(super) fn read(path: &Path, json: &Value, options: &MapOptions) -> Result<PlacementFile> {
    let bad = |message: String| FormatError::bad(path, "", message);
    let Some(map) = json.get(KEY) else {
        let counts = json.get("logical_count").is_some();
        return Err(bad(if counts {
            "holds `logical_count`: these are counts, not a placement (import them as a profile)".to_owned()
        } else {
            format!("`{KEY}` is missing")
        }));
    };
    from_rows(path, rows_of(path, map)?, options)
}

/// Rows of all hidden layers; the MoE layers among them are an option.
pub(super) fn from_rows(path: &Path, rows: Vec<Vec<i64>>, options: &MapOptions) -> Result<PlacementFile> {
    let bad = |message: String| FormatError::bad(path, "", message);
    let hidden = rows.len();
    let ids: Vec<u32> = options.layer_ids.clone().unwrap_or_else(|| (0..hidden as u32).collect());
    let mut layers = Vec::with_capacity(ids.len());
    for &id in &ids {
        let row = rows
            .get(id as usize)
            .ok_or_else(|| bad(format!("there is no layer {id}, it has {hidden} rows")))?;
        layers.push(ranks_of_row(path, id as usize, row, options)?);
    }
    let map =
        Map { path, format: "sglang", layers, layer_ids: Some(ids), num_hidden_layers: Some(hidden as u32) };
    map.placement(options)
}

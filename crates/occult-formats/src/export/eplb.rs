//! The tables of DeepSeek's EPLB as JSON: `phy2log` `[L][R]`, `log2phy` `[L][E][X]` filled up with -1 (X = most replicas of
//! any expert), `logcnt` `[L][E]`; with the numbers of GPUs and nodes that its `rebalance_experts` was called with.

use std::path::Path;

use serde_json::Value;

use super::maps::{Ints, rows_of};
use super::physical::{Map, ranks_of_row};
use super::slots::Slots;
use super::{ExportOptions, Exported, MapOptions};
use crate::PlacementFile;
use crate::error::{FormatError, Result};

pub(super) const KEY: &str = "phy2log";

pub(super) fn write(file: &PlacementFile, options: &ExportOptions) -> Result<Exported> {
    let slots = Slots::of(file, options)?;
    let experts = file.placement.num_experts();
    let log2phy: Vec<Vec<Vec<i64>>> = slots.layers.iter().map(|row| inverse(row, experts)).collect();
    let width = log2phy.iter().flatten().map(Vec::len).max().unwrap_or(0);
    let rows = |lines: Vec<String>| lines.join(",\n");
    let counts: Vec<String> =
        log2phy.iter().map(|layer| format!("{:?}", layer.iter().map(Vec::len).collect::<Vec<_>>())).collect();
    let padded: Vec<String> = log2phy
        .into_iter()
        .map(|mut layer| {
            layer.iter_mut().for_each(|list| list.resize(width, -1));
            format!("{layer:?}")
        })
        .collect();
    let topology = file.placement.topology();
    let text = format!(
        "{{\"num_gpus\": {}, \"num_nodes\": {},\n\"{KEY}\": [\n{}\n],\n\"log2phy\": [\n{}\n],\n\"logcnt\": [\n{}\n]}}\n",
        topology.num_ranks(),
        topology.num_nodes(),
        rows(slots.layers.iter().map(|row| format!("{row:?}")).collect()),
        rows(padded),
        rows(counts)
    );
    Ok(Exported { text, notes: slots.notes(file) })
}

/// Slots of every expert, ascending.
fn inverse(row: &[u16], experts: usize) -> Vec<Vec<i64>> {
    let mut slots = vec![Vec::new(); experts];
    for (slot, &e) in (0_i64..).zip(row) {
        if let Some(list) = slots.get_mut(usize::from(e)) {
            list.push(slot);
        }
    }
    slots
}

pub(super) fn read(path: &Path, json: &Value, options: &MapOptions) -> Result<PlacementFile> {
    let bad = |place: String, message: String| FormatError::bad(path, place, message);
    let map = json.get(KEY).ok_or_else(|| bad(String::new(), format!("`{KEY}` is missing")))?;
    let rows = rows_of(path, map)?;
    let number = |key: &str| json.get(key).and_then(Value::as_u64).map(|n| n as usize);
    let mut options = options.clone();
    for (key, given) in [("num_gpus", &mut options.num_ranks), ("num_nodes", &mut options.num_nodes)] {
        match (number(key), *given) {
            (Some(found), Some(wanted)) if found != wanted => {
                return Err(bad(String::new(), format!("{key} is {found}, the option says {wanted}")));
            }
            (found, wanted) => *given = found.or(wanted),
        }
    }
    let ranks = rows.iter().enumerate().map(|(i, row)| ranks_of_row(path, i, row, &options));
    let layers = ranks.collect::<Result<Vec<_>>>()?;
    let file =
        Map { path, format: "eplb", layers, layer_ids: None, num_hidden_layers: None }.placement(&options)?;
    check_tables(path, json, &rows, file.placement.num_experts())?;
    Ok(file)
}

/// The other two tables, where they are there, must say the same.
fn check_tables(path: &Path, json: &Value, rows: &[Vec<i64>], experts: usize) -> Result<()> {
    for (layer, row) in rows.iter().enumerate() {
        let bad = |message: String| FormatError::bad(path, format!("layer {layer}"), message);
        let ids: Vec<u16> = row.iter().filter_map(|&e| u16::try_from(e).ok()).collect();
        let wanted = inverse(&ids, experts);
        if let Some(table) = json.get("logcnt") {
            let counts: Vec<i64> = wanted.iter().map(|l| l.len() as i64).collect();
            let own = table.get(layer).and_then(Ints::of);
            if own.is_none_or(|own| own.0 != counts) {
                return Err(bad("logcnt disagrees with phy2log".to_owned()));
            }
        }
        let Some(table) = json.get("log2phy") else { continue };
        for (expert, slots) in wanted.iter().enumerate() {
            let own = table.get(layer).and_then(|t| t.get(expert)).and_then(Ints::of);
            let own = own.map(|Ints(list)| list.into_iter().filter(|&p| p != -1).collect::<Vec<_>>());
            let own = own.map(|mut list| {
                list.sort_unstable();
                list
            });
            if own.as_ref() != Some(slots) {
                return Err(bad(format!("log2phy of expert {expert} disagrees with phy2log")));
            }
        }
    }
    Ok(())
}

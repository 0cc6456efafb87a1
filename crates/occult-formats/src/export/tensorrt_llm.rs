//! TensorRT-LLM's `moe_load_balancer.yaml`: `num_slots`, `initial_global_assignments` (layer number: expert of each slot),
//! `layer_updates_per_iter`. The reader knows the YAML that such files are written in, not all of YAML.

use std::fmt::Write as _;
use std::path::Path;

use super::physical::{Map, ranks_of_row};
use super::slots::Slots;
use super::{ExportOptions, Exported, MapOptions};
use crate::PlacementFile;
use crate::error::{FormatError, Result};
use crate::{MAX_EXPERTS, MAX_LAYERS};

pub(super) const KEY: &str = "initial_global_assignments";

pub(super) fn write(file: &PlacementFile, options: &ExportOptions) -> Result<Exported> {
    let slots = Slots::of(file, options)?;
    let mut text = format!("num_slots: {}\n{KEY}:\n", slots.total());
    for (id, row) in file.meta.layer_ids.iter().zip(&slots.layers) {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "  {id}: {row:?}");
    }
    let _ = writeln!(text, "layer_updates_per_iter: {}", options.layer_updates_per_iter);
    let mut notes = slots.notes(file);
    notes.push("name this file in moe_config.load_balancer of the extra LLM API options".to_owned());
    Ok(Exported { text, notes })
}

pub(super) fn read(path: &Path, text: &str, options: &MapOptions) -> Result<PlacementFile> {
    let bad = |place: String, message: String| FormatError::bad(path, place, message);
    let (num_slots, assignments) =
        parse(text).map_err(|(line, message)| bad(format!("line {line}"), message))?;
    let Some(num_slots) = num_slots else {
        return Err(bad(String::new(), "num_slots is missing".to_owned()));
    };
    let mut assignments = assignments;
    assignments.sort_by_key(|(id, _)| *id);
    let mut layers = Vec::with_capacity(assignments.len());
    for (i, (id, row)) in assignments.iter().enumerate() {
        if row.len() as u64 != num_slots {
            let message =
                format!("has {} slots (layer {id} of the model), num_slots is {num_slots}", row.len());
            return Err(bad(format!("layer {i}"), message));
        }
        layers.push(ranks_of_row(path, i, row, options)?);
    }
    let layer_ids = Some(assignments.into_iter().map(|(id, _)| id).collect());
    Map { path, format: "tensorrt-llm", layers, layer_ids, num_hidden_layers: None }.placement(options)
}

type Parsed = (Option<u64>, Vec<(u32, Vec<i64>)>);

/// Line by line: `key: value` at the margin, `number: [a, b, ..]` (over several lines if need be) or `number:` with
/// `- a` lines below the assignments.
fn parse(text: &str) -> std::result::Result<Parsed, (usize, String)> {
    let mut num_slots = None;
    let mut layers: Vec<(u32, Vec<i64>)> = Vec::new();
    let mut inside = false;
    let mut open = false;
    for (i, line) in text.lines().enumerate() {
        let error = |message: String| (i + 1, message);
        let line = line.split('#').next().unwrap_or_default().trim_end();
        let content = line.trim_start();
        if content.is_empty() || content == "---" {
            continue;
        }
        if open {
            let list = layers.last_mut().map(|(_, list)| list);
            open = extend(list, content).map_err(error)?;
            continue;
        }
        if let (true, Some(item)) = (inside, content.strip_prefix("- ")) {
            extend(layers.last_mut().map(|(_, list)| list), item).map_err(error)?;
            continue;
        }
        let Some((key, value)) = content.split_once(':') else {
            return Err(error(format!("expected `key: value`, found {:?}", shorten(content))));
        };
        let (key, value) = (key.trim(), value.trim());
        if line.len() == content.len() {
            inside = key == KEY;
            match key {
                "num_slots" => {
                    let n = value.parse().map_err(|_| error(format!("num_slots is {:?}", shorten(value))))?;
                    num_slots = Some(n);
                }
                KEY if !value.is_empty() => {
                    return Err(error(format!("expected the layers of {KEY} on lines of their own")));
                }
                // layer_updates_per_iter and what later versions add say nothing about the placement.
                _ => {}
            }
        } else if inside {
            let id = key.trim_matches(['"', '\'']).parse();
            let id = id.map_err(|_| error(format!("{:?} is not a layer number", shorten(key))))?;
            if layers.iter().any(|(other, _)| *other == id) || layers.len() >= MAX_LAYERS {
                return Err(error(format!("layer {id} is there twice, or there are too many layers")));
            }
            layers.push((id, Vec::new()));
            if let Some(list) = value.strip_prefix('[') {
                open = extend(layers.last_mut().map(|(_, list)| list), list).map_err(error)?;
            } else if !value.is_empty() {
                return Err(error(format!("expected a list, found {:?}", shorten(value))));
            }
        }
    }
    if open {
        return Err((text.lines().count(), "a list does not end".to_owned()));
    }
    if layers.is_empty() {
        return Err((1, format!("there is no layer under {KEY}")));
    }
    Ok((num_slots, layers))
}

/// Adds comma-separated numbers; true while the list is open.
fn extend(list: Option<&mut Vec<i64>>, text: &str) -> std::result::Result<bool, String> {
    let list = list.ok_or("a list without a layer")?;
    let (text, open) = match text.split_once(']') {
        Some((text, rest)) if rest.trim().is_empty() => (text, false),
        Some((_, rest)) => return Err(format!("{:?} after a list", shorten(rest))),
        None => (text, true),
    };
    for item in text.split(',').map(str::trim).filter(|item| !item.is_empty()) {
        let id = item.parse().map_err(|_| format!("{:?} is not an expert id", shorten(item)))?;
        if list.len() >= 16 * MAX_EXPERTS {
            return Err("too many slots".to_owned());
        }
        list.push(id);
    }
    Ok(open)
}

fn shorten(text: &str) -> String {
    text.chars().take(40).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn yaml_in_its_usual_dresses() {
        let wanted = (Some(4), vec![(3, vec![0, 1, 1, 2]), (5, vec![2, 1, 0, 0])]);
        let inline = "num_slots: 4\ninitial_global_assignments:\n  3: [0, 1, 1, 2]\n  5: [2, 1,\n    0, 0]\nlayer_updates_per_iter: 0\n";
        assert_eq!(parse(inline), Ok(wanted.clone()));
        let block = "---\ninitial_global_assignments:\n  3:\n  - 0\n  - 1\n  - 1\n  - 2\n  '5': [2,1,0,0] # why\nnum_slots: 4";
        assert_eq!(parse(block), Ok(wanted));
        for (text, line) in [
            ("", 1),
            ("num_slots: 4\nwhat\n", 2),
            ("num_slots: x", 1),
            ("initial_global_assignments:\n  3: [0, 1", 2),
            ("initial_global_assignments:\n  3: [0, x]", 2),
            ("initial_global_assignments:\n  3: [0]\n  3: [0]", 3),
            ("initial_global_assignments:\n  - 3\n", 2),
        ] {
            assert_eq!(parse(text).map_err(|e| e.0), Err(line), "{text:?}");
        }
    }
}

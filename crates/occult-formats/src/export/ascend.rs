//! vllm-ascend and MindIE: `expert_map_path`. A layer's `layer_id` is its index among the MoE layers.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::physical::Map;
use super::slots::Slots;
use super::{ExportOptions, Exported, MapOptions};
use crate::PlacementFile;
use crate::error::{FormatError, Result};

#[derive(Serialize, Deserialize)]
struct Layer {
    layer_id: usize,
    device_count: usize,
    device_list: Vec<Device>,
}

#[derive(Serialize, Deserialize)]
struct Device {
    device_id: usize,
    device_expert: Vec<i64>,
}

#[derive(Deserialize)]
struct File {
    moe_layer_count: usize,
    layer_list: Vec<Layer>,
}

pub(super) fn write(file: &PlacementFile, options: &ExportOptions) -> Result<Exported> {
    let slots = Slots::of(file, options)?;
    let mut lines = Vec::with_capacity(slots.layers.len());
    for (layer_id, row) in slots.layers.iter().enumerate() {
        let devices = row.chunks(slots.per_rank.max(1)).enumerate();
        let device_list: Vec<Device> = devices
            .map(|(device_id, experts)| Device {
                device_id,
                device_expert: experts.iter().map(|&e| i64::from(e)).collect(),
            })
            .collect();
        let layer = Layer { layer_id, device_count: device_list.len(), device_list };
        let line = serde_json::to_string(&layer).map_err(|e| FormatError::Request(e.to_string()))?;
        lines.push(line);
    }
    let text =
        format!("{{\"moe_layer_count\": {}, \"layer_list\": [\n{}\n]}}\n", lines.len(), lines.join(",\n"));
    let mut notes = slots.notes(file);
    notes.push("set additional_config.eplb_config.expert_map_path to this file".to_owned());
    Ok(Exported { text, notes })
}

pub(super) fn read(path: &Path, json: &Value, options: &MapOptions) -> Result<PlacementFile> {
    let bad = |place: String, message: String| FormatError::bad(path, place, message);
    let file = File::deserialize(json).map_err(|e| bad(String::new(), e.to_string()))?;
    if file.moe_layer_count != file.layer_list.len() {
        let message =
            format!("moe_layer_count is {}, layer_list has {}", file.moe_layer_count, file.layer_list.len());
        return Err(bad(String::new(), message));
    }
    let mut layers = Vec::with_capacity(file.layer_list.len());
    for (i, layer) in file.layer_list.into_iter().enumerate() {
        let place = || format!("layer {i}");
        if layer.layer_id != i {
            return Err(bad(place(), format!("its layer_id is {}, expected {i}", layer.layer_id)));
        }
        if layer.device_count != layer.device_list.len() {
            let message = format!(
                "device_count is {}, device_list has {}",
                layer.device_count,
                layer.device_list.len()
            );
            return Err(bad(place(), message));
        }
        let mut ranks = Vec::with_capacity(layer.device_list.len());
        for (rank, device) in layer.device_list.into_iter().enumerate() {
            if device.device_id != rank {
                let message = format!("device_id {} stands where {rank} was expected", device.device_id);
                return Err(bad(place(), message));
            }
            ranks.push(device.device_expert);
        }
        if let Some(wanted) = options.num_ranks.filter(|&n| n != ranks.len()) {
            return Err(bad(place(), format!("has {} devices, expected {wanted}", ranks.len())));
        }
        layers.push(ranks);
    }
    Map { path, format: "vllm-ascend", layers, layer_ids: None, num_hidden_layers: None }.placement(options)
}

//! A new order of the experts of a checkpoint: with equal experts per rank and no replicas, an engine that gives rank `r`
//! the experts `r * E/W .. (r + 1) * E/W` then has the placement without knowing of it.
//!
//! Entry `i` of a layer's list is the old id of the expert at new position `i`. Routers that first choose *groups* of
//! experts by position work only if every group stays whole: `E/G` new positions must come from one old group.

use occult_plan::LayerPlacement;
use serde_json::json;

use super::{ExportOptions, Exported};
use crate::PlacementFile;
use crate::error::{FormatError, Result};

pub(super) const FORMAT: &str = "occult.permutation.v1";

pub(super) fn write(file: &PlacementFile, options: &ExportOptions) -> Result<Exported> {
    let experts = file.placement.num_experts();
    let ranks = file.placement.topology().num_ranks();
    if let Some(groups) = options.num_groups
        && (groups == 0 || !experts.is_multiple_of(groups))
    {
        return Err(FormatError::Request(format!("{groups} routing groups do not divide {experts} experts")));
    }
    let mut lines = Vec::new();
    for (i, layer) in file.placement.layers().iter().enumerate() {
        let id = file.meta.layer_ids.get(i).copied().unwrap_or_default();
        let order = new_to_old(layer).map_err(|message| refuse(i, id, &message))?;
        if let Some(groups) = options.num_groups {
            check_groups(&order, experts / groups).map_err(|message| refuse(i, id, &message))?;
        }
        lines.push(json!({ "layer": id, "new_to_old": order }).to_string());
    }
    let text = format!(
        "{{\"format\": {FORMAT:?}, \"num_experts\": {experts}, \"num_ranks\": {ranks}, \"layers\": [\n{}\n]}}\n",
        lines.join(",\n")
    );
    let mut notes = vec!["entry i of new_to_old is the old id of the expert at new position i".to_owned()];
    if options.num_groups.is_none() {
        notes.push("for a group-limited router give its number of groups: they must stay whole".to_owned());
    }
    Ok(Exported { text, notes })
}

fn refuse(layer: usize, id: u32, message: &str) -> FormatError {
    FormatError::Request(format!(
        "layer {layer} (layer {id} of the model) cannot be a permutation: {message}"
    ))
}

fn new_to_old(layer: &LayerPlacement) -> std::result::Result<Vec<u16>, String> {
    if layer.has_replicas() {
        let e = (0..layer.num_experts() as u16).find(|&e| layer.ranks_of(e).len() > 1).unwrap_or_default();
        return Err(format!("expert {e} has {} replicas", layer.ranks_of(e).len()));
    }
    let (experts, ranks) = (layer.num_experts(), layer.num_ranks());
    let mut order = Vec::with_capacity(experts);
    for rank in 0..ranks {
        let own = layer.experts_of(rank as u16);
        if own.len() * ranks != experts {
            return Err(format!(
                "rank {rank} has {} of {experts} experts, all {ranks} ranks need the same number",
                own.len()
            ));
        }
        order.extend_from_slice(own);
    }
    Ok(order)
}

/// Every block of `size` new positions must be one old group.
fn check_groups(order: &[u16], size: usize) -> std::result::Result<(), String> {
    for (block, positions) in order.chunks(size).enumerate() {
        let group = |e: u16| usize::from(e) / size;
        let first = positions.first().copied().map_or(0, group);
        if let Some(&e) = positions.iter().find(|&&e| group(e) != first) {
            return Err(format!(
                "routing group {first} is torn apart: new positions {} to {} mix it with expert {e} of group {}; place \
                 whole groups",
                block * size,
                (block + 1) * size - 1,
                group(e)
            ));
        }
    }
    Ok(())
}

//! From slots back to a placement: what all readers of expert maps share.

use std::path::Path;

use occult_plan::{ExpertId, LayerPlacement, Placement, Topology};

use super::MapOptions;
use crate::error::{FormatError, Result};
use crate::{MAX_EXPERTS, MAX_LAYERS, PlacementFile, PlacementMeta};

/// Rows of slots `[layers][R]`, as a file has them.
pub(super) type Rows = Vec<Vec<i64>>;

/// Everything a file said, before it is checked.
pub(super) struct Map<'a> {
    pub(super) path: &'a Path,
    /// Name of the format, for the description.
    pub(super) format: &'static str,
    /// `[layers][W][experts]`.
    pub(super) layers: Vec<Vec<Vec<i64>>>,
    /// The model's number of each layer, where the file says it.
    pub(super) layer_ids: Option<Vec<u32>>,
    pub(super) num_hidden_layers: Option<u32>,
}

/// Cuts a row of slots into ranks.
pub(super) fn ranks_of_row(
    path: &Path,
    layer: usize,
    row: &[i64],
    options: &MapOptions,
) -> Result<Vec<Vec<i64>>> {
    let bad = |message: String| FormatError::bad(path, format!("layer {layer}"), message);
    let Some(ranks) = options.num_ranks else {
        return Err(bad(format!(
            "{} slots: the map does not say on how many ranks, give their number",
            row.len()
        )));
    };
    if row.is_empty() || ranks == 0 || !row.len().is_multiple_of(ranks) {
        return Err(bad(format!("{} slots cannot be divided over {ranks} ranks", row.len())));
    }
    Ok(row.chunks_exact(row.len() / ranks).map(<[i64]>::to_vec).collect())
}

impl Map<'_> {
    /// Checks the map and makes the placement. A second copy of an expert on one rank adds nothing: it is dropped.
    pub(super) fn placement(self, options: &MapOptions) -> Result<PlacementFile> {
        let bad = |place: String, message: String| FormatError::bad(self.path, place, message);
        if self.layers.is_empty() || self.layers.len() > MAX_LAYERS {
            let message = format!("has {} layers, expected 1 to {MAX_LAYERS}", self.layers.len());
            return Err(bad(String::new(), message));
        }
        let largest = self.layers.iter().flatten().flatten().copied().max().unwrap_or(-1);
        let num_experts = options.num_experts.map_or(largest + 1, |e| e as i64);
        if num_experts < 1 || num_experts > MAX_EXPERTS as i64 || largest >= num_experts {
            let message = format!(
                "the largest expert id is {largest}, expected less than {}",
                match options.num_experts {
                    Some(e) => e,
                    None => MAX_EXPERTS,
                }
            );
            return Err(bad(String::new(), message));
        }
        let num_ranks = self.layers.first().map_or(0, Vec::len);
        let mut twice = 0;
        let mut tables = Vec::with_capacity(self.layers.len());
        for (i, layer) in self.layers.iter().enumerate() {
            let place = || format!("layer {i}");
            if layer.len() != num_ranks {
                return Err(bad(place(), format!("has {} ranks, layer 0 has {num_ranks}", layer.len())));
            }
            let mut ranks: Vec<Vec<ExpertId>> = Vec::with_capacity(num_ranks);
            for (rank, list) in layer.iter().enumerate() {
                let id = |&e: &i64| {
                    ExpertId::try_from(e)
                        .map_err(|_| bad(place(), format!("rank {rank}: {e} is not an expert id")))
                };
                let mut experts = list.iter().map(id).collect::<Result<Vec<_>>>()?;
                experts.sort_unstable();
                experts.dedup();
                twice += list.len() - experts.len();
                ranks.push(experts);
            }
            let table = LayerPlacement::from_rank_experts(num_experts as usize, &ranks);
            tables.push(table.map_err(|e| FormatError::plan(self.path, i, 0, e))?);
        }
        let topology = Topology::new(num_ranks, options.num_nodes.unwrap_or(1))
            .map_err(|e| bad(String::new(), e.to_string()))?;
        let count = tables.len();
        let placement = Placement::new(topology, tables).map_err(|e| bad(String::new(), e.to_string()))?;
        let given = options.layer_ids.clone().filter(|ids| ids.len() == count);
        let layer_ids = self.layer_ids.or(given).unwrap_or_else(|| (0..count as u32).collect());
        let mut meta = PlacementMeta {
            layer_ids,
            num_hidden_layers: options.num_hidden_layers.or(self.num_hidden_layers),
            model: options.model.clone(),
            method: format!("import of {}", self.format),
            ..PlacementMeta::default()
        };
        if twice > 0 {
            meta.notes.push(format!(
                "{twice} slots held a second copy of an expert on the same rank and were dropped"
            ));
        }
        PlacementFile::new(meta, placement).map_err(|e| bad(String::new(), e.to_string()))
    }
}

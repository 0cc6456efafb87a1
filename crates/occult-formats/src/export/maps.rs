//! Expert maps of other engines into placements.

use std::path::Path;

use serde_json::Value;

use super::{ExportFormat, ascend, eplb, physical::Rows, sglang, tensorrt_llm, vllm};
use crate::error::{FormatError, Result};
use crate::pickle::TorchFile;
use crate::{MAX_EXPERTS, MAX_LAYERS, PlacementFile, io};

/// What an expert map does not say itself. All optional, but most maps need the number of ranks.
#[derive(Debug, Clone, Default)]
pub struct MapOptions {
    /// `W`. Maps of slots do not say it.
    pub num_ranks: Option<usize>,
    /// Nodes; 1 when not given.
    pub num_nodes: Option<usize>,
    /// `E`; the largest id plus one when not given.
    pub num_experts: Option<usize>,
    /// The model's MoE layers: which rows of a map of all hidden layers count, and the numbers of the layers otherwise.
    pub layer_ids: Option<Vec<u32>>,
    /// Hidden layers of the model, dense ones included.
    pub num_hidden_layers: Option<u32>,
    /// Name of the model.
    pub model: Option<String>,
}

/// Reads an expert map of SGLang (`.json` or `.pt`), vLLM, vllm-ascend, TensorRT-LLM or EPLB; the format is found out
/// from the contents when it is not given.
pub fn import_placement(
    path: &Path,
    format: Option<ExportFormat>,
    options: &MapOptions,
) -> Result<PlacementFile> {
    let bad = |message: String| FormatError::bad(path, "", message);
    if options.num_experts.is_some_and(|e| e == 0 || e > MAX_EXPERTS) {
        return Err(bad(format!("the number of experts must be 1 to {MAX_EXPERTS}")));
    }
    let format = match format {
        Some(format) => format,
        None => detect_map(path)?.ok_or_else(|| bad("is not an expert map that is known".to_owned()))?,
    };
    let (prefix, _) = io::read_prefix(path, 4)?;
    if format == ExportFormat::Sglang && prefix.starts_with(b"PK") {
        return sglang::from_rows(path, torch_rows(path)?, options);
    }
    let bytes = io::read_whole(path)?;
    if format == ExportFormat::TensorrtLlm {
        let text = std::str::from_utf8(&bytes).map_err(|_| bad("is not UTF-8 text".to_owned()))?;
        return tensorrt_llm::read(path, text, options);
    }
    let json = serde_json::from_slice(&bytes).map_err(|e| bad(format!("broken JSON: {e}")))?;
    match format {
        ExportFormat::Sglang => sglang::read(path, &json, options),
        ExportFormat::Vllm => vllm::read(path, &json, options),
        ExportFormat::VllmAscend => ascend::read(path, &json, options),
        ExportFormat::Eplb => eplb::read(path, &json, options),
        ExportFormat::TensorrtLlm | ExportFormat::Permutation => {
            Err(bad("is an order of a checkpoint's experts, not an expert map".to_owned()))
        }
    }
}

/// Which engine's expert map (or permutation) a file is, by content; `None` if it is none.
pub fn detect_map(path: &Path) -> Result<Option<ExportFormat>> {
    let (prefix, _) = io::read_prefix(path, 4096)?;
    if prefix.starts_with(b"PK\x03\x04") {
        let map = TorchFile::open(path).ok().map(|t| t.pickle());
        let has = map.is_some_and(|p| p.root().get(sglang::KEY).is_some());
        return Ok(has.then_some(ExportFormat::Sglang));
    }
    let start = prefix.trim_ascii_start();
    if !matches!(start.first(), Some(b'{' | b'[')) {
        let text = String::from_utf8_lossy(&prefix);
        let yaml =
            text.lines().any(|l| l.starts_with("num_slots:") || l.starts_with("initial_global_assignments:"));
        return Ok(yaml.then_some(ExportFormat::TensorrtLlm));
    }
    let Ok(json) = serde_json::from_slice::<Value>(&io::read_whole(path)?) else {
        return Ok(None);
    };
    let has = |key: &str| json.get(key).is_some();
    Ok(if has(sglang::KEY) {
        Some(ExportFormat::Sglang)
    } else if has("layer_list") && has("moe_layer_count") {
        Some(ExportFormat::VllmAscend)
    } else if has(eplb::KEY) {
        Some(ExportFormat::Eplb)
    } else if json.get("format").and_then(Value::as_str) == Some(super::permutation::FORMAT) {
        Some(ExportFormat::Permutation)
    } else if has(vllm::RANKS_KEY) || looks_like_slots(&json) {
        Some(ExportFormat::Vllm)
    } else {
        None
    })
}

/// A list of lists in which every list names the experts `0..E`, each at least once: a table of loads is hardly that.
fn looks_like_slots(json: &Value) -> bool {
    let names_all = |row: &Value| {
        let Some(Ints(ids)) = Ints::of(row) else { return false };
        let mut seen = vec![false; ids.len()];
        for id in ids {
            match usize::try_from(id).ok().and_then(|id| seen.get_mut(id)) {
                Some(seen) => *seen = true,
                None => return false,
            }
        }
        let experts = seen.iter().rposition(|&s| s).map_or(0, |last| last + 1);
        experts > 1 && seen.iter().take(experts).all(|&s| s)
    };
    let rows = json.as_array().filter(|rows| !rows.is_empty());
    rows.is_some_and(|rows| rows.iter().all(names_all)) || names_all(json)
}

/// A JSON list of integers.
pub(super) struct Ints(pub(super) Vec<i64>);

impl Ints {
    pub(super) fn of(json: &Value) -> Option<Self> {
        json.as_array()?.iter().map(Value::as_i64).collect::<Option<Vec<_>>>().map(Ints)
    }
}

/// A list of integers, or an error.
pub(super) fn ints(path: &Path, json: &Value) -> Result<Vec<i64>> {
    let list = Ints::of(json).ok_or_else(|| FormatError::bad(path, "", "expected a list of integers"))?;
    Ok(list.0)
}

/// A list of lists of integers, at most as many as a model has layers.
pub(super) fn rows_of(path: &Path, json: &Value) -> Result<Rows> {
    let bad = |place: String, message: &str| FormatError::bad(path, place, message);
    let rows = json.as_array().ok_or_else(|| bad(String::new(), "expected a list of lists of expert ids"))?;
    if rows.len() > 4 * MAX_LAYERS {
        return Err(bad(String::new(), "has too many layers for a model"));
    }
    let row = |(i, row): (usize, &Value)| {
        let list = Ints::of(row).ok_or_else(|| bad(format!("layer {i}"), "expected a list of expert ids"))?;
        Ok(list.0)
    };
    rows.iter().enumerate().map(row).collect()
}

/// `physical_to_logical_map` of a `.pt` file: a tensor or nested lists.
fn torch_rows(path: &Path) -> Result<Rows> {
    let bad = |message: String| FormatError::bad(path, sglang::KEY, message);
    let mut file = TorchFile::open(path).map_err(|message| FormatError::bad(path, "", message))?;
    let pickle = file.pickle();
    let map = pickle.root().get(sglang::KEY).ok_or_else(|| bad("is missing".to_owned()))?;
    if let Some(tensor) = map.tensor() {
        let &[layers, slots] = tensor.shape() else {
            return Err(bad(format!("has shape {:?}, expected [layers, slots]", tensor.shape())));
        };
        if layers == 0 || slots == 0 || layers > 4 * MAX_LAYERS {
            return Err(bad(format!("has shape {:?}", tensor.shape())));
        }
        let values = file.read_i64(tensor).map_err(bad)?;
        return Ok(values.chunks_exact(slots).map(<[i64]>::to_vec).collect());
    }
    let rows = map.items().ok_or_else(|| bad(format!("is {}, expected a tensor", map.kind())))?;
    if rows.len() > 4 * MAX_LAYERS {
        return Err(bad("has too many layers for a model".to_owned()));
    }
    let mut out = Vec::new();
    for (i, row) in rows.enumerate() {
        let items = row.items().filter(|items| items.len() <= 16 * MAX_EXPERTS);
        let ids = items.and_then(|items| items.map(|v| v.as_i64()).collect::<Option<Vec<_>>>());
        out.push(ids.ok_or_else(|| bad(format!("row {i} is not a list of expert ids")))?);
    }
    Ok(out)
}

//! TensorRT-LLM expert statistics (`EXPERT_STATISTIC_PATH`): a folder with `meta_info.json` {num_experts,
//! num_experts_per_token}, `rank{r}.safetensors` with the counts `[E]` of each `<iteration>_<layer>`, and perhaps
//! `rank{r}_raw.safetensors` with the chosen experts `[T, K]` under the same keys.
//!
//! Where raw choices exist they are read and the counts follow from them; otherwise the counts of all ranks and
//! iterations are added up.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::lines::expand;
use super::{At, ImportOptions, Layout, RowBlock, Sink};
use crate::array::{DType, ints_from_bytes, to_expert_ids};
use crate::error::{FormatError, Result};
use crate::tensors::{TensorFile, TensorSpan};
use crate::{MAX_EXPERTS, MAX_LAYERS};

/// Bytes of raw choices that are read at a time.
const BLOCK_BYTES: usize = 4 << 20;

#[derive(Deserialize, Default)]
struct MetaInfo {
    #[serde(default)]
    num_experts: Option<usize>,
    #[serde(default)]
    num_experts_per_token: Option<usize>,
}

/// `<iteration>_<layer>`.
pub(super) fn parse_key(key: &str) -> Option<(u64, u32)> {
    let (iteration, layer) = key.split_once('_')?;
    Some((iteration.parse().ok()?, layer.parse().ok()?))
}

fn is_rank_file(name: &str) -> bool {
    name.starts_with("rank") && name.ends_with(".safetensors")
}

fn is_raw(path: &Path) -> bool {
    crate::io::file_name(path).ends_with("_raw.safetensors")
}

pub(crate) fn read(inputs: &[PathBuf], options: &ImportOptions, sink: &mut Sink<'_>) -> Result<()> {
    let files = expand(inputs, &is_rank_file, "rank*.safetensors")?;
    let first = files.first().map(PathBuf::as_path).unwrap_or(Path::new(""));
    let info = meta_info(&files)?;
    let num_experts = info.num_experts.or(options.num_experts).ok_or_else(|| {
        let message = "num_experts is not known: meta_info.json does not say it; give it (`--experts N`)";
        FormatError::bad(first.with_file_name("meta_info.json"), "", message)
    })?;
    if num_experts == 0 || num_experts > MAX_EXPERTS {
        let message = format!("num_experts is {num_experts}, expected 1 to {MAX_EXPERTS}");
        return Err(FormatError::bad(first.with_file_name("meta_info.json"), "", message));
    }
    let use_raw = files.iter().any(|f| is_raw(f));
    let wanted: Vec<&PathBuf> = files.iter().filter(|f| is_raw(f) == use_raw).collect();
    if use_raw && wanted.len() < files.len() {
        sink.note("the chosen experts of the raw files were read; the counts beside them were not used");
    }
    let mut top_k = info.num_experts_per_token;
    let mut layers: BTreeMap<u32, usize> = BTreeMap::new();
    for path in &wanted {
        let file = TensorFile::open(path)?;
        for (key, span) in &file.tensors {
            let bad = |message: String| FormatError::bad(path, format!("tensor {key}"), message);
            let (_, layer) =
                parse_key(key).ok_or_else(|| bad("is not named <iteration>_<layer>".to_owned()))?;
            layers.insert(layer, 0);
            if layers.len() > MAX_LAYERS {
                return Err(bad(format!("there are more than {MAX_LAYERS} layers")));
            }
            check_span(span, use_raw, num_experts, &mut top_k).map_err(bad)?;
        }
    }
    if layers.is_empty() {
        return Err(FormatError::bad(first, "", "holds no statistics"));
    }
    for (index, layer) in layers.values_mut().enumerate() {
        *layer = index;
    }
    let layer_ids = layers.keys().copied().collect();
    sink.begin(Layout { num_experts, top_k, layer_ids, ..Layout::default() })?;
    let mut counts = vec![vec![0_u64; num_experts]; layers.len()];
    let mut rows_done = vec![0_usize; layers.len()];
    for (i, path) in wanted.iter().enumerate() {
        let file = TensorFile::open(path)?;
        // By iteration, then layer: the order in which the tokens came.
        let mut spans: Vec<_> =
            file.tensors.iter().filter_map(|(key, span)| Some((parse_key(key)?, key, span))).collect();
        spans.sort_by_key(|&(order, _, _)| order);
        rows_done.fill(0);
        for ((_, layer_id), key, span) in spans {
            let layer = layers.get(&layer_id).copied().unwrap_or_default();
            if use_raw {
                let done = rows_done.get_mut(layer);
                let first_row = done.as_ref().map_or(0, |d| **d);
                let rows = append_raw(&file, span, num_experts, (layer, first_row), sink)?;
                if let Some(done) = done {
                    *done += rows;
                }
            } else if let Some(sum) = counts.get_mut(layer) {
                add_counts(&file, key, span, sum)?;
            }
        }
        sink.progress(i as u64 + 1, wanted.len() as u64);
    }
    if !use_raw {
        for (layer, counts) in counts.into_iter().enumerate() {
            sink.set_counts(first, layer, counts, None)?;
        }
    }
    Ok(())
}

/// `meta_info.json` beside the first file; empty if there is none.
fn meta_info(files: &[PathBuf]) -> Result<MetaInfo> {
    match files.first().map(|f| f.with_file_name("meta_info.json")) {
        Some(path) if path.is_file() => crate::io::read_json(&path),
        _ => Ok(MetaInfo::default()),
    }
}

fn check_span(
    span: &TensorSpan,
    raw: bool,
    num_experts: usize,
    top_k: &mut Option<usize>,
) -> std::result::Result<(), String> {
    if !span.dtype.is_integer() {
        return Err(format!("has element type {:?}, expected an integer type", span.dtype));
    }
    match span.shape[..] {
        [_, k] if raw && (1..=MAX_EXPERTS).contains(&k) => {
            let known = *top_k.get_or_insert(k);
            if known == k { Ok(()) } else { Err(format!("has {k} experts for each token, expected {known}")) }
        }
        [e] if !raw && e == num_experts => Ok(()),
        _ if raw => Err(format!("has shape {:?}, expected [tokens, top_k]", span.shape)),
        _ => Err(format!("has shape {:?}, expected [{num_experts}]", span.shape)),
    }
}

/// Appends the chosen experts of one iteration; returns the number of rows.
fn append_raw(
    file: &TensorFile,
    span: &TensorSpan,
    num_experts: usize,
    (layer, first_row): (usize, usize),
    sink: &mut Sink<'_>,
) -> Result<usize> {
    let &[rows, k] = &span.shape[..] else {
        return Ok(0);
    };
    let row_bytes = k * span.dtype.size();
    let block = (BLOCK_BYTES / row_bytes.max(1)).max(1);
    let (mut raw, mut ids) = (Vec::new(), Vec::new());
    let mut row = 0;
    while row < rows {
        let n = block.min(rows - row);
        let bytes = file.read(span, row as u64 * row_bytes as u64, n * row_bytes)?;
        raw.clear();
        ints_from_bytes(span.dtype, &bytes, &mut raw);
        let at = At { file: &file.path, layer, first_row: first_row + row };
        to_expert_ids(raw.iter().copied(), k, num_experts, (at.file, layer, at.first_row), &mut ids)?;
        sink.append(at, RowBlock { expert_ids: &ids, ..RowBlock::default() })?;
        row += n;
    }
    Ok(rows)
}

fn add_counts(file: &TensorFile, key: &str, span: &TensorSpan, sum: &mut [u64]) -> Result<()> {
    debug_assert_ne!(span.dtype, DType::Other);
    let mut values = Vec::new();
    ints_from_bytes(span.dtype, &file.read_all(span)?, &mut values);
    for (expert, (sum, &value)) in sum.iter_mut().zip(&values).enumerate() {
        let added = u64::try_from(value).ok().and_then(|v| sum.checked_add(v));
        *sum = added.ok_or_else(|| {
            let message = format!("expert {expert}: count {value} is negative or too large");
            FormatError::bad(&file.path, format!("tensor {key}"), message)
        })?;
    }
    Ok(())
}

//! Megatron's router trace (`--moe-routing-trace-path`): `router_trace_rank{r}.jsonl`, one line for each (step, layer) with
//! the chosen experts of that rank's tokens; layers and steps interleave. With `--moe-routing-trace-capture-logits` the
//! router logits lie beside it in `logits_rank{r}.bin` as bf16.
//!
//! The files are read twice: once for the layers and sizes, once for the rows.

use std::collections::BTreeSet;
use std::fs::File;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::lines::{Lines, expand};
use super::{At, ImportOptions, Layout, RowBlock, Sink};
use crate::array::{DType, floats_from_bytes, to_expert_ids};
use crate::error::{FormatError, Result};
use crate::{MAX_EXPERTS, MAX_LAYERS};

/// One line. `top_indices` is checked row by row later.
#[derive(Deserialize)]
struct Record {
    layer: u32,
    #[serde(default)]
    block: Option<String>,
    #[serde(default)]
    mtp_idx: Option<u32>,
    topk: usize,
    #[serde(default)]
    num_tokens: Option<usize>,
    top_indices: Vec<Vec<i64>>,
    #[serde(default)]
    logit_offset: Option<u64>,
    #[serde(default)]
    logit_shape: Option<Vec<usize>>,
}

/// The same line without its rows.
#[derive(Deserialize)]
struct Head {
    layer: u32,
    #[serde(default)]
    block: Option<String>,
    #[serde(default)]
    mtp_idx: Option<u32>,
    topk: usize,
    #[serde(default)]
    logit_offset: Option<u64>,
    #[serde(default)]
    logit_shape: Option<Vec<usize>>,
}

/// Layers of multi-token prediction share numbers with the decoder's and are another router: left out.
fn is_mtp(block: Option<&str>, mtp_idx: Option<u32>) -> bool {
    mtp_idx.is_some() || block.is_some_and(|b| b != "decoder")
}

pub(super) fn is_trace_name(name: &str) -> bool {
    name.starts_with("router_trace_rank") && name.ends_with(".jsonl")
}

pub(crate) fn read(inputs: &[PathBuf], options: &ImportOptions, sink: &mut Sink<'_>) -> Result<()> {
    let files = expand(inputs, &is_trace_name, "router_trace_rank*.jsonl")?;
    let scan = scan(&files)?;
    let first = files.first().map(PathBuf::as_path).unwrap_or(Path::new(""));
    let Some(top_k) = scan.top_k else {
        return Err(FormatError::bad(first, "", "has no records of decoder layers"));
    };
    // Logits are used only if every record has them and the side files exist.
    let mut sides = Vec::new();
    if let Some(experts) = scan.logits_width.filter(|_| scan.all_logits) {
        for file in &files {
            sides.push(open_side(file)?.map(|side| (side, experts)));
        }
    }
    let with_logits = !sides.is_empty() && sides.iter().all(Option::is_some);
    if scan.logits_width.is_some() && !with_logits {
        sink.warn("the trace mentions router logits, but not for every record, or logits_rank*.bin is missing: left out");
    }
    let num_experts = options.num_experts.or(scan.logits_width).ok_or_else(|| {
        FormatError::bad(
            first,
            "",
            "a Megatron trace does not say the number of experts: give it (`--experts N`)",
        )
    })?;
    let layer_ids: Vec<u32> = scan.layers.into_iter().collect();
    if scan.skipped > 0 {
        sink.warn(format!("{} records of multi-token prediction layers were left out", scan.skipped));
    }
    if files.len() > 1 {
        sink.note(
            "rows of all ranks were concatenated; ranks that see the same tokens (tensor parallelism) count twice",
        );
    }
    sink.begin(Layout {
        num_experts,
        top_k: Some(top_k),
        layer_ids: layer_ids.clone(),
        ..Layout::default()
    })?;
    let total: u64 = scan.bytes;
    let mut before = 0;
    for (i, file) in files.iter().enumerate() {
        let side = sides.get(i).and_then(Option::as_ref).filter(|_| with_logits);
        before += read_file(file, side, num_experts, &layer_ids, (before, total), sink)?;
    }
    Ok(())
}

#[derive(Default)]
struct Scan {
    layers: BTreeSet<u32>,
    top_k: Option<usize>,
    logits_width: Option<usize>,
    all_logits: bool,
    skipped: u64,
    bytes: u64,
}

fn scan(files: &[PathBuf]) -> Result<Scan> {
    let mut scan = Scan { all_logits: true, ..Scan::default() };
    for file in files {
        let mut lines = Lines::open(file)?;
        scan.bytes += lines.len();
        let mut records = 0_u64;
        while let Some(head) = lines.next_json::<Head>()? {
            records += 1;
            if is_mtp(head.block.as_deref(), head.mtp_idx) {
                scan.skipped += 1;
                continue;
            }
            if *scan.top_k.get_or_insert(head.topk) != head.topk {
                let before = scan.top_k.unwrap_or_default();
                return Err(lines.bad(format!("topk is {}, it was {before} before", head.topk)));
            }
            scan.layers.insert(head.layer);
            if scan.layers.len() > MAX_LAYERS {
                return Err(lines.bad(format!("there are more than {MAX_LAYERS} layers")));
            }
            match (head.logit_offset, head.logit_shape.as_deref()) {
                (Some(_), Some(&[_, width])) if (1..=MAX_EXPERTS).contains(&width) => {
                    if *scan.logits_width.get_or_insert(width) != width {
                        return Err(
                            lines.bad(format!("logit_shape has a width of {width}, it was another before"))
                        );
                    }
                }
                _ => scan.all_logits = false,
            }
        }
        if records == 0 {
            return Err(FormatError::bad(file, "", "is empty: there are no records"));
        }
    }
    Ok(scan)
}

/// `logits_rank3.bin` beside `router_trace_rank3.jsonl`.
fn open_side(trace: &Path) -> Result<Option<(PathBuf, File, u64)>> {
    let name = crate::io::file_name(trace).replace("router_trace_", "logits_").replace(".jsonl", ".bin");
    let path = trace.with_file_name(name);
    if path == trace || !path.is_file() {
        return Ok(None);
    }
    let (file, len) = crate::io::open(&path)?;
    Ok(Some((path, file, len)))
}

type Side = ((PathBuf, File, u64), usize);

/// Appends one file; returns its length.
fn read_file(
    path: &Path,
    side: Option<&Side>,
    num_experts: usize,
    layer_ids: &[u32],
    (before, total): (u64, u64),
    sink: &mut Sink<'_>,
) -> Result<u64> {
    let mut lines = Lines::open(path)?;
    let mut rows_done = vec![0_usize; layer_ids.len()];
    let (mut ids, mut logits) = (Vec::new(), Vec::new());
    while let Some(record) = lines.next_json::<Record>()? {
        if is_mtp(record.block.as_deref(), record.mtp_idx) {
            continue;
        }
        let Ok(layer) = layer_ids.binary_search(&record.layer) else {
            return Err(
                lines.bad(format!("layer {} was not there a moment ago: the file changed", record.layer))
            );
        };
        let rows = record.top_indices.len();
        if let Some(said) = record.num_tokens.filter(|&n| n != rows) {
            return Err(lines.bad(format!("num_tokens is {said}, but top_indices has {rows} rows")));
        }
        if let Some((row, ids)) = record.top_indices.iter().enumerate().find(|(_, r)| r.len() != record.topk)
        {
            let message = format!("row {row} has {} experts, topk is {}", ids.len(), record.topk);
            return Err(lines.bad(message));
        }
        let first_row = rows_done.get(layer).copied().unwrap_or_default();
        let raw = record.top_indices.iter().flatten().copied();
        to_expert_ids(raw, record.topk, num_experts, (path, layer, first_row), &mut ids)
            .map_err(|e| at_line(e, &lines))?;
        if let Some(side) = side {
            read_logits(side, &record, rows, &lines, &mut logits)?;
        }
        let block =
            RowBlock { expert_ids: &ids, scores: side.map(|_| logits.as_slice()), ..RowBlock::default() };
        sink.append(At { file: path, layer, first_row }, block).map_err(|e| at_line(e, &lines))?;
        if let Some(done) = rows_done.get_mut(layer) {
            *done += rows;
        }
        sink.progress(before + lines.bytes(), total);
    }
    Ok(lines.len())
}

/// Adds the line to an error that names layer and row.
fn at_line(error: FormatError, lines: &Lines<'_>) -> FormatError {
    match error {
        FormatError::Plan { layer, source, .. } => lines.bad(format!("layer {layer}: {source}")),
        other => other,
    }
}

fn read_logits(
    ((path, file, len), experts): &Side,
    at: &Record,
    rows: usize,
    lines: &Lines<'_>,
    out: &mut Vec<f32>,
) -> Result<()> {
    let bytes = rows.saturating_mul(experts * 2) as u64;
    let offset = at.logit_offset.unwrap_or_default();
    let shape = at.logit_shape.as_deref().unwrap_or_default();
    let end = offset.checked_add(bytes).filter(|end| end <= len);
    if shape != [rows, *experts] || end.is_none() {
        let name = crate::io::file_name(path);
        return Err(lines.bad(format!(
            "logits of shape {shape:?} at byte {offset} of {name} ({len} bytes), expected [{rows}, {experts}]"
        )));
    }
    let mut buf = vec![0; bytes as usize];
    crate::io::read_exact_at(file, &mut buf, offset).map_err(|e| FormatError::io("read", path, e))?;
    out.clear();
    floats_from_bytes(DType::BF16, &buf, out);
    Ok(())
}

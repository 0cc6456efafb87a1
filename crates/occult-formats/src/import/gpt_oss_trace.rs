//! gpt-oss routing trace: `routes_u8.bin` tokens x layers x 4 expert ids in descending weight, `gates_u8.bin` of the same
//! shape with the weights times 255, `segments.csv` with the data set each range of tokens comes from. The binary files
//! have no header, so the number of layers is an option (`num_hidden_layers`, 24 if not given).

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use super::{At, ImportOptions, Layout, RowBlock, Sink};
use crate::array::to_expert_ids;
use crate::error::{FormatError, Result};
use crate::profile::{RouterInfo, Scoring};
use crate::{MAX_EXPERTS, MAX_LAYERS};

/// Name of the file with the chosen experts.
pub(super) const ROUTES: &str = "routes_u8.bin";
const TOP_K: usize = 4;
/// Rows that are read at a time.
const BLOCK_ROWS: usize = 4096;

/// One contiguous range of tokens of one data set.
struct Segment {
    tokens: usize,
    domain: u16,
}

pub(crate) fn read(inputs: &[PathBuf], options: &ImportOptions, sink: &mut Sink<'_>) -> Result<()> {
    let layers = options.num_hidden_layers.unwrap_or(24) as usize;
    let top_k = options.top_k.unwrap_or(TOP_K);
    let num_experts = options.num_experts.unwrap_or(32);
    let limits =
        [("layers", layers, MAX_LAYERS), ("top_k", top_k, 256), ("experts", num_experts, MAX_EXPERTS)];
    for (what, n, max) in limits {
        if n == 0 || n > max {
            return Err(FormatError::Request(format!("{what} is {n}, expected 1 to {max}")));
        }
    }
    let routes: Vec<PathBuf> =
        inputs.iter().map(|p| if p.is_dir() { p.join(ROUTES) } else { p.clone() }).collect();
    let mut domains = Vec::new();
    let mut plans = Vec::new();
    let mut with_weights = true;
    for path in &routes {
        let (file, len) = crate::io::open(path)?;
        let row_bytes = (layers * top_k) as u64;
        if len == 0 || len % row_bytes != 0 {
            let message =
                format!("has {len} bytes, expected a multiple of {layers} layers x {top_k}, and not zero");
            return Err(FormatError::bad(path, "", message));
        }
        let gates_path = path.with_file_name("gates_u8.bin");
        let gates = if gates_path.is_file() {
            let (gates, gates_len) = crate::io::open(&gates_path)?;
            if gates_len != len {
                let message = format!("has {gates_len} bytes, {ROUTES} has {len}");
                return Err(FormatError::bad(&gates_path, "", message));
            }
            Some(gates)
        } else {
            with_weights = false;
            None
        };
        let tokens = (len / row_bytes) as usize;
        let segments = segments(&path.with_file_name("segments.csv"), tokens, &mut domains)?;
        plans.push((path, file, gates, segments, tokens));
    }
    let with_domains = plans.iter().all(|(_, _, _, segments, _)| segments.is_some());
    sink.begin(Layout {
        num_experts,
        top_k: Some(top_k),
        layer_ids: (0..layers as u32).collect(),
        num_hidden_layers: Some(layers as u32),
        model: (num_experts == 32 && layers == 24).then(|| "gpt-oss-20b".to_owned()),
        domains: if with_domains { domains } else { Vec::new() },
        // Softmax over the chosen logits is softmax over all, renormalised.
        router: Some(RouterInfo { norm_topk_prob: true, scoring: Scoring::Softmax, ..RouterInfo::default() }),
    })?;
    if with_weights {
        sink.note("weights were stored in steps of 1/255");
    }
    let total: u64 = plans.iter().map(|(.., tokens)| *tokens as u64).sum();
    let mut done = 0;
    for (path, file, gates, segments, tokens) in plans {
        let (gates, segments) = (gates.filter(|_| with_weights), segments.filter(|_| with_domains));
        let shape = (tokens, layers, top_k, num_experts);
        stream(path, file, gates, segments, shape, (&mut done, total), sink)?;
    }
    Ok(())
}

/// Reads `segments.csv`; `None` if there is none.
fn segments(path: &Path, tokens: usize, names: &mut Vec<String>) -> Result<Option<Vec<Segment>>> {
    if !path.is_file() {
        return Ok(None);
    }
    let bad = |line: u64, message: String| FormatError::bad(path, format!("line {line}"), message);
    let broken = |e: csv::Error| FormatError::bad(path, "", e.to_string());
    let mut reader = csv::Reader::from_reader(crate::io::open(path)?.0);
    let headers = reader.headers().map_err(broken)?.clone();
    let column = |name: &str| {
        headers.iter().position(|h| h == name).ok_or_else(|| bad(1, format!("there is no column {name}")))
    };
    let (offset, length, dataset) = (column("token_offset")?, column("tokens")?, column("dataset")?);
    let mut segments = Vec::new();
    let mut end = 0_usize;
    for record in reader.records() {
        let record = record.map_err(broken)?;
        let line = record.position().map_or(0, csv::Position::line);
        let number = |i: usize| {
            let text = record.get(i).unwrap_or_default();
            text.parse::<usize>().map_err(|_| bad(line, format!("{text:?} is not a number of tokens")))
        };
        let (from, n) = (number(offset)?, number(length)?);
        if from != end {
            return Err(bad(line, format!("starts at token {from}, the segment before ends at {end}")));
        }
        end = from.checked_add(n).ok_or_else(|| bad(line, format!("has {n} tokens")))?;
        let name = record.get(dataset).unwrap_or_default();
        let domain = names.iter().position(|d| d == name).unwrap_or_else(|| {
            names.push(name.to_owned());
            names.len() - 1
        });
        let domain =
            u16::try_from(domain).map_err(|_| bad(line, "there are too many data sets".to_owned()))?;
        segments.push(Segment { tokens: n, domain });
    }
    if end != tokens {
        let message = format!("its segments end at token {end}, {ROUTES} has {tokens} tokens");
        return Err(FormatError::bad(path, "", message));
    }
    Ok(Some(segments))
}

fn stream(
    path: &Path,
    file: File,
    gates: Option<File>,
    segments: Option<Vec<Segment>>,
    (tokens, layers, k, num_experts): (usize, usize, usize, usize),
    (done, total): (&mut u64, u64),
    sink: &mut Sink<'_>,
) -> Result<()> {
    let width = layers * k;
    let mut routes = BufReader::with_capacity(1 << 18, file);
    let mut gates = gates.map(|g| BufReader::with_capacity(1 << 18, g));
    let mut of_token = segments.iter().flatten().flat_map(|s| std::iter::repeat_n(s.domain, s.tokens));
    let (mut raw, mut raw_gates) = (Vec::new(), Vec::new());
    let (mut ids, mut weights) = (Vec::new(), Vec::new());
    let mut first_row = 0;
    while first_row < tokens {
        let n = BLOCK_ROWS.min(tokens - first_row);
        raw.resize(n * width, 0_u8);
        routes.read_exact(&mut raw).map_err(|e| FormatError::io("read", path, e))?;
        if let Some(gates) = &mut gates {
            raw_gates.resize(n * width, 0_u8);
            gates
                .read_exact(&mut raw_gates)
                .map_err(|e| FormatError::io("read", path.with_file_name("gates_u8.bin"), e))?;
        }
        let domains: Vec<u16> = of_token.by_ref().take(n).collect();
        for layer in 0..layers {
            let part = |all: &[u8]| -> Vec<u8> {
                all.chunks_exact(width).flat_map(|t| t.iter().skip(layer * k).take(k).copied()).collect()
            };
            let at = At { file: path, layer, first_row };
            let layer_ids = part(&raw).into_iter().map(i64::from);
            to_expert_ids(layer_ids, k, num_experts, (path, layer, first_row), &mut ids)?;
            weights.clear();
            weights.extend(part(&raw_gates).into_iter().map(|w| f32::from(w) / 255.0));
            let block = RowBlock {
                expert_ids: &ids,
                weights: gates.is_some().then_some(&weights),
                domains: segments.is_some().then_some(&domains),
                ..RowBlock::default()
            };
            sink.append(at, block)?;
        }
        first_row += n;
        *done += n as u64;
        sink.progress(*done, total);
    }
    Ok(())
}

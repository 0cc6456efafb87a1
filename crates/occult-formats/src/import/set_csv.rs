//! Expert sets with their occurrences as CSV: `domain,layer,..,e0,..,eK-1` and a column `occurrences`. The exact top-8 sets
//! of OLMoE and the exact pairs of Mixtral have this form; layers are the model's numbers.
//!
//! The file is read twice: for the layers and domains, then for the rows.

use std::collections::BTreeSet;
use std::fs::File;
use std::path::{Path, PathBuf};

use super::{At, ImportOptions, Layout, RowBlock, Sink};
use crate::MAX_LAYERS;
use crate::array::to_expert_ids;
use crate::error::{FormatError, Result};

/// What is known of the model a file comes from.
pub(super) struct Model {
    pub(super) name: &'static str,
    pub(super) num_experts: usize,
    pub(super) num_hidden_layers: u32,
}

pub(super) const OLMOE: Model = Model { name: "OLMoE-1B-7B", num_experts: 64, num_hidden_layers: 16 };
pub(super) const MIXTRAL: Model = Model { name: "Mixtral-8x7B", num_experts: 8, num_hidden_layers: 32 };

/// Positions of the columns.
#[derive(Debug, PartialEq)]
struct Columns {
    domain: usize,
    layer: usize,
    occurrences: usize,
    experts: Vec<usize>,
}

/// Reads the header line; `None` if it is not one of such a file.
fn columns<'a>(header: impl Iterator<Item = &'a str> + Clone) -> Option<Columns> {
    let find = |name: &str| header.clone().position(|h| h == name);
    let experts: Vec<usize> = (0..header.clone().count()).map_while(|i| find(&format!("e{i}"))).collect();
    let (domain, layer, occurrences) = (find("domain")?, find("layer")?, find("occurrences")?);
    (!experts.is_empty()).then_some(Columns { domain, layer, occurrences, experts })
}

/// Number of experts in a row of a file with this header line; `None` if it is another kind of file.
pub(super) fn top_k_of(header: &str) -> Option<usize> {
    Some(columns(header.trim().split(','))?.experts.len())
}

/// Rows of one layer that wait to be appended.
#[derive(Default)]
struct Pending {
    ids: Vec<i64>,
    occurrences: Vec<u32>,
    domains: Vec<u16>,
    first_row: usize,
}

const BLOCK_ROWS: usize = 4096;

pub(crate) fn read(
    inputs: &[PathBuf],
    options: &ImportOptions,
    sink: &mut Sink<'_>,
    model: &Model,
) -> Result<()> {
    let (mut layers, mut domains, mut top_k) = (BTreeSet::new(), Vec::new(), None);
    for path in inputs {
        for_each_row(path, &mut |row| {
            if *top_k.get_or_insert(row.experts.len()) != row.experts.len() {
                return Err(row.bad(format!(
                    "{} experts in a row, the file before has another number",
                    row.experts.len()
                )));
            }
            if !domains.contains(&row.domain) {
                domains.push(row.domain.clone());
                if domains.len() > usize::from(u16::MAX) {
                    return Err(row.bad("there are too many domains"));
                }
            }
            layers.insert(row.layer);
            if layers.len() > MAX_LAYERS {
                return Err(row.bad(format!("there are more than {MAX_LAYERS} layers")));
            }
            Ok(())
        })?;
    }
    let first = inputs.first().map(PathBuf::as_path).unwrap_or(Path::new(""));
    let Some(top_k) = top_k else {
        return Err(FormatError::bad(first, "", "has a header, but no rows"));
    };
    let num_experts = options.num_experts.unwrap_or(model.num_experts);
    let usual = num_experts == model.num_experts;
    let layer_ids: Vec<u32> = layers.into_iter().collect();
    sink.begin(Layout {
        num_experts,
        top_k: Some(top_k),
        layer_ids: layer_ids.clone(),
        num_hidden_layers: Some(model.num_hidden_layers)
            .filter(|&n| usual && layer_ids.last().is_none_or(|&l| l < n)),
        model: usual.then(|| model.name.to_owned()),
        domains: domains.clone(),
        router: None,
    })?;
    sink.note(
        "rows are distinct expert sets with their occurrences; ids ascend, the order of weights is not known",
    );
    for (i, path) in inputs.iter().enumerate() {
        let mut pending: Vec<Pending> = layer_ids.iter().map(|_| Pending::default()).collect();
        for_each_row(path, &mut |row| {
            let at = layer_ids.binary_search(&row.layer).ok();
            let domain = domains.iter().position(|d| *d == row.domain);
            let (Some(layer), Some(domain)) = (at, domain) else {
                return Err(row.bad("was not there a moment ago: the file changed"));
            };
            if let Some(rows) = pending.get_mut(layer) {
                rows.ids.extend(&row.experts);
                rows.occurrences.push(row.occurrences);
                rows.domains.push(domain as u16);
                if rows.occurrences.len() >= BLOCK_ROWS {
                    flush(path, layer, rows, (top_k, num_experts), sink)?;
                }
            }
            Ok(())
        })?;
        for (layer, rows) in pending.iter_mut().enumerate() {
            flush(path, layer, rows, (top_k, num_experts), sink)?;
        }
        sink.progress(i as u64 + 1, inputs.len() as u64);
    }
    Ok(())
}

fn flush(
    path: &Path,
    layer: usize,
    rows: &mut Pending,
    (top_k, num_experts): (usize, usize),
    sink: &mut Sink<'_>,
) -> Result<()> {
    let first_row = rows.first_row;
    let mut ids = Vec::new();
    to_expert_ids(rows.ids.iter().copied(), top_k, num_experts, (path, layer, first_row), &mut ids)?;
    let block = RowBlock {
        expert_ids: &ids,
        occurrences: Some(&rows.occurrences),
        domains: Some(&rows.domains),
        ..RowBlock::default()
    };
    sink.append(At { file: path, layer, first_row }, block)?;
    rows.first_row += rows.occurrences.len();
    rows.ids.clear();
    rows.occurrences.clear();
    rows.domains.clear();
    Ok(())
}

struct Row<'a> {
    path: &'a Path,
    line: u64,
    domain: String,
    layer: u32,
    occurrences: u32,
    experts: Vec<i64>,
}

impl Row<'_> {
    fn bad(&self, message: impl Into<String>) -> FormatError {
        FormatError::bad(self.path, format!("line {}", self.line), message)
    }
}

fn for_each_row(path: &Path, f: &mut dyn FnMut(&Row<'_>) -> Result<()>) -> Result<()> {
    let broken = |e: csv::Error| FormatError::bad(path, "", e.to_string());
    let mut reader: csv::Reader<File> = csv::Reader::from_reader(crate::io::open(path)?.0);
    let columns = columns(reader.headers().map_err(broken)?.iter()).ok_or_else(|| {
        FormatError::bad(path, "line 1", "expected columns domain, layer, occurrences, e0, e1 ...")
    })?;
    let mut record = csv::StringRecord::new();
    while reader.read_record(&mut record).map_err(broken)? {
        let line = record.position().map_or(0, csv::Position::line);
        let text = |i: usize| record.get(i).unwrap_or_default();
        let bad = |what: &str, text: &str| {
            FormatError::bad(path, format!("line {line}"), format!("{text:?} is not {what}"))
        };
        let occurrences = text(columns.occurrences);
        let layer = text(columns.layer);
        let experts = columns
            .experts
            .iter()
            .map(|&i| text(i).trim().parse::<i64>().map_err(|_| bad("an expert id", text(i))));
        let row = Row {
            path,
            line,
            domain: text(columns.domain).to_owned(),
            layer: layer.parse().map_err(|_| bad("a layer number", layer))?,
            occurrences: occurrences.parse().map_err(|_| bad("a number of occurrences", occurrences))?,
            experts: experts.collect::<Result<_>>()?,
        };
        if row.occurrences == 0 {
            return Err(row.bad("occurs zero times"));
        }
        f(&row)?;
    }
    Ok(())
}

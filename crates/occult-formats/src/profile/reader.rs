//! Opens a profile and reads it as a stream.

use std::path::Path;

use occult_plan::{CoActivation, Routing, RoutingBuf};

use super::writer::{check_order, check_total};
use super::{Column, FORMAT, ProfileMeta};
use crate::array::DType;
use crate::error::{FormatError, Result};
use crate::io::{get_f32, get_u16, get_u32, get_u64};
use crate::tensors::{TensorFile, TensorSpan};

/// An open profile. Nothing but its header is in memory; reads go to the file by position, so one `Profile` can be used by
/// several threads.
#[derive(Debug)]
pub struct Profile {
    file: TensorFile,
    meta: ProfileMeta,
    layers: Vec<LayerSpans>,
}

#[derive(Debug, Default)]
struct LayerSpans {
    rows: Option<usize>,
    spans: [Option<TensorSpan>; Column::ALL.len()],
}

impl LayerSpans {
    fn get(&self, column: Column) -> Option<&TensorSpan> {
        self.spans[column as usize].as_ref()
    }
}

/// Which columns to read besides ids and occurrences. A column that the layer does not have is `None` in the result.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Columns {
    /// Routing weights `[T, K]`.
    pub weights: bool,
    /// Scores of all experts `[T, E]`.
    pub scores: bool,
    /// Domain of each row `[T]`.
    pub domains: bool,
}

impl Columns {
    /// Ids and occurrences only.
    pub const IDS: Self = Self { weights: false, scores: false, domains: false };
    /// Everything there is.
    pub const ALL: Self = Self { weights: true, scores: true, domains: true };
}

/// Some consecutive rows of one layer, checked.
#[derive(Debug, Clone, Copy)]
pub struct Chunk<'a> {
    /// Row of the layer that this chunk starts with.
    pub first_row: usize,
    /// The rows.
    pub routing: Routing<'a>,
    /// Index into `meta.domains` of each row.
    pub domains: Option<&'a [u16]>,
}

/// Rows of one layer as owned data.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerRows {
    /// The rows, checked: `routing.view()` succeeds.
    pub routing: RoutingBuf,
    /// Index into `meta.domains` of each row.
    pub domains: Option<Vec<u16>>,
    /// Rows that the layer has in the file.
    pub total_rows: usize,
}

impl LayerRows {
    /// Row of the file that row `i` here was taken from.
    pub fn source_row(&self, i: usize) -> usize {
        spaced_row(i, self.routing.num_tokens(), self.total_rows)
    }
}

/// Row `i` of `n` evenly spaced ones of `total`.
fn spaced_row(i: usize, n: usize, total: usize) -> usize {
    (i as u128 * total as u128 / n.max(1) as u128) as usize
}

impl Profile {
    /// Opens a profile and checks its header, its description, and both against each other and the size of the file. Row
    /// values are checked when they are read.
    pub fn open(path: &Path) -> Result<Self> {
        let file = TensorFile::open(path)?;
        match file.metadata.get("format").map(String::as_str) {
            Some(FORMAT) => {}
            found => {
                let found = found.map_or("nothing".to_owned(), |f| format!("{f:?}"));
                let message =
                    format!("metadata `format` is {found}, expected {FORMAT:?}: not a routing profile");
                return Err(FormatError::bad(path, "", message));
            }
        }
        let text = file
            .metadata
            .get("meta")
            .ok_or_else(|| FormatError::bad(path, "metadata", "`meta` is missing"))?;
        let meta: ProfileMeta = serde_json::from_str(text)
            .map_err(|e| FormatError::bad(path, "metadata `meta`", e.to_string()))?;
        if let Some(problem) = meta.problem() {
            return Err(FormatError::bad(path, "metadata `meta`", problem));
        }
        let layers =
            (0..meta.num_layers()).map(|i| check_layer(&file, &meta, i)).collect::<Result<Vec<_>>>()?;
        Ok(Self { file, meta, layers })
    }

    /// The description.
    pub fn meta(&self) -> &ProfileMeta {
        &self.meta
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        &self.file.path
    }

    /// `L`, MoE layers in the file.
    pub fn num_layers(&self) -> usize {
        self.layers.len()
    }

    /// Rows of a layer; `None` if only counts or an order are known (or there is no such layer).
    pub fn num_rows(&self, layer: usize) -> Option<usize> {
        self.layers.get(layer)?.rows
    }

    /// Whether rows carry the weights of the chosen experts.
    pub fn has_weights(&self, layer: usize) -> bool {
        self.span(layer, Column::Weights).is_some()
    }

    /// Whether rows carry the scores of all experts.
    pub fn has_scores(&self, layer: usize) -> bool {
        self.span(layer, Column::RouterLogits).is_some()
    }

    /// Whether rows carry a domain.
    pub fn has_domains(&self, layer: usize) -> bool {
        self.span(layer, Column::Domains).is_some()
    }

    /// Whether rows stand for several tokens each.
    pub fn has_occurrences(&self, layer: usize) -> bool {
        self.span(layer, Column::Occurrences).is_some()
    }

    /// Whether tokens per expert are known.
    pub fn has_counts(&self, layer: usize) -> bool {
        self.span(layer, Column::Counts).is_some()
    }

    /// Whether tokens per pair of experts are known.
    pub fn has_coactivation(&self, layer: usize) -> bool {
        self.span(layer, Column::CoActivation).is_some()
    }

    /// Tokens per expert, `[E]`. An error if the source knew only an order.
    pub fn counts(&self, layer: usize) -> Result<Vec<u64>> {
        let span = self.span(layer, Column::Counts).ok_or_else(|| {
            self.bad(
                layer,
                "tokens per expert are not known: this profile holds an order of collaborators only",
            )
        })?;
        let counts = get_u64(&self.file.read_all(span)?);
        check_total("counts", &counts).map_err(|m| self.bad(layer, m))?;
        Ok(counts)
    }

    /// Tokens per pair of experts, where known.
    pub fn coactivation(&self, layer: usize) -> Result<Option<CoActivation>> {
        let Some(span) = self.span(layer, Column::CoActivation) else {
            return Ok(None);
        };
        let pairs = get_u64(&self.file.read_all(span)?);
        check_total("co-activation counts", &pairs).map_err(|m| self.bad(layer, m))?;
        let graph = CoActivation::from_counts(self.meta.num_experts, pairs);
        graph.map(Some).map_err(|e| FormatError::plan(self.path(), layer, 0, e))
    }

    /// For every expert the other experts by descending co-activation, `[E, E-1]`, where only that is known.
    pub fn collaborator_order(&self, layer: usize) -> Result<Option<Vec<u16>>> {
        let Some(span) = self.span(layer, Column::Order) else {
            return Ok(None);
        };
        let order = get_u16(&self.file.read_all(span)?);
        check_order(self.meta.num_experts, &order).map_err(|m| self.bad(layer, m))?;
        Ok(Some(order))
    }

    /// Streams the rows of a layer in order, `chunk_rows` at a time. Ids are checked (range, duplicates), weights and
    /// scores too (finite); the error names layer and row.
    pub fn for_each_chunk(
        &self,
        layer: usize,
        columns: Columns,
        chunk_rows: usize,
        f: &mut dyn FnMut(Chunk<'_>) -> Result<()>,
    ) -> Result<()> {
        let total = self.rows_or_error(layer)?;
        let mut first_row = 0;
        while first_row < total {
            let n = chunk_rows.max(1).min(total - first_row);
            let (routing, domains) = self.read_range(layer, columns, first_row, n)?;
            let view = routing.view().map_err(|e| FormatError::plan(self.path(), layer, first_row, e))?;
            f(Chunk { first_row, routing: view, domains: domains.as_deref() })?;
            first_row += n;
        }
        Ok(())
    }

    /// At most `max_rows` rows, evenly spaced over the layer ([`LayerRows::source_row`]).
    pub fn read_rows(&self, layer: usize, columns: Columns, max_rows: usize) -> Result<LayerRows> {
        let total = self.rows_or_error(layer)?;
        let n = max_rows.min(total);
        let (mut all, mut domains) = self.read_range(layer, columns, 0, 0)?;
        // Far apart: fetch single rows. Close together: read through, and keep what is asked for.
        let block = if n > 0 && total / n >= 64 { 1 } else { 4096 };
        let mut i = 0;
        while i < n {
            let first_row = spaced_row(i, n, total);
            let (part, part_domains) =
                self.read_range(layer, columns, first_row, block.min(total - first_row))?;
            part.view().map_err(|e| FormatError::plan(self.path(), layer, first_row, e))?;
            let last = first_row + part.num_tokens();
            while i < n && spaced_row(i, n, total) < last {
                let row = spaced_row(i, n, total) - first_row;
                copy_row(&part.expert_ids, &mut all.expert_ids, row, part.top_k);
                copy_optional(&part.weights, &mut all.weights, row, part.top_k);
                copy_optional(&part.scores, &mut all.scores, row, part.num_experts);
                copy_optional(&part.occurrences, &mut all.occurrences, row, 1);
                copy_optional(&part_domains, &mut domains, row, 1);
                i += 1;
            }
        }
        Ok(LayerRows { routing: all, domains, total_rows: total })
    }

    fn span(&self, layer: usize, column: Column) -> Option<&TensorSpan> {
        self.layers.get(layer)?.get(column)
    }

    fn bad(&self, layer: usize, message: impl Into<String>) -> FormatError {
        FormatError::bad(self.path(), format!("layer {layer}"), message)
    }

    fn rows_or_error(&self, layer: usize) -> Result<usize> {
        match self.layers.get(layer) {
            None => Err(self.bad(layer, format!("there are {} layers", self.layers.len()))),
            Some(LayerSpans { rows: Some(rows), .. }) => Ok(*rows),
            Some(_) => {
                Err(self.bad(layer, "holds no expert sets of tokens, only what was counted over them"))
            }
        }
    }

    /// Unchecked values of `n` rows from `first`; the range lies in the layer.
    fn read_range(
        &self,
        layer: usize,
        columns: Columns,
        first: usize,
        n: usize,
    ) -> Result<(RoutingBuf, Option<Vec<u16>>)> {
        let (e, k) = (self.meta.num_experts, self.meta.top_k.unwrap_or(0));
        // A layer with rows was checked to have bytes for all of them, so these products fit.
        let read = |column: Column, wanted: bool, row_bytes: usize| -> Result<Option<Vec<u8>>> {
            match self.span(layer, column) {
                Some(span) if wanted => {
                    self.file.read(span, first as u64 * row_bytes as u64, n * row_bytes).map(Some)
                }
                _ => Ok(None),
            }
        };
        let ids = read(Column::ExpertIds, true, 2 * k)?.unwrap_or_default();
        let routing = RoutingBuf {
            num_experts: e,
            top_k: k,
            expert_ids: get_u16(&ids),
            weights: read(Column::Weights, columns.weights, 4 * k)?.map(|b| get_f32(&b)),
            scores: read(Column::RouterLogits, columns.scores, 4 * e)?.map(|b| get_f32(&b)),
            occurrences: read(Column::Occurrences, true, 4)?.map(|b| get_u32(&b)),
        };
        let domains = read(Column::Domains, columns.domains, 2)?.map(|b| get_u16(&b));
        let names = self.meta.domains.len();
        if let Some(i) = domains.iter().flatten().position(|&d| names > 0 && usize::from(d) >= names) {
            let message = format!("row {}: its domain has no name, there are {names} domains", first + i);
            return Err(self.bad(layer, message));
        }
        Ok((routing, domains))
    }
}

fn copy_row<T: Copy>(from: &[T], to: &mut Vec<T>, row: usize, width: usize) {
    to.extend(from.iter().skip(row * width).take(width));
}

fn copy_optional<T: Copy>(from: &Option<Vec<T>>, to: &mut Option<Vec<T>>, row: usize, width: usize) {
    if let (Some(from), Some(to)) = (from, to) {
        copy_row(from, to, row, width);
    }
}

/// Finds a layer's tensors and checks types and shapes against the description.
fn check_layer(file: &TensorFile, meta: &ProfileMeta, layer: usize) -> Result<LayerSpans> {
    let e = meta.num_experts;
    let mut found = LayerSpans::default();
    if let Some(ids) = file.tensors.get(&Column::ExpertIds.tensor(layer)) {
        let rows = ids.shape.first().copied().unwrap_or(0);
        if rows == 0 || meta.top_k.is_none() {
            let message =
                format!("shape {:?}, expected [rows, top_k] with rows and a known top_k", ids.shape);
            return Err(FormatError::bad(&file.path, Column::ExpertIds.tensor(layer), message));
        }
        found.rows = Some(rows);
    }
    for column in Column::ALL {
        let name = column.tensor(layer);
        let Some(span) = file.tensors.get(&name) else {
            continue;
        };
        let rows = match (column, found.rows) {
            (Column::Counts | Column::CoActivation | Column::Order, _) => 0,
            (_, Some(rows)) => rows,
            (_, None) => {
                return Err(FormatError::bad(&file.path, name, "exists, but the layer has no expert_ids"));
            }
        };
        let (types, shape): (&[DType], _) = match column {
            Column::Counts => (&[DType::U64, DType::I64], vec![e]),
            Column::CoActivation => (&[DType::U64], vec![e, e]),
            Column::Order => (&[DType::U16], vec![e, e - 1]),
            Column::ExpertIds => (&[DType::U16], vec![rows, meta.top_k.unwrap_or(0)]),
            Column::Weights => (&[DType::F32], vec![rows, meta.top_k.unwrap_or(0)]),
            Column::RouterLogits => (&[DType::F32], vec![rows, e]),
            Column::Occurrences => (&[DType::U32], vec![rows]),
            Column::Domains => (&[DType::U16], vec![rows]),
        };
        if !types.contains(&span.dtype) || span.shape != shape {
            let message = format!("is {:?} {:?}, expected {:?} {shape:?}", span.dtype, span.shape, types[0]);
            return Err(FormatError::bad(&file.path, name, message));
        }
        found.spans[column as usize] = Some(span.clone());
    }
    if found.get(Column::Counts).is_none() && found.get(Column::Order).is_none() {
        return Err(FormatError::bad(&file.path, Column::Counts.tensor(layer), "is missing"));
    }
    Ok(found)
}

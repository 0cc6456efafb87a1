//! Load per layer and expert, as EPLB takes it: `[layers, experts]` as JSON (`[[..]]`, or SGLang's `logical_count`, also
//! `[steps, layers, experts]`, which is added up), `.npy`, one 2-D tensor of a safetensors file, or lines of numbers
//! separated by commas or spaces.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::lines::Lines;
use super::{ImportOptions, Layout, Sink};
use crate::array::ArrayStream;
use crate::error::{FormatError, Result};
use crate::tensors::{TensorFile, looks_like_safetensors};
use crate::{MAX_EXPERTS, MAX_LAYERS};

/// Keys under which a table is looked for.
const KEYS: [&str; 5] = ["logical_count", "load", "loads", "weight", "counts"];

type Table = Vec<Vec<f64>>;

#[derive(Deserialize)]
#[serde(untagged)]
enum Json {
    Keyed(std::collections::BTreeMap<String, serde_json::Value>),
    Table(Table),
    Steps(Vec<Table>),
}

pub(crate) fn read(inputs: &[PathBuf], options: &ImportOptions, sink: &mut Sink<'_>) -> Result<()> {
    let mut sum: Option<(Table, &Path)> = None;
    for path in inputs {
        let table = load(path)?;
        check(path, &table)?;
        match &mut sum {
            None => sum = Some((table, path)),
            Some((sum, first)) => {
                let shape = |t: &Table| (t.len(), t.first().map_or(0, Vec::len));
                if shape(sum) != shape(&table) {
                    let (a, b) = (shape(sum), shape(&table));
                    let message = format!(
                        "layer or expert counts differ: {} has {a:?}, {} has {b:?}",
                        crate::io::file_name(first),
                        crate::io::file_name(path)
                    );
                    return Err(FormatError::bad(path, "", message));
                }
                sum.iter_mut().zip(&table).for_each(|(a, b)| add(a, b));
            }
        }
    }
    let Some((table, first)) = sum else {
        return Ok(());
    };
    if inputs.len() > 1 {
        sink.note("the loads of all files were added up");
    }
    // Engines that keep a row for every hidden layer leave dense layers at zero.
    let loaded = |row: &[f64]| row.iter().any(|&v| v > 0.0);
    let layer_ids: Vec<u32> =
        (0..table.len() as u32).zip(&table).filter(|(_, row)| loaded(row)).map(|(l, _)| l).collect();
    if layer_ids.is_empty() {
        return Err(FormatError::bad(first, "", "all loads are zero"));
    }
    let dense = layer_ids.len() < table.len();
    if dense {
        let dropped = table.len() - layer_ids.len();
        sink.warn(format!("{dropped} layers without any load were left out (dense layers?)"));
    }
    sink.begin(Layout {
        num_experts: table.first().map_or(0, Vec::len),
        top_k: options.top_k,
        layer_ids,
        num_hidden_layers: dense.then_some(table.len() as u32),
        ..Layout::default()
    })?;
    // Counts are whole; loads that are estimates may not be.
    let whole = table.iter().flatten().all(|v| v.fract() == 0.0);
    let scale = if whole { 1.0 } else { 1e6 };
    if !whole {
        sink.warn("loads are fractions: they were multiplied by 1,000,000 and rounded");
    }
    for (layer, row) in table.iter().filter(|row| loaded(row)).enumerate() {
        let counts = row.iter().map(|v| (v * scale).round() as u64).collect();
        sink.set_counts(first, layer, counts, None)?;
    }
    sink.progress(1, 1);
    Ok(())
}

fn add(sum: &mut [f64], row: &[f64]) {
    sum.iter_mut().zip(row).for_each(|(a, b)| *a += b);
}

/// Every layer as wide as the first, every load a number that is not negative.
fn check(path: &Path, table: &Table) -> Result<()> {
    let width = table.first().map_or(0, Vec::len);
    if table.len() > MAX_LAYERS || width == 0 || width > MAX_EXPERTS {
        let message = format!(
            "is a table of {} layers and {width} experts, expected 1 to {MAX_LAYERS} and 1 to {MAX_EXPERTS}",
            table.len()
        );
        return Err(FormatError::bad(path, "", message));
    }
    for (layer, row) in table.iter().enumerate() {
        let place = format!("layer {layer}");
        if row.len() != width {
            let message = format!("has {} experts, layer 0 has {width}", row.len());
            return Err(FormatError::bad(path, place, message));
        }
        if let Some((expert, load)) = row.iter().enumerate().find(|(_, v)| !v.is_finite() || **v < 0.0) {
            let message = format!("expert {expert}: load {load}, expected a number that is not negative");
            return Err(FormatError::bad(path, place, message));
        }
    }
    Ok(())
}

fn load(path: &Path) -> Result<Table> {
    let (prefix, len) = crate::io::read_prefix(path, 64)?;
    if prefix.starts_with(crate::npy::MAGIC) {
        return from_array(crate::npy::open_npy(path)?);
    }
    if looks_like_safetensors(&prefix, len) {
        return from_safetensors(path);
    }
    match prefix.trim_ascii_start().first() {
        Some(b'[' | b'{') => from_json(path),
        _ => from_text(path),
    }
}

fn from_array(mut array: ArrayStream) -> Result<Table> {
    let (steps, layers, experts) = match array.shape[..] {
        [layers, experts] => (1, layers, experts),
        [steps, layers, experts] => (steps, layers, experts),
        _ => return Err(array.bad(format!("has shape {:?}, expected [layers, experts]", array.shape))),
    };
    if steps == 0 || layers == 0 || layers > MAX_LAYERS || experts == 0 || experts > MAX_EXPERTS {
        return Err(array.bad(format!("has shape {:?}, which cannot be [layers, experts]", array.shape)));
    }
    let rows = if array.shape.len() == 2 { layers } else { 1 };
    let mut table: Table = vec![vec![0.0; experts]; layers];
    for _ in 0..steps {
        let values = array.read_numbers(rows)?;
        table.iter_mut().zip(values.chunks_exact(experts)).for_each(|(a, b)| add(a, b));
    }
    array.finish()?;
    Ok(table)
}

fn from_safetensors(path: &Path) -> Result<Table> {
    let file = TensorFile::open(path)?;
    let named = KEYS.iter().copied().find(|k| file.tensors.contains_key(*k));
    let name = match (named, file.tensors.len()) {
        (Some(name), _) => name.to_owned(),
        (None, 1) => file.tensors.keys().next().cloned().unwrap_or_default(),
        (None, n) => {
            let message = format!("has {n} tensors, none of them named {}", KEYS.join(", "));
            return Err(FormatError::bad(path, "", message));
        }
    };
    match super::safetensors::tensor(&file, &name)? {
        Some(array) => from_array(array),
        None => Err(FormatError::bad(path, "", format!("has no tensor {name}"))),
    }
}

fn from_json(path: &Path) -> Result<Table> {
    let shape_error =
        |_| FormatError::bad(path, "", "expected numbers [layers][experts] or [steps][layers][experts]");
    let text = crate::io::read_whole(path)?;
    let value: serde_json::Value =
        serde_json::from_slice(&text).map_err(|e| FormatError::bad(path, "", format!("broken JSON: {e}")))?;
    let json = match serde_json::from_value(value).map_err(shape_error)? {
        Json::Keyed(mut map) => {
            let value = KEYS.iter().find_map(|k| map.remove(*k)).ok_or_else(|| {
                FormatError::bad(path, "", format!("has none of the keys {}", KEYS.join(", ")))
            })?;
            serde_json::from_value(value).map_err(shape_error)?
        }
        json => json,
    };
    match json {
        Json::Table(table) => Ok(table),
        Json::Steps(steps) => {
            let mut steps = steps.into_iter();
            let mut sum = steps.next().unwrap_or_default();
            for (i, step) in steps.enumerate() {
                let widths = |t: &Table| t.iter().map(Vec::len).collect::<Vec<_>>();
                if widths(&step) != widths(&sum) {
                    let message = "has another shape than step 0";
                    return Err(FormatError::bad(path, format!("step {}", i + 1), message));
                }
                sum.iter_mut().zip(&step).for_each(|(a, b)| add(a, b));
            }
            Ok(sum)
        }
        Json::Keyed(_) => Err(FormatError::bad(path, "", "holds objects inside objects, expected a table")),
    }
}

fn from_text(path: &Path) -> Result<Table> {
    let mut lines = Lines::open(path)?;
    let mut table = Table::new();
    while let Some(line) = lines.next_line()? {
        let line = String::from_utf8_lossy(line).into_owned();
        if line.starts_with('#') {
            continue;
        }
        let row = line
            .split([',', ';', ' ', '\t'])
            .filter(|field| !field.is_empty())
            .map(|field| field.parse::<f64>().map_err(|_| lines.bad(format!("{field:?} is not a number"))))
            .collect::<Result<Vec<f64>>>()?;
        if table.len() >= MAX_LAYERS {
            return Err(lines.bad(format!("there are more than {MAX_LAYERS} layers")));
        }
        table.push(row);
    }
    Ok(table)
}

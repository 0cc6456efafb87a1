//! Writing safetensors files and model directories.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::sync::Arc;

use memmap2::Mmap;
use safetensors::Dtype;
use serde_json::{Value, json};

use crate::error::{ModelError, Result};
use crate::quantise::Quantising;
use crate::weight::{StoredDtype, Weight};

/// Bytes between two words about progress.
const PIECE: usize = 8 << 20;

/// A piece of a tensor's bytes.
#[derive(Debug, Clone)]
pub(crate) enum Part {
    /// Values, converted to the tensor's format when they have another.
    Values(Weight),
    /// Bytes of a source file, of whatever format.
    Raw(Arc<Mmap>, usize, usize),
    /// Bytes that are here.
    Bytes(Vec<u8>),
    /// Levels of a matrix, which is quantised when they are written.
    Levels(Arc<Quantising>),
    /// Its scales; to be written after the levels.
    Scales(Arc<Quantising>),
}

/// A tensor to write: its parts follow each other.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    /// Where `dtype` is one of ours, the format that values are converted to.
    pub(crate) stored: Option<StoredDtype>,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: usize,
    pub(crate) parts: Vec<Part>,
}

impl Entry {
    pub(crate) fn of_values(name: String, shape: Vec<usize>, dtype: StoredDtype, parts: Vec<Weight>) -> Self {
        let bytes = shape.iter().product::<usize>() * dtype.bytes();
        let parts = parts.into_iter().map(Part::Values).collect();
        Self { name, dtype: dtype.safetensors(), stored: Some(dtype), shape, bytes, parts }
    }

    fn write(&self, path: &Path, out: &mut impl Write, wrote: &mut dyn FnMut(u64)) -> Result<()> {
        let failed = |e| ModelError::io("write", path, e);
        let mut written = 0;
        for part in &self.parts {
            let (cast, levels, scales);
            let bytes = match (part, self.stored) {
                (Part::Raw(map, from, to), _) => &map[*from..*to],
                (Part::Bytes(bytes), _) => bytes,
                (Part::Levels(quantising), _) => {
                    levels = quantising.levels()?;
                    &levels
                }
                (Part::Scales(quantising), _) => {
                    scales = quantising.scales();
                    bytemuck::cast_slice(&scales)
                }
                (Part::Values(w), Some(dtype)) if dtype != w.dtype() || w.quant_layout().is_some() => {
                    cast = w.cast(dtype)?;
                    cast.bytes()
                }
                (Part::Values(w), _) => w.bytes(),
            };
            for piece in bytes.chunks(PIECE) {
                out.write_all(piece).map_err(failed)?;
                wrote(piece.len() as u64);
            }
            written += bytes.len();
        }
        if written != self.bytes {
            let message = format!("its parts have {written} bytes, expected {}", self.bytes);
            return Err(ModelError::bad(path, format!("tensor {}", self.name), message));
        }
        Ok(())
    }
}

/// The order of the safetensors library: wide formats first, then by name.
pub(crate) fn sort(entries: &mut [Entry]) {
    entries.sort_by(|a, b| b.dtype.cmp(&a.dtype).then_with(|| a.name.cmp(&b.name)));
}

/// Writes one file, tensors in the given order, byte for byte as the safetensors library lays it out. `metadata` is the
/// text of the `__metadata__` object. `wrote` is told of every piece of data that is written.
pub(crate) fn write_file(
    path: &Path,
    metadata: Option<&str>,
    entries: &[Entry],
    wrote: &mut dyn FnMut(u64),
) -> Result<()> {
    let mut header = String::from("{");
    if let Some(metadata) = metadata {
        header.push_str(&format!("\"__metadata__\":{metadata},"));
    }
    let mut offset = 0;
    for e in entries {
        let to = offset + e.bytes;
        let name = Value::String(e.name.clone());
        let shape = json!(e.shape);
        let dtype = serde_json::to_string(&e.dtype)
            .map_err(|error| ModelError::bad(path, format!("tensor {}", e.name), error.to_string()))?;
        header.push_str(&format!(
            "{name}:{{\"dtype\":{dtype},\"shape\":{shape},\"data_offsets\":[{offset},{to}]}},"
        ));
        offset = to;
    }
    if header.ends_with(',') {
        header.pop();
    }
    header.push('}');
    while header.len() % 8 != 0 {
        header.push(' ');
    }
    let failed = |e| ModelError::io("write", path, e);
    let mut out = BufWriter::with_capacity(1 << 20, File::create(path).map_err(failed)?);
    out.write_all(&(header.len() as u64).to_le_bytes()).map_err(failed)?;
    out.write_all(header.as_bytes()).map_err(failed)?;
    for e in entries {
        e.write(path, &mut out, wrote)?;
    }
    out.into_inner().map_err(|e| failed(e.into_error()))?.sync_all().map_err(failed)
}

/// Writes an index the way the Hugging Face libraries do. `metadata` is the source's object.
pub(crate) fn write_index(
    path: &Path,
    metadata: Option<Value>,
    bytes: u64,
    files: &BTreeMap<String, String>,
) -> Result<()> {
    let mut metadata = metadata.filter(Value::is_object).unwrap_or_else(|| json!({}));
    metadata["total_size"] = json!(bytes);
    let index = json!({ "metadata": metadata, "weight_map": files });
    let text = serde_json::to_string_pretty(&index).unwrap_or_default() + "\n";
    std::fs::write(path, text).map_err(|e| ModelError::io("write", path, e))
}

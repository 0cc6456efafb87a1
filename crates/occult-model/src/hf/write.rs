//! Writing safetensors files and model directories.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
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

/// The beginning of a file: the length of the header, and the header. Tensors follow each other in the given order.
fn head<'a>(
    path: &Path,
    metadata: Option<&str>,
    tensors: impl Iterator<Item = (&'a str, Dtype, &'a [usize], usize)>,
) -> Result<Vec<u8>> {
    let mut header = String::from("{");
    if let Some(metadata) = metadata {
        header.push_str(&format!("\"__metadata__\":{metadata},"));
    }
    let mut offset = 0;
    for (name, dtype, shape, bytes) in tensors {
        let to = offset + bytes;
        let quoted = Value::String(name.to_owned());
        let shape = json!(shape);
        let dtype = serde_json::to_string(&dtype)
            .map_err(|error| ModelError::bad(path, format!("tensor {name}"), error.to_string()))?;
        header.push_str(&format!(
            "{quoted}:{{\"dtype\":{dtype},\"shape\":{shape},\"data_offsets\":[{offset},{to}]}},"
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
    Ok([(header.len() as u64).to_le_bytes().as_slice(), header.as_bytes()].concat())
}

/// Writes one file, tensors in the given order, byte for byte as the safetensors library lays it out. `metadata` is the
/// text of the `__metadata__` object. `wrote` is told of every piece of data that is written.
pub(crate) fn write_file(
    path: &Path,
    metadata: Option<&str>,
    entries: &[Entry],
    wrote: &mut dyn FnMut(u64),
) -> Result<()> {
    let failed = |e| ModelError::io("write", path, e);
    let head = head(
        path,
        metadata,
        entries.iter().map(|e| (e.name.as_str(), e.dtype, e.shape.as_slice(), e.bytes)),
    )?;
    let mut out = BufWriter::with_capacity(1 << 20, File::create(path).map_err(failed)?);
    out.write_all(&head).map_err(failed)?;
    for e in entries {
        e.write(path, &mut out, wrote)?;
    }
    out.into_inner().map_err(|e| failed(e.into_error()))?.sync_all().map_err(failed)
}

/// A tensor that a [`PlacedFile`] will get: its name and shape.
pub(crate) type Place = (String, Vec<usize>);

/// A file of tensors that come in any order, one at a time: each is written where it belongs, so none has to wait in memory.
/// It lies beside its final name and takes it when it is complete and on the disk; an unfinished one is removed.
#[derive(Debug)]
pub(crate) struct PlacedFile {
    path: PathBuf,
    partial: PathBuf,
    file: File,
    dtype: StoredDtype,
    /// Where each tensor's bytes begin, and how many they are; taken out when they are there.
    open: BTreeMap<String, (u64, usize)>,
}

impl PlacedFile {
    /// Begins the file `path` of tensors of one format, laid out as [`write_file`] does.
    pub(crate) fn create(
        path: &Path,
        metadata: Option<&str>,
        dtype: StoredDtype,
        mut places: Vec<Place>,
    ) -> Result<Self> {
        places.sort();
        let bytes = |shape: &[usize]| shape.iter().product::<usize>() * dtype.bytes();
        let tensors = places.iter().map(|(n, s)| (n.as_str(), dtype.safetensors(), s.as_slice(), bytes(s)));
        let head = head(path, metadata, tensors)?;
        let mut offset = head.len() as u64;
        let mut open = BTreeMap::new();
        for (name, shape) in &places {
            open.insert(name.clone(), (offset, bytes(shape)));
            offset += bytes(shape) as u64;
        }
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(".partial");
        let partial = path.with_file_name(name);
        let file = File::create(&partial).map_err(|e| ModelError::io("create", &partial, e))?;
        let mut new = Self { path: path.to_owned(), partial, file, dtype, open };
        new.file.write_all(&head).map_err(|e| ModelError::io("write", &new.partial, e))?;
        Ok(new)
    }

    /// Writes one tensor.
    pub(crate) fn put(&mut self, name: &str, weight: &Weight) -> Result<()> {
        let cast = weight.cast(self.dtype)?;
        let Some((offset, bytes)) = self.open.remove(name) else {
            return Err(ModelError::bad(&self.path, format!("tensor {name}"), "has no place in the file"));
        };
        if cast.bytes().len() != bytes {
            let message = format!("has {} bytes, expected {bytes}", cast.bytes().len());
            return Err(ModelError::bad(&self.path, format!("tensor {name}"), message));
        }
        let written = self.file.seek(SeekFrom::Start(offset)).and_then(|_| self.file.write_all(cast.bytes()));
        written.map_err(|e| ModelError::io("write", &self.partial, e))
    }

    /// Flushes the file and gives it its name. Errors when a tensor is missing.
    pub(crate) fn finish(self) -> Result<()> {
        if let Some(name) = self.open.keys().next() {
            return Err(ModelError::bad(&self.path, format!("tensor {name}"), "was not written"));
        }
        let failed = |e| ModelError::io("write", &self.path, e);
        self.file.sync_all().map_err(failed)?;
        fs::rename(&self.partial, &self.path).map_err(failed)?;
        sync_folder(&self.path).map_err(failed)
    }
}

impl Drop for PlacedFile {
    fn drop(&mut self) {
        // After `finish` the temporary name is gone; nothing to be done where removing fails.
        let _ = fs::remove_file(&self.partial);
    }
}

/// Flushes the entry of a file in its folder to the disk.
fn sync_folder(path: &Path) -> std::io::Result<()> {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // Only unix can open a folder; elsewhere the rename itself is all there is.
    if cfg!(unix) { File::open(folder)?.sync_all() } else { Ok(()) }
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
    fs::write(path, text).map_err(|e| ModelError::io("write", path, e))
}

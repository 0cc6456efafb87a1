//! `torch.save` archives: a zip file with `<name>/data.pkl` and one file `<name>/data/<key>` per storage.

use std::borrow::Cow;
use std::fs::File;
use std::io::{BufReader, Read, Seek};
use std::path::Path;
use std::sync::Arc;

use zip::{CompressionMethod, ZipArchive};

use super::{Element, MAX_STREAM_BYTES, Pickle};

/// Elements of a tensor that shows its storage repeatedly (an expanded tensor), at most.
const MAX_REPEATED: u64 = 4 << 20;

/// What follows the protocol in files of torch before 1.6: a pickled number of ten bytes.
const OLD_MAGIC: &[u8] = b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19";

/// A tensor of a `.pt` file: a view of a storage that [`TorchFile`] reads when asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tensor {
    element: Element,
    key: String,
    storage_bytes: u64,
    offset: u64,
    shape: Vec<usize>,
    strides: Vec<usize>,
    elements: usize,
}

impl Tensor {
    /// Checks that every element lies inside the storage.
    pub(crate) fn new(
        element: Element,
        key: String,
        storage_bytes: u64,
        offset: u64,
        shape: Vec<usize>,
        strides: Vec<usize>,
    ) -> Result<Self, String> {
        if shape.len() != strides.len() {
            return Err(format!("a tensor of shape {shape:?} has {} strides", strides.len()));
        }
        let elements = shape.iter().try_fold(1u64, |n, &d| n.checked_mul(d as u64));
        let elements = elements.ok_or_else(|| format!("a tensor of shape {shape:?} is too large"))?;
        let length = storage_bytes / element.size() as u64;
        let last = shape.iter().zip(&strides).try_fold(offset, |at, (&d, &s)| {
            at.checked_add((d as u64).saturating_sub(1).checked_mul(s as u64)?)
        });
        let inside = elements == 0 || last.is_some_and(|last| last < length);
        if !inside || elements > length.max(MAX_REPEATED) {
            return Err(format!(
                "a tensor of shape {shape:?}, strides {strides:?}, offset {offset} is not inside its storage of {length} elements"
            ));
        }
        let elements = usize::try_from(elements).map_err(|_| "a tensor is too large".to_string())?;
        Ok(Self { element, key, storage_bytes, offset, shape, strides, elements })
    }

    /// Element type.
    pub fn element(&self) -> Element {
        self.element
    }

    /// Lengths of the dimensions.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Elements in row-major order, read from the bytes of the whole storage.
    fn gather<T>(&self, storage: &[u8], read: impl Fn(&[u8]) -> Option<T>) -> Result<Vec<T>, String> {
        let size = self.element.size();
        let mut out = Vec::with_capacity(self.elements);
        let mut index = vec![0usize; self.shape.len()];
        // `new` checked the last element against the storage, so these products stay small.
        let mut at = self.offset as usize;
        for _ in 0..self.elements {
            let bytes = storage.get(at * size..(at + 1) * size).ok_or("a tensor is outside its storage")?;
            let value = read(bytes)
                .ok_or_else(|| format!("a value of type {} is not a whole number", self.element.name()))?;
            out.push(value);
            for ((i, &d), &stride) in index.iter_mut().zip(&self.shape).zip(&self.strides).rev() {
                *i += 1;
                at += stride;
                if *i < d {
                    break;
                }
                at -= *i * stride;
                *i = 0;
            }
        }
        Ok(out)
    }
}

/// An open `.pt` archive: its object, and its storages on demand.
pub struct TorchFile<R> {
    archive: ZipArchive<R>,
    folder: String,
    big_endian: bool,
    file_bytes: u64,
    pickle: Arc<Pickle>,
}

impl<R> std::fmt::Debug for TorchFile<R> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TorchFile").field("folder", &self.folder).finish_non_exhaustive()
    }
}

impl TorchFile<BufReader<File>> {
    /// Opens a file. `Err` says why in words; I/O errors are part of it.
    pub fn open(path: &Path) -> Result<Self, String> {
        let file = File::open(path).map_err(|e| format!("cannot be opened: {e}"))?;
        Self::new(BufReader::new(file))
    }
}

impl<R: Read + Seek> TorchFile<R> {
    /// Reads the directory and the pickle of an archive.
    pub fn new(mut reader: R) -> Result<Self, String> {
        let file_bytes =
            reader.seek(std::io::SeekFrom::End(0)).map_err(|e| format!("cannot be read: {e}"))?;
        reader.rewind().map_err(|e| format!("cannot be read: {e}"))?;
        let mut start = Vec::new();
        reader.by_ref().take(16).read_to_end(&mut start).map_err(|e| format!("cannot be read: {e}"))?;
        if start.get(2..).is_some_and(|s| s.starts_with(OLD_MAGIC)) {
            return Err(
                "was written by torch.save in its old format (not a zip archive); load and save it again \
                        with a current torch"
                    .into(),
            );
        }
        reader.rewind().map_err(|e| format!("cannot be read: {e}"))?;
        let mut archive = ZipArchive::new(reader).map_err(|e| format!("is not a zip archive: {e}"))?;
        let is_pickle = |n: &str| n == "data.pkl" || n.ends_with("/data.pkl");
        let name = archive.file_names().filter_map(Result::ok).find(|n| is_pickle(n)).map(Cow::into_owned);
        let name = name.ok_or("has no data.pkl inside: it was not written by torch.save")?;
        let folder = name.strip_suffix("data.pkl").unwrap_or_default().to_owned();
        let stream = read_entry(&mut archive, &name, file_bytes, MAX_STREAM_BYTES)?;
        let pickle = Pickle::parse(&stream).map_err(|e| format!("data.pkl: {e}"))?;
        let order = format!("{folder}byteorder");
        let big_endian = match archive.index_for_name(&order) {
            Some(_) => match read_entry(&mut archive, &order, file_bytes, 16)?.as_slice() {
                b"little" => false,
                b"big" => true,
                other => return Err(format!("byteorder is {:?}", String::from_utf8_lossy(other))),
            },
            None => false,
        };
        Ok(Self { archive, folder, big_endian, file_bytes, pickle: Arc::new(pickle) })
    }

    /// The saved object; shared, so that its tensors can be read while it is walked.
    pub fn pickle(&self) -> Arc<Pickle> {
        Arc::clone(&self.pickle)
    }

    /// All elements of an integer tensor of this file, row-major.
    pub fn read_i64(&mut self, tensor: &Tensor) -> Result<Vec<i64>, String> {
        let (element, big_endian) = (tensor.element, self.big_endian);
        let storage = self.storage(tensor)?;
        tensor.gather(&storage, |bytes| element.to_i64(bytes, big_endian))
    }

    /// All elements of a tensor of this file as doubles, row-major.
    pub fn read_f64(&mut self, tensor: &Tensor) -> Result<Vec<f64>, String> {
        let (element, big_endian) = (tensor.element, self.big_endian);
        let storage = self.storage(tensor)?;
        tensor.gather(&storage, |bytes| element.to_f64(bytes, big_endian))
    }

    fn storage(&mut self, tensor: &Tensor) -> Result<Vec<u8>, String> {
        let name = format!("{}data/{}", self.folder, tensor.key);
        let bytes = read_entry(&mut self.archive, &name, self.file_bytes, tensor.storage_bytes)?;
        if bytes.len() as u64 != tensor.storage_bytes {
            let (found, expected) = (bytes.len(), tensor.storage_bytes);
            return Err(format!("storage {name} has {found} bytes, data.pkl says {expected}"));
        }
        Ok(bytes)
    }
}

/// Reads an entry of at most `limit` bytes. `torch.save` compresses nothing, so an entry is never larger than the file.
fn read_entry<R: Read + Seek>(
    archive: &mut ZipArchive<R>,
    name: &str,
    file_bytes: u64,
    limit: u64,
) -> Result<Vec<u8>, String> {
    let entry = archive.by_name(name).map_err(|e| format!("entry {name}: {e}"))?;
    if entry.compression() != CompressionMethod::Stored {
        return Err(format!("entry {name} is compressed, torch.save compresses nothing"));
    }
    let size = entry.size();
    if size > file_bytes || size > limit {
        return Err(format!("entry {name} claims {size} bytes, expected at most {}", limit.min(file_bytes)));
    }
    let mut bytes = Vec::with_capacity(size as usize);
    entry.take(limit).read_to_end(&mut bytes).map_err(|e| format!("entry {name}: {e}"))?;
    Ok(bytes)
}

//! The header of a safetensors file, checked against the file. Data are read by position when they are needed.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use safetensors::tensor::Metadata;

use crate::array::DType;
use crate::error::{FormatError, Result};
use crate::io;

/// Where one tensor lies.
#[derive(Debug, Clone)]
pub(crate) struct TensorSpan {
    pub(crate) dtype: DType,
    pub(crate) shape: Vec<usize>,
    /// From the start of the file.
    pub(crate) offset: u64,
    pub(crate) bytes: u64,
}

/// An open safetensors file.
#[derive(Debug)]
pub(crate) struct TensorFile {
    pub(crate) path: PathBuf,
    pub(crate) file: File,
    pub(crate) tensors: BTreeMap<String, TensorSpan>,
    pub(crate) metadata: BTreeMap<String, String>,
}

/// Length limit of the header, the same as in the safetensors crate.
const MAX_HEADER: u64 = 100_000_000;

/// True if `prefix` can be the start of a safetensors file of `len` bytes.
pub(crate) fn looks_like_safetensors(prefix: &[u8], len: u64) -> bool {
    match prefix.first_chunk::<8>() {
        Some(n) => {
            let header = u64::from_le_bytes(*n);
            header >= 2 && header <= MAX_HEADER.min(len.saturating_sub(8)) && prefix.get(8) == Some(&b'{')
        }
        None => false,
    }
}

impl TensorFile {
    /// Reads and checks the header: lengths, offsets, shapes and dtypes agree with each other and with the file.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let (file, len) = io::open(path)?;
        let bad = |message: String| FormatError::bad(path, "safetensors header", message);
        let mut n = [0; 8];
        if len < 8 {
            return Err(bad(format!("the file has only {len} bytes")));
        }
        io::read_exact_at(&file, &mut n, 0).map_err(|e| FormatError::io("read", path, e))?;
        let header = u64::from_le_bytes(n);
        if header > MAX_HEADER || header > len - 8 {
            return Err(bad(format!("says it has {header} bytes, the file has {}", len - 8)));
        }
        let mut buffer = vec![0; header as usize];
        io::read_exact_at(&file, &mut buffer, 8).map_err(|e| FormatError::io("read", path, e))?;
        // Parsing checks that tensors follow each other without holes and that shapes fit their spans.
        let parsed: Metadata = serde_json::from_slice(&buffer).map_err(|e| bad(e.to_string()))?;
        let data = 8 + header;
        let mut tensors = BTreeMap::new();
        let mut end = 0;
        for (name, info) in parsed.tensors() {
            let (from, to) = (info.data_offsets.0 as u64, info.data_offsets.1 as u64);
            if from > to || to > len - data {
                let held = len - data;
                return Err(bad(format!(
                    "tensor {name} ends at byte {to} of the data, the file holds {held}"
                )));
            }
            end = end.max(to);
            let span = TensorSpan {
                dtype: DType::from_safetensors(info.dtype),
                shape: info.shape.clone(),
                offset: data + from,
                bytes: to - from,
            };
            tensors.insert(name, span);
        }
        if end != len - data {
            return Err(bad(format!("describes {end} bytes of data, the file holds {}", len - data)));
        }
        let metadata = parsed.metadata().iter().flatten().map(|(k, v)| (k.clone(), v.clone())).collect();
        Ok(Self { path: path.to_path_buf(), file, tensors, metadata })
    }

    /// Reads part of a tensor. The caller bounds `bytes`; the span is known to lie in the file.
    pub(crate) fn read(&self, span: &TensorSpan, from: u64, bytes: usize) -> Result<Vec<u8>> {
        let mut buf = vec![0; bytes];
        io::read_exact_at(&self.file, &mut buf, span.offset + from)
            .map_err(|e| FormatError::io("read", &self.path, e))?;
        Ok(buf)
    }

    /// Reads a whole tensor.
    pub(crate) fn read_all(&self, span: &TensorSpan) -> Result<Vec<u8>> {
        self.read(span, 0, span.bytes as usize)
    }
}

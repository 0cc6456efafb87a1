//! A rank's tensors as a safetensors file: `NAME`, `NAME.exp_avg`, `NAME.exp_avg_sq`, all f32.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use safetensors::tensor::Metadata;
use serde_json::{Map, Value, json};

use crate::error::{Result, TrainError};

/// Who has a parameter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// Every rank has the same.
    Replicated,
    /// This rank has the slices (along the first dimension) of these experts; ids are those of the model. Ranks use the same
    /// name for the parameter.
    Experts(Vec<u32>),
}

/// A parameter as it is saved; its master weights are asked for when they are written.
#[derive(Debug, Clone, Copy)]
pub struct Saved<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its shape; [e, ...] for experts.
    pub shape: &'a [usize],
    /// Who has it.
    pub kind: &'a Kind,
    /// First moment.
    pub mean: &'a [f32],
    /// Second moment.
    pub square: &'a [f32],
}

pub(crate) const SUFFIXES: [&str; 3] = ["", ".exp_avg", ".exp_avg_sq"];

/// Header of a shard with its length in front, which parameters of `saved` are in it, in this order, and its length in bytes.
/// Rank 0 saves the replicated parameters, others only experts.
pub(crate) fn layout(rank: usize, saved: &[Saved<'_>]) -> Result<(Vec<u8>, Vec<usize>, u64)> {
    let mut header = Map::new();
    let mut experts = BTreeMap::new();
    let mut written = vec![];
    let mut offset = 0u64;
    for (i, s) in saved.iter().enumerate() {
        let len: usize = s.shape.iter().product();
        let slices = match s.kind {
            Kind::Experts(ids) => Some(ids.len()),
            Kind::Replicated => None,
        };
        if slices.is_some_and(|n| s.shape.first() != Some(&n))
            || [s.mean, s.square].iter().any(|v| v.len() != len)
        {
            let message =
                format!("parameter {}: shape {:?} does not fit its values or experts", s.name, s.shape);
            return Err(TrainError::request(message));
        }
        match s.kind {
            Kind::Replicated if rank != 0 => continue,
            Kind::Replicated => {}
            Kind::Experts(ids) => {
                experts.insert(s.name, ids);
            }
        }
        for suffix in SUFFIXES {
            let end = offset + 4 * len as u64;
            let entry = json!({ "dtype": "F32", "shape": s.shape, "data_offsets": [offset, end] });
            if header.insert(format!("{}{suffix}", s.name), entry).is_some() {
                return Err(TrainError::request(format!("two parameters are called {}", s.name)));
            }
            offset = end;
        }
        written.push(i);
    }
    let failed = |e: serde_json::Error| TrainError::request(e.to_string());
    let experts = serde_json::to_string(&experts).map_err(failed)?;
    header.insert("__metadata__".into(), json!({ "experts": experts }));
    let mut text = serde_json::to_vec(&Value::Object(header)).map_err(failed)?;
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut head = (text.len() as u64).to_le_bytes().to_vec();
    head.extend(text);
    let bytes = head.len() as u64 + offset;
    Ok((head, written, bytes))
}

/// An open shard.
#[derive(Debug)]
pub(crate) struct Shard {
    pub(crate) path: PathBuf,
    file: File,
    data_start: u64,
    metadata: Metadata,
    pub(crate) experts: BTreeMap<String, Vec<u32>>,
}

impl Shard {
    /// Opens a shard; its header is checked against its length.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let failed = |e| TrainError::io("read", path, e);
        let mut file = File::open(path).map_err(|e| TrainError::io("open", path, e))?;
        let bytes = file.metadata().map_err(failed)?.len();
        let mut first = [0u8; 8];
        file.read_exact(&mut first).map_err(failed)?;
        let header_len = u64::from_le_bytes(first);
        if header_len > bytes.saturating_sub(8) {
            return Err(TrainError::damaged(path, format!("a header of {header_len} bytes in {bytes}")));
        }
        let mut header = vec![0; header_len as usize];
        file.read_exact(&mut header).map_err(failed)?;
        let bad = |e: serde_json::Error| TrainError::damaged(path, e.to_string());
        let metadata: Metadata = serde_json::from_slice(&header).map_err(bad)?;
        let data_start = 8 + header_len;
        if data_start + metadata.data_len() as u64 != bytes {
            let expected = data_start + metadata.data_len() as u64;
            return Err(TrainError::Truncated { file: path.into(), expected, found: bytes });
        }
        let text = metadata.metadata().as_ref().and_then(|m| m.get("experts").cloned());
        let experts = serde_json::from_str(text.as_deref().unwrap_or("{}")).map_err(bad)?;
        Ok(Self { path: path.into(), file, data_start, metadata, experts })
    }

    /// Shape of a tensor, where the shard has it.
    pub(crate) fn shape(&self, name: &str) -> Option<&[usize]> {
        self.metadata.info(name).map(|i| i.shape.as_slice())
    }

    /// Values `from..from + out.len()` of a tensor. Errors when it has fewer or other values.
    pub(crate) fn read(&mut self, name: &str, from: usize, out: &mut [f32]) -> Result<()> {
        let info = self.metadata.info(name);
        let info =
            info.ok_or_else(|| TrainError::damaged(&self.path, format!("tensor {name} is missing")))?;
        let (start, end) = info.data_offsets;
        let range = (from + out.len()).checked_mul(4).and_then(|n| start.checked_add(n));
        if info.dtype != Dtype::F32 || range.is_none_or(|to| to > end) {
            let message = format!("tensor {name}: {:?} of shape {:?}", info.dtype, info.shape);
            return Err(TrainError::damaged(&self.path, message));
        }
        let first = start + from * 4;
        let read = self.file.seek(SeekFrom::Start(self.data_start + first as u64));
        let read = read.and_then(|_| self.file.read_exact(bytemuck::cast_slice_mut(out)));
        read.map_err(|e| TrainError::io("read", &self.path, e))
    }
}

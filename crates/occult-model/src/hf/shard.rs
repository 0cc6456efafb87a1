//! One mapped safetensors file: the header is checked against the file before anything is read.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;
use safetensors::{Dtype, SafeTensorError, SafeTensors};
use serde_json::value::RawValue;

use crate::error::{ModelError, Result};

/// Where a tensor lies in its file.
#[derive(Debug, Clone)]
pub(crate) struct Span {
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    /// Bytes from the start of the file.
    pub(crate) from: usize,
    pub(crate) to: usize,
}

/// A mapped file.
#[derive(Debug)]
pub(crate) struct Shard {
    pub(crate) path: Arc<PathBuf>,
    pub(crate) map: Arc<Mmap>,
    pub(crate) tensors: BTreeMap<String, Span>,
    /// Names in the order of their data.
    pub(crate) order: Vec<String>,
    /// The `__metadata__` object as it is written in the header.
    pub(crate) metadata: Option<String>,
}

impl Shard {
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let bad = |message: String| ModelError::bad(path, "", message);
        let file = File::open(path).map_err(|e| ModelError::io("open", path, e))?;
        let meta = file.metadata().map_err(|e| ModelError::io("inspect", path, e))?;
        if !meta.is_file() {
            return Err(bad("is not a file".into()));
        }
        if meta.len() < 8 {
            return Err(bad(format!(
                "is truncated: a safetensors file starts with 8 bytes, it has {}",
                meta.len()
            )));
        }
        // SAFETY: the map is read-only and private to this process; bytes are only ever read as plain numbers, for which
        // every bit pattern is valid. What the language cannot promise is that no other process truncates or rewrites
        // the file meanwhile; a checkpoint under use must be left alone, as with every program that maps one.
        let map = unsafe { Mmap::map(&file) }.map_err(|e| ModelError::io("map", path, e))?;
        let header = map.first_chunk::<8>().map_or(0, |n| u64::from_le_bytes(*n));
        if header > (map.len() - 8) as u64 {
            return Err(bad(format!(
                "is truncated or not safetensors: its header should have {header} bytes, {} follow",
                map.len() - 8
            )));
        }
        let (length, parsed) = SafeTensors::read_metadata(&map).map_err(|e| match e {
            SafeTensorError::MetadataIncompleteBuffer => bad(length_problem(&map, header as usize)),
            e => bad(format!("broken header: {e}")),
        })?;
        let data = 8 + length;
        let held = map.len() - data;
        let mut tensors = BTreeMap::new();
        let mut end = 0;
        let mut order: Vec<(usize, String)> = Vec::new();
        for (name, info) in parsed.tensors() {
            let (from, to) = info.data_offsets;
            if from > to || to > held {
                let message = format!(
                    "ends at byte {to} of the data, but only {held} bytes are there: the file is truncated"
                );
                return Err(ModelError::bad(path, format!("tensor {name}"), message));
            }
            end = end.max(to);
            order.push((from, name.clone()));
            let span =
                Span { dtype: info.dtype, shape: info.shape.clone(), from: data + from, to: data + to };
            tensors.insert(name, span);
        }
        if end != held {
            return Err(bad(format!("describes {end} bytes of data, but holds {held}")));
        }
        order.sort();
        let metadata = parsed.metadata().is_some().then(|| raw_metadata(&map[8..data])).flatten();
        Ok(Self {
            path: Arc::new(path.to_path_buf()),
            map: Arc::new(map),
            tensors,
            order: order.into_iter().map(|(_, n)| n).collect(),
            metadata,
        })
    }
}

/// The header describes another number of bytes than the file has.
fn length_problem(map: &[u8], header: usize) -> String {
    let held = map.len() - 8 - header;
    let entries: BTreeMap<String, serde_json::Value> =
        serde_json::from_slice(&map[8..8 + header]).unwrap_or_default();
    let end = |(name, tensor): (&String, &serde_json::Value)| {
        Some((tensor["data_offsets"][1].as_u64()?, name.clone()))
    };
    match entries.iter().filter_map(end).max() {
        Some((end, name)) if end > held as u64 => {
            format!("is truncated: tensor {name} ends at byte {end} of the data, {held} bytes are there")
        }
        Some((end, _)) => format!("describes {end} bytes of data, but holds {held}"),
        None => format!("describes no data, but holds {held} bytes"),
    }
}

fn raw_metadata(header: &[u8]) -> Option<String> {
    let entries: BTreeMap<String, Box<RawValue>> = serde_json::from_slice(header).ok()?;
    entries.get("__metadata__").map(|raw| raw.get().to_owned())
}

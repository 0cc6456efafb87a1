//! A checkpoint directory: the tensors of one or many shards by name.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Component, Path, PathBuf};

use occult_kernels::quant::{Format, Layout};
use safetensors::Dtype;
use serde::Deserialize;

use super::quant_names;
use super::shard::{Shard, Span};
use crate::error::{ModelError, Result};
use crate::weight::{StoredDtype, Weight};

/// Largest JSON file that is read whole.
const MAX_JSON: u64 = 256 << 20;
/// Index of a checkpoint in several files.
pub(crate) const INDEX: &str = "model.safetensors.index.json";
pub(crate) const SINGLE: &str = "model.safetensors";

/// The tensors of a Hugging Face directory. Files are mapped; a tensor's bytes are touched when it is used.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    pub(crate) shards: Vec<Shard>,
    /// Shard of every tensor.
    tensors: BTreeMap<String, usize>,
    /// Which file says which tensors there are.
    listing: PathBuf,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Checkpoint {
    /// Opens `model.safetensors`, or the shards of `model.safetensors.index.json`, in a directory.
    pub fn open(dir: &Path) -> Result<Self> {
        let index = dir.join(INDEX);
        if index.is_file() {
            return Self::sharded(dir, index);
        }
        let single = dir.join(SINGLE);
        if !single.is_file() {
            let message = format!("has neither {SINGLE} nor {INDEX}");
            return Err(ModelError::bad(dir, "", message));
        }
        let shard = Shard::open(&single)?;
        let tensors = shard.tensors.keys().map(|n| (n.clone(), 0)).collect();
        Ok(Self { dir: dir.to_path_buf(), shards: vec![shard], tensors, listing: single })
    }

    fn sharded(dir: &Path, index: PathBuf) -> Result<Self> {
        let parsed: Index = read_json(&index)?;
        let mut files: BTreeMap<&str, usize> = BTreeMap::new();
        let mut shards = Vec::new();
        let mut tensors = BTreeMap::new();
        for (tensor, file) in &parsed.weight_map {
            let place = || format!("tensor {tensor}");
            let shard = match files.get(file.as_str()) {
                Some(&s) => s,
                None => {
                    let plain = matches!(
                        Path::new(file).components().collect::<Vec<_>>()[..],
                        [Component::Normal(_)]
                    );
                    if !plain {
                        let message = format!(
                            "is said to be in {file:?}, expected the name of a file beside the index"
                        );
                        return Err(ModelError::bad(&index, place(), message));
                    }
                    if !dir.join(file).exists() {
                        return Err(ModelError::bad(
                            &index,
                            place(),
                            format!("is in {file}, which is missing"),
                        ));
                    }
                    shards.push(Shard::open(&dir.join(file))?);
                    files.insert(file, shards.len() - 1);
                    shards.len() - 1
                }
            };
            if !shards[shard].tensors.contains_key(tensor) {
                let message = format!("is said to be in {file}, which does not have it");
                return Err(ModelError::bad(&index, place(), message));
            }
            tensors.insert(tensor.clone(), shard);
        }
        if shards.is_empty() {
            return Err(ModelError::bad(&index, "weight_map", "is empty"));
        }
        Ok(Self { dir: dir.to_path_buf(), shards, tensors, listing: index })
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Names of all tensors, ascending.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Whether there is such a tensor.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The file that lists the tensors: the index, or the only shard.
    pub fn listing(&self) -> &Path {
        &self.listing
    }

    /// Number of files with weights.
    pub fn num_shards(&self) -> usize {
        self.shards.len()
    }

    /// Bytes of all weights.
    pub fn total_bytes(&self) -> u64 {
        self.tensors
            .iter()
            .map(|(n, &s)| self.shards[s].tensors.get(n).map_or(0, |t| (t.to - t.from) as u64))
            .sum()
    }

    pub(crate) fn shard_of(&self, name: &str) -> Option<usize> {
        self.tensors.get(name).copied()
    }

    pub(crate) fn span(&self, name: &str) -> Option<(&Shard, &Span)> {
        let shard = &self.shards[*self.tensors.get(name)?];
        Some((shard, shard.tensors.get(name)?))
    }

    /// A tensor of any shape, without a copy.
    pub fn weight(&self, name: &str) -> Result<Weight> {
        let Some((shard, span)) = self.span(name) else {
            if let Some(format) = quant_names::format_of(name, |n| self.contains(n)) {
                return self.quantised(name, format);
            }
            return Err(ModelError::bad(&self.listing, format!("tensor {name}"), "is missing"));
        };
        let Some(dtype) = StoredDtype::from_safetensors(span.dtype) else {
            let message = format!("has dtype {:?}; supported: F32, BF16, F16", span.dtype);
            return Err(ModelError::bad(&*shard.path, format!("tensor {name}"), message));
        };
        Ok(Weight::mapped(
            &shard.map,
            (span.from, span.to),
            dtype,
            span.shape.clone(),
            name,
            shard.path.clone(),
        ))
    }

    /// A quantised matrix, from its three tensors ([`quant_names`]).
    fn quantised(&self, name: &str, format: Format) -> Result<Weight> {
        let part = |suffix: &str, dtype: Dtype| {
            let name = format!("{name}{suffix}");
            match self.span(&name) {
                Some((shard, span)) if span.dtype == dtype => Ok((shard, span)),
                Some((shard, span)) => {
                    let message = format!("has dtype {:?}, expected {dtype:?}", span.dtype);
                    Err(ModelError::bad(&*shard.path, format!("tensor {name}"), message))
                }
                None => Err(ModelError::bad(&self.listing, format!("tensor {name}"), "is missing")),
            }
        };
        let (shard, data) = part(quant_names::data(format), Dtype::U8)?;
        let (scales_shard, scales) = part(quant_names::SCALES, Dtype::BF16)?;
        let (shape_shard, shape) = part(quant_names::SHAPE, Dtype::I64)?;
        let bad = |message: String| ModelError::bad(&*shard.path, format!("tensor {name}"), message);
        let bytes = &shape_shard.map[shape.from..shape.to];
        let sizes: Vec<usize> = bytes
            .chunks_exact(8)
            .filter_map(|b| usize::try_from(i64::from_le_bytes(b.try_into().ok()?)).ok())
            .collect();
        let (&[rows, cols, group], [3]) = (&sizes[..], &shape.shape[..]) else {
            return Err(bad(format!("its shape is {sizes:?}, expected rows, columns and group")));
        };
        let layout = Layout::new(format, group, rows, cols).map_err(|e| bad(e.to_string()))?;
        if data.shape != layout.data_shape() || scales.shape != layout.scales_shape() {
            return Err(bad(format!(
                "has levels {:?} and scales {:?}; [{rows}, {cols}] in groups of {group} has {:?} and {:?}",
                data.shape,
                scales.shape,
                layout.data_shape(),
                layout.scales_shape()
            )));
        }
        let range = (scales.from, scales.to);
        let path = shard.path.clone();
        let scales =
            Weight::mapped(&scales_shard.map, range, StoredDtype::Bf16, scales.shape.clone(), name, path);
        Ok(scales.quantised(&shard.map, (data.from, data.to), layout, name))
    }

    /// A tensor that must have this shape.
    pub fn weight_of(&self, name: &str, shape: &[usize]) -> Result<Weight> {
        let weight = self.weight(name)?;
        if weight.shape() != shape {
            let file = self.span(name).map_or(&self.listing, |(s, _)| &s.path);
            let message = format!("has shape {:?}, the configuration says {shape:?}", weight.shape());
            return Err(ModelError::bad(file, format!("tensor {name}"), message));
        }
        Ok(weight)
    }
}

/// Parses a JSON file of a sane size.
pub(crate) fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T> {
    let file = File::open(path).map_err(|e| ModelError::io("open", path, e))?;
    let mut bytes = Vec::new();
    file.take(MAX_JSON + 1).read_to_end(&mut bytes).map_err(|e| ModelError::io("read", path, e))?;
    if bytes.len() as u64 > MAX_JSON {
        return Err(ModelError::bad(path, "", format!("has more than {MAX_JSON} bytes")));
    }
    serde_json::from_slice(&bytes).map_err(|e| ModelError::bad(path, "", format!("broken JSON: {e}")))
}

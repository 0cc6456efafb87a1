//! Writing a model directory with quantised weights.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use half::bf16;
use occult_kernels::Threads;
use occult_kernels::quant::{ErrorStats, Format, Layout, quantise as quantise_matrix};
use safetensors::Dtype;
use serde_json::Value;

use crate::error::{ModelError, Result};
use crate::hf::write::{Entry, Part, sort, write_file, write_index};
use crate::hf::{
    CONFIG, ExpertLayout, INDEX, Matrix, Names, Role, SINGLE, TensorInfo, quant_names, read_json,
};
use crate::load::{LoadOptions, ModelFiles};
use crate::rewrite::{Progress, Writer, copy_others, in_new_directory, set_quantised};
use crate::weight::Weight;

/// What quantising did to the matrices of one kind.
#[derive(Debug, Clone, PartialEq)]
pub struct QuantisedClass {
    /// `experts gate`, `experts up`, `experts down`, `dense` or `output`.
    pub class: &'static str,
    /// Their format.
    pub format: Format,
    /// How many matrices.
    pub num_tensors: usize,
    /// The errors of all of them together.
    pub error: ErrorStats,
    /// The one with the largest relative error.
    pub worst: String,
    /// Its relative error (root mean square).
    pub worst_relative_rms: f64,
}

/// Writes the model in `from` to the new directory `to`, with the experts and the dense matrices in `format` and groups of
/// 32 columns. Embeddings, norms, biases, routers and gates of shared experts stay as stored; with 4 bits the output layer
/// has 8. Experts get the released names. `occult` loads the directory like any other; tensors that are no part of the
/// model are left out. Needs memory for one matrix. `progress` is told while weights are written.
///
/// # Errors
/// When the model cannot be read, has weights that are not finite, or is quantised already.
pub fn quantise(
    from: &Path,
    to: &Path,
    format: Format,
    threads: &Threads,
    progress: &mut Progress<'_>,
) -> Result<Vec<QuantisedClass>> {
    let files = ModelFiles::open(from, LoadOptions::default())?;
    let mut written = Vec::new();
    in_new_directory(to, |dir| {
        written = write_quantised(&files, dir, format, threads, progress)?;
        Ok(())
    })?;
    Ok(report(&written))
}

/// The kind of a tensor that is quantised, and its format.
fn class_of(info: &TensorInfo, format: Format) -> Option<(&'static str, Format)> {
    match info.role {
        Role::Expert { matrix: Matrix::Gate, .. } => Some(("experts gate", format)),
        Role::Expert { matrix: Matrix::Up, .. } => Some(("experts up", format)),
        Role::Expert { matrix: Matrix::Down, .. } => Some(("experts down", format)),
        Role::Other if info.shape.len() != 2 || info.shape[0] == 1 => None,
        Role::Other if info.name == "model.embed_tokens.weight" => None,
        Role::Other if info.name == "lm_head.weight" => Some(("output", Format::Q8)),
        Role::Other => Some(("dense", format)),
        Role::Router { .. } | Role::FusedGateUp { .. } | Role::FusedDown { .. } => None,
    }
}

type Written = (&'static str, Arc<Quantising>);

fn write_quantised(
    files: &ModelFiles,
    to: &Path,
    format: Format,
    threads: &Threads,
    progress: &mut Progress<'_>,
) -> Result<Vec<Written>> {
    let checkpoint = files.checkpoint();
    let writer = Writer { files, dtype: None, orders: None };
    let names = Names::new(files.spec().family, ExpertLayout::PerExpert);
    // Of every shard: sizes, then levels and scales of each matrix, then the tensors as stored.
    let mut shards = vec![[Vec::new(), Vec::new(), Vec::new()]; checkpoint.num_shards()];
    let mut all = Vec::new();
    for info in names.tensors(files.spec()) {
        let class = class_of(&info, format);
        let (shard, entry) = writer.entry(info)?;
        let [sizes, matrices, others] = &mut shards[shard];
        let (Some((class, format)), [Part::Values(weight)]) = (class, &entry.parts[..]) else {
            others.push(entry);
            continue;
        };
        let weight = weight.clone();
        let quantising = Arc::new(Quantising::new(weight, entry.name.clone(), format, threads)?);
        let [size, levels, scales] = quantising.entries();
        sizes.push(size);
        matrices.extend([levels, scales]);
        all.push((class, quantising));
    }
    let bytes: usize = shards.iter().flatten().flatten().map(|e| e.bytes).sum();
    let mut done = 0;
    let mut wrote = |n| {
        done += n;
        progress(done, bytes as u64);
    };
    let (mut weight_map, mut total) = (BTreeMap::new(), 0);
    for (source, [sizes, matrices, mut others]) in checkpoint.shards.iter().zip(shards) {
        sort(&mut others);
        let entries: Vec<Entry> = [sizes, matrices, others].into_iter().flatten().collect();
        let name = source.path.file_name().and_then(|n| n.to_str()).unwrap_or(SINGLE).to_owned();
        write_file(&to.join(&name), source.metadata.as_deref(), &entries, &mut wrote)?;
        for e in entries {
            total += e.bytes as u64;
            weight_map.insert(e.name, name.clone());
        }
    }
    copy_others(checkpoint, to)?;
    if checkpoint.listing().ends_with(INDEX) {
        let metadata = read_json::<Value>(checkpoint.listing())?.get("metadata").cloned();
        write_index(&to.join(INDEX), metadata, total, &weight_map)?;
    }
    set_quantised(&to.join(CONFIG), Some(format.name()))?;
    Ok(all)
}

fn report(written: &[Written]) -> Vec<QuantisedClass> {
    let classes: BTreeSet<&'static str> = written.iter().map(|(class, _)| *class).collect();
    let of_class = |class| {
        let mut members = written.iter().filter(|(c, _)| *c == class).map(|(_, q)| q);
        let first = members.next()?;
        let mut result = QuantisedClass {
            class,
            format: first.layout.format(),
            num_tensors: 0,
            error: ErrorStats::default(),
            worst: first.name.clone(),
            worst_relative_rms: 0.0,
        };
        for (_, q) in written.iter().filter(|(c, _)| *c == class) {
            let error = q.error();
            result.num_tensors += 1;
            result.error.merge(&error);
            if error.relative_rms() > result.worst_relative_rms {
                (result.worst, result.worst_relative_rms) = (q.name.clone(), error.relative_rms());
            }
        }
        Some(result)
    };
    classes.into_iter().filter_map(of_class).collect()
}

/// A matrix on its way: quantised when its levels are asked for, so that one at a time is in memory.
pub(crate) struct Quantising {
    weight: Weight,
    name: String,
    layout: Layout,
    threads: Threads,
    done: Mutex<(Vec<bf16>, ErrorStats)>,
}

impl fmt::Debug for Quantising {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Quantising({}, {:?})", self.name, self.layout)
    }
}

impl Quantising {
    fn new(weight: Weight, name: String, format: Format, threads: &Threads) -> Result<Self> {
        let &[rows, cols] = weight.shape() else {
            return Err(ModelError::request(format!("{name}: not a matrix")));
        };
        let layout = Layout::new(format, Layout::DEFAULT_GROUP, rows, cols)
            .map_err(|e| ModelError::request(format!("{name}: {e}")))?;
        Ok(Self { weight, name, layout, threads: threads.clone(), done: Mutex::default() })
    }

    /// Size, levels and scales.
    fn entries(self: &Arc<Self>) -> [Entry; 3] {
        let sizes = [self.layout.rows(), self.layout.cols(), self.layout.group()];
        let sizes = sizes.iter().flat_map(|&n| (n as i64).to_le_bytes()).collect();
        let entry = |suffix: &str, dtype: Dtype, shape: Vec<usize>, bytes: usize, part: Part| Entry {
            name: format!("{}{suffix}", self.name),
            dtype,
            stored: None,
            bytes: shape.iter().product::<usize>() * bytes,
            shape,
            parts: vec![part],
        };
        let (data, scales) = (self.layout.data_shape().to_vec(), self.layout.scales_shape().to_vec());
        let levels = quant_names::data(self.layout.format());
        [
            entry(quant_names::SHAPE, Dtype::I64, vec![3], 8, Part::Bytes(sizes)),
            entry(levels, Dtype::U8, data, 1, Part::Levels(self.clone())),
            entry(quant_names::SCALES, Dtype::BF16, scales, 2, Part::Scales(self.clone())),
        ]
    }

    /// Quantises the matrix; keeps its scales and errors.
    pub(crate) fn levels(&self) -> Result<Vec<u8>> {
        let values = self.weight.values();
        let fill = |row: usize, out: &mut [f32]| values.widen(row * out.len(), out);
        let (matrix, error) = quantise_matrix(&self.threads, self.layout, fill)
            .map_err(|e| ModelError::request(format!("tensor {}: {e}", self.name)))?;
        let (levels, scales) = matrix.into_parts();
        *self.done.lock().unwrap_or_else(PoisonError::into_inner) = (scales, error);
        Ok(levels)
    }

    /// The scales that the levels belong to; they are not kept.
    pub(crate) fn scales(&self) -> Vec<bf16> {
        std::mem::take(&mut self.done.lock().unwrap_or_else(PoisonError::into_inner).0)
    }

    fn error(&self) -> ErrorStats {
        self.done.lock().unwrap_or_else(PoisonError::into_inner).1
    }
}

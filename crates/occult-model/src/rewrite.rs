//! Writing a model directory back: same names or the other expert layout, another number format, another order of experts.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use occult_plan::ExpertId;
use serde_json::Value;

use crate::error::{ModelError, Result};
use crate::hf::write::{Entry, Part, sort, write_file, write_index};
use crate::hf::{
    CONFIG, Checkpoint, ExpertLayout, INDEX, Matrix, Names, QUANT_METHOD, Role, SINGLE, TensorInfo,
    quant_names, read_json,
};
use crate::load::{LoadOptions, ModelFiles};
use crate::weight::{StoredDtype, Weight};

/// What [`convert`] changes.
#[derive(Debug, Clone, Copy)]
pub struct ConvertOptions {
    /// How experts are named; [`ExpertLayout::PerExpert`] are the released names.
    pub layout: ExpertLayout,
    /// Number format of all weights; as stored when `None`.
    pub dtype: Option<StoredDtype>,
}

impl Default for ConvertOptions {
    fn default() -> Self {
        Self { layout: ExpertLayout::PerExpert, dtype: None }
    }
}

/// Is told the bytes of weights that are written, and of all that will be.
pub type Progress<'a> = dyn FnMut(u64, u64) + 'a;

/// Writes the model in `from` to the new directory `to`, which appears when it is complete. Without a change of layout or
/// format every file is byte-identical. Files that are not weights are copied. `progress` is told while weights are written.
pub fn convert(from: &Path, to: &Path, options: &ConvertOptions, progress: &mut Progress<'_>) -> Result<()> {
    let files = ModelFiles::open(from, LoadOptions::default())?;
    rewrite(&files, to, options, None, progress, |_| Ok(()))
}

/// For every MoE layer, the old expert at each new index.
pub(crate) type ExpertOrders = [Vec<ExpertId>];

/// Writes to a temporary directory beside `to`, lets `check` look at it, and renames.
pub(crate) fn rewrite(
    files: &ModelFiles,
    to: &Path,
    options: &ConvertOptions,
    orders: Option<&ExpertOrders>,
    progress: &mut Progress<'_>,
    check: impl FnOnce(&Path) -> Result<()>,
) -> Result<()> {
    in_new_directory(to, |dir| {
        write_all(files, dir, options, orders, progress)?;
        check(dir)
    })
}

/// Makes the directory `to` with what `write` puts into a temporary one beside it.
pub(crate) fn in_new_directory(to: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let occupied = fs::read_dir(to).map(|mut d| d.next().is_some()).unwrap_or(to.exists());
    if occupied {
        return Err(ModelError::bad(to, "", "exists already; give a new directory"));
    }
    let parent = match to.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    };
    let temporary = tempfile::Builder::new()
        .prefix(".occult-")
        .tempdir_in(parent)
        .map_err(|e| ModelError::io("make a directory in", parent, e))?;
    write(temporary.path())?;
    // Directories made for one user become readable like any other.
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        fs::set_permissions(temporary.path(), fs::Permissions::from_mode(0o755))
            .map_err(|e| ModelError::io("set the permissions of", temporary.path(), e))?;
    }
    fs::rename(temporary.path(), to)
        .map_err(|e| ModelError::io("give the finished directory its name", to, e))?;
    let _ = temporary.keep(); // it has moved: nothing to delete
    Ok(())
}

fn write_all(
    files: &ModelFiles,
    to: &Path,
    options: &ConvertOptions,
    orders: Option<&ExpertOrders>,
    progress: &mut Progress<'_>,
) -> Result<()> {
    let checkpoint = files.checkpoint();
    let writer = Writer { files, dtype: options.dtype, orders };
    let names = Names::new(files.spec().family, options.layout);
    let mut shards: Vec<Vec<Entry>> = vec![Vec::new(); checkpoint.num_shards()];
    let mut listed = BTreeSet::new();
    for info in files.names().tensors(files.spec()) {
        listed.insert(info.name);
    }
    for info in names.tensors(files.spec()) {
        let (shard, entry) = writer.entry(info)?;
        shards[shard].push(entry);
    }
    // Tensors that a checkpoint may carry without being part of the model stay.
    let part = |n: &str| quant_names::base(n).is_some_and(|base| listed.contains(base));
    for name in checkpoint.names().filter(|n| !listed.contains(*n) && !part(n)) {
        if let (Some(shard), Some((file, span))) = (checkpoint.shard_of(name), checkpoint.span(name)) {
            let parts = vec![Part::Raw(file.map.clone(), span.from, span.to)];
            let (shape, bytes) = (span.shape.clone(), span.to - span.from);
            shards[shard].push(Entry {
                name: name.into(),
                dtype: span.dtype,
                stored: None,
                shape,
                bytes,
                parts,
            });
        }
    }
    let same = options.layout == files.names().layout && options.dtype.is_none();
    let mut weight_map = BTreeMap::new();
    let total = shards.iter().flatten().map(|e| e.bytes as u64).sum();
    let mut written = 0;
    for (source, entries) in checkpoint.shards.iter().zip(&mut shards) {
        sort(entries);
        if same {
            let place: BTreeMap<&str, usize> =
                source.order.iter().enumerate().map(|(i, n)| (n.as_str(), i)).collect();
            entries.sort_by_key(|e| place.get(e.name.as_str()).copied().unwrap_or(usize::MAX));
        }
        let name = source.path.file_name().and_then(|n| n.to_str()).unwrap_or(SINGLE).to_owned();
        write_file(&to.join(&name), source.metadata.as_deref(), entries, &mut |bytes| {
            written += bytes;
            progress(written, total);
        })?;
        for e in entries.iter() {
            weight_map.insert(e.name.clone(), name.clone());
        }
    }
    copy_others(checkpoint, to)?;
    if checkpoint.listing().ends_with(INDEX) {
        let metadata = read_json::<Value>(checkpoint.listing())?.get("metadata").cloned();
        if same {
            copy(checkpoint.listing(), &to.join(INDEX))?;
        } else {
            write_index(&to.join(INDEX), metadata, total, &weight_map)?;
        }
    }
    if let Some(dtype) = options.dtype {
        set_dtype(&to.join(CONFIG), dtype)?;
        set_quantised(&to.join(CONFIG), None)?;
    }
    Ok(())
}

/// Everything in the directory that is not weights.
pub(crate) fn copy_others(checkpoint: &Checkpoint, to: &Path) -> Result<()> {
    for path in files_beside_weights(checkpoint.dir())? {
        if let Some(name) = path.file_name() {
            copy(&path, &to.join(name))?;
        }
    }
    Ok(())
}

/// The files of a model directory that are not weights, by name.
pub fn files_beside_weights(dir: &Path) -> Result<Vec<PathBuf>> {
    let failed = |e| ModelError::io("list", dir, e);
    let mut files = vec![];
    for entry in fs::read_dir(dir).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
        let weights =
            matches!(extension, "safetensors" | "bin" | "pt" | "pth" | "gguf") || path.ends_with(INDEX);
        if !weights && path.is_file() {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::copy(from, to).map(drop).map_err(|e| ModelError::io("copy", from, e))
}

fn set_dtype(config: &Path, dtype: StoredDtype) -> Result<()> {
    let mut json: Value = read_json(config)?;
    let name = match dtype {
        StoredDtype::F32 => "float32",
        StoredDtype::Bf16 => "bfloat16",
        StoredDtype::F16 => "float16",
    };
    let key = if json.get("dtype").is_some() { "dtype" } else { "torch_dtype" };
    json[key] = Value::from(name);
    let text = serde_json::to_string_pretty(&json).unwrap_or_default() + "\n";
    fs::write(config, text).map_err(|e| ModelError::io("write", config, e))
}

/// Says in config.json that the weights are quantised by us, or that they are not.
pub(crate) fn set_quantised(config: &Path, format: Option<&str>) -> Result<()> {
    const KEY: &str = "quantization_config";
    let mut json: Value = read_json(config)?;
    match format {
        Some(format) => json[KEY] = serde_json::json!({ "quant_method": QUANT_METHOD, "format": format }),
        None if json.get(KEY).is_none() => return Ok(()),
        None => drop(json.as_object_mut().and_then(|o| o.remove(KEY))),
    }
    let text = serde_json::to_string_pretty(&json).unwrap_or_default() + "\n";
    fs::write(config, text).map_err(|e| ModelError::io("write", config, e))
}

pub(crate) struct Writer<'a> {
    pub(crate) files: &'a ModelFiles,
    pub(crate) dtype: Option<StoredDtype>,
    pub(crate) orders: Option<&'a ExpertOrders>,
}

impl Writer<'_> {
    /// The tensor to write and the shard it belongs to: that of its (first) source.
    pub(crate) fn entry(&self, info: TensorInfo) -> Result<(usize, Entry)> {
        let experts = self.files.spec().moe.router.num_experts;
        let mut parts = Vec::new();
        match info.role {
            Role::Other => parts.push(self.files.checkpoint().weight(&info.name)?),
            Role::Router { layer } => {
                let weight = self.files.checkpoint().weight(&self.files.names().router(layer))?;
                if self.orders.is_none() {
                    parts.push(weight);
                } else {
                    for new in 0..experts {
                        let old = self.old(layer, new);
                        parts.push(weight.rows(old, old + 1).ok_or_else(|| missing(&weight, old))?);
                    }
                }
            }
            Role::Expert { layer, expert, matrix } => {
                parts.push(self.matrix(layer, self.old(layer, expert), matrix)?)
            }
            Role::FusedGateUp { layer } => {
                for new in 0..experts {
                    let old = self.old(layer, new);
                    parts.push(self.matrix(layer, old, Matrix::Gate)?);
                    parts.push(self.matrix(layer, old, Matrix::Up)?);
                }
            }
            Role::FusedDown { layer } => {
                for new in 0..experts {
                    parts.push(self.matrix(layer, self.old(layer, new), Matrix::Down)?);
                }
            }
        }
        let Some(first) = parts.first() else {
            return Err(ModelError::request(format!("nothing to write for tensor {}", info.name)));
        };
        if let (None, Some(quantised)) = (self.dtype, parts.iter().find(|w| w.quant_layout().is_some())) {
            let message = format!("{} is quantised: give the format to widen it to", quantised.name());
            return Err(ModelError::request(message));
        }
        let dtype = self.dtype.unwrap_or(first.dtype());
        // A permuted expert stays in the file where its new name was.
        let checkpoint = self.files.checkpoint();
        let shard = checkpoint.shard_of(&info.name).or_else(|| checkpoint.shard_of(first.name()));
        Ok((shard.unwrap_or(0), Entry::of_values(info.name, info.shape, dtype, parts)))
    }

    /// The old index of the expert that gets a new index.
    fn old(&self, layer: usize, new: usize) -> usize {
        let Some(orders) = self.orders else { return new };
        let index = self.files.spec().moe_layers().position(|l| l == layer);
        index.and_then(|i| orders.get(i)?.get(new)).map_or(new, |&old| usize::from(old))
    }

    /// One matrix of one expert of the source.
    fn matrix(&self, layer: usize, expert: usize, matrix: Matrix) -> Result<Weight> {
        let (checkpoint, names) = (self.files.checkpoint(), self.files.names());
        if names.layout == ExpertLayout::PerExpert {
            return checkpoint.weight(&names.expert(layer, expert, matrix));
        }
        let (gate_up, down) = names.fused(layer);
        let (d, f) = (self.files.spec().hidden_size, self.files.spec().moe.expert_size);
        let (stacked, from, to) = match matrix {
            Matrix::Gate => (checkpoint.weight(&gate_up)?, 0, f),
            Matrix::Up => (checkpoint.weight(&gate_up)?, f, 2 * f),
            Matrix::Down => (checkpoint.weight(&down)?, 0, d),
        };
        stacked.slab_rows(expert, from, to).ok_or_else(|| missing(&stacked, expert))
    }
}

fn missing(weight: &Weight, expert: usize) -> ModelError {
    ModelError::request(format!("tensor {} has no expert {expert}", weight.name()))
}

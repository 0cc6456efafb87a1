//! Models as commands need them: opened, loaded, described as a profile describes them.

use std::path::Path;

use anyhow::{Context, Result, bail};
use occult_formats::{LIMIT_FILE, LimitFile, ProfileMeta, RouterInfo, Scoring};
use occult_model::{Decoder, LoadOptions, ModelFiles, ModelSpec, TextTokenizer, Threads};

use crate::model_args::LoadArgs;
use crate::progress;

/// Tokens of a window when nobody says otherwise.
const WINDOW: usize = 2048;

/// Opens a model directory, with the bias on its routers' choices where `occult.json` has one.
pub(crate) fn open(dir: &Path, options: LoadOptions) -> Result<ModelFiles> {
    let files = ModelFiles::open(dir, options)?;
    match LimitFile::read_bias(dir)? {
        Some(bias) => {
            files.with_selection_bias(bias).with_context(|| dir.join(LIMIT_FILE).display().to_string())
        }
        None => Ok(files),
    }
}

/// Loads a model with all experts in this process.
pub(crate) fn load(args: &LoadArgs) -> Result<Decoder> {
    let options =
        LoadOptions { dtype: args.dtype.map(|d| d.stored()), threads: args.threads.map(Threads::new) };
    let files = open(&args.model, options)?;
    let spinner = progress::spinner(&format!("loading {}", args.model.display()));
    let decoder = files.load();
    spinner.finish_and_clear();
    Ok(decoder?)
}

/// Bytes of a weight as it is held, on average.
pub(crate) fn bytes_per_value(args: &LoadArgs) -> Result<f64> {
    if let Some(dtype) = args.dtype {
        return Ok(dtype.stored().bytes() as f64);
    }
    let files = ModelFiles::open(&args.model, LoadOptions::default())?;
    let values = occult_model::hf::ParameterCounts::of(files.spec()).total;
    Ok(files.checkpoint().total_bytes() as f64 / values.max(1) as f64)
}

/// The tokenizer of a model directory.
pub(crate) fn tokenizer(dir: &Path, spec: &ModelSpec) -> Result<TextTokenizer> {
    Ok(TextTokenizer::open(dir, spec)?)
}

/// Checks sequences against a model before its weights are read.
pub(crate) fn check_ids(sequences: &[Vec<u32>], spec: &ModelSpec, longest: usize) -> Result<()> {
    for (i, s) in sequences.iter().enumerate() {
        if s.len() > longest {
            bail!("sequence {i} has {} tokens, the model's context is {longest}", s.len());
        }
        if let Some(id) = s.iter().find(|&&id| id as usize >= spec.vocab_size) {
            bail!("sequence {i} has token id {id}, the model's vocabulary has {}", spec.vocab_size);
        }
    }
    Ok(())
}

/// Window length: what was asked for, checked, or the default.
pub(crate) fn window(asked: Option<usize>, spec: &ModelSpec) -> Result<usize> {
    match asked {
        None => Ok(WINDOW.min(spec.context_len)),
        Some(n) if n <= spec.context_len => Ok(n),
        Some(n) => bail!("--context is {n}, expected 1 to {} (the model's context)", spec.context_len),
    }
}

/// Name of a directory, links and dots resolved.
pub(crate) fn name(dir: &Path) -> String {
    let resolved = dir.canonicalize().unwrap_or_else(|_| dir.to_path_buf());
    resolved.file_name().map_or_else(|| dir.display().to_string(), |n| n.to_string_lossy().into_owned())
}

/// What a profile of this model says about it.
pub(crate) fn profile_meta(spec: &ModelSpec, name: String) -> ProfileMeta {
    let router = spec.moe.router;
    ProfileMeta {
        num_experts: router.num_experts,
        top_k: Some(router.top_k),
        layer_ids: spec.moe_layers().map(|l| l as u32).collect(),
        num_hidden_layers: Some(spec.layers.len() as u32),
        model: Some(name),
        router: Some(RouterInfo {
            norm_topk_prob: router.norm_topk,
            num_groups: router.groups.map(|g| g.num_groups),
            topk_groups: router.groups.map(|g| g.top_groups),
            scoring: Scoring::Softmax,
        }),
        ..ProfileMeta::default()
    }
}

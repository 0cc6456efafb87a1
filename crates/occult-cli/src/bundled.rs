//! What comes with the program: real routing of gpt-oss-20b (`data/gpt-oss-20b/NOTICE`), and a small model with held-out
//! texts (`models/occult-16m`, `data/demo-texts/NOTICE`).

use std::path::Path;

use anyhow::{Context, Result};
use occult_formats::write_atomic;
use occult_plan::RoutingBuf;

use crate::exit::Usage;

macro_rules! model_files {
    ($($name:literal),*) => { [$(($name, include_bytes!(concat!("../../../models/occult-16m/", $name)))),*] };
}

/// Name of the model.
pub(crate) const MODEL: &str = "occult-16m";
/// Its files.
const MODEL_FILES: [(&str, &[u8]); 4] =
    model_files!["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"];

macro_rules! texts {
    ($($domain:literal),*) => { [$((
        concat!($domain, ".txt"),
        include_bytes!(concat!("../data/demo-texts/profile/", $domain, ".txt")),
        include_bytes!(concat!("../data/demo-texts/measure/", $domain, ".txt")),
    )),*] };
}

/// Texts that the model has not been trained on, a file per domain: name, what to profile, what to measure.
pub(crate) const TEXTS: [(&str, &[u8], &[u8]); 7] =
    texts!["c", "dictionary", "javascript", "mathematics", "prose", "python", "rust"];

/// Writes the model and the texts: `dir/model`, `dir/texts/profile`, `dir/texts/measure`.
pub(crate) fn unpack(dir: &Path) -> Result<()> {
    let notice: &[u8] = include_bytes!("../data/demo-texts/NOTICE");
    let model = MODEL_FILES.map(|(name, bytes)| (dir.join("model").join(name), bytes));
    let texts = TEXTS.iter().flat_map(|&(name, profile, measure)| {
        let texts = dir.join("texts");
        [(texts.join("profile").join(name), profile), (texts.join("measure").join(name), measure)]
    });
    for (path, bytes) in model.into_iter().chain(texts).chain([(dir.join("texts/NOTICE"), notice)]) {
        let folder = path.parent().unwrap_or(dir);
        std::fs::create_dir_all(folder)
            .with_context(|| format!("cannot make the folder {}", folder.display()))?;
        write_atomic(&path, bytes)?;
    }
    Ok(())
}

const ROUTES: &[u8] = include_bytes!("../data/gpt-oss-20b/routes_u8.bin");
const GATES: &[u8] = include_bytes!("../data/gpt-oss-20b/gates_u8.bin");

/// MoE layers.
pub(crate) const LAYERS: usize = 24;
const EXPERTS: usize = 32;
const TOP_K: usize = 4;

/// All tokens of one layer, with weights.
pub(crate) fn layer(layer: usize) -> Result<RoutingBuf> {
    if layer >= LAYERS {
        return Err(Usage(format!("layer {layer} of the bundled routing, which has {LAYERS}")).into());
    }
    let of_layer = |bytes: &'static [u8]| {
        bytes.chunks_exact(LAYERS * TOP_K).flat_map(move |row| &row[layer * TOP_K..(layer + 1) * TOP_K])
    };
    Ok(RoutingBuf {
        num_experts: EXPERTS,
        top_k: TOP_K,
        expert_ids: of_layer(ROUTES).map(|&id| id.into()).collect(),
        weights: Some(of_layer(GATES).map(|&gate| f32::from(gate) / 255.0).collect()),
        ..RoutingBuf::default()
    })
}

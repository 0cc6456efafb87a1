//! The directory that training leaves: a model that transformers and Occult load.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use occult_model::StoredDtype;
use serde_json::Value;

/// Files beside the weights that are taken over as they are.
const TAKEN: [&str; 7] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
];

fn name(dtype: StoredDtype) -> &'static str {
    match dtype {
        StoredDtype::Bf16 => "bfloat16",
        StoredDtype::F16 => "float16",
        _ => "float32",
    }
}

/// Writes configuration and tokenizer of the model directory `from` into `to`.
pub(crate) fn configuration(from: &Path, to: &Path, dtype: StoredDtype) -> Result<()> {
    let path = from.join("config.json");
    let text = fs::read(&path).with_context(|| path.display().to_string())?;
    let mut config: Value = serde_json::from_slice(&text).with_context(|| path.display().to_string())?;
    if let Some(config) = config.as_object_mut() {
        config.remove("dtype");
        config.remove("quantization_config");
        config.insert("torch_dtype".into(), name(dtype).into());
    }
    let text = serde_json::to_vec_pretty(&config)?;
    occult_formats::write_atomic(&to.join("config.json"), &text)?;
    for file in TAKEN.iter().filter(|f| from.join(f).is_file()) {
        let (from, to) = (from.join(file), to.join(file));
        let same = from.canonicalize().ok().zip(to.canonicalize().ok()).is_some_and(|(a, b)| a == b);
        if !same {
            fs::copy(&from, &to).with_context(|| format!("copying {}", from.display()))?;
        }
    }
    Ok(())
}

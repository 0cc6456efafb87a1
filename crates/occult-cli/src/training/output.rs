//! The directory that training leaves: a model that transformers and Occult load.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use clap::ValueEnum;
use occult_formats::{LIMIT_FILE, LimitFile, PlacementFile, PlacementMeta};
use occult_model::StoredDtype;
use occult_plan::Placement;
use occult_train::model::MoeModel;
use serde_json::Value;

use crate::train_args::TrainArgs;

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

/// Records placement, limit and bias where there are any; removes what an earlier run has recorded.
pub(crate) fn limit(to: &Path, model: &MoeModel, args: &TrainArgs) -> Result<()> {
    const PLACEMENT: &str = "placement.json";
    let (ranks, spec) = (model.ranks(), model.model().spec());
    let selection_bias = model.selection_bias().map(<[_]>::to_vec);
    if args.placement.is_none() && args.max_ranks.is_none() && !model.was_replaced() {
        if let Some(bias) = selection_bias {
            return Ok(LimitFile::of_bias(bias).write(to)?);
        }
        let old = to.join(LIMIT_FILE);
        return if old.is_file() { fs::remove_file(&old).context("removing an old limit") } else { Ok(()) };
    }
    let file = match &args.placement {
        Some(path) if !model.was_replaced() => PlacementFile::read(path)?,
        _ => {
            let meta = PlacementMeta {
                layer_ids: spec.moe_layers().map(|l| l as u32).collect(),
                num_hidden_layers: Some(spec.layers.len() as u32),
                method: if model.was_replaced() { "search while training" } else { "contiguous" }.into(),
                ..PlacementMeta::default()
            };
            PlacementFile::new(meta, Placement::new(ranks.topology(), ranks.layers().to_vec())?)?
        }
    };
    file.write(&to.join(PLACEMENT))?;
    let rule = args.rule.to_possible_value().map_or_else(String::new, |v| v.get_name().to_owned());
    let mut limit = LimitFile::new(PLACEMENT, args.max_ranks, &rule, args.keep_mass);
    limit.selection_bias = selection_bias;
    Ok(limit.write(to)?)
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

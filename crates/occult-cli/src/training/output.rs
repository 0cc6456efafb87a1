//! The directory that training leaves: a model that transformers and Occult load.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use occult_formats::{LIMIT_FILE, LimitFile, PlacementFile, write_similarity};
use occult_model::StoredDtype;
use occult_train::model::MoeModel;
use serde_json::Value;

use super::Start;
use crate::train_args::TrainArgs;

/// The placement beside `occult.json`.
const PLACEMENT: &str = "placement.json";
/// The tables of the rule `similarity` beside it.
const SIMILARITY: &str = "occult.similarity";

/// What a configuration that training begins with has beside it for a model; other files there are its own business.
const TAKEN: [&str; 10] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
];

/// Errors unless the directory `to` can take a model made from `from` without anything of value being overwritten.
pub(crate) fn check(from: Start<'_>, to: &Path) -> Result<()> {
    if to.exists() && !to.is_dir() {
        bail!("{}: is a file, expected a directory for the model", to.display());
    }
    let resolved = |p: &Path| p.canonicalize().ok();
    if resolved(to).is_some_and(|to| Some(to) == resolved(from.dir())) {
        bail!(
            "{}: is the directory that is read, {}; the model needs a directory of its own",
            to.display(),
            from.dir().display()
        );
    }
    let holds = |name: &str| to.join(name).exists();
    // Programs would go on reading the files that an index names.
    let found = ["model.safetensors.index.json", "model.safetensors"].into_iter().find(|name| holds(name));
    match found {
        Some(name) if name.ends_with(".json") || !holds("training/latest") => {
            bail!("{}: holds {name}, a model that no run here has made; give a new directory", to.display())
        }
        _ => Ok(()),
    }
}

fn name(dtype: StoredDtype) -> &'static str {
    match dtype {
        StoredDtype::Bf16 => "bfloat16",
        StoredDtype::F16 => "float16",
        _ => "float32",
    }
}

/// Records placement, limit and bias where there are any; removes what an earlier run has recorded.
pub(crate) fn limit(to: &Path, model: &MoeModel, placement: &PlacementFile, args: &TrainArgs) -> Result<()> {
    let selection_bias = model.selection_bias().map(<[_]>::to_vec);
    let replaced = model.was_replaced();
    let tables = model.ranks().similarity();
    if tables.is_empty() {
        remove(&to.join(SIMILARITY))?;
    }
    if args.max_ranks.is_none() && !replaced && super::placement::is_equal_runs(placement) {
        if let Some(bias) = selection_bias {
            return Ok(LimitFile::of_bias(bias).write(to)?);
        }
        return remove(&to.join(LIMIT_FILE));
    }
    if replaced {
        super::placement::searched(placement, model.ranks())?.write(&to.join(PLACEMENT))?;
    } else {
        placement.write(&to.join(PLACEMENT))?;
    }
    let mut limit =
        LimitFile::new(PLACEMENT, args.rule.name(), args.max_ranks.map(|n| args.adaptive.budget(n)));
    limit.selection_bias = selection_bias;
    if !tables.is_empty() {
        write_similarity(&to.join(SIMILARITY), &tables)?;
        limit.similarity = Some(SIMILARITY.to_owned());
    }
    Ok(limit.write(to)?)
}

/// Removes what an earlier run, or the model that a run began with, has recorded.
fn remove(old: &Path) -> Result<()> {
    let removed = if old.is_file() { fs::remove_file(old) } else { Ok(()) };
    removed.with_context(|| format!("removing {}", old.display()))
}

/// Writes configuration, tokenizer and what else lies beside the weights into `to`: of a model all of it, as `convert` does.
pub(crate) fn configuration(from: Start<'_>, to: &Path, dtype: StoredDtype) -> Result<()> {
    let dir = from.dir();
    let path = dir.join("config.json");
    let text = fs::read(&path).with_context(|| path.display().to_string())?;
    let mut config: Value = serde_json::from_slice(&text).with_context(|| path.display().to_string())?;
    if let Some(config) = config.as_object_mut() {
        config.remove("dtype");
        config.remove("quantization_config");
        config.insert("torch_dtype".into(), name(dtype).into());
    }
    let text = serde_json::to_vec_pretty(&config)?;
    occult_formats::write_atomic(&to.join("config.json"), &text)?;
    // The limit is this run's own.
    let own = ["config.json", LIMIT_FILE, PLACEMENT];
    for from_file in occult_model::files_beside_weights(dir)? {
        let Some(name) = from_file.file_name() else { continue };
        let taken = match from {
            Start::Random(_) => TAKEN.iter().any(|n| name == *n),
            Start::Model(_) => !own.iter().any(|n| name == *n),
        };
        if taken {
            copy(&from_file, &to.join(name))?;
        }
    }
    Ok(())
}

/// Copies a file; it appears under its name when it is complete.
fn copy(from: &Path, to: &Path) -> Result<()> {
    let doing = || format!("copying {} to {}", from.display(), to.display());
    let mut source = fs::File::open(from).with_context(doing)?;
    occult_formats::write_atomic_with(to, |file| {
        std::io::copy(&mut source, file).map(|_| ()).with_context(doing)
    })
}

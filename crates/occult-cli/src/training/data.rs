//! Data files become loaders of packed sequences.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use occult_model::hf::GenerationDefaults;
use occult_model::{ModelSpec, TextTokenizer};
use occult_train::data::encode::ModelTokenizer;
use occult_train::data::{
    Format, Loader, LongDocument, PackOptions, Packed, StoreWriter, TokenStore, build_store, fingerprint,
    remove_unfinished,
};

use crate::progress;

/// A store as a folder: what was given, or what `build` has left under `cache`.
fn is_store(path: &Path) -> bool {
    path.join("store.json").is_file()
}

/// Encodes files once: the store under `cache` is used again while tokenizer and files are the same. Returns its path.
pub(crate) fn build(files: &[PathBuf], model: &Path, spec: &ModelSpec, cache: &Path) -> Result<PathBuf> {
    if let [store] = files
        && is_store(store)
    {
        return Ok(store.clone());
    }
    let mut described = format!("tokenizer {:016x}", fingerprint(&model.join("tokenizer.json"))?);
    for file in files {
        // Where a file lies is not what it is.
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        described += &format!("; {name} {:016x}", fingerprint(file)?);
    }
    let store = cache.join(format!("{:016x}.store", occult_train::random::hash_bytes(described.as_bytes())));
    if is_store(&store) {
        return Ok(store);
    }
    let text = TextTokenizer::open(model, spec)?;
    let defaults = GenerationDefaults::read(model)?;
    let Some(&end) = defaults.eos_ids.first() else {
        bail!("{}: its configuration names no token that ends a text (eos_token_id)", model.display());
    };
    // Only a token that the tokenizer itself puts in front begins a document.
    let begin = defaults.bos_id.filter(|b| text.encode("", true).is_ok_and(|ids| ids.first() == Some(b)));
    std::fs::create_dir_all(cache).with_context(|| cache.display().to_string())?;
    remove_unfinished(cache)?;
    let spinner = progress::spinner(&format!("encoding {} files", files.len()));
    let mut writer = StoreWriter::create(&store, &described)?;
    let inputs: Vec<(&PathBuf, Option<Format>)> = files.iter().map(|f| (f, None)).collect();
    build_store(&inputs, &ModelTokenizer { text: &text, begin, end }, &mut writer)?;
    writer.finish()?;
    spinner.finish_and_clear();
    Ok(store)
}

/// Data as the trainer reads them.
pub(crate) struct Data {
    pub(crate) loader: Loader,
    /// In words: the same when a run is resumed.
    pub(crate) description: String,
    /// Documents that lost their end.
    pub(crate) truncated: u64,
}

/// Opens a store: all documents, or those of one source, in sequences of `length`, in an order that `seed` decides.
pub(crate) fn open(
    store: &Path,
    source: Option<u32>,
    length: usize,
    seed: Option<u64>,
    spec: &ModelSpec,
) -> Result<Data> {
    if length > spec.context_len {
        bail!("--length is {length}, the model's context is {}", spec.context_len);
    }
    let store = TokenStore::open(store)?;
    let long = LongDocument::ByDocument;
    let options = PackOptions { length, long, validation: 0.0, validation_part: false, source };
    let packed = Packed::new(&store, &options)?;
    let (documents, tokens) = (store.num_documents(), store.num_tokens());
    let description = format!("{}; {documents} documents, {tokens} tokens", store.description());
    let truncated = packed.num_truncated();
    Ok(Data { loader: Loader::new(store, packed, seed), description, truncated })
}

/// Names of domains: of each file without its extension, or of the store.
pub(crate) fn domains(files: &[PathBuf]) -> Vec<(String, Option<u32>)> {
    if let [store] = files
        && is_store(store)
    {
        return vec![("all".to_owned(), None)];
    }
    let name = |f: &PathBuf| {
        let name = f.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned());
        name.split('.').next().unwrap_or_default().to_owned()
    };
    files.iter().zip(0u32..).map(|(f, i)| (name(f), Some(i))).collect()
}

/// A hash of the weights in a model directory.
pub(crate) fn weights_fingerprint(dir: &Path) -> Result<u64> {
    let entries = std::fs::read_dir(dir).with_context(|| dir.display().to_string())?;
    let mut files = vec![];
    for entry in entries {
        let path = entry.with_context(|| dir.display().to_string())?.path();
        if path.extension().is_some_and(|e| e == "safetensors") {
            files.push(path);
        }
    }
    files.sort();
    let sums = files.iter().map(|f| Ok(fingerprint(f)?)).collect::<Result<Vec<u64>>>()?;
    Ok(occult_train::random::key(&sums))
}

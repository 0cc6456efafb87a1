//! Broken and lying model directories, made from the fixtures by one change each: every one is refused with an error that
//! names the file and what is wrong in it.

#[path = "../common/mod.rs"]
mod common;
mod config;
mod requests;
mod shards;
mod tasks;
mod tensors;
#[cfg(feature = "tokenizer")]
mod tokenizer;

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use common::{dir, load};
use occult_model::{Batch, GenerateOptions, LoadOptions, Logits, ModelFiles, StoredDtype, generate};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use tempfile::TempDir;

/// A copy of a case that a test may break.
fn copy(case: &str) -> TempDir {
    let temp = tempfile::tempdir().expect("temp");
    for entry in fs::read_dir(dir(case)).expect("case") {
        let path = entry.expect("entry").path();
        fs::copy(&path, temp.path().join(path.file_name().expect("name"))).expect("copy");
    }
    temp
}

fn set(dir: &Path, key: &str, value: Value) {
    edit(&dir.join("config.json"), |config| config[key] = value);
}

fn edit(path: &Path, change: impl FnOnce(&mut Value)) {
    let mut json: Value = serde_json::from_slice(&fs::read(path).expect("read")).expect("json");
    change(&mut json);
    fs::write(path, json.to_string()).expect("write");
}

type Tensors = HashMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

/// Rewrites a safetensors file.
fn edit_tensors(path: &Path, change: impl FnOnce(&mut Tensors)) {
    let bytes = fs::read(path).expect("read");
    let parsed = SafeTensors::deserialize(&bytes).expect("tensors");
    let one =
        |(name, t): (String, TensorView<'_>)| (name, (t.dtype(), t.shape().to_vec(), t.data().to_vec()));
    let mut tensors: Tensors = parsed.tensors().into_iter().map(one).collect();
    change(&mut tensors);
    let views: Vec<(&String, TensorView<'_>)> =
        tensors.iter().map(|(n, (d, s, b))| (n, TensorView::new(*d, s.clone(), b).expect("view"))).collect();
    fs::write(path, safetensors::serialize(views, None).expect("serialize")).expect("write");
}

/// The error of opening and loading must contain all of these.
fn refused(dir: &Path, words: &[&str]) {
    let result = ModelFiles::open(dir, LoadOptions::default()).and_then(|f| f.load());
    let message = result.map(drop).expect_err("must be refused").to_string();
    for word in words {
        assert!(message.contains(word), "{word:?} is not in: {message}");
    }
}

const GATE: &str = "model.layers.1.mlp.gate.weight";
const EXPERT: &str = "model.layers.0.mlp.experts.3.up_proj.weight";

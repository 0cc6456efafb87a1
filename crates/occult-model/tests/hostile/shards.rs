//! Directories, shards and indexes.

use super::*;

#[test]
fn directory_is_missing() {
    refused(Path::new("no/such/model"), &["no/such/model", "not a directory"]);
}

#[test]
fn weights_are_missing() {
    let d = copy("olmoe");
    fs::remove_file(d.path().join("model.safetensors")).expect("remove");
    refused(d.path(), &["model.safetensors.index.json"]);
}

#[test]
fn shard_is_missing() {
    let d = copy("qwen2_moe-sharded-bf16");
    fs::remove_file(d.path().join("model-00002-of-00003.safetensors")).expect("remove");
    refused(
        d.path(),
        &[
            "model.safetensors.index.json",
            "tensor model.layers.",
            "model-00002-of-00003.safetensors",
            "missing",
        ],
    );
}

#[test]
fn shard_is_truncated() {
    for keep in [0, 5, 8, 100, 200_000] {
        let d = copy("olmoe");
        let path = d.path().join("model.safetensors");
        let bytes = fs::read(&path).expect("read");
        fs::write(&path, &bytes[..keep]).expect("write");
        refused(d.path(), &["model.safetensors", "truncated"]);
        if keep == 200_000 {
            refused(d.path(), &["tensor model.", "ends at byte"]);
        }
    }
    let d = copy("qwen2_moe-sharded-bf16");
    let path = d.path().join("model-00002-of-00003.safetensors");
    let bytes = fs::read(&path).expect("read");
    fs::write(&path, &bytes[..bytes.len() - 1]).expect("write");
    refused(d.path(), &["model-00002-of-00003.safetensors", "truncated", "tensor model."]);
}

#[test]
fn shard_has_bytes_at_the_end() {
    let d = copy("olmoe");
    let path = d.path().join("model.safetensors");
    let mut bytes = fs::read(&path).expect("read");
    bytes.extend_from_slice(b"more");
    fs::write(&path, bytes).expect("write");
    refused(d.path(), &["model.safetensors", "but holds"]);
}

#[test]
fn header_is_garbage() {
    let d = copy("olmoe");
    let path = d.path().join("model.safetensors");
    let mut bytes = fs::read(&path).expect("read");
    bytes[8..40].fill(b'x');
    fs::write(&path, bytes).expect("write");
    refused(d.path(), &["model.safetensors", "broken header"]);
}

#[test]
fn index_names_the_wrong_shard() {
    let d = copy("qwen2_moe-sharded-bf16");
    edit(&d.path().join("model.safetensors.index.json"), |i| {
        i["weight_map"]["model.norm.weight"] = json!("model-00001-of-00003.safetensors");
    });
    refused(
        d.path(),
        &["index.json", "tensor model.norm.weight", "model-00001-of-00003.safetensors", "does not have it"],
    );
}

#[test]
fn index_leaves_out_a_tensor_that_a_shard_has() {
    let d = copy("qwen2_moe-sharded-bf16");
    let index = d.path().join("model.safetensors.index.json");
    edit(&index, |i| drop(i["weight_map"].as_object_mut().expect("map").remove("model.norm.weight")));
    refused(d.path(), &["index.json", "tensor model.norm.weight", "missing"]);
}

#[test]
fn index_names_a_directory() {
    let d = copy("qwen2_moe-sharded-bf16");
    let shard = d.path().join("model-00002-of-00003.safetensors");
    fs::remove_file(&shard).expect("remove");
    fs::create_dir(&shard).expect("directory");
    refused(d.path(), &["model-00002-of-00003.safetensors"]);
}

#[test]
fn index_names_a_file_elsewhere() {
    for file in ["../model.safetensors", "/etc/passwd", "a/b.safetensors", ""] {
        let d = copy("qwen2_moe-sharded-bf16");
        edit(&d.path().join("model.safetensors.index.json"), |i| {
            i["weight_map"]["model.norm.weight"] = json!(file)
        });
        refused(d.path(), &["index.json", "tensor model.norm.weight", "beside the index"]);
    }
}

#[test]
fn index_is_broken_json() {
    let d = copy("qwen2_moe-sharded-bf16");
    fs::write(d.path().join("model.safetensors.index.json"), "{\"weight_map\": [").expect("write");
    refused(d.path(), &["index.json", "broken JSON"]);
}

#[test]
fn index_is_empty() {
    let d = copy("qwen2_moe-sharded-bf16");
    fs::write(d.path().join("model.safetensors.index.json"), "{\"weight_map\": {}}").expect("write");
    refused(d.path(), &["index.json", "empty"]);
}

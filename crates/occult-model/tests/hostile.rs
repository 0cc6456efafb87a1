//! Broken and lying model directories: every one is refused with an error that names the file and what is wrong in it.

mod common;

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use common::{dir, load};
use occult_model::{Batch, GenerateOptions, LoadOptions, Logits, ModelFiles, generate};
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
    }
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

#[test]
fn tensor_has_a_dtype_that_cannot_be_used() {
    let d = copy("olmoe");
    edit_tensors(&d.path().join("model.safetensors"), |t| {
        let (dtype, shape, bytes) = t.get_mut(GATE).expect("gate");
        bytes.truncate(shape.iter().product());
        *dtype = Dtype::F8_E4M3;
    });
    refused(d.path(), &["model.safetensors", GATE, "F8_E4M3", "F32, BF16, F16"]);
}

#[test]
fn tensor_has_the_wrong_shape() {
    let d = copy("olmoe");
    edit_tensors(&d.path().join("model.safetensors"), |t| t.get_mut(GATE).expect("gate").1.reverse());
    refused(d.path(), &["model.safetensors", GATE, "[32, 16]", "[16, 32]"]);
}

#[test]
fn expert_is_missing() {
    let d = copy("olmoe");
    edit_tensors(&d.path().join("model.safetensors"), |t| drop(t.remove(EXPERT)));
    refused(d.path(), &["model.safetensors", EXPERT, "missing"]);
}

#[test]
fn fused_experts_have_the_wrong_number() {
    let d = copy("qwen2_moe-fused");
    set(d.path(), "num_experts", json!(10));
    refused(d.path(), &["model.safetensors", "[12, 32]", "[10, 32]"]);
}

#[test]
fn family_is_unknown() {
    let d = copy("olmoe");
    set(d.path(), "model_type", json!("gpt_neox"));
    refused(
        d.path(),
        &["config.json", "model_type = gpt_neox", "olmoe", "qwen2_moe", "deepseek_v2", "mixtral"],
    );
}

#[test]
fn options_that_are_not_supported_are_named() {
    let yarn = json!({"rope_type": "longrope", "factor": 4.0});
    for (case, key, value, words) in [
        ("olmoe", "hidden_act", json!("gelu"), ["hidden_act = gelu", "silu"]),
        ("olmoe", "rope_scaling", yarn, ["rope_scaling.rope_type = longrope", "default, linear, yarn"]),
        ("olmoe", "quantization_config", json!({"bits": 4}), ["quantization_config", "F32, BF16 or F16"]),
        ("qwen3_moe", "partial_rotary_factor", json!(0.5), ["partial_rotary_factor", "rope"]),
        ("deepseek", "scoring_func", json!("sigmoid"), ["scoring_func = sigmoid", "softmax"]),
        (
            "deepseek_v2-lite",
            "topk_method",
            json!("noaux_tc"),
            ["topk_method = noaux_tc", "group_limited_greedy"],
        ),
        ("deepseek_v2-lite", "norm_topk_prob", json!(true), ["norm_topk_prob = true", "false"]),
        ("deepseek_v2-lite", "mlp_bias", json!(true), ["mlp_bias = true", "false"]),
    ] {
        let d = copy(case);
        if key == "partial_rotary_factor" {
            set(d.path(), "rope_scaling", json!({"rope_type": "default"}));
        }
        set(d.path(), key, value);
        let words: Vec<&str> = if words[1] == "rope" { vec![words[0]] } else { words.to_vec() };
        refused(d.path(), &[&words[..], &["config.json", "not supported"]].concat());
    }
}

#[test]
fn configuration_contradicts_the_weights() {
    for (key, value, words) in [
        ("hidden_size", json!(64), ["tensor model.embed_tokens.weight", "[96, 32]", "[96, 64]"]),
        ("vocab_size", json!(97), ["tensor model.embed_tokens.weight", "[96, 32]", "[97, 32]"]),
        (
            "num_hidden_layers",
            json!(3),
            ["tensor model.layers.2.self_attn.q_proj.weight", "missing", "model.safetensors"],
        ),
        ("num_hidden_layers", json!(1), ["tensor model.layers.1.", "not part of the model", "1 layers"]),
        ("num_experts", json!(15), ["tensor model.layers.0.mlp.gate.weight", "[16, 32]", "[15, 32]"]),
        ("intermediate_size", json!(8), ["experts.0.gate_proj.weight", "[16, 32]", "[8, 32]"]),
        ("tie_word_embeddings", json!("yes"), ["config.json", "tie_word_embeddings", "true or false"]),
    ] {
        let d = copy("olmoe");
        set(d.path(), key, value);
        refused(d.path(), &words);
    }
}

#[test]
fn configuration_is_impossible() {
    for (key, value, words) in [
        ("num_experts_per_tok", json!(17), ["num_experts_per_tok", "17", "16 experts"]),
        ("num_attention_heads", json!(0), ["num_attention_heads", "0", "whole number"]),
        ("num_key_value_heads", json!(3), ["num_key_value_heads", "3", "4 attention heads"]),
        ("num_hidden_layers", json!(1e9), ["num_hidden_layers", "whole number", "config.json"]),
        ("num_hidden_layers", json!(1_000_000_000_000u64), ["num_hidden_layers", "1024", "config.json"]),
        ("hidden_size", Value::Null, ["hidden_size", "missing", "config.json"]),
        ("hidden_size", json!(33), ["hidden_size", "33", "multiple"]),
        ("rms_norm_eps", json!(-1.0), ["rms_norm_eps", "-1", "positive"]),
        ("rope_theta", json!("big"), ["rope_theta", "number", "config.json"]),
    ] {
        let d = copy("olmoe");
        set(d.path(), key, value);
        refused(d.path(), &words);
    }
}

#[test]
fn weights_that_are_no_numbers() {
    for (name, value) in [(EXPERT, f32::NAN), (GATE, f32::INFINITY), ("model.norm.weight", f32::NAN)] {
        let d = copy("olmoe");
        edit_tensors(&d.path().join("model.safetensors"), |t| {
            t.get_mut(name).expect("tensor").2[8..12].copy_from_slice(&value.to_le_bytes());
        });
        refused(d.path(), &["model.safetensors", name, "value 2 is", &value.to_string()]);
    }
    for case in ["mixtral-f16", "qwen3_moe-window-bias-fused-bf16"] {
        let d = copy(case);
        edit_tensors(&d.path().join("model.safetensors"), |t| {
            let (_, (_, _, bytes)) = t.iter_mut().find(|(n, _)| n.contains("experts")).expect("expert");
            bytes[6..8].copy_from_slice(&[0xff, 0x7f]);
        });
        refused(d.path(), &["model.safetensors", "experts", "value 3 is NaN"]);
    }
}

#[test]
fn unaligned_data_are_read_all_the_same() {
    let d = copy("mixtral-f16");
    let path = d.path().join("model.safetensors");
    let bytes = fs::read(&path).expect("read");
    let header = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes")) as usize;
    // One more space in the header: every tensor now starts at an odd address.
    let mut moved = (header as u64 + 1).to_le_bytes().to_vec();
    moved.extend_from_slice(&bytes[8..8 + header]);
    moved.push(b' ');
    moved.extend_from_slice(&bytes[8 + header..]);
    fs::write(&path, moved).expect("write");
    let batch = Batch::single(&[5, 6, 7]).expect("batch");
    let run = |model: &occult_model::Decoder| {
        common::values(&model.forward(&batch, None, Logits::All, None).expect("logits"))
    };
    assert_eq!(run(&common::load_dir(d.path())), run(&load("mixtral-f16")));
}

#[test]
fn prompt_is_longer_than_the_context() {
    let model = load("olmoe"); // context 64
    let prompt = vec![5; 65];
    let mut go = |_| Ok(std::ops::ControlFlow::Continue(()));
    let error = generate(&model, &prompt, &GenerateOptions::default(), &mut go).expect_err("too long");
    assert_eq!(error.to_string(), "the prompt has 65 tokens, the model's context is 64");
    let batch = Batch::single(&prompt).expect("batch");
    let error = model.forward(&batch, None, Logits::All, None).expect_err("too long").to_string();
    assert!(error.contains("65 tokens are more than the model's context of 64"), "{error}");
    // A padded batch is as long as its longest sequence, and the cache counts.
    let mut cache = model.new_cache();
    let batch = Batch::single(&prompt[..60]).expect("batch");
    model.forward(&batch, Some(&mut cache), Logits::Last, None).expect("fits");
    let error = model.forward(&Batch::single(&[5; 5]).expect("batch"), Some(&mut cache), Logits::Last, None);
    assert!(error.expect_err("full").to_string().contains("65 tokens"));
}

#[test]
fn ids_outside_the_vocabulary() {
    let batch = Batch::single(&[5, 96]).expect("batch");
    let error = load("olmoe").forward(&batch, None, Logits::All, None).expect_err("no such id");
    assert_eq!(error.to_string(), "token id 96 is outside the vocabulary of 96");
}

#[test]
fn sequences_without_tokens() {
    assert!(Batch::new::<Vec<u32>>(&[]).is_err());
    assert!(Batch::new(&[vec![1], vec![]]).is_err());
}

#[cfg(feature = "tokenizer")]
mod tokenizer {
    use super::*;
    use occult_model::TextTokenizer;

    fn refused(dir: &Path, words: &[&str]) {
        let message =
            TextTokenizer::open(dir, load("olmoe").spec()).map(drop).expect_err("refused").to_string();
        for word in words {
            assert!(message.contains(word), "{word:?} is not in: {message}");
        }
    }

    #[test]
    fn is_missing() {
        let d = copy("olmoe");
        fs::remove_file(d.path().join("tokenizer.json")).expect("remove");
        refused(d.path(), &["tokenizer.json", "missing"]);
    }

    #[test]
    fn is_broken() {
        let d = copy("olmoe");
        fs::write(d.path().join("tokenizer.json"), "{").expect("write");
        refused(d.path(), &["tokenizer.json"]);
    }

    #[test]
    fn has_ids_the_model_lacks() {
        let d = copy("olmoe");
        edit(&d.path().join("tokenizer.json"), |t| t["model"]["vocab"]["extra"] = json!(96));
        refused(d.path(), &["tokenizer.json", "extra", "id 96", "vocabulary has 96"]);
    }

    #[test]
    fn lacks_the_id_that_ends_a_text() {
        let d = copy("olmoe");
        fs::write(d.path().join("generation_config.json"), "{\"eos_token_id\": [2, 950]}").expect("write");
        refused(d.path(), &["tokenizer.json", "id 950"]);
    }
}

mod tasks {
    use super::*;
    use occult_model::eval::read_items;

    #[test]
    fn broken_lines_are_named() {
        let temp = tempfile::tempdir().expect("temp");
        let path = temp.path().join("task.jsonl");
        let good = "{\"context\": \"a\", \"choices\": [\"b\", \"c\"], \"answer\": 1}\n";
        for (line, words) in [
            ("{", ["line 2", "task.jsonl"]),
            ("{\"context\": \"a\", \"choices\": [\"b\"]}", ["line 2", "answer"]),
            ("{\"context\": \"a\", \"choices\": [\"b\"], \"answer\": 1}", ["line 2", "there are 1 choices"]),
            ("{\"context\": \"a\", \"choices\": [\"\"], \"answer\": 0}", ["line 2", "empty"]),
        ] {
            fs::write(&path, format!("{good}{line}\n")).expect("write");
            let message = read_items(&path).expect_err("broken").to_string();
            assert!(words.iter().all(|w| message.contains(w)), "{message}");
        }
        fs::write(&path, "\n\n").expect("write");
        assert!(read_items(&path).expect_err("empty").to_string().contains("no questions"));
    }
}

//! Tensors that are missing, of another kind or no numbers.

use super::*;

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
fn fused_experts_lack_their_second_half() {
    let d = copy("qwen2_moe-fused");
    let name = "model.layers.1.mlp.experts.down_proj";
    edit_tensors(&d.path().join("model.safetensors"), |t| drop(t.remove(name)));
    refused(d.path(), &["model.safetensors", name, "missing"]);
}

#[test]
fn values_beyond_the_format_asked_for() {
    let d = copy("olmoe");
    edit_tensors(&d.path().join("model.safetensors"), |t| {
        t.get_mut(EXPERT).expect("tensor").2[8..12].copy_from_slice(&70_000f32.to_le_bytes());
    });
    let files = |dtype| {
        ModelFiles::open(d.path(), LoadOptions { dtype, ..Default::default() })
            .and_then(|f| f.load())
            .map(drop)
    };
    assert!(files(Some(StoredDtype::Bf16)).is_ok());
    let message = files(Some(StoredDtype::F16)).expect_err("too large").to_string();
    for word in ["model.safetensors", EXPERT, "value 2 is 70000", "F16"] {
        assert!(message.contains(word), "{word:?} is not in: {message}");
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

//! Configurations.

use super::*;

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

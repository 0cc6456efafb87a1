//! The configurations of the released models are read without an exception, and the tensors they describe add up to the
//! published sizes. Abridged only by keys that say nothing about the model (dropout, token ids, versions ...).

use occult_model::hf::{ParameterCounts, read_spec};
use occult_model::spec::{AttentionSpec, RopeScaling};
use occult_model::{ModelError, ModelSpec};
use serde_json::{Value, json};

fn read(config: &Value) -> Result<ModelSpec, ModelError> {
    let temp = tempfile::tempdir().expect("temp");
    std::fs::write(temp.path().join("config.json"), config.to_string()).expect("write");
    read_spec(temp.path())
}

/// `model` with some keys replaced.
fn with(model: &Value, keys: Value) -> Value {
    let mut all = model.as_object().expect("object").clone();
    all.extend(keys.as_object().expect("object").clone());
    Value::Object(all)
}

fn olmoe() -> Value {
    json!({"architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "attention_bias": false, "clip_qkv": null,
        "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 1024, "max_position_embeddings": 4096,
        "norm_topk_prob": false, "num_attention_heads": 16, "num_experts": 64, "num_experts_per_tok": 8,
        "num_hidden_layers": 16, "num_key_value_heads": 16, "output_router_logits": false, "rms_norm_eps": 1e-05,
        "rope_scaling": null, "rope_theta": 10000.0, "router_aux_loss_coef": 0.01, "tie_word_embeddings": false,
        "torch_dtype": "bfloat16", "use_cache": true, "vocab_size": 50304})
}

fn qwen15() -> Value {
    json!({"architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "decoder_sparse_step": 1,
        "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 5632, "max_position_embeddings": 8192,
        "max_window_layers": 21, "moe_intermediate_size": 1408, "norm_topk_prob": false, "num_attention_heads": 16,
        "num_experts": 60, "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 16,
        "output_router_logits": false, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001,
        "shared_expert_intermediate_size": 5632, "sliding_window": 32768, "tie_word_embeddings": false,
        "torch_dtype": "bfloat16", "use_sliding_window": false, "vocab_size": 151936})
}

fn qwen2_57b() -> Value {
    // The authors' advice for long texts adds rope_scaling.
    with(
        &qwen15(),
        json!({"hidden_size": 3584, "intermediate_size": 18944, "max_position_embeddings": 32768, "max_window_layers": 28,
            "mlp_only_layers": [], "moe_intermediate_size": 2560, "num_attention_heads": 28, "num_experts": 64,
            "num_experts_per_tok": 8, "num_hidden_layers": 28, "num_key_value_heads": 4,
            "shared_expert_intermediate_size": 20480, "sliding_window": 65536,
            "rope_scaling": {"factor": 2.0, "original_max_position_embeddings": 32768, "type": "yarn"}}),
    )
}

fn qwen3_30b() -> Value {
    json!({"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "attention_bias": false,
        "decoder_sparse_step": 1, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 6144,
        "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [], "moe_intermediate_size": 768,
        "norm_topk_prob": true, "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
        "num_hidden_layers": 48, "num_key_value_heads": 4, "output_router_logits": false, "rms_norm_eps": 1e-06,
        "rope_scaling": null, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": null,
        "tie_word_embeddings": false, "torch_dtype": "bfloat16", "use_sliding_window": false, "vocab_size": 151936})
}

fn qwen3_235b() -> Value {
    with(
        &qwen3_30b(),
        json!({"hidden_size": 4096, "intermediate_size": 12288, "max_window_layers": 94, "moe_intermediate_size": 1536,
            "num_attention_heads": 64, "num_hidden_layers": 94}),
    )
}

/// Qwen3-Coder-30B-A3B: keys of other families stand in it.
fn qwen3_coder() -> Value {
    with(
        &qwen3_30b(),
        json!({"max_position_embeddings": 262144, "max_window_layers": 28, "qkv_bias": false, "rope_theta": 10000000,
            "shared_expert_intermediate_size": 0, "use_qk_norm": true}),
    )
}

fn deepseek_moe() -> Value {
    json!({"architectures": ["DeepseekForCausalLM"], "model_type": "deepseek", "attention_bias": false,
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekConfig"}, "aux_loss_alpha": 0.001,
        "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 10944,
        "max_position_embeddings": 4096, "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_routed_experts": 64,
        "n_shared_experts": 2, "norm_topk_prob": false, "num_attention_heads": 16, "num_experts_per_tok": 6,
        "num_hidden_layers": 28, "num_key_value_heads": 16, "pretraining_tp": 1, "rms_norm_eps": 1e-06,
        "rope_scaling": null, "rope_theta": 10000, "scoring_func": "softmax", "seq_aux": true,
        "tie_word_embeddings": false, "torch_dtype": "bfloat16", "vocab_size": 102400})
}

fn v2_lite() -> Value {
    with(
        &deepseek_moe(),
        json!({"architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "kv_lora_rank": 512,
            "max_position_embeddings": 163840, "n_group": 1, "num_hidden_layers": 27, "q_lora_rank": null,
            "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "routed_scaling_factor": 1.0,
            "topk_group": 1, "topk_method": "greedy",
            "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
                "original_max_position_embeddings": 4096, "type": "yarn"}}),
    )
}

/// DeepSeek-V2, V2-Chat and V2.5.
fn v2() -> Value {
    with(
        &v2_lite(),
        json!({"ep_size": 1, "hidden_size": 5120, "intermediate_size": 12288, "moe_intermediate_size": 1536,
            "n_group": 8, "n_routed_experts": 160, "num_attention_heads": 128, "num_hidden_layers": 60,
            "num_key_value_heads": 128, "q_lora_rank": 1536, "routed_scaling_factor": 16.0, "topk_group": 3,
            "topk_method": "group_limited_greedy",
            "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
                "original_max_position_embeddings": 4096, "type": "yarn"}}),
    )
}

fn mixtral_8x7b() -> Value {
    json!({"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_act": "silu", "hidden_size": 4096,
        "intermediate_size": 14336, "max_position_embeddings": 32768, "num_attention_heads": 32,
        "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8,
        "output_router_logits": false, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02,
        "sliding_window": null, "tie_word_embeddings": false, "torch_dtype": "bfloat16", "vocab_size": 32000})
}

fn mixtral_8x22b() -> Value {
    with(
        &mixtral_8x7b(),
        json!({"hidden_size": 6144, "intermediate_size": 16384, "max_position_embeddings": 65536,
            "num_attention_heads": 48, "num_hidden_layers": 56, "router_jitter_noise": 0.0}),
    )
}

#[test]
fn sizes_are_the_published_ones() {
    // Billions of parameters, and half a unit of the last published digit.
    for (name, config, billions, half) in [
        ("OLMoE-1B-7B-0125", olmoe(), 6.92, 0.005),
        ("Qwen1.5-MoE-A2.7B", qwen15(), 14.3, 0.05),
        ("Qwen2-57B-A14B-Instruct", qwen2_57b(), 57.4, 0.05),
        ("Qwen3-30B-A3B", qwen3_30b(), 30.5, 0.05),
        ("Qwen3-Coder-30B-A3B-Instruct", qwen3_coder(), 30.5, 0.05),
        ("Qwen3-235B-A22B", qwen3_235b(), 235.0, 0.5),
        ("deepseek-moe-16b-base", deepseek_moe(), 16.4, 0.05),
        ("DeepSeek-V2-Lite", v2_lite(), 15.7, 0.05),
        ("DeepSeek-V2, V2.5", v2(), 236.0, 0.5),
        ("Mixtral-8x7B-v0.1", mixtral_8x7b(), 46.7, 0.05),
        ("Mixtral-8x22B-v0.1", mixtral_8x22b(), 141.0, 0.5),
    ] {
        let spec = read(&config).unwrap_or_else(|e| panic!("{name}: {e}"));
        let total = ParameterCounts::of(&spec).total as f64 / 1e9;
        assert!((total - billions).abs() <= half, "{name}: {total} billion parameters, published {billions}");
        assert!(spec.layers.iter().all(|l| l.sliding_window.is_none()), "{name}: no released model slides");
    }
}

#[test]
fn what_sets_a_model_apart_is_kept() {
    let (lite, v2) = (read(&v2_lite()).expect("V2-Lite"), read(&v2()).expect("V2"));
    for (spec, layers, factor) in [(&lite, 27, 0.0707), (&v2, 60, 0.1)] {
        assert_eq!((spec.layers.len(), spec.num_moe_layers()), (layers, layers - 1));
        let AttentionSpec::Latent(latent) = &spec.attention else { panic!("latent attention") };
        let scale = 1.0 + factor * 40f64.ln();
        assert!((latent.score_scale - scale * scale).abs() < 1e-9, "{}", latent.score_scale);
        let RopeScaling::Yarn { attention_factor, original_context, .. } = spec.rope.scaling else {
            panic!("YaRN")
        };
        assert_eq!((attention_factor, original_context), (1.0, 4096), "mscale and mscale_all_dim cancel");
    }
    let router = v2.moe.router;
    let groups = router.groups.expect("groups");
    assert_eq!((groups.num_groups, groups.top_groups, router.top_k), (8, 3, 6));
    assert_eq!((router.scale, router.norm_topk), (16.0, false));
    assert_eq!(lite.moe.router.groups, None);
    let yarn = read(&qwen2_57b()).expect("Qwen2").rope.scaling;
    let RopeScaling::Yarn { factor, attention_factor, .. } = yarn else { panic!("YaRN") };
    assert_eq!(factor, 2.0);
    assert!((attention_factor - (1.0 + 0.1 * 2f64.ln())).abs() < 1e-12);
    assert!(read(&mixtral_8x7b()).expect("Mixtral").moe.router.norm_topk);
    assert!(read(&qwen3_30b()).expect("Qwen3").moe.router.norm_topk);
}

#[test]
fn a_head_is_the_hidden_size_over_the_heads_where_nothing_is_said() {
    let mut config = qwen3_30b();
    config.as_object_mut().expect("object").remove("head_dim");
    let AttentionSpec::Grouped(attention) = read(&config).expect("Qwen3").attention else {
        panic!("grouped")
    };
    assert_eq!(attention.head_dim, 2048 / 32);
}

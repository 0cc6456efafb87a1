//! config.json of each family to [`ModelSpec`]. Defaults are those of the released model code.

use std::path::Path;

use super::keys::{Keys, MAX_EXPERTS, MAX_LAYER_EXPERTS, MAX_LAYERS, MAX_SIZE};
use super::rope::rope;
use crate::error::{ModelError, Result};
use crate::spec::{
    AttentionSpec, Family, GroupedSpec, LatentSpec, LayerSpec, ModelSpec, MoeSpec, QkNorm, RopeScaling,
    RouterSpec, RoutingGroups, SharedSpec,
};

/// Name of the configuration file.
pub(crate) const CONFIG: &str = "config.json";

/// Reads `config.json` of a model directory.
pub fn read_spec(dir: &Path) -> Result<ModelSpec> {
    if !dir.is_dir() {
        return Err(ModelError::bad(dir, "", "is not a directory; a model is a folder with config.json"));
    }
    spec_from(&Keys::read(&dir.join(CONFIG))?)
}

/// Values that several families share.
/// `quantization_config.quant_method` of directories with our quantised weights.
pub(crate) const QUANT_METHOD: &str = "occult";

struct Common {
    hidden: usize,
    heads: usize,
    kv_heads: usize,
    layers: usize,
}

fn spec_from(keys: &Keys) -> Result<ModelSpec> {
    let found = keys.str_opt("model_type")?.ok_or_else(|| keys.bad("model_type", "is missing"))?;
    let Some(family) = Family::ALL.into_iter().find(|f| f.model_type() == found) else {
        let known = Family::ALL.map(Family::model_type).join(", ");
        return Err(keys.unsupported("model_type", found, &known));
    };
    let ours = |v: &serde_json::Value| v.get("quant_method").is_some_and(|m| m == QUANT_METHOD);
    if keys.get("quantization_config").is_some_and(|v| !ours(v)) {
        return Err(keys.unsupported(
            "quantization_config",
            "an object",
            "none: weights in F32, BF16 or F16, or as `occult convert --quantize` writes them",
        ));
    }
    keys.only("hidden_act", &["silu"])?;
    let heads = keys.usize("num_attention_heads", MAX_SIZE)?;
    let common = Common {
        hidden: keys.usize("hidden_size", MAX_SIZE)?,
        heads,
        kv_heads: keys.usize_opt("num_key_value_heads", 1, heads)?.unwrap_or(heads),
        layers: keys.usize("num_hidden_layers", MAX_LAYERS)?,
    };
    if !common.heads.is_multiple_of(common.kv_heads) {
        let message = format!("is {}, which does not divide the {heads} attention heads", common.kv_heads);
        return Err(keys.bad("num_key_value_heads", message));
    }
    let (mut attention, rotated) = attention(keys, family, &common)?;
    let rope = rope(keys, family, rotated)?;
    if let (AttentionSpec::Latent(latent), RopeScaling::Yarn { factor, .. }) = (&mut attention, &rope.scaling)
    {
        latent.score_scale = score_scale(keys, *factor)?;
    }
    let moe = moe(keys, family)?;
    if common.layers * moe.router.num_experts > MAX_LAYER_EXPERTS {
        let message = format!("is {}, with {} experts each", common.layers, moe.router.num_experts);
        return Err(keys.bad("num_hidden_layers", message + ": more than any model has"));
    }
    let spec = ModelSpec {
        family,
        vocab_size: keys.usize("vocab_size", MAX_SIZE)?,
        hidden_size: common.hidden,
        context_len: keys.usize("max_position_embeddings", 1 << 30)?,
        norm_eps: keys.positive(
            "rms_norm_eps",
            Some(if matches!(family, Family::Olmoe | Family::Mixtral) { 1e-5 } else { 1e-6 }),
        )?,
        tied_embeddings: keys.bool("tie_word_embeddings", false)?,
        attention,
        rope,
        layers: layers(keys, family, &common)?,
        moe,
    };
    Ok(spec)
}

/// The attention and the width that is rotated.
fn attention(keys: &Keys, family: Family, c: &Common) -> Result<(AttentionSpec, usize)> {
    if family == Family::DeepSeekV2 {
        if c.kv_heads != c.heads {
            return Err(keys.unsupported(
                "num_key_value_heads",
                c.kv_heads,
                &format!("{} (all heads)", c.heads),
            ));
        }
        keys.only_bool("mlp_bias", false)?;
        let latent = LatentSpec {
            num_heads: c.heads,
            q_rank: keys.usize_opt("q_lora_rank", 1, MAX_SIZE)?,
            kv_rank: keys.usize("kv_lora_rank", MAX_SIZE)?,
            nope_dim: keys.usize("qk_nope_head_dim", MAX_SIZE)?,
            rope_dim: keys.usize("qk_rope_head_dim", MAX_SIZE)?,
            v_dim: keys.usize("v_head_dim", MAX_SIZE)?,
            latent_norm_eps: 1e-6,
            bias: keys.bool("attention_bias", false)?,
            score_scale: 1.0,
        };
        let rotated = latent.rope_dim;
        return Ok((AttentionSpec::Latent(latent), rotated));
    }
    let explicit = match family {
        Family::Qwen3Moe | Family::Mixtral => keys.usize_opt("head_dim", 1, MAX_SIZE)?,
        _ => None,
    };
    let head_dim = match explicit {
        Some(d) => d,
        None if !c.hidden.is_multiple_of(c.heads) => {
            let message = format!("is {}, not a multiple of the {} attention heads", c.hidden, c.heads);
            return Err(keys.bad("hidden_size", message));
        }
        None => c.hidden / c.heads,
    };
    let bias = keys.bool("attention_bias", false)?;
    let (qkv_bias, output_bias, qk_norm) = match family {
        Family::Qwen2Moe => (keys.bool("qkv_bias", true)?, false, QkNorm::None),
        Family::Mixtral => (false, false, QkNorm::None),
        Family::Olmoe => (bias, bias, QkNorm::Full),
        Family::Qwen3Moe => (bias, bias, QkNorm::PerHead),
        _ => (bias, bias, QkNorm::None),
    };
    let clip_qkv = if family == Family::Olmoe { keys.f64_opt("clip_qkv")? } else { None };
    if let Some(clip) = clip_qkv
        && clip <= 0.0
    {
        return Err(keys.bad("clip_qkv", format!("is {clip}, expected a positive number or null")));
    }
    let (num_heads, num_kv_heads) = (c.heads, c.kv_heads);
    let grouped = GroupedSpec { num_heads, num_kv_heads, head_dim, qkv_bias, output_bias, qk_norm, clip_qkv };
    Ok((AttentionSpec::Grouped(grouped), head_dim))
}

/// DeepSeek's YaRN scales the scores by the square of `0.1 * mscale_all_dim * ln(factor) + 1`.
fn score_scale(keys: &Keys, factor: f64) -> Result<f64> {
    let block = match keys.object("rope_parameters")? {
        Some(block) => Some(block),
        None => keys.object("rope_scaling")?,
    };
    let all = match block {
        Some(block) => block.f64_opt("mscale_all_dim")?.unwrap_or(0.0),
        None => 0.0,
    };
    Ok(if all == 0.0 { 1.0 } else { super::rope::mscale(factor, all).powi(2) })
}

fn layers(keys: &Keys, family: Family, c: &Common) -> Result<Vec<LayerSpec>> {
    let dense_size = match family {
        Family::Olmoe | Family::Mixtral => 0,
        _ => keys.usize("intermediate_size", MAX_SIZE)?,
    };
    let window = match family {
        Family::Mixtral => keys.usize_opt("sliding_window", 1, MAX_SIZE)?,
        Family::Qwen2Moe | Family::Qwen3Moe if keys.bool("use_sliding_window", false)? => {
            Some(keys.usize_opt("sliding_window", 1, MAX_SIZE)?.unwrap_or(4096))
        }
        _ => None,
    };
    let window_layers = keys.usize_opt("max_window_layers", 0, MAX_LAYERS)?.unwrap_or(28);
    let types = layer_types(keys, family, c.layers)?;
    let is_moe = moe_layers(keys, family)?;
    let layer = |i: usize| {
        let windowed = match (&types, family) {
            (Some(types), _) => types[i],
            // The released code: every other layer below max_window_layers.
            (None, Family::Qwen2Moe) => i.is_multiple_of(2) && i < window_layers,
            _ => true,
        };
        LayerSpec {
            sliding_window: window.filter(|_| windowed),
            dense_size: (!is_moe(i)).then_some(dense_size),
        }
    };
    Ok((0..c.layers).map(layer).collect())
}

/// `layer_types`, where a family has it: whether each layer slides.
fn layer_types(keys: &Keys, family: Family, layers: usize) -> Result<Option<Vec<bool>>> {
    let Some(value) = keys.get("layer_types").filter(|_| family == Family::Qwen2Moe) else { return Ok(None) };
    let types: Option<Vec<bool>> = value.as_array().and_then(|list| {
        let one = |v: &serde_json::Value| match v.as_str() {
            Some("sliding_attention") => Some(true),
            Some("full_attention") => Some(false),
            _ => None,
        };
        list.iter().map(one).collect()
    });
    match types {
        Some(types) if types.len() == layers => Ok(Some(types)),
        _ => Err(keys.bad("layer_types", format!("expected {layers} of sliding_attention, full_attention"))),
    }
}

/// Which layers have routed experts.
fn moe_layers(keys: &Keys, family: Family) -> Result<Box<dyn Fn(usize) -> bool>> {
    Ok(match family {
        Family::Olmoe | Family::Mixtral => Box::new(|_| true),
        Family::Qwen2Moe | Family::Qwen3Moe => {
            let step = keys.usize_opt("decoder_sparse_step", 1, MAX_LAYERS)?.unwrap_or(1);
            let dense = keys.ids("mlp_only_layers")?;
            Box::new(move |i| !dense.contains(&(i as u32)) && (i + 1).is_multiple_of(step))
        }
        Family::DeepSeek | Family::DeepSeekV2 => {
            let first = keys.usize_opt("first_k_dense_replace", 0, MAX_LAYERS)?.unwrap_or(0);
            let freq = keys.usize_opt("moe_layer_freq", 1, MAX_LAYERS)?.unwrap_or(1);
            Box::new(move |i| i >= first && i.is_multiple_of(freq))
        }
    })
}

fn moe(keys: &Keys, family: Family) -> Result<MoeSpec> {
    let count = match family {
        Family::Mixtral => "num_local_experts",
        Family::DeepSeek | Family::DeepSeekV2 => "n_routed_experts",
        _ => "num_experts",
    };
    let num_experts = keys.usize(count, MAX_EXPERTS)?;
    let top_k = keys.usize("num_experts_per_tok", MAX_EXPERTS)?;
    if top_k > num_experts {
        let message = format!("is {top_k}, there are {num_experts} experts");
        return Err(keys.bad("num_experts_per_tok", message));
    }
    let size = if matches!(family, Family::Olmoe | Family::Mixtral) {
        "intermediate_size"
    } else {
        "moe_intermediate_size"
    };
    let expert_size = keys.usize(size, MAX_SIZE)?;
    let norm = keys.bool("norm_topk_prob", false)?;
    let mut router = RouterSpec { num_experts, top_k, norm_topk: norm, groups: None, scale: 1.0 };
    let mut shared = None;
    match family {
        Family::Mixtral => router.norm_topk = true,
        Family::Qwen2Moe => {
            let size = keys.usize("shared_expert_intermediate_size", MAX_SIZE)?;
            shared = Some(SharedSpec { size, gated: true });
        }
        Family::DeepSeek | Family::DeepSeekV2 => {
            keys.only("scoring_func", &["softmax"])?;
            if let Some(n) = keys.usize_opt("n_shared_experts", 1, MAX_EXPERTS)? {
                shared = Some(SharedSpec { size: n * expert_size, gated: false });
            }
        }
        _ => {}
    }
    if family == Family::DeepSeekV2 {
        if norm {
            // transformers ignores it, the authors' code divides and then does not scale: no released model sets it.
            return Err(keys.unsupported("norm_topk_prob", true, "false"));
        }
        keys.only("topk_method", &["greedy", "group_limited_greedy"])?;
        router.scale = keys.positive("routed_scaling_factor", Some(1.0))? as f32;
        if keys.str_opt("topk_method")? == Some("group_limited_greedy") {
            let num_groups = keys.usize("n_group", num_experts)?;
            let top_groups = keys.usize("topk_group", num_groups)?;
            if !num_experts.is_multiple_of(num_groups) {
                return Err(keys.bad(
                    "n_group",
                    format!("is {num_groups}, which does not divide {num_experts} experts"),
                ));
            }
            if top_k > top_groups * (num_experts / num_groups) {
                let message = format!("is {top_k}, but {top_groups} groups have fewer experts");
                return Err(keys.bad("num_experts_per_tok", message));
            }
            router.groups = Some(RoutingGroups { num_groups, top_groups });
        }
    }
    Ok(MoeSpec { expert_size, router, shared })
}

//! What a model is, without its weights: one description that all families are mapped to.
//!
//! Letters: `D` hidden size, `E` routed experts, `K` top_k, `F` width of an expert, `V` vocabulary.

use std::fmt;

pub use occult_plan::prune::RoutingGroups;

/// The released model families. Only `hf/` looks at this.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// `olmoe`
    Olmoe,
    /// `qwen2_moe`: Qwen1.5-MoE and Qwen2-MoE
    Qwen2Moe,
    /// `qwen3_moe`
    Qwen3Moe,
    /// `deepseek`: DeepSeek-MoE 16B
    DeepSeek,
    /// `deepseek_v2`: DeepSeek-V2 and V2-Lite
    DeepSeekV2,
    /// `mixtral`
    Mixtral,
}

impl Family {
    /// All families.
    pub const ALL: [Family; 6] = [
        Family::Olmoe,
        Family::Qwen2Moe,
        Family::Qwen3Moe,
        Family::DeepSeek,
        Family::DeepSeekV2,
        Family::Mixtral,
    ];

    /// The value of `model_type` in config.json.
    pub fn model_type(self) -> &'static str {
        match self {
            Family::Olmoe => "olmoe",
            Family::Qwen2Moe => "qwen2_moe",
            Family::Qwen3Moe => "qwen3_moe",
            Family::DeepSeek => "deepseek",
            Family::DeepSeekV2 => "deepseek_v2",
            Family::Mixtral => "mixtral",
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.model_type())
    }
}

/// A decoder-only model with routed experts.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelSpec {
    /// Where it comes from; a label outside `hf/`.
    pub family: Family,
    /// `V`.
    pub vocab_size: usize,
    /// `D`.
    pub hidden_size: usize,
    /// Longest sequence.
    pub context_len: usize,
    /// Epsilon of the layer norms.
    pub norm_eps: f64,
    /// The output layer is the embedding table.
    pub tied_embeddings: bool,
    /// The attention of every layer.
    pub attention: AttentionSpec,
    /// Rotary position embedding.
    pub rope: RopeSpec,
    /// One entry per hidden layer.
    pub layers: Vec<LayerSpec>,
    /// Every MoE layer.
    pub moe: MoeSpec,
}

/// What differs between layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerSpec {
    /// A query sees this many positions, itself included; all when `None`.
    pub sliding_window: Option<usize>,
    /// Width of the dense MLP; `None` for an MoE layer.
    pub dense_size: Option<usize>,
}

/// The kind of attention.
#[derive(Debug, Clone, PartialEq)]
pub enum AttentionSpec {
    /// Multi-head, grouped-query or multi-query attention.
    Grouped(GroupedSpec),
    /// Multi-head latent attention (DeepSeek-V2).
    Latent(LatentSpec),
}

/// Attention with one key/value head for every `num_heads / num_kv_heads` query heads.
#[derive(Debug, Clone, PartialEq)]
pub struct GroupedSpec {
    /// Query heads.
    pub num_heads: usize,
    /// Key/value heads.
    pub num_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Biases on q, k and v.
    pub qkv_bias: bool,
    /// Bias on the output.
    pub output_bias: bool,
    /// Norms on queries and keys.
    pub qk_norm: QkNorm,
    /// Clamp of q, k and v, after the norms.
    pub clip_qkv: Option<f64>,
}

/// RMS norms on queries and keys before the rotation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QkNorm {
    /// None.
    None,
    /// Over all heads together.
    Full,
    /// Over each head by itself.
    PerHead,
}

/// Keys and values from one low-rank latent per token, and one rotary key shared by all heads.
#[derive(Debug, Clone, PartialEq)]
pub struct LatentSpec {
    /// Query heads.
    pub num_heads: usize,
    /// Rank of the queries' factorisation, if factorised.
    pub q_rank: Option<usize>,
    /// Width of the latent.
    pub kv_rank: usize,
    /// Width of a head's part without position.
    pub nope_dim: usize,
    /// Width of a head's rotary part.
    pub rope_dim: usize,
    /// Width of a value head.
    pub v_dim: usize,
    /// Epsilon of the norms of the latents. Not the model's: the released code leaves it at its default.
    pub latent_norm_eps: f64,
    /// Biases on the first projections and the output.
    pub bias: bool,
    /// Factor on the attention scores beside `1/sqrt(nope_dim + rope_dim)`.
    pub score_scale: f64,
}

/// Rotary position embedding.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeSpec {
    /// Rotated width.
    pub dim: usize,
    /// Base of the wavelengths.
    pub theta: f64,
    /// Pairs are neighbours (0,1), (2,3) ... instead of (i, i + dim/2).
    pub interleaved: bool,
    /// Stretching beyond the trained context.
    pub scaling: RopeScaling,
}

/// How positions are stretched.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// Not.
    None,
    /// All frequencies divided by a factor.
    Linear {
        /// The factor.
        factor: f64,
    },
    /// YaRN (arXiv 2309.00071): low frequencies divided, high ones kept, a ramp between.
    Yarn {
        /// Context extension.
        factor: f64,
        /// Context of the training before extension.
        original_context: usize,
        /// Rotations above which a frequency is kept.
        beta_fast: f64,
        /// Rotations below which a frequency is divided.
        beta_slow: f64,
        /// Factor on cos and sin.
        attention_factor: f64,
        /// Round the ends of the ramp to whole dimensions.
        truncate: bool,
    },
}

/// The MoE layers.
#[derive(Debug, Clone, PartialEq)]
pub struct MoeSpec {
    /// `F`.
    pub expert_size: usize,
    /// The router.
    pub router: RouterSpec,
    /// The expert that every token visits.
    pub shared: Option<SharedSpec>,
}

/// From router logits to experts and weights: softmax over all experts in f32, then the best `top_k`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RouterSpec {
    /// `E`.
    pub num_experts: usize,
    /// `K`.
    pub top_k: usize,
    /// Divide the chosen weights by their sum.
    pub norm_topk: bool,
    /// Routing groups: only experts of the best groups can be chosen; a group's score is the largest of its experts' scores.
    pub groups: Option<RoutingGroups>,
    /// Factor on the weights.
    pub scale: f32,
}

/// The shared expert (several shared experts are one wide MLP).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SharedSpec {
    /// Its width.
    pub size: usize,
    /// Its output is multiplied by the sigmoid of a learned projection.
    pub gated: bool,
}

impl ModelSpec {
    /// The numbers of the MoE layers, ascending.
    pub fn moe_layers(&self) -> impl Iterator<Item = usize> + '_ {
        self.layers.iter().enumerate().filter(|(_, l)| l.dense_size.is_none()).map(|(i, _)| i)
    }

    /// How many layers have routed experts.
    pub fn num_moe_layers(&self) -> usize {
        self.moe_layers().count()
    }
}

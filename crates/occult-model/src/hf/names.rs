//! Tensor names of the released checkpoints. The one list of what a model consists of: loading, checking, writing back and
//! permuting all walk it.

use super::checkpoint::Checkpoint;
use super::quant_names;
use crate::error::{ModelError, Result};
use crate::spec::{AttentionSpec, Family, ModelSpec, QkNorm};

/// The three matrices of an expert or MLP: `down(silu(gate(x)) * up(x))`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Matrix {
    /// `[F, D]`
    Gate,
    /// `[F, D]`
    Up,
    /// `[D, F]`
    Down,
}

/// What a tensor is, as far as experts are concerned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Router weight, `[E, D]`: one row per expert.
    Router {
        /// The model's layer.
        layer: usize,
    },
    /// One matrix of one expert.
    Expert {
        /// The model's layer.
        layer: usize,
        /// The expert.
        expert: usize,
        /// Which of the three.
        matrix: Matrix,
    },
    /// Gate and up rows of all experts, `[E, 2F, D]`.
    FusedGateUp {
        /// The model's layer.
        layer: usize,
    },
    /// Down matrices of all experts, `[E, D, F]`.
    FusedDown {
        /// The model's layer.
        layer: usize,
    },
    /// Anything else.
    Other,
}

/// A tensor of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorInfo {
    /// Name in the file.
    pub name: String,
    /// Shape.
    pub shape: Vec<usize>,
    /// What it is.
    pub role: Role,
}

/// How the routed experts are named.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExpertLayout {
    /// As released: three tensors per expert.
    PerExpert,
    /// As transformers 5 holds them: two stacked tensors per layer.
    Fused,
}

/// Names of one checkpoint.
#[derive(Debug, Clone, Copy)]
pub struct Names {
    family: Family,
    /// The layout of the experts.
    pub layout: ExpertLayout,
}

impl Names {
    /// The released names of a family with this layout.
    pub fn new(family: Family, layout: ExpertLayout) -> Self {
        Self { family, layout }
    }

    /// The layout that a checkpoint has.
    pub fn detect(spec: &ModelSpec, checkpoint: &Checkpoint) -> Self {
        let fused = Self::new(spec.family, ExpertLayout::Fused);
        let is_fused = spec.moe_layers().next().is_some_and(|l| checkpoint.contains(&fused.fused(l).0));
        let layout = if is_fused { ExpertLayout::Fused } else { ExpertLayout::PerExpert };
        Self::new(spec.family, layout)
    }

    /// Prefix of an MLP or MoE block.
    pub(crate) fn block(&self, layer: usize) -> String {
        let old = self.family == Family::Mixtral && self.layout == ExpertLayout::PerExpert;
        format!("model.layers.{layer}.{}", if old { "block_sparse_moe" } else { "mlp" })
    }

    /// The router weight.
    pub(crate) fn router(&self, layer: usize) -> String {
        format!("{}.gate.weight", self.block(layer))
    }

    /// One matrix of one expert, in the per-expert layout.
    pub(crate) fn expert(&self, layer: usize, expert: usize, matrix: Matrix) -> String {
        let name = match (self.family, matrix) {
            (Family::Mixtral, Matrix::Gate) => "w1",
            (Family::Mixtral, Matrix::Up) => "w3",
            (Family::Mixtral, Matrix::Down) => "w2",
            (_, Matrix::Gate) => "gate_proj",
            (_, Matrix::Up) => "up_proj",
            (_, Matrix::Down) => "down_proj",
        };
        format!("{}.experts.{expert}.{name}.weight", self.block(layer))
    }

    /// The two stacked tensors of the fused layout.
    pub(crate) fn fused(&self, layer: usize) -> (String, String) {
        let block = self.block(layer);
        (format!("{block}.experts.gate_up_proj"), format!("{block}.experts.down_proj"))
    }

    /// Prefix of the shared expert, and its gate.
    pub(crate) fn shared(&self, layer: usize) -> (String, String) {
        let block = self.block(layer);
        let shared = if self.family == Family::Qwen2Moe { "shared_expert" } else { "shared_experts" };
        (format!("{block}.{shared}"), format!("{block}.shared_expert_gate.weight"))
    }

    /// Every tensor of a model, layer after layer.
    pub fn tensors(&self, spec: &ModelSpec) -> Vec<TensorInfo> {
        let d = spec.hidden_size;
        let mut list = List::default();
        list.other("model.embed_tokens.weight", &[spec.vocab_size, d]);
        for (layer, l) in spec.layers.iter().enumerate() {
            let p = format!("model.layers.{layer}");
            self.attention(spec, &format!("{p}.self_attn"), &mut list);
            list.other(&format!("{p}.input_layernorm.weight"), &[d]);
            list.other(&format!("{p}.post_attention_layernorm.weight"), &[d]);
            match l.dense_size {
                Some(size) => list.mlp(&format!("{p}.mlp"), size, d),
                None => self.moe(spec, layer, &mut list),
            }
        }
        list.other("model.norm.weight", &[d]);
        if !spec.tied_embeddings {
            list.other("lm_head.weight", &[spec.vocab_size, d]);
        }
        list.0
    }

    fn attention(&self, spec: &ModelSpec, p: &str, list: &mut List) {
        let d = spec.hidden_size;
        match &spec.attention {
            AttentionSpec::Grouped(a) => {
                let (q, kv) = (a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim);
                list.linear(&format!("{p}.q_proj"), q, d, a.qkv_bias);
                list.linear(&format!("{p}.k_proj"), kv, d, a.qkv_bias);
                list.linear(&format!("{p}.v_proj"), kv, d, a.qkv_bias);
                list.linear(&format!("{p}.o_proj"), d, q, a.output_bias);
                let norms = match a.qk_norm {
                    QkNorm::None => return,
                    QkNorm::Full => (q, kv),
                    QkNorm::PerHead => (a.head_dim, a.head_dim),
                };
                list.other(&format!("{p}.q_norm.weight"), &[norms.0]);
                list.other(&format!("{p}.k_norm.weight"), &[norms.1]);
            }
            AttentionSpec::Latent(a) => {
                let q = a.num_heads * (a.nope_dim + a.rope_dim);
                match a.q_rank {
                    None => list.linear(&format!("{p}.q_proj"), q, d, false),
                    Some(rank) => {
                        list.linear(&format!("{p}.q_a_proj"), rank, d, a.bias);
                        list.other(&format!("{p}.q_a_layernorm.weight"), &[rank]);
                        list.linear(&format!("{p}.q_b_proj"), q, rank, false);
                    }
                }
                list.linear(&format!("{p}.kv_a_proj_with_mqa"), a.kv_rank + a.rope_dim, d, a.bias);
                list.other(&format!("{p}.kv_a_layernorm.weight"), &[a.kv_rank]);
                list.linear(
                    &format!("{p}.kv_b_proj"),
                    a.num_heads * (a.nope_dim + a.v_dim),
                    a.kv_rank,
                    false,
                );
                list.linear(&format!("{p}.o_proj"), d, a.num_heads * a.v_dim, a.bias);
            }
        }
    }

    fn moe(&self, spec: &ModelSpec, layer: usize, list: &mut List) {
        let (d, f, e) = (spec.hidden_size, spec.moe.expert_size, spec.moe.router.num_experts);
        list.push(self.router(layer), vec![e, d], Role::Router { layer });
        match self.layout {
            ExpertLayout::PerExpert => {
                for expert in 0..e {
                    for matrix in [Matrix::Gate, Matrix::Up, Matrix::Down] {
                        let shape = if matrix == Matrix::Down { vec![d, f] } else { vec![f, d] };
                        list.push(
                            self.expert(layer, expert, matrix),
                            shape,
                            Role::Expert { layer, expert, matrix },
                        );
                    }
                }
            }
            ExpertLayout::Fused => {
                let (gate_up, down) = self.fused(layer);
                list.push(gate_up, vec![e, 2 * f, d], Role::FusedGateUp { layer });
                list.push(down, vec![e, d, f], Role::FusedDown { layer });
            }
        }
        if let Some(shared) = spec.moe.shared {
            let (prefix, gate) = self.shared(layer);
            list.mlp(&prefix, shared.size, d);
            if shared.gated {
                list.other(&gate, &[1, d]);
            }
        }
    }

    /// Checks that a checkpoint has every tensor of the model with its shape, and no others. Reads headers only.
    pub fn check(&self, spec: &ModelSpec, checkpoint: &Checkpoint) -> Result<()> {
        let mut expected = std::collections::BTreeSet::new();
        for info in self.tensors(spec) {
            checkpoint.weight_of(&info.name, &info.shape)?;
            expected.insert(info.name);
        }
        // Old checkpoints carry the rotary frequencies; with tied embeddings some carry the output layer as well.
        let ignored =
            |n: &str| n.ends_with(".rotary_emb.inv_freq") || (spec.tied_embeddings && n == "lm_head.weight");
        let part = |n: &str| {
            quant_names::base(n).is_some_and(|base| !checkpoint.contains(base) && expected.contains(base))
        };
        let extra: Vec<&str> =
            checkpoint.names().filter(|n| !expected.contains(*n) && !ignored(n) && !part(n)).collect();
        if let Some(first) = extra.first() {
            let message = format!(
                "is not part of the model that the configuration describes ({}, {} layers, {} experts); {} such tensors",
                spec.family,
                spec.layers.len(),
                spec.moe.router.num_experts,
                extra.len()
            );
            let file = checkpoint.span(first).map_or(checkpoint.listing(), |(s, _)| &s.path);
            return Err(ModelError::bad(file, format!("tensor {first}"), message));
        }
        Ok(())
    }
}

/// How many values a model has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ParameterCounts {
    /// All.
    pub total: u64,
    /// Those of the routed experts.
    pub routed: u64,
    /// Those that one token uses: all but the routed experts it does not visit.
    pub active: u64,
}

impl ParameterCounts {
    /// Counts from the shapes.
    pub fn of(spec: &ModelSpec) -> Self {
        let mut counts = Self::default();
        for info in Names::new(spec.family, ExpertLayout::Fused).tensors(spec) {
            let values = info.shape.iter().map(|&n| n as u64).product::<u64>();
            counts.total += values;
            if matches!(info.role, Role::FusedGateUp { .. } | Role::FusedDown { .. }) {
                counts.routed += values;
            }
        }
        let router = spec.moe.router;
        counts.active =
            counts.total - counts.routed + counts.routed / router.num_experts as u64 * router.top_k as u64;
        counts
    }
}

#[derive(Default)]
struct List(Vec<TensorInfo>);

impl List {
    fn push(&mut self, name: String, shape: Vec<usize>, role: Role) {
        self.0.push(TensorInfo { name, shape, role });
    }

    fn other(&mut self, name: &str, shape: &[usize]) {
        self.push(name.to_owned(), shape.to_vec(), Role::Other);
    }

    fn linear(&mut self, prefix: &str, rows: usize, cols: usize, bias: bool) {
        self.other(&format!("{prefix}.weight"), &[rows, cols]);
        if bias {
            self.other(&format!("{prefix}.bias"), &[rows]);
        }
    }

    fn mlp(&mut self, prefix: &str, size: usize, d: usize) {
        self.linear(&format!("{prefix}.gate_proj"), size, d, false);
        self.linear(&format!("{prefix}.up_proj"), size, d, false);
        self.linear(&format!("{prefix}.down_proj"), d, size, false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::{GroupedSpec, LayerSpec, MoeSpec, RopeScaling, RopeSpec, RouterSpec};

    #[test]
    fn olmoe_has_seven_billion_parameters_and_uses_one() {
        let grouped = GroupedSpec {
            num_heads: 16,
            num_kv_heads: 16,
            head_dim: 128,
            qkv_bias: false,
            output_bias: false,
            qk_norm: QkNorm::Full,
            clip_qkv: None,
        };
        let router = RouterSpec { num_experts: 64, top_k: 8, norm_topk: false, groups: None, scale: 1.0 };
        let spec = ModelSpec {
            family: Family::Olmoe,
            vocab_size: 50304,
            hidden_size: 2048,
            context_len: 4096,
            norm_eps: 1e-5,
            tied_embeddings: false,
            attention: AttentionSpec::Grouped(grouped),
            rope: RopeSpec { dim: 128, theta: 1e4, interleaved: false, scaling: RopeScaling::None },
            layers: vec![LayerSpec { sliding_window: None, dense_size: None }; 16],
            moe: MoeSpec { expert_size: 1024, router, shared: None },
        };
        let counts = ParameterCounts::of(&spec);
        assert_eq!(counts.total, 6_919_161_856, "the published size");
        assert_eq!(counts.routed, 16 * 64 * 3 * 1024 * 2048);
        assert_eq!(counts.active, counts.total - counts.routed / 64 * 56);
    }
}

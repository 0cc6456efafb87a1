//! A [`Decoder`] from parameters, wherever they are: files or variables.

use std::sync::Arc;

use candle_core::Tensor;
use occult_kernels::Threads;

use crate::decoder::Decoder;
use crate::error::Result;
use crate::hf::Names;
use crate::layer::{Attention, Ffn, Layer, SharedExpert};
use crate::layers::{
    GroupedAttention, LatentAttention, Linear, MatrixParameter, Mlp, Queries, RmsNorm, Rope,
};
use crate::moe::MoeLayer;
use crate::spec::{AttentionSpec, ModelSpec, QkNorm};

/// Parameters by their names in a checkpoint.
pub(crate) trait Source {
    fn spec(&self) -> &ModelSpec;
    fn names(&self) -> &Names;
    fn threads(&self) -> &Threads;
    /// `[out, in]`
    fn matrix(&self, name: &str) -> Result<MatrixParameter>;
    /// f32
    fn vector(&self, name: &str) -> Result<Tensor>;
}

/// The model with MoE layers made by `moe` from their numbers.
pub(crate) fn build(
    source: &dyn Source,
    moe: &mut dyn FnMut(usize) -> Result<Box<dyn MoeLayer>>,
) -> Result<Decoder> {
    let (spec, part) = (source.spec(), Parts(source));
    let embedding = source.matrix("model.embed_tokens.weight")?;
    let output = if spec.tied_embeddings {
        Linear::from_parts(source.threads(), embedding.clone(), None)
    } else {
        part.linear("lm_head", false)?
    };
    let mut layers = Vec::with_capacity(spec.layers.len());
    for (i, l) in spec.layers.iter().enumerate() {
        let p = format!("model.layers.{i}");
        let ffn = match l.dense_size {
            Some(_) => Ffn::Dense(part.mlp(&format!("{p}.mlp"))?),
            None => Ffn::Moe { routed: moe(i)?, shared: part.shared(i)? },
        };
        layers.push(Arc::new(Layer {
            attention_norm: part.norm(&format!("{p}.input_layernorm"), spec.norm_eps)?,
            attention: part.attention(&format!("{p}.self_attn"))?,
            ffn_norm: part.norm(&format!("{p}.post_attention_layernorm"), spec.norm_eps)?,
            ffn,
            window: l.sliding_window,
        }));
    }
    let norm = part.norm("model.norm", spec.norm_eps)?;
    let (threads, rope) = (source.threads().clone(), Rope::new(&spec.rope));
    Ok(Decoder {
        spec: spec.clone(),
        threads,
        embedding,
        layers,
        norm,
        output,
        rope,
        parameters: None,
        ranks: None,
    })
}

struct Parts<'a>(&'a dyn Source);

impl Parts<'_> {
    fn linear(&self, prefix: &str, bias: bool) -> Result<Linear> {
        let bias = if bias { Some(self.0.vector(&format!("{prefix}.bias"))?) } else { None };
        Ok(Linear::from_parts(self.0.threads(), self.0.matrix(&format!("{prefix}.weight"))?, bias))
    }

    fn norm(&self, prefix: &str, eps: f64) -> Result<RmsNorm> {
        Ok(RmsNorm::new(self.0.vector(&format!("{prefix}.weight"))?, eps))
    }

    fn mlp(&self, p: &str) -> Result<Mlp> {
        let part = |n: &str| self.linear(&format!("{p}.{n}"), false);
        Ok(Mlp::new(part("gate_proj")?, part("up_proj")?, part("down_proj")?))
    }

    fn shared(&self, layer: usize) -> Result<Option<SharedExpert>> {
        let Some(spec) = self.0.spec().moe.shared else { return Ok(None) };
        let (prefix, gate) = self.0.names().shared(layer);
        let gate = match spec.gated {
            true => Some(Linear::from_parts(self.0.threads(), self.0.matrix(&gate)?, None)),
            false => None,
        };
        Ok(Some(SharedExpert { mlp: self.mlp(&prefix)?, gate }))
    }

    fn attention(&self, p: &str) -> Result<Attention> {
        let part = |n: &str, bias: bool| self.linear(&format!("{p}.{n}"), bias);
        let norm = |n: &str, eps: f64| self.norm(&format!("{p}.{n}"), eps);
        let (spec, threads) = (self.0.spec(), self.0.threads().clone());
        Ok(match &spec.attention {
            AttentionSpec::Grouped(s) => Attention::Grouped(GroupedAttention {
                q: part("q_proj", s.qkv_bias)?,
                k: part("k_proj", s.qkv_bias)?,
                v: part("v_proj", s.qkv_bias)?,
                out: part("o_proj", s.output_bias)?,
                norms: match s.qk_norm {
                    QkNorm::None => None,
                    _ => Some((norm("q_norm", spec.norm_eps)?, norm("k_norm", spec.norm_eps)?)),
                },
                spec: s.clone(),
                threads,
            }),
            AttentionSpec::Latent(s) => Attention::Latent(LatentAttention {
                queries: match s.q_rank {
                    None => Queries::Full(part("q_proj", false)?),
                    Some(_) => Queries::LowRank {
                        down: part("q_a_proj", s.bias)?,
                        norm: norm("q_a_layernorm", s.latent_norm_eps)?,
                        up: part("q_b_proj", false)?,
                    },
                },
                kv_down: part("kv_a_proj_with_mqa", s.bias)?,
                kv_norm: norm("kv_a_layernorm", s.latent_norm_eps)?,
                kv_up: part("kv_b_proj", false)?,
                out: part("o_proj", s.bias)?,
                spec: s.clone(),
                threads,
            }),
        })
    }
}

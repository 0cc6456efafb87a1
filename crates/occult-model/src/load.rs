//! From a directory to a [`Decoder`].

use std::path::Path;

use candle_core::Tensor;
use rayon::prelude::*;

use crate::decoder::{Attention, Decoder, Ffn, Layer, SharedExpert};
use crate::error::{ModelError, Result};
use crate::hf::{Checkpoint, ExpertLayout, Matrix, Names, read_spec};
use crate::layers::{GroupedAttention, KvUp, LatentAttention, Linear, Mlp, Queries, RmsNorm, Rope};
use crate::moe::{ExpertWeights, LocalExperts, MoeLayer, Router};
use crate::spec::{AttentionSpec, ModelSpec, QkNorm};
use crate::weight::{StoredDtype, Weight};

/// Makes the routed part of one MoE layer from the files and the layer's number.
pub type MakeMoeLayer<'a> = dyn FnMut(&ModelFiles, usize) -> Result<Box<dyn MoeLayer>> + 'a;

/// How weights are read.
#[derive(Debug, Clone, Copy, Default)]
pub struct LoadOptions {
    /// Format in which weights are held; as stored when `None`, without a copy of the experts. Arithmetic is f32.
    pub dtype: Option<StoredDtype>,
}

/// A model directory whose headers have been checked against its configuration. Weights are read when they are asked for.
#[derive(Debug)]
pub struct ModelFiles {
    spec: ModelSpec,
    checkpoint: Checkpoint,
    names: Names,
    options: LoadOptions,
}

impl ModelFiles {
    /// Reads config.json and the headers of the weights, and checks that every tensor is there with its shape.
    pub fn open(dir: &Path, options: LoadOptions) -> Result<Self> {
        let spec = read_spec(dir)?;
        let checkpoint = Checkpoint::open(dir)?;
        let names = Names::detect(&spec, &checkpoint);
        names.check(&spec, &checkpoint)?;
        Ok(Self { spec, checkpoint, names, options })
    }

    /// What the model is.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// The tensors.
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    /// Their names.
    pub fn names(&self) -> &Names {
        &self.names
    }

    /// A tensor, checked to be finite, in the format asked for.
    fn weight(&self, name: &str) -> Result<Weight> {
        let weight = self.checkpoint.weight(name)?;
        weight.check_finite()?;
        match self.options.dtype {
            Some(dtype) => weight.cast(dtype),
            None => Ok(weight),
        }
    }

    /// The router of a layer.
    pub fn router(&self, layer: usize) -> Result<Router> {
        Router::new(self.spec.moe.router, layer, &self.weight(&self.names.router(layer))?)
    }

    /// The weights of these experts of a layer, in the given order; nothing of the other experts is read.
    pub fn experts(&self, layer: usize, experts: &[usize]) -> Result<Vec<ExpertWeights>> {
        let n = self.spec.moe.router.num_experts;
        if let Some(e) = experts.iter().find(|&&e| e >= n) {
            return Err(ModelError::request(format!("expert {e}, the layer has {n}")));
        }
        match self.names.layout {
            ExpertLayout::PerExpert => {
                let one = |&e: &usize| {
                    let matrix = |m| self.weight(&self.names.expert(layer, e, m));
                    Ok(ExpertWeights {
                        gate: matrix(Matrix::Gate)?,
                        up: matrix(Matrix::Up)?,
                        down: matrix(Matrix::Down)?,
                    })
                };
                experts.par_iter().map(one).collect()
            }
            ExpertLayout::Fused => {
                let (gate_up, down) = self.names.fused(layer);
                let (gate_up, down) = (self.checkpoint.weight(&gate_up)?, self.checkpoint.weight(&down)?);
                let (d, f) = (self.spec.hidden_size, self.spec.moe.expert_size);
                let cut = |from: &Weight, e: usize, rows: (usize, usize)| {
                    let slab = from.slab_rows(e, rows.0, rows.1);
                    let slab =
                        slab.ok_or_else(|| ModelError::request(format!("{}: no slab {e}", from.name())))?;
                    slab.check_finite()?;
                    self.options.dtype.map_or(Ok(slab.clone()), |dtype| slab.cast(dtype))
                };
                let one = |&e: &usize| {
                    Ok(ExpertWeights {
                        gate: cut(&gate_up, e, (0, f))?,
                        up: cut(&gate_up, e, (f, 2 * f))?,
                        down: cut(&down, e, (0, d))?,
                    })
                };
                experts.par_iter().map(one).collect()
            }
        }
    }

    /// The model with all experts in this process.
    pub fn load(&self) -> Result<Decoder> {
        let all: Vec<usize> = (0..self.spec.moe.router.num_experts).collect();
        self.load_with(&mut |files, layer| {
            Ok(Box::new(LocalExperts::new(files.router(layer)?, files.experts(layer, &all)?)?))
        })
    }

    /// The model with MoE layers made by `moe`, which is called with each MoE layer's number and reads what it needs.
    pub fn load_with(&self, moe: &mut MakeMoeLayer<'_>) -> Result<Decoder> {
        let spec = &self.spec;
        let embedding: Tensor = self.weight("model.embed_tokens.weight")?.tensor()?;
        let output = if spec.tied_embeddings {
            Linear::from_tensor(embedding.clone())
        } else {
            self.linear("lm_head", false)?
        };
        let mut layers = Vec::with_capacity(spec.layers.len());
        for (i, l) in spec.layers.iter().enumerate() {
            let p = format!("model.layers.{i}");
            let ffn = match l.dense_size {
                Some(_) => Ffn::Dense(self.mlp(&format!("{p}.mlp"))?),
                None => Ffn::Moe { routed: moe(self, i)?, shared: self.shared(i)? },
            };
            layers.push(Layer {
                attention_norm: self.norm(&format!("{p}.input_layernorm"), spec.norm_eps)?,
                attention: self.attention(&format!("{p}.self_attn"))?,
                ffn_norm: self.norm(&format!("{p}.post_attention_layernorm"), spec.norm_eps)?,
                ffn,
            });
        }
        let norm = self.norm("model.norm", spec.norm_eps)?;
        Ok(Decoder { spec: spec.clone(), embedding, layers, norm, output, rope: Rope::new(&spec.rope) })
    }

    fn linear(&self, prefix: &str, bias: bool) -> Result<Linear> {
        let bias = if bias { Some(self.weight(&format!("{prefix}.bias"))?) } else { None };
        Linear::new(&self.weight(&format!("{prefix}.weight"))?, bias.as_ref())
    }

    fn norm(&self, prefix: &str, eps: f64) -> Result<RmsNorm> {
        RmsNorm::new(&self.weight(&format!("{prefix}.weight"))?, eps)
    }

    fn mlp(&self, p: &str) -> Result<Mlp> {
        let part = |n: &str| self.linear(&format!("{p}.{n}"), false);
        Ok(Mlp::new(part("gate_proj")?, part("up_proj")?, part("down_proj")?))
    }

    fn shared(&self, layer: usize) -> Result<Option<SharedExpert>> {
        let Some(spec) = self.spec.moe.shared else { return Ok(None) };
        let (prefix, gate) = self.names.shared(layer);
        let gate = if spec.gated { Some(Linear::new(&self.weight(&gate)?, None)?) } else { None };
        Ok(Some(SharedExpert { mlp: self.mlp(&prefix)?, gate }))
    }

    fn attention(&self, p: &str) -> Result<Attention> {
        let part = |n: &str, bias: bool| self.linear(&format!("{p}.{n}"), bias);
        let norm = |n: &str, eps: f64| self.norm(&format!("{p}.{n}"), eps);
        Ok(match &self.spec.attention {
            AttentionSpec::Grouped(s) => Attention::Grouped(GroupedAttention {
                q: part("q_proj", s.qkv_bias)?,
                k: part("k_proj", s.qkv_bias)?,
                v: part("v_proj", s.qkv_bias)?,
                out: part("o_proj", s.output_bias)?,
                norms: match s.qk_norm {
                    QkNorm::None => None,
                    _ => Some((norm("q_norm", self.spec.norm_eps)?, norm("k_norm", self.spec.norm_eps)?)),
                },
                spec: s.clone(),
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
                kv_up: KvUp::new(self.weight(&format!("{p}.kv_b_proj.weight"))?.tensor()?, s)?,
                out: part("o_proj", s.bias)?,
                spec: s.clone(),
            }),
        })
    }
}

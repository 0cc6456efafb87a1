//! Multi-head latent attention (DeepSeek-V2): the cache holds one latent and one rotary key per position, and keys and
//! values of all heads are made from them.

use candle_core::{D, Tensor};
use occult_kernels::{Threads, ops};

use super::{Linear, RmsNorm, Rotation, View};
use crate::error::Result;
use crate::kv_cache::LayerCache;
use crate::spec::LatentSpec;

/// Queries: one projection, or two with a norm between.
#[derive(Debug)]
pub(crate) enum Queries {
    Full(Linear),
    LowRank { down: Linear, norm: RmsNorm, up: Linear },
}

/// Attention of [`LatentSpec`].
#[derive(Debug)]
pub(crate) struct LatentAttention {
    pub(crate) spec: LatentSpec,
    pub(crate) threads: Threads,
    pub(crate) queries: Queries,
    /// To the latent and the rotary key.
    pub(crate) kv_down: Linear,
    pub(crate) kv_norm: RmsNorm,
    /// From the latent to keys and values of all heads.
    pub(crate) kv_up: Linear,
    pub(crate) out: Linear,
}

impl LatentAttention {
    /// `x` `[B, T, D]` gives `[B, T, D]`.
    pub(crate) fn forward(
        &self,
        x: &Tensor,
        rotation: &Rotation,
        view: &View,
        cache: Option<&mut LayerCache>,
    ) -> Result<Tensor> {
        let s = &self.spec;
        let (b, t, _) = x.dims3()?;
        let (h, qk_dim) = (s.num_heads, s.nope_dim + s.rope_dim);
        let q = match &self.queries {
            Queries::Full(proj) => proj.forward(x)?,
            Queries::LowRank { down, norm, up } => up.forward(&norm.forward(&down.forward(x)?)?)?,
        };
        let q = q.reshape((b, t, h, qk_dim))?.transpose(1, 2)?;
        let q_rope = rotation.apply(&q.narrow(D::Minus1, s.nope_dim, s.rope_dim)?)?;
        let q = Tensor::cat(&[&q.narrow(D::Minus1, 0, s.nope_dim)?, &q_rope], D::Minus1)?.contiguous()?;

        let compressed = self.kv_down.forward(x)?;
        let latent = self.kv_norm.forward(&compressed.narrow(D::Minus1, 0, s.kv_rank)?)?.unsqueeze(1)?;
        let k_rope = rotation.apply(&compressed.narrow(D::Minus1, s.kv_rank, s.rope_dim)?.unsqueeze(1)?)?;
        let (latent, k_rope) = match cache {
            Some(cache) => cache.append(&latent, &k_rope)?,
            None => (latent, k_rope),
        };

        let len = latent.dim(2)?;
        let kv = self.kv_up.forward(&latent.squeeze(1)?)?;
        let kv = kv.reshape((b, len, h, s.nope_dim + s.v_dim))?.transpose(1, 2)?;
        let k_nope = kv.narrow(D::Minus1, 0, s.nope_dim)?;
        let k = Tensor::cat(&[&k_nope, &k_rope.expand((b, h, len, s.rope_dim))?], D::Minus1)?;
        let v = kv.narrow(D::Minus1, s.nope_dim, s.v_dim)?;
        let shape = view.shape(s.score_scale / (qk_dim as f64).sqrt());
        self.out.forward(&ops::attention(&self.threads, &q, &k, &v, &shape)?)
    }
}

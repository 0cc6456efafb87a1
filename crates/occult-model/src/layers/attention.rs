//! Multi-head, grouped-query and multi-query attention.

use candle_core::Tensor;
use occult_kernels::{Threads, ops};

use super::{Linear, RmsNorm, Rotation, View};
use crate::error::Result;
use crate::kv_cache::LayerCache;
use crate::spec::{GroupedSpec, QkNorm};

/// Attention of [`GroupedSpec`].
#[derive(Debug)]
pub(crate) struct GroupedAttention {
    pub(crate) spec: GroupedSpec,
    pub(crate) threads: Threads,
    pub(crate) q: Linear,
    pub(crate) k: Linear,
    pub(crate) v: Linear,
    pub(crate) out: Linear,
    pub(crate) norms: Option<(RmsNorm, RmsNorm)>,
}

impl GroupedAttention {
    /// `x` `[B, T, D]` gives `[B, T, D]`; keys and values of the earlier positions come from the cache.
    pub(crate) fn forward(
        &self,
        x: &Tensor,
        rotation: &Rotation,
        view: &View,
        cache: Option<&mut LayerCache>,
    ) -> Result<Tensor> {
        let s = &self.spec;
        let (mut q, mut k, mut v) = (self.q.forward(x)?, self.k.forward(x)?, self.v.forward(x)?);
        if let (QkNorm::Full, Some((q_norm, k_norm))) = (s.qk_norm, &self.norms) {
            (q, k) = (q_norm.forward(&q)?, k_norm.forward(&k)?);
        }
        if let Some(clip) = s.clip_qkv {
            (q, k, v) = (q.clamp(-clip, clip)?, k.clamp(-clip, clip)?, v.clamp(-clip, clip)?);
        }
        let (b, t, _) = x.dims3()?;
        let mut q = q.reshape((b, t, s.num_heads, s.head_dim))?;
        let mut k = k.reshape((b, t, s.num_kv_heads, s.head_dim))?;
        let v = v.reshape((b, t, s.num_kv_heads, s.head_dim))?.transpose(1, 2)?;
        if let (QkNorm::PerHead, Some((q_norm, k_norm))) = (s.qk_norm, &self.norms) {
            (q, k) = (q_norm.forward(&q)?, k_norm.forward(&k)?);
        }
        let q = rotation.apply(&q.transpose(1, 2)?)?;
        let k = rotation.apply(&k.transpose(1, 2)?)?;
        let (k, v) = match cache {
            Some(cache) => cache.append(&k, &v)?,
            None => (k, v),
        };
        let shape = view.shape(1.0 / (s.head_dim as f64).sqrt());
        self.out.forward(&ops::attention(&self.threads, &q, &k, &v, &shape)?)
    }
}

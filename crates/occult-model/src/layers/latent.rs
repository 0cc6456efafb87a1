//! Multi-head latent attention (DeepSeek-V2): the cache holds one latent and one rotary key per position, and keys and
//! values of all heads are made from them.
//!
//! With `k = W_k c` and `v = W_v c` for a latent `c`, attention can be computed in two orders that differ by rounding only:
//! expanded, keys and values of all `S` positions are made first; absorbed, `q·(W_k c) = (W_kᵀ q)·c` and
//! `sum p (W_v c) = W_v (sum p c)`, so that only the `T` new positions are multiplied and the cache stays as small as it is
//! (arXiv 2405.04434, section 2.1.2). A pass takes the order with fewer multiplications.

use candle_core::{D, Device, Tensor};
use occult_kernels::linear::{LinearDims, linear, linear_bwd_x};
use occult_kernels::{Threads, ops};

use super::{Linear, RmsNorm, Rotation, View, with_f32};
use crate::error::{ModelError, Result};
use crate::kv_cache::LayerCache;
use crate::spec::LatentSpec;
use crate::weight::Weight;

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
    /// From the latent to keys and values of all heads, `[h * (nope + v), kv_rank]`: of each head keys, then values.
    pub(crate) kv_up: Linear,
    pub(crate) out: Linear,
}

/// What both orders begin from.
struct Parts<'a> {
    /// `[B, h, T, nope]`
    q_nope: Tensor,
    /// `[B, h, T, rope]`, rotated
    q_rope: Tensor,
    /// `[B, 1, S, kv_rank + rope]`: latent, then rotary key.
    cached: Tensor,
    view: &'a View,
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
        let q_nope = q.narrow(D::Minus1, 0, s.nope_dim)?;
        let q_rope = rotation.apply(&q.narrow(D::Minus1, s.nope_dim, s.rope_dim)?)?;

        let compressed = self.kv_down.forward(x)?;
        let latent = self.kv_norm.forward(&compressed.narrow(D::Minus1, 0, s.kv_rank)?)?.unsqueeze(1)?;
        let k_rope = rotation.apply(&compressed.narrow(D::Minus1, s.kv_rank, s.rope_dim)?.unsqueeze(1)?)?;
        let new = Tensor::cat(&[&latent, &k_rope], D::Minus1)?;
        let [cached] = match cache {
            Some(cache) => cache.append([&new])?,
            None => [new],
        };
        let stored = self.kv_up.plain().filter(|_| !x.track_op());
        let absorb = stored.filter(|_| cached.dim(2).is_ok_and(|len| absorbing_is_less_work(s, t, len)));
        let parts = Parts { q_nope, q_rope, cached, view };
        let context = match absorb {
            Some(kv_up) => self.absorbed(&parts, kv_up),
            None => self.expanded(&parts),
        };
        self.out.forward(&context?)
    }

    fn scale(&self) -> f64 {
        self.spec.score_scale / ((self.spec.nope_dim + self.spec.rope_dim) as f64).sqrt()
    }

    /// Keys and values of all heads first: the definition. `[B, T, h * v]`.
    fn expanded(&self, p: &Parts<'_>) -> Result<Tensor> {
        let s = &self.spec;
        let (b, _, len, _) = p.cached.dims4()?;
        let h = s.num_heads;
        let kv = self.kv_up.forward(&p.cached.narrow(D::Minus1, 0, s.kv_rank)?.squeeze(1)?)?;
        let kv = kv.reshape((b, len, h, s.nope_dim + s.v_dim))?.transpose(1, 2)?;
        let k_nope = kv.narrow(D::Minus1, 0, s.nope_dim)?;
        let k_rope = p.cached.narrow(D::Minus1, s.kv_rank, s.rope_dim)?;
        let k = Tensor::cat(&[&k_nope, &k_rope.expand((b, h, len, s.rope_dim))?], D::Minus1)?;
        let v = kv.narrow(D::Minus1, s.nope_dim, s.v_dim)?;
        let q = Tensor::cat(&[&p.q_nope, &p.q_rope], D::Minus1)?;
        Ok(ops::attention(&self.threads, &q, &k, &v, &p.view.shape(self.scale()))?)
    }

    /// Attention over the latents themselves, as if they were the one key/value head of all query heads. `[B, T, h * v]`.
    fn absorbed(&self, p: &Parts<'_>, kv_up: &Weight) -> Result<Tensor> {
        let s = &self.spec;
        let (b, h, t, _) = p.q_nope.dims4()?;
        let (rows, each) = (b * t, s.nope_dim + s.v_dim);
        let threads = &self.threads;

        let dims = LinearDims { rows, out: s.nope_dim, inner: s.kv_rank };
        let q = per_head(&p.q_nope, s.kv_rank, |head, x, y| {
            let keys = head_rows(kv_up, head * each, s.nope_dim)?;
            Ok(linear_bwd_x(threads, dims, x, keys.matrix(), y)?)
        })?;
        let q = Tensor::cat(&[&q, &p.q_rope], D::Minus1)?;
        let latent = p.cached.narrow(D::Minus1, 0, s.kv_rank)?;
        let mixed = ops::attention(threads, &q, &p.cached, &latent, &p.view.shape(self.scale()))?;
        let mixed = mixed.reshape((b, t, h, s.kv_rank))?.transpose(1, 2)?;
        let dims = LinearDims { rows, out: s.v_dim, inner: s.kv_rank };
        let out = per_head(&mixed, s.v_dim, |head, x, y| {
            let values = head_rows(kv_up, head * each + s.nope_dim, s.v_dim)?;
            Ok(linear(threads, dims, x, values.matrix(), y)?)
        })?;
        Ok(out.transpose(1, 2)?.reshape((b, t, h * s.v_dim))?)
    }
}

fn head_rows(weight: &Weight, from: usize, count: usize) -> Result<Weight> {
    let rows = weight.rows(from, from + count);
    rows.ok_or_else(|| ModelError::request(format!("{}: {:?}", weight.name(), weight.shape())))
}

/// Multiplications per head and sequence: `T` new positions, `S` in all.
fn absorbing_is_less_work(s: &LatentSpec, t: usize, len: usize) -> bool {
    let map = (s.nope_dim + s.v_dim) * s.kv_rank;
    let absorbed = t * map + t * len * (2 * s.kv_rank + s.rope_dim);
    let expanded = len * map + t * len * (s.nope_dim + s.rope_dim + s.v_dim);
    absorbed < expanded
}

/// `x` `[B, h, T, in]` through each head's own map, called with the head, `[B * T, in]` and room for `[B * T, out]`; gives
/// a view `[B, h, T, out]`.
fn per_head(
    x: &Tensor,
    out: usize,
    mut map: impl FnMut(usize, &[f32], &mut [f32]) -> Result<()>,
) -> Result<Tensor> {
    let (b, h, t, inner) = x.dims4()?;
    let mut y = vec![0.0; h * b * t * out];
    with_f32(&x.transpose(0, 1)?.contiguous()?, |x| {
        let heads = x.chunks_exact((b * t * inner).max(1)).zip(y.chunks_exact_mut((b * t * out).max(1)));
        heads.enumerate().try_for_each(|(head, (x, y))| map(head, x, y))
    })??;
    Ok(Tensor::from_vec(y, (h, b, t, out), &Device::Cpu)?.transpose(0, 1)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weight::StoredDtype;

    /// Both orders on random parts, with heads, batch, mask and 16-bit weights.
    #[test]
    fn both_orders_give_the_same() -> Result<()> {
        let spec = LatentSpec {
            num_heads: 3,
            q_rank: None,
            kv_rank: 20,
            nope_dim: 6,
            rope_dim: 4,
            v_dim: 5,
            latent_norm_eps: 1e-6,
            bias: false,
            score_scale: 1.3,
        };
        let (b, t, len) = (2, 3, 9);
        let threads = Threads::new(2);
        let random = |shape: &[usize]| Tensor::randn(0f32, 1.0, shape, &Device::Cpu);
        let linear = |rows: usize, cols: usize| -> Result<Linear> {
            let values = random(&[rows * cols])?.to_vec1::<f32>()?;
            Linear::new(&threads, &Weight::from_f32("w", &values, vec![rows, cols], StoredDtype::Bf16)?, None)
        };
        let attention = LatentAttention {
            threads: threads.clone(),
            queries: Queries::Full(linear(1, 1)?),
            kv_down: linear(1, 1)?,
            kv_norm: RmsNorm::new(Tensor::ones(1, candle_core::DType::F32, &Device::Cpu)?, 1e-6),
            kv_up: linear(spec.num_heads * (spec.nope_dim + spec.v_dim), spec.kv_rank)?,
            out: linear(1, 1)?,
            spec: spec.clone(),
        };
        let view = View { past: 6, padding: Some([0, 2].into()), window: None, starts: None };
        let parts = Parts {
            // As in a forward pass: heads and positions swapped, not contiguous.
            q_nope: random(&[b, t, spec.num_heads, spec.nope_dim])?.transpose(1, 2)?,
            q_rope: random(&[b, spec.num_heads, t, spec.rope_dim])?,
            cached: random(&[b, 1, len, spec.kv_rank + spec.rope_dim])?,
            view: &view,
        };
        let kv_up = attention.kv_up.plain().expect("stored");
        let (a, e) = (attention.absorbed(&parts, kv_up)?, attention.expanded(&parts)?);
        assert_eq!(a.dims(), [b, t, spec.num_heads * spec.v_dim]);
        let diff = (a - e)?.abs()?.max_all()?.to_scalar::<f32>()?;
        assert!(diff < 1e-4, "difference {diff}");
        Ok(())
    }

    #[test]
    fn one_new_token_is_absorbed_and_a_whole_prompt_expanded() {
        let spec = LatentSpec {
            num_heads: 16,
            q_rank: None,
            kv_rank: 512,
            nope_dim: 128,
            rope_dim: 64,
            v_dim: 128,
            latent_norm_eps: 1e-6,
            bias: false,
            score_scale: 1.0,
        };
        assert!(absorbing_is_less_work(&spec, 1, 2) && absorbing_is_less_work(&spec, 8, 4096));
        assert!(!absorbing_is_less_work(&spec, 512, 512) && !absorbing_is_less_work(&spec, 512, 4096));
    }
}

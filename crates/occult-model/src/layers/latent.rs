//! Multi-head latent attention (DeepSeek-V2): the cache holds one latent and one rotary key per position, and keys and
//! values of all heads are made from them.
//!
//! With `k = W_k c` and `v = W_v c` for a latent `c`, attention can be computed in two orders that differ by rounding only:
//! expanded, keys and values of all `S` positions are made first; absorbed, `q·(W_k c) = (W_kᵀ q)·c` and
//! `sum p (W_v c) = W_v (sum p c)`, so that only the `T` new positions are multiplied and the cache stays as small as it is
//! (arXiv 2405.04434, section 2.1.2). A pass takes the order with fewer multiplications.

use candle_core::{D, Tensor};
use rayon::prelude::*;

use super::{Linear, RmsNorm, Rotation, attend};
use crate::error::Result;
use crate::kv_cache::LayerCache;
use crate::spec::LatentSpec;

/// Queries: one projection, or two with a norm between.
#[derive(Debug)]
pub(crate) enum Queries {
    Full(Linear),
    LowRank { down: Linear, norm: RmsNorm, up: Linear },
}

/// From the latent to keys (without position) and values.
#[derive(Debug)]
pub(crate) struct KvUp {
    /// All heads together, `[h * (nope + v), r]`.
    whole: Linear,
    /// `W_kᵀ` of each head, `[r, nope]`: the one copy that the absorbed order needs.
    keys: Vec<Linear>,
    /// `W_v` of each head, `[v, r]`: rows of the whole.
    values: Vec<Linear>,
}

impl KvUp {
    /// From `W` `[h * (nope + v), r]` in its stored format; every head's key rows stand before its value rows.
    pub(crate) fn new(weight: Tensor, s: &LatentSpec) -> Result<Self> {
        let (mut keys, mut values) = (Vec::with_capacity(s.num_heads), Vec::with_capacity(s.num_heads));
        for head in 0..s.num_heads {
            let from = head * (s.nope_dim + s.v_dim);
            keys.push(Linear::from_tensor(weight.narrow(0, from, s.nope_dim)?.t()?.contiguous()?));
            values.push(Linear::from_tensor(weight.narrow(0, from + s.nope_dim, s.v_dim)?));
        }
        Ok(Self { whole: Linear::from_tensor(weight), keys, values })
    }
}

/// Attention of [`LatentSpec`].
#[derive(Debug)]
pub(crate) struct LatentAttention {
    pub(crate) spec: LatentSpec,
    pub(crate) queries: Queries,
    /// To the latent and the rotary key.
    pub(crate) kv_down: Linear,
    pub(crate) kv_norm: RmsNorm,
    pub(crate) kv_up: KvUp,
    pub(crate) out: Linear,
}

/// What attention is computed from: queries `[B, h, T, nope]` and `[B, h, T, rope]`, latents `[B, 1, S, r]`, rotary keys
/// `[B, 1, S, rope]`, and the factor on scores.
struct Parts<'a> {
    q_nope: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    mask: Option<&'a Tensor>,
    scale: f64,
}

impl LatentAttention {
    /// `x` `[B, T, D]` gives `[B, T, D]`.
    pub(crate) fn forward(
        &self,
        x: &Tensor,
        rotation: &Rotation,
        mask: Option<&Tensor>,
        cache: Option<&mut LayerCache>,
    ) -> Result<Tensor> {
        let s = &self.spec;
        let (b, t, _) = x.dims3()?;
        let qk_dim = s.nope_dim + s.rope_dim;
        let q = match &self.queries {
            Queries::Full(proj) => proj.forward(x)?,
            Queries::LowRank { down, norm, up } => up.forward(&norm.forward(&down.forward(x)?)?)?,
        };
        let q = q.reshape((b, t, s.num_heads, qk_dim))?.transpose(1, 2)?;
        let q_nope = q.narrow(D::Minus1, 0, s.nope_dim)?;
        let q_rope = rotation.apply(&q.narrow(D::Minus1, s.nope_dim, s.rope_dim)?)?;

        let compressed = self.kv_down.forward(x)?;
        let latent = self.kv_norm.forward(&compressed.narrow(D::Minus1, 0, s.kv_rank)?)?.unsqueeze(1)?;
        let k_rope = rotation.apply(&compressed.narrow(D::Minus1, s.kv_rank, s.rope_dim)?.unsqueeze(1)?)?;
        let (latent, k_rope) = match cache {
            Some(cache) => cache.append(&latent, &k_rope)?,
            None => (latent, k_rope),
        };
        let absorb = absorbing_is_less_work(s, t, latent.dim(2)?);
        let scale = s.score_scale / (qk_dim as f64).sqrt();
        let parts = Parts { q_nope, q_rope, latent, k_rope, mask, scale };
        let context = if absorb { self.absorbed(&parts) } else { self.expanded(&parts) };
        self.out.forward(&context?)
    }

    /// Keys and values of all heads first: the definition. `[B, T, h * v]`.
    fn expanded(&self, p: &Parts<'_>) -> Result<Tensor> {
        let s = &self.spec;
        let (b, _, len, _) = p.latent.dims4()?;
        let h = s.num_heads;
        let kv = self.kv_up.whole.forward(&p.latent.squeeze(1)?)?;
        let kv = kv.reshape((b, len, h, s.nope_dim + s.v_dim))?.transpose(1, 2)?;
        let k_nope = kv.narrow(D::Minus1, 0, s.nope_dim)?;
        let k =
            Tensor::cat(&[&k_nope, &p.k_rope.expand((b, h, len, s.rope_dim))?], D::Minus1)?.contiguous()?;
        let v = kv.narrow(D::Minus1, s.nope_dim, s.v_dim)?.contiguous()?;
        let q = Tensor::cat(&[&p.q_nope, &p.q_rope], D::Minus1)?.contiguous()?;
        attend(&q, &k, &v, p.mask, p.scale)
    }

    /// Attention over the latents themselves, as if they were the one key/value head of all query heads. `[B, T, h * v]`.
    fn absorbed(&self, p: &Parts<'_>) -> Result<Tensor> {
        let s = &self.spec;
        let (b, h, t, _) = p.q_nope.dims4()?;
        let len = p.latent.dim(2)?;
        let rows = (b, 1, h * t, s.kv_rank);
        let q = per_head(&p.q_nope, &self.kv_up.keys)?.reshape(rows)?;
        let q_rope = p.q_rope.contiguous()?.reshape((b, 1, h * t, s.rope_dim))?;
        let scores = (q.matmul(&p.latent.t()?)? + q_rope.matmul(&p.k_rope.t()?)?)?;
        let scores = (scores * p.scale)?.reshape((b, h, t, len))?;
        let scores = match p.mask {
            Some(mask) => scores.broadcast_add(mask)?,
            None => scores,
        };
        let weights = candle_nn::ops::softmax_last_dim(&scores)?.reshape((b, 1, h * t, len))?;
        let mixed = weights.matmul(&p.latent)?.reshape((b, h, t, s.kv_rank))?;
        let out = per_head(&mixed, &self.kv_up.values)?;
        Ok(out.transpose(1, 2)?.reshape((b, t, h * s.v_dim))?)
    }
}

/// Multiplications per head and sequence: `T` new positions, `S` in all.
fn absorbing_is_less_work(s: &LatentSpec, t: usize, len: usize) -> bool {
    let map = (s.nope_dim + s.v_dim) * s.kv_rank;
    let absorbed = t * map + t * len * (2 * s.kv_rank + s.rope_dim);
    let expanded = len * map + t * len * (s.nope_dim + s.rope_dim + s.v_dim);
    absorbed < expanded
}

/// `x` `[B, h, T, in]` through each head's own map gives `[B, h, T, out]`.
fn per_head(x: &Tensor, maps: &[Linear]) -> Result<Tensor> {
    let one = |(head, map): (usize, &Linear)| map.forward(&x.narrow(1, head, 1)?);
    let heads = maps.par_iter().enumerate().map(one).collect::<Result<Vec<Tensor>>>()?;
    Ok(Tensor::cat(&heads, 1)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weight::{StoredDtype, Weight};
    use candle_core::Device;

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
        let random = |shape: &[usize]| Tensor::randn(0f32, 1.0, shape, &Device::Cpu);
        let linear = || -> Result<Linear> { Ok(Linear::from_tensor(random(&[1, 1])?)) };
        let norm = Weight::from_f32("norm", &[1.0], vec![1], StoredDtype::F32)?;
        let up = random(&[spec.num_heads * (spec.nope_dim + spec.v_dim), spec.kv_rank])?;
        let mask: Vec<f32> =
            (0..t * len).map(|i| if i % len > i / len + 6 { f32::NEG_INFINITY } else { 0.0 }).collect();
        let mask = Tensor::from_vec(mask, (1, 1, t, len), &Device::Cpu)?;
        let attention = LatentAttention {
            queries: Queries::Full(linear()?),
            kv_down: linear()?,
            kv_norm: RmsNorm::new(&norm, 1e-6)?,
            kv_up: KvUp::new(up.to_dtype(candle_core::DType::BF16)?, &spec)?,
            out: linear()?,
            spec: spec.clone(),
        };
        let parts = Parts {
            // As in a forward pass: heads and positions swapped, not contiguous.
            q_nope: random(&[b, t, spec.num_heads, spec.nope_dim])?.transpose(1, 2)?,
            q_rope: random(&[b, spec.num_heads, t, spec.rope_dim])?,
            latent: random(&[b, 1, len, spec.kv_rank])?,
            k_rope: random(&[b, 1, len, spec.rope_dim])?,
            mask: Some(&mask),
            scale: 0.3,
        };
        let (a, e) = (attention.absorbed(&parts)?, attention.expanded(&parts)?);
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

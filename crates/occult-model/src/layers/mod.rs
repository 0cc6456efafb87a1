//! The parts of a decoder layer, on CPU: f32 activations, weights as they are stored.

mod attention;
mod latent;
mod linear;
mod matmul;
mod mlp;
mod norm;
mod rope;

pub(crate) use attention::GroupedAttention;
pub(crate) use latent::{KvUp, LatentAttention, Queries};
pub use linear::Linear;
pub(crate) use matmul::{Threads, matmul_nt, silu};
pub use mlp::Mlp;
pub(crate) use norm::RmsNorm;
pub(crate) use rope::{Rope, Rotation};

use candle_core::{D, Tensor};

use crate::error::Result;

/// Scaled dot-product attention: `q` `[B, h, T, d]`, `k` `[B, h_kv, S, d]`, `v` `[B, h_kv, S, d_v]`, additive `mask`
/// `[B or 1, 1, T, S]`; gives `[B, T, h * d_v]`. Query head `i` uses key head `i / (h / h_kv)`.
fn attend(q: &Tensor, k: &Tensor, v: &Tensor, mask: Option<&Tensor>, scale: f64) -> Result<Tensor> {
    let (b, h, t, d) = q.dims4()?;
    let (_, h_kv, s, _) = k.dims4()?;
    let d_v = v.dim(D::Minus1)?;
    // The query heads of one key head are further rows of one product.
    let q = (q * scale)?.reshape((b, h_kv, h / h_kv * t, d))?;
    let scores = q.matmul(&k.t()?)?.reshape((b, h, t, s))?;
    let scores = match mask {
        Some(mask) => scores.broadcast_add(mask)?,
        None => scores,
    };
    let weights = candle_nn::ops::softmax_last_dim(&scores)?;
    let out = weights.reshape((b, h_kv, h / h_kv * t, s))?.matmul(v)?;
    Ok(out.reshape((b, h, t, d_v))?.transpose(1, 2)?.reshape((b, t, h * d_v))?)
}

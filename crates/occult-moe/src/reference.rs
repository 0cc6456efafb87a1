//! The layer by its definition: every expert on every token, with weight zero where it was not chosen. One process, all
//! tokens, all experts, autograd's own operations.

use candle_core::{D, Device, Tensor};
use occult_plan::{ExpertId, Scoring};

use crate::error::Result;
use crate::router::RouterSpec;

/// `y_t = sum over e of w_te down_e(silu(gate_e x_t) * up_e x_t)`.
///
/// `x` `[T, D]`, `weights` `[T, E]`, `w_up` `[E, 2F, D]` (gate rows, then up rows), `w_down` `[E, D, F]`.
pub fn dense_layer(x: &Tensor, weights: &Tensor, w_up: &Tensor, w_down: &Tensor) -> Result<Tensor> {
    let f = w_down.dim(2)?;
    let mut y = x.zeros_like()?;
    for e in 0..w_up.dim(0)? {
        let pre = x.matmul(&w_up.get(e)?.t()?)?;
        let h = (pre.narrow(1, 0, f)?.silu()? * pre.narrow(1, f, f)?)?;
        let out = h.matmul(&w_down.get(e)?.t()?)?;
        y = (y + out.broadcast_mul(&weights.narrow(1, e, 1)?)?)?;
    }
    Ok(y)
}

/// Weights of all experts `[T, E]` from logits `[T, E]`: the router's rule for the chosen `ids` `[T, K]`, zero elsewhere.
pub fn dense_weights(spec: &RouterSpec, logits: &Tensor, ids: &[ExpertId]) -> Result<Tensor> {
    let (tokens, e) = logits.dims2()?;
    let p = match spec.rule.scoring {
        Scoring::Softmax => {
            let p = logits.broadcast_sub(&logits.max_keepdim(D::Minus1)?.detach())?.exp()?;
            p.broadcast_div(&p.sum_keepdim(D::Minus1)?)?
        }
        Scoring::Sigmoid => (logits.neg()?.exp()? + 1.0)?.recip()?,
    };
    let mut mask = vec![0f32; tokens * e];
    for (row, ids) in ids.chunks_exact(spec.top_k).enumerate() {
        ids.iter().for_each(|&id| mask[row * e + usize::from(id)] = 1.0);
    }
    let mut w = (p * Tensor::from_vec(mask, (tokens, e), &Device::Cpu)?)?;
    if spec.rule.norm_topk_prob {
        w = w.broadcast_div(&w.sum_keepdim(D::Minus1)?)?;
    }
    Ok((w * f64::from(spec.rule.routed_scaling_factor))?)
}

/// Routing weights `[T, K]` spread over all experts `[T, E]`.
pub fn spread_weights(weights: &Tensor, ids: &[ExpertId], num_experts: usize) -> Result<Tensor> {
    let (tokens, k) = weights.dims2()?;
    let ids: Vec<u32> = ids.iter().map(|&id| u32::from(id)).collect();
    let ids = Tensor::from_vec(ids, (tokens, k), &Device::Cpu)?;
    let zeros = Tensor::zeros((tokens, num_experts), weights.dtype(), &Device::Cpu)?;
    Ok(zeros.scatter_add(&ids, weights, 1)?)
}

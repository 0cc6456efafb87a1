use candle_core::{D, Device, Result, Tensor};

use super::TopkWeights;

/// The definition of [`routing_weights`](super::routing_weights()) in candle's own operations, for ids that are all
/// there.
///
/// # Errors
/// Those of candle.
pub fn routing_weights(scores: &Tensor, expert_ids: &[u32], how: TopkWeights) -> Result<Tensor> {
    let ids = Tensor::from_slice(expert_ids, (scores.dim(0)?, how.top_k), &Device::Cpu)?;
    let chosen = scores.gather(&ids, D::Minus1)?;
    let weights = if how.norm_topk { chosen.broadcast_div(&chosen.sum_keepdim(D::Minus1)?)? } else { chosen };
    weights * f64::from(how.scale)
}

use candle_core::{D, Result, Tensor};

/// The definition of [`rms_norm`](super::rms_norm()) in candle's own operations.
///
/// # Errors
/// Those of candle.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
    let root = (x.sqr()?.mean_keepdim(D::Minus1)? + f64::from(eps))?.sqrt()?;
    x.broadcast_div(&root)?.broadcast_mul(weight)
}

use candle_core::{Result, Tensor};

/// The definition of [`linear`](super::linear()) in candle's own operations, for an f32 weight.
///
/// # Errors
/// Those of candle.
pub fn linear(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    match x.dims() {
        [_] => x.unsqueeze(0)?.matmul(&w.t()?)?.squeeze(0),
        _ => x.broadcast_matmul(&w.t()?),
    }
}

use candle_core::{D, Result, Tensor};

use super::RopeStyle;

/// The definition of [`rope`](super::rope()) in candle's own operations: `(a, b)` becomes
/// `(a cos - b sin, b cos + a sin)`.
///
/// # Errors
/// Those of candle.
pub fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor, style: RopeStyle) -> Result<Tensor> {
    let (b, h, t, d) = x.dims4()?;
    // Tables as [1 or B, 1, T, d / 2].
    let table = |t: &Tensor| if t.dims().len() == 2 { t.unsqueeze(0)?.unsqueeze(0) } else { t.unsqueeze(1) };
    let (cos, sin) = (table(cos)?, table(sin)?);
    let (first, second) = match style {
        RopeStyle::HalfSplit => (x.narrow(3, 0, d / 2)?, x.narrow(3, d / 2, d / 2)?),
        RopeStyle::Interleaved => {
            let pairs = x.reshape((b, h, t, d / 2, 2))?;
            (pairs.narrow(4, 0, 1)?.squeeze(4)?, pairs.narrow(4, 1, 1)?.squeeze(4)?)
        }
    };
    let a = (first.broadcast_mul(&cos)? - second.broadcast_mul(&sin)?)?;
    let b_ = (second.broadcast_mul(&cos)? + first.broadcast_mul(&sin)?)?;
    match style {
        RopeStyle::HalfSplit => Tensor::cat(&[a, b_], D::Minus1),
        RopeStyle::Interleaved => Tensor::stack(&[a, b_], 4)?.reshape((b, h, t, d)),
    }
}

use candle_core::{D, Device, Result, Tensor};

use super::AttentionShape;

/// The definition of [`attention`](super::attention()) in candle's own operations, with the whole score matrix. Every
/// query must see a key.
///
/// # Errors
/// Those of candle.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, shape: &AttentionShape) -> Result<Tensor> {
    let ((b, h, t, dk), (_, hkv, s, dv)) = (q.dims4()?, v.dims4()?);
    let repeat = |x: &Tensor, d: usize| {
        x.unsqueeze(2)?.expand((b, hkv, h / hkv, s, d))?.contiguous()?.reshape((b, h, s, d))
    };
    let scores = (q.contiguous()?.matmul(&repeat(k, dk)?.t()?)? * f64::from(shape.scale))?;
    let mut mask = Vec::with_capacity(b * t * s);
    for sequence in 0..b {
        let padding = shape.padding.as_ref().map_or(0, |p| p[sequence]);
        for position in shape.past..shape.past + t {
            mask.extend((0..s).map(|key| {
                let in_window = shape.window.is_none_or(|w| position < key + w);
                let begun =
                    shape.starts.as_ref().is_none_or(|from| key >= from[sequence * s + position] as usize);
                let seen = key >= padding && begun && (!shape.causal || key <= position && in_window);
                let own = shape.causal && key == position;
                if seen || own { 0.0 } else { f32::NEG_INFINITY }
            }));
        }
    }
    let scores = scores.broadcast_add(&Tensor::from_vec(mask, (b, 1, t, s), &Device::Cpu)?)?;
    let e = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?.detach())?.exp()?;
    let p = e.broadcast_div(&e.sum_keepdim(D::Minus1)?)?;
    p.matmul(&repeat(v, dv)?)?.transpose(1, 2)?.reshape((b, t, h * dv))
}

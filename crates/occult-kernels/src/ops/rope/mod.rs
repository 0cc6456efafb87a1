//! Rotary position embedding.

mod reference;

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, bail};

pub use reference::rope as reference;

use super::simd::vectorised;
use super::tensor::{Rows4, cpu, f32s, gradient, rows_contiguous, with_f32};

/// Which two values of a row are rotated together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RopeStyle {
    /// `i` and `i + d / 2` ("neox": Llama, Qwen, OLMoE, Mixtral).
    HalfSplit,
    /// `2i` and `2i + 1` (DeepSeek). The result is in the same order.
    Interleaved,
}

/// Rotates `x` `[B, H, T, d]` by the angles whose cosine and sine are `[T, d / 2]` (the same for all sequences) or
/// `[B, T, d / 2]` (positions of each sequence). Result `[B, H, T, d]`.
///
/// `x` can be a view with a contiguous last dimension. Backward is the inverse rotation (times the square of a factor
/// in the tables, as is right); the tables get no gradient. Su et al., "RoFormer", 2021.
///
/// # Errors
/// An odd `d`, tables of other shapes, other dtypes or devices.
pub fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor, style: RopeStyle) -> Result<Tensor> {
    rows_contiguous(x)?.apply_op3(&cos.contiguous()?, &sin.contiguous()?, Rope { style })
}

struct Rope {
    style: RopeStyle,
}

vectorised! {
    fn half_split(x: &[f32], cos: &[f32], sin: &[f32], sign: f32, out: &mut [f32]) {
        let half = cos.len();
        let (a, b) = x.split_at(half);
        let (oa, ob) = out.split_at_mut(half);
        for i in 0..half.min(b.len()).min(ob.len()).min(sin.len()).min(a.len()).min(oa.len()) {
            let s = sin[i] * sign;
            oa[i] = a[i] * cos[i] - b[i] * s;
            ob[i] = b[i] * cos[i] + a[i] * s;
        }
    }
}

vectorised! {
    fn interleaved(x: &[f32], cos: &[f32], sin: &[f32], sign: f32, out: &mut [f32]) {
        for (((x, o), cos), sin) in x.chunks_exact(2).zip(out.chunks_exact_mut(2)).zip(cos).zip(sin) {
            let s = *sin * sign;
            o[0] = x[0] * *cos - x[1] * s;
            o[1] = x[1] * *cos + x[0] * s;
        }
    }
}

impl Rope {
    /// Rotates forwards (`sign` 1) or backwards (-1).
    fn rotate(&self, x: Rows4<'_>, cos: &[f32], sin: &[f32], sign: f32) -> Vec<f32> {
        let [b, h, t, d] = x.dims;
        let mut out = vec![0.0; b * h * t * d];
        // One table for all sequences, or one each.
        let per_batch = if cos.len() == t * d / 2 { 0 } else { t };
        let rotate = match self.style {
            RopeStyle::HalfSplit => half_split,
            RopeStyle::Interleaved => interleaved,
        };
        for (row, out) in out.chunks_exact_mut(d.max(1)).enumerate() {
            let (b, h, t) = (row / (h * t), row / t % h, row % t);
            let at = (b * per_batch + t) * (d / 2);
            rotate(x.row(b, h, t), &cos[at..at + d / 2], &sin[at..at + d / 2], sign, out);
        }
        out
    }
}

impl CustomOp3 for Rope {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        cos: &CpuStorage,
        cos_layout: &Layout,
        sin: &CpuStorage,
        sin_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let x = Rows4::new(x, x_layout, "x")?;
        let [b, _, t, d] = x.dims;
        if d % 2 != 0 {
            bail!("rope: rows of odd width {d}");
        }
        for (layout, what) in [(cos_layout, "cos"), (sin_layout, "sin")] {
            let dims = layout.dims();
            if dims != [t, d / 2] && dims != [b, t, d / 2] || dims != cos_layout.dims() {
                bail!("rope: {what} {dims:?} for x {:?}", x.dims);
            }
        }
        let (cos, sin) = (f32s(cos, cos_layout, "cos")?, f32s(sin, sin_layout, "sin")?);
        Ok((CpuStorage::F32(self.rotate(x, cos, sin, 1.0)), x_layout.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        cos: &Tensor,
        sin: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let dy = rows_contiguous(dy)?;
        let (storage, layout) = dy.storage_and_layout();
        let rows = Rows4::new(cpu(&storage, "the gradient")?, layout, "the gradient")?;
        let dx =
            with_f32(cos, "cos", |cos| with_f32(sin, "sin", |sin| Ok(self.rotate(rows, cos, sin, -1.0))))?;
        Ok((Some(gradient(dx, x.shape(), x.dtype())?), None, None))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check::{SPECIALS, difference, op_is, specials_go_as_in, tensor};

    #[test]
    fn is_its_definition_with_its_gradient() -> Result<()> {
        for style in [RopeStyle::HalfSplit, RopeStyle::Interleaved] {
            for (b, h, t, d) in [(1, 1, 1, 2), (2, 3, 5, 8), (3, 2, 4, 34), (1, 2, 3, 128)] {
                for shape in [vec![t, d / 2], vec![b, t, d / 2]] {
                    let angle = (tensor(2, &shape)? * 3.0)?;
                    let (cos, sin) = (angle.cos()?, angle.sin()?);
                    op_is(
                        &|x| rope(&x[0], &cos, &sin, style),
                        &|x| reference(&x[0], &cos, &sin, style),
                        &[tensor(1, &[b, h, t, d])?],
                        1e-6,
                    )?;
                }
            }
        }
        Ok(())
    }

    #[test]
    fn nan_and_infinity_go_where_the_definition_sends_them() -> Result<()> {
        for style in [RopeStyle::HalfSplit, RopeStyle::Interleaved] {
            for special in [0.5, f32::NAN, f32::INFINITY] {
                // In the rows, and in the tables.
                let angle = tensor(2, &[5, 17])?;
                let mut cos = angle.cos()?.flatten_all()?.to_vec1::<f32>()?;
                cos[40] = special;
                let (cos, sin) = (Tensor::from_vec(cos, (5, 17), angle.device())?, angle.sin()?);
                specials_go_as_in(
                    &|x| rope(&x[0], &cos, &sin, style),
                    &|x| reference(&x[0], &cos, &sin, style),
                    &[tensor(1, &[2, 1, 5, 34])?],
                    &SPECIALS,
                )?;
            }
        }
        Ok(())
    }

    #[test]
    fn takes_transposed_rows_as_they_are() -> Result<()> {
        let x = tensor(1, &[2, 5, 3, 8])?.transpose(1, 2)?;
        let angle = tensor(2, &[5, 4])?;
        let (cos, sin) = (angle.cos()?, angle.sin()?);
        let style = RopeStyle::HalfSplit;
        let diff = difference(&rope(&x, &cos, &sin, style)?, &rope(&x.contiguous()?, &cos, &sin, style)?)?;
        assert_eq!(diff, 0.0);
        Ok(())
    }

    #[test]
    fn wrong_shapes_are_errors() -> Result<()> {
        let x = tensor(1, &[2, 1, 4, 6])?;
        let (good, bad) = (tensor(2, &[4, 3])?, tensor(2, &[3, 4])?);
        let style = RopeStyle::Interleaved;
        assert!(rope(&x, &good, &good, style).is_ok());
        assert!(rope(&x, &bad, &bad, style).is_err());
        assert!(rope(&x, &good, &bad, style).is_err());
        assert!(rope(&x.narrow(3, 0, 5)?, &good, &good, style).is_err());
        assert!(rope(&x.squeeze(1)?, &good, &good, style).is_err());
        Ok(())
    }
}

//! RMS norm.

mod reference;

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};

pub use reference::rms_norm as reference;

use super::simd::{dot, vectorised};
use super::tensor::{f32s, gradient, with_f32};

/// `x / sqrt(mean(x²) + eps) * weight` over the last dimension.
///
/// `x` `[.., D]` f32, `weight` `[D]` f32, result `[.., D]`. Nothing is kept for backward except the inputs; the gradient
/// of `weight` adds rows in ascending order. Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
///
/// # Errors
/// Shapes that do not fit, other dtypes or devices.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
    x.contiguous()?.apply_op2(&weight.contiguous()?, RmsNorm { eps })
}

struct RmsNorm {
    eps: f32,
}

/// 1 / root mean square of a row.
fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    1.0 / (dot(x, x) / x.len() as f32 + eps).sqrt()
}

vectorised! {
    fn scale_row(x: &[f32], r: f32, weight: &[f32], out: &mut [f32]) {
        for ((o, x), w) in out.iter_mut().zip(x).zip(weight) {
            *o = *x * r * *w;
        }
    }
}

vectorised! {
    /// Gradients of one row; `weighted` is room for `weight * dy`.
    fn row_bwd(x: &[f32], r: f32, weight: &[f32], dy: &[f32], weighted: &mut [f32], dx: &mut [f32], dw: &mut [f32]) {
        for (((s, w), dy), (dw, x)) in weighted.iter_mut().zip(weight).zip(dy).zip(dw.iter_mut().zip(x)) {
            *s = *w * *dy;
            *dw += *dy * *x * r;
        }
        let inner = super::simd::dot_body::<ISA>(x, weighted);
        let along = inner * r * r * r / x.len() as f32;
        for ((dx, s), x) in dx.iter_mut().zip(weighted.iter()).zip(x) {
            *dx = *s * r - *x * along;
        }
    }
}

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        w: &CpuStorage,
        w_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, w) = (f32s(x, x_layout, "x")?, f32s(w, w_layout, "the norm's weight")?);
        if w_layout.dims().len() != 1 || x_layout.dims().last() != Some(&w.len()) {
            bail!("rms-norm: x {:?} with a weight {:?}", x_layout.dims(), w_layout.dims());
        }
        let mut out = vec![0.0; x.len()];
        for (x, out) in x.chunks_exact(w.len().max(1)).zip(out.chunks_exact_mut(w.len().max(1))) {
            scale_row(x, inverse_rms(x, self.eps), w, out);
        }
        Ok((CpuStorage::F32(out), x_layout.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let dy = dy.contiguous()?;
        let d = w.elem_count();
        let (mut dx, mut dw, mut room) = (vec![0.0; x.elem_count()], vec![0.0; d], vec![0.0; d]);
        with_f32(x, "x", |x| {
            with_f32(w, "the norm's weight", |w| {
                with_f32(&dy, "the gradient", |dy| {
                    let d = d.max(1);
                    for ((x, dy), dx) in x.chunks_exact(d).zip(dy.chunks_exact(d)).zip(dx.chunks_exact_mut(d))
                    {
                        row_bwd(x, inverse_rms(x, self.eps), w, dy, &mut room, dx, &mut dw);
                    }
                    Ok(())
                })
            })
        })?;
        let to_x = x.track_op().then(|| gradient(dx, x.shape(), x.dtype())).transpose()?;
        let to_w = w.track_op().then(|| gradient(dw, d, w.dtype())).transpose()?;
        Ok((to_x, to_w))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check::{SPECIALS, op_is, specials_go_as_in, tensor};

    #[test]
    fn is_its_definition_with_its_gradients() -> Result<()> {
        for dims in [vec![1, 1], vec![3, 7], vec![2, 3, 64], vec![5, 131], vec![2, 2, 2, 96]] {
            let d = dims[dims.len() - 1];
            let inputs = [tensor(1, &dims)?, (tensor(2, &[d])? + 1.5)?];
            op_is(&|t| rms_norm(&t[0], &t[1], 1e-5), &|t| reference(&t[0], &t[1], 1e-5), &inputs, 2e-6)?;
        }
        Ok(())
    }

    #[test]
    fn nan_and_infinity_go_where_the_definition_sends_them() -> Result<()> {
        for dims in [vec![1, 1], vec![3, 7], vec![2, 2, 131]] {
            let inputs = [tensor(1, &dims)?, tensor(2, &dims[dims.len() - 1..])?];
            let (op, plain) =
                (|t: &[Tensor]| rms_norm(&t[0], &t[1], 1e-5), |t: &[Tensor]| reference(&t[0], &t[1], 1e-5));
            specials_go_as_in(&op, &plain, &inputs, &SPECIALS)?;
        }
        Ok(())
    }

    #[test]
    fn views_empty_inputs_and_wrong_shapes() -> Result<()> {
        let x = tensor(1, &[4, 6])?;
        let w = tensor(2, &[4])?;
        let t = rms_norm(&x.t()?, &w, 1e-6)?;
        assert_eq!(t.dims(), [6, 4]);
        assert_eq!(rms_norm(&x.narrow(0, 0, 0)?, &tensor(3, &[6])?, 1e-6)?.dims(), [0, 6]);
        assert!(rms_norm(&x, &w, 1e-6).is_err());
        assert!(rms_norm(&x, &tensor(3, &[1, 6])?, 1e-6).is_err());
        assert!(rms_norm(&x.to_dtype(candle_core::DType::F64)?, &tensor(3, &[6])?, 1e-6).is_err());
        Ok(())
    }
}

//! The activation of gated MLPs.

mod reference;

use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor, bail};

pub use reference::swiglu as reference;

use super::simd::{exp, vectorised};
use super::tensor::{f32s, gradient, with_f32};

/// `silu(gate) * up`, of equal shapes, f32. Backward recomputes the activation from the inputs.
///
/// Shazeer, "GLU Variants Improve Transformer", 2020.
///
/// # Errors
/// Unequal shapes, other dtypes or devices.
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    gate.contiguous()?.apply_op2(&up.contiguous()?, Swiglu)
}

/// [`swiglu`] of the two halves of each row: `[.., 2F]` (gate | up) gives `[.., F]`.
///
/// # Errors
/// Rows of odd width, other dtypes or devices.
pub fn swiglu_packed(gate_up: &Tensor) -> Result<Tensor> {
    gate_up.contiguous()?.apply_op1(SwigluPacked)
}

vectorised! {
    fn forward(gate: &[f32], up: &[f32], out: &mut [f32]) {
        for ((o, g), u) in out.iter_mut().zip(gate).zip(up) {
            *o = *g / (1.0 + exp::<ISA>(-*g)) * *u;
        }
    }
}

vectorised! {
    /// With `s = sigmoid(g)`: `d_up = dy g s`, `d_gate = dy u s (1 + g (1 - s))`.
    fn backward(gate: &[f32], up: &[f32], dy: &[f32], d_gate: &mut [f32], d_up: &mut [f32]) {
        for ((((dg, du), g), u), dy) in d_gate.iter_mut().zip(d_up.iter_mut()).zip(gate).zip(up).zip(dy) {
            let s = 1.0 / (1.0 + exp::<ISA>(-*g));
            *du = *dy * (*g * s);
            *dg = *dy * *u * s * (1.0 + *g * (1.0 - s));
        }
    }
}

struct Swiglu;

impl CustomOp2 for Swiglu {
    fn name(&self) -> &'static str {
        "swiglu"
    }

    fn cpu_fwd(
        &self,
        gate: &CpuStorage,
        gate_layout: &Layout,
        up: &CpuStorage,
        up_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        if gate_layout.dims() != up_layout.dims() {
            bail!("swiglu: gate {:?}, up {:?}", gate_layout.dims(), up_layout.dims());
        }
        let (gate, up) = (f32s(gate, gate_layout, "gate")?, f32s(up, up_layout, "up")?);
        let mut out = vec![0.0; gate.len()];
        forward(gate, up, &mut out);
        Ok((CpuStorage::F32(out), gate_layout.shape().clone()))
    }

    fn bwd(
        &self,
        gate: &Tensor,
        up: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let dy = dy.contiguous()?;
        let (mut to_gate, mut to_up) = (vec![0.0; gate.elem_count()], vec![0.0; up.elem_count()]);
        with_f32(gate, "gate", |g| {
            with_f32(up, "up", |u| {
                with_f32(&dy, "the gradient", |dy| {
                    backward(g, u, dy, &mut to_gate, &mut to_up);
                    Ok(())
                })
            })
        })?;
        let to_gate = gate.track_op().then(|| gradient(to_gate, gate.shape(), gate.dtype())).transpose()?;
        let to_up = up.track_op().then(|| gradient(to_up, up.shape(), up.dtype())).transpose()?;
        Ok((to_gate, to_up))
    }
}

struct SwigluPacked;

impl CustomOp1 for SwigluPacked {
    fn name(&self) -> &'static str {
        "swiglu-packed"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = f32s(x, layout, "gate and up")?;
        let Some((&width, rows)) = layout.dims().split_last() else { bail!("swiglu: a scalar") };
        if width % 2 != 0 {
            bail!("swiglu: rows of odd width {width}");
        }
        let f = width / 2;
        let mut out = vec![0.0; x.len() / 2];
        for (x, out) in x.chunks_exact(width.max(1)).zip(out.chunks_exact_mut(f.max(1))) {
            forward(&x[..f], &x[f..], out);
        }
        let shape: Vec<usize> = rows.iter().copied().chain([f]).collect();
        Ok((CpuStorage::F32(out), shape.into()))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let dy = dy.contiguous()?;
        let width = x.dims().last().copied().unwrap_or(0);
        let f = width / 2;
        let mut dx = vec![0.0; x.elem_count()];
        with_f32(x, "gate and up", |x| {
            with_f32(&dy, "the gradient", |dy| {
                let rows = x.chunks_exact(width.max(1)).zip(dy.chunks_exact(f.max(1)));
                for ((x, dy), dx) in rows.zip(dx.chunks_exact_mut(width.max(1))) {
                    let (to_gate, to_up) = dx.split_at_mut(f);
                    backward(&x[..f], &x[f..], dy, to_gate, to_up);
                }
                Ok(())
            })
        })?;
        Ok(Some(gradient(dx, x.shape(), x.dtype())?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check::{SPECIALS, op_is, specials_go_as_in, tensor};
    use candle_core::{D, Device};

    #[test]
    fn is_its_definition_with_its_gradients() -> Result<()> {
        for dims in [vec![1], vec![3, 5], vec![2, 3, 70]] {
            let inputs = [(tensor(1, &dims)? * 4.0)?, tensor(2, &dims)?];
            op_is(&|t| swiglu(&t[0], &t[1]), &|t| reference(&t[0], &t[1]), &inputs, 1e-6)?;
        }
        Ok(())
    }

    #[test]
    fn packed_is_the_same_on_halves() -> Result<()> {
        let plain = |t: &[Tensor]| {
            let f = t[0].dim(D::Minus1)? / 2;
            reference(&t[0].narrow(D::Minus1, 0, f)?, &t[0].narrow(D::Minus1, f, f)?)
        };
        for dims in [vec![2], vec![3, 6], vec![2, 3, 66]] {
            op_is(&|t| swiglu_packed(&t[0]), &plain, &[(tensor(1, &dims)? * 3.0)?], 1e-6)?;
        }
        assert!(swiglu_packed(&tensor(1, &[2, 3])?).is_err());
        assert!(swiglu(&tensor(1, &[2, 3])?, &tensor(1, &[3, 2])?).is_err());
        Ok(())
    }

    #[test]
    fn nan_and_infinity_go_where_the_definition_sends_them() -> Result<()> {
        let inputs = [tensor(1, &[3, 37])?, tensor(2, &[3, 37])?];
        specials_go_as_in(&|t| swiglu(&t[0], &t[1]), &|t| reference(&t[0], &t[1]), &inputs, &SPECIALS)
    }

    #[test]
    fn large_gates_do_not_overflow() -> Result<()> {
        let gate = Tensor::new(&[-200f32, -90.0, 90.0, 200.0, f32::NAN], &Device::Cpu)?;
        let y = swiglu(&gate, &gate.ones_like()?)?.to_vec1::<f32>()?;
        assert!(y[0].abs() < 1e-35 && y[1].abs() < 1e-35, "{y:?}");
        assert_eq!(y[2..4], [90.0, 200.0]);
        assert!(y[4].is_nan());
        Ok(())
    }
}

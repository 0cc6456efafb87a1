//! A dense layer.

mod reference;

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};

pub use reference::linear as reference;

use super::sink::{GradSink, weight_gradient};
use super::tensor::{core, cpu, f32s, gradient, matrix, with_f32};
use crate::Threads;
use crate::linear::{self as slices, LinearDims};

/// `y = x Wᵀ`: `x` `[.., K]` f32, `w` `[N, K]` as stored (f32, bf16, f16), result `[.., N]` f32.
///
/// Arithmetic and accumulation are f32. Backward keeps nothing but the inputs; the gradient of `w` is computed in f32
/// and has the dtype of `w` (candle's rule; see [`linear_into`] for f32).
///
/// # Errors
/// Shapes that do not fit, other dtypes or devices.
pub fn linear(threads: &Threads, x: &Tensor, w: &Tensor) -> Result<Tensor> {
    x.contiguous()?.apply_op2(&w.contiguous()?, Linear { threads: threads.clone(), sink: None })
}

/// [`linear`] whose weight gradient is added to `sink`.
///
/// # Errors
/// As [`linear`].
pub fn linear_into(threads: &Threads, x: &Tensor, w: &Tensor, sink: &GradSink) -> Result<Tensor> {
    let op = Linear { threads: threads.clone(), sink: Some(sink.clone()) };
    x.contiguous()?.apply_op2(&w.contiguous()?, op)
}

struct Linear {
    threads: Threads,
    sink: Option<GradSink>,
}

/// M, N, K and the dimensions of the result.
fn dims(x: &[usize], w: &[usize]) -> Result<(LinearDims, Vec<usize>)> {
    let (Some((&k, rows)), &[n, w_k]) = (x.split_last(), w) else { bail!("linear: x {x:?}, weight {w:?}") };
    if k != w_k {
        bail!("linear: rows of {k} values, a weight {w:?}");
    }
    let shape = rows.iter().copied().chain([n]).collect();
    Ok((LinearDims { rows: rows.iter().product(), out: n, inner: k }, shape))
}

impl CustomOp2 for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        w: &CpuStorage,
        w_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (sizes, shape) = dims(x_layout.dims(), w_layout.dims())?;
        let (x, w) = (f32s(x, x_layout, "x")?, matrix(w, w_layout, "the weight")?);
        let mut out = vec![0.0; sizes.rows * sizes.out];
        slices::linear(&self.threads, sizes, x, w, &mut out).map_err(core)?;
        Ok((CpuStorage::F32(out), shape.into()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (sizes, _) = dims(x.dims(), w.dims())?;
        let dy = dy.contiguous()?;
        with_f32(&dy, "the gradient", |dy| {
            let to_x = if x.track_op() {
                let mut dx = vec![0.0; sizes.rows * sizes.inner];
                let (storage, layout) = w.storage_and_layout();
                let w = matrix(cpu(&storage, "the weight")?, layout, "the weight")?;
                slices::linear_bwd_x(&self.threads, sizes, dy, w, &mut dx).map_err(core)?;
                Some(gradient(dx, x.shape(), x.dtype())?)
            } else {
                None
            };
            let to_w = weight_gradient(w, self.sink.as_ref(), |dw| match dw {
                Some(dw) => {
                    with_f32(x, "x", |x| slices::linear_bwd_w(&self.threads, sizes, dy, x, dw).map_err(core))
                }
                None => Ok(()),
            })?;
            Ok((to_x, to_w))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check::{SPECIALS, difference, op_is, specials_go_as_in, tensor};
    use candle_core::{DType, Var};

    #[test]
    fn is_its_definition_with_its_gradients() -> Result<()> {
        let threads = Threads::new(2);
        for (rows, n, k) in [(vec![1], 1, 1), (vec![2, 3], 17, 9), (vec![40], 70, 33)] {
            let x = tensor(1, &[rows.clone(), vec![k]].concat())?;
            let inputs = [x, tensor(2, &[n, k])?];
            op_is(&|t| linear(&threads, &t[0], &t[1]), &|t| reference(&t[0], &t[1]), &inputs, 2e-6)?;
        }
        Ok(())
    }

    #[test]
    fn nan_and_infinity_go_where_the_definition_sends_them() -> Result<()> {
        let threads = Threads::new(2);
        for rows in [3, 60] {
            let inputs = [tensor(1, &[rows, 37])?, tensor(2, &[11, 37])?];
            specials_go_as_in(
                &|t| linear(&threads, &t[0], &t[1]),
                &|t| reference(&t[0], &t[1]),
                &inputs,
                &SPECIALS,
            )?;
        }
        Ok(())
    }

    #[test]
    fn half_weights_are_read_as_stored() -> Result<()> {
        let threads = Threads::new(1);
        let x = Var::from_tensor(&tensor(1, &[5, 24])?)?;
        for dtype in [DType::BF16, DType::F16] {
            let w = Var::from_tensor(&tensor(2, &[9, 24])?.to_dtype(dtype)?)?;
            let want = reference(x.as_tensor(), &w.to_dtype(DType::F32)?)?;
            let sink = GradSink::new();
            let y = linear_into(&threads, x.as_tensor(), w.as_tensor(), &sink)?;
            assert!(difference(&y, &want)? < 1e-6);
            let (ours, plain) = (y.sqr()?.sum_all()?.backward()?, want.sqr()?.sum_all()?.backward()?);
            assert!(ours.get(&w).is_none());
            let (a, b) = (ours.get(&x).expect("ours"), plain.get(&x).expect("plain"));
            assert!(difference(a, b)? < 1e-5);
            let dw = sink.take(w.shape())?.expect("a gradient");
            assert_eq!(dw.dtype(), DType::F32);
            assert!(difference(&dw, plain.get(&w).expect("plain"))? < 1e-2);
            assert!(sink.take(w.shape())?.is_none());
            let grads = linear(&threads, x.as_tensor(), w.as_tensor())?.sqr()?.sum_all()?.backward()?;
            assert_eq!(grads.get(&w).expect("a gradient").dtype(), dtype);
        }
        Ok(())
    }

    #[test]
    fn wrong_shapes_are_errors_and_no_rows_are_none() -> Result<()> {
        let threads = Threads::new(1);
        let (x, w) = (tensor(1, &[4, 6])?, tensor(2, &[3, 6])?);
        assert_eq!(linear(&threads, &x.narrow(0, 0, 0)?, &w)?.dims(), [0, 3]);
        assert!(linear(&threads, &x, &w.t()?).is_err());
        assert!(linear(&threads, &x, &w.unsqueeze(0)?).is_err());
        assert!(linear(&threads, &x.to_dtype(DType::BF16)?, &w).is_err());
        Ok(())
    }
}

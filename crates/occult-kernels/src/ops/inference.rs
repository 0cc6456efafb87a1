//! Operations for inference, on weights that need not be tensors: in a mapped file, in 8 or 4 bits. Their results lead to no
//! gradient.

use candle_core::{Device, Result, Tensor, bail};

use super::tensor::{core, with_f32};
use crate::linear::{self as slices, LinearDims};
use crate::smm::{self, ExpertDims, ExpertMatrices};
use crate::{Matrix, SparseRows, Threads};

/// `x Wᵀ`: `x` `[.., K]` f32, `w` of `out` rows `[out, K]` as stored, result `[.., out]` f32. With quantised weights `x` is
/// quantised as well ([`crate::quant::linear()`]).
///
/// # Errors
/// Shapes that do not fit, other dtypes or devices.
pub fn linear(threads: &Threads, x: &Tensor, w: Matrix<'_>, out: usize) -> Result<Tensor> {
    let Some((&inner, rows)) = x.dims().split_last() else { bail!("linear: x {:?}", x.dims()) };
    let dims = LinearDims { rows: rows.iter().product(), out, inner };
    let shape: Vec<usize> = rows.iter().copied().chain([out]).collect();
    let y = with_f32(&x.contiguous()?, "x", |x| {
        let mut y = vec![0.0; dims.rows * out];
        slices::linear(threads, dims, x, w, &mut y).map_err(core)?;
        Ok(y)
    })?;
    Tensor::from_vec(y, shape, &Device::Cpu)
}

/// The experts of a layer without their router, see [`smm::expert_ffn`]: `x` `[R, D]` and `row_weights` `[N]`, both f32,
/// give `[R, D]` f32.
///
/// # Errors
/// Shapes that do not fit, other dtypes or devices.
pub fn expert_ffn(
    threads: &Threads,
    rows: &SparseRows,
    dims: ExpertDims,
    x: &Tensor,
    experts: &[ExpertMatrices<'_>],
    row_weights: &Tensor,
) -> Result<Tensor> {
    let y = with_f32(&x.contiguous()?, "x", |x| {
        with_f32(&row_weights.contiguous()?, "the row weights", |weights| {
            let mut y = vec![0.0; x.len()];
            smm::expert_ffn(threads, rows, dims, x, experts, weights, &mut y).map_err(core)?;
            Ok(y)
        })
    })?;
    Tensor::from_vec(y, x.shape(), &Device::Cpu)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops;
    use crate::ops::check::{difference, tensor};
    use crate::quant::{Format, Layout, QuantisedBuf, quantise, reference};
    use candle_core::Var;
    use std::sync::Arc;

    fn values(t: &Tensor) -> Result<Vec<f32>> {
        t.flatten_all()?.to_vec1()
    }

    fn quantised(w: &[f32], rows: usize, cols: usize) -> QuantisedBuf {
        let layout = Layout::new(Format::Q8, 32, rows, cols).expect("a layout");
        let fill = |row: usize, to: &mut [f32]| to.copy_from_slice(&w[row * cols..][..cols]);
        quantise(&Threads::new(1), layout, fill).expect("finite values").0
    }

    #[test]
    fn a_dense_layer_is_the_differentiable_one() -> Result<()> {
        let threads = Threads::new(2);
        let (x, w) = (Var::from_tensor(&tensor(1, &[2, 3, 40])?)?, tensor(2, &[7, 40])?);
        let stored = values(&w)?;
        let y = linear(&threads, &x, Matrix::F32(&stored), 7)?;
        assert_eq!(values(&y)?, values(&ops::linear(&threads, &x, &w)?)?);
        assert!(!y.track_op());
        assert!(linear(&threads, &x, Matrix::F32(&stored), 8).is_err());

        let w = quantised(&stored, 7, 40);
        let y = linear(&threads, &x, Matrix::Quantised(w.view()), 7)?;
        let mut want = vec![0.0; 6 * 7];
        reference::linear(&values(&x)?, &w.view(), 6, &mut want).expect("shapes");
        assert_eq!((y.dims(), values(&y)?), (&[2, 3, 7][..], want));
        Ok(())
    }

    #[test]
    fn experts_are_the_differentiable_ones() -> Result<()> {
        let (threads, (e, d, f)) = (Threads::new(2), (2, 40, 33));
        let rows = Arc::new(SparseRows::new(4, vec![0, 3, 5], vec![0, 1, 3, 1, 2]).expect("rows"));
        let dims = ExpertDims { hidden: d, intermediate: f };
        let (x, weights) = (tensor(1, &[4, d])?, tensor(2, &[5])?);
        let (w_up, w_down) = (tensor(3, &[e, 2 * f, d])?, tensor(4, &[e, d, f])?);
        let (up, down) = (values(&w_up)?, values(&w_down)?);
        let gate_of = |i: usize| &up[i * 2 * f * d..][..f * d];
        let up_of = |i: usize| &up[(2 * i + 1) * f * d..][..f * d];
        let down_of = |i: usize| &down[i * d * f..][..d * f];
        let experts: Vec<_> = (0..e)
            .map(|i| ExpertMatrices {
                gate: Matrix::F32(gate_of(i)),
                up: Matrix::F32(up_of(i)),
                down: Matrix::F32(down_of(i)),
            })
            .collect();
        let y = expert_ffn(&threads, &rows, dims, &x, &experts, &weights)?;
        let pre = ops::scattering_smm(&threads, &rows, &x, &w_up)?;
        let want = ops::merging_smm(&threads, &rows, &pre, &w_down, &weights)?;
        assert!(difference(&y, &want)? < 1e-5);

        let kept: Vec<_> = (0..e)
            .map(|i| [quantised(gate_of(i), f, d), quantised(up_of(i), f, d), quantised(down_of(i), d, f)])
            .collect();
        let experts: Vec<_> = kept
            .iter()
            .map(|[gate, up, down]| ExpertMatrices {
                gate: Matrix::Quantised(gate.view()),
                up: Matrix::Quantised(up.view()),
                down: Matrix::Quantised(down.view()),
            })
            .collect();
        let found = expert_ffn(&threads, &rows, dims, &x, &experts, &weights)?;
        assert!(difference(&found, &want)? < 0.05);
        Ok(())
    }
}

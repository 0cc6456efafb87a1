use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};

use crate::ops::simd::{dot, max, scaled_exp, sum_exp};
use crate::ops::tensor::{f32s, gradient, with_f32};

/// From logits to scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scoring {
    /// Softmax over all experts.
    Softmax,
    /// Sigmoid of each (DeepSeek-V3).
    Sigmoid,
}

/// Scores `[.., E]` of `logits` `[.., E]` f32, differentiable.
///
/// # Errors
/// Other dtypes or devices.
pub fn router_scores(logits: &Tensor, scoring: Scoring) -> Result<Tensor> {
    match scoring {
        Scoring::Softmax => logits.contiguous()?.apply_op1(Softmax),
        Scoring::Sigmoid => (logits.neg()?.exp()? + 1.0)?.recip(),
    }
}

struct Softmax;

impl CustomOp1 for Softmax {
    fn name(&self) -> &'static str {
        "softmax"
    }

    fn cpu_fwd(&self, logits: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let Some(&width) = layout.dims().last() else { bail!("softmax: a scalar") };
        let mut out = f32s(logits, layout, "logits")?.to_vec();
        for row in out.chunks_exact_mut(width.max(1)) {
            let shift = max(row);
            let sum = sum_exp(row, shift);
            scaled_exp(row, shift, 1.0 / sum);
        }
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }

    /// `dx = y (dy - <y, dy>)`.
    fn bwd(&self, x: &Tensor, y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let width = x.dims().last().copied().unwrap_or(0).max(1);
        let dy = dy.contiguous()?;
        let mut dx = vec![0.0; x.elem_count()];
        with_f32(y, "scores", |y| {
            with_f32(&dy, "the gradient", |dy| {
                for ((y, dy), dx) in
                    y.chunks_exact(width).zip(dy.chunks_exact(width)).zip(dx.chunks_exact_mut(width))
                {
                    let inner = dot(y, dy);
                    dx.iter_mut().zip(y).zip(dy).for_each(|((dx, y), dy)| *dx = y * (dy - inner));
                }
                Ok(())
            })
        })?;
        Ok(Some(gradient(dx, x.shape(), x.dtype())?))
    }
}

//! The two sparse matmuls of an MoE layer as operations on stacked expert weights.
//!
//! `merging_smm(rows, scattering_smm(rows, x, w_up), w_down, row_weights)` is the SwiGLU expert network of all experts
//! of this rank, added up per received row. Kept for backward: the rows, the pre-activation (the tensor between the
//! two) and the row weights; the activation is computed again.

mod merging;
mod reference;
mod scattering;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use candle_core::{Result, Tensor, bail};

pub use reference::{merging_smm as merging_reference, scattering_smm as scattering_reference};

use super::sink::GradSink;
use crate::smm::ExpertDims;
use crate::{SparseRows, Threads};

/// Scattering sparse matmul: `pre[n] = W_up[expert of n] x[row_idx[n]]`.
///
/// `x` `[R, D]` f32, `w_up` `[e, 2F, D]` as stored (gate rows, then up rows), result `[N, 2F]` f32. The gradient of
/// `w_up` comes whole, `[e, 2F, D]`, in its dtype (candle's rule; see [`scattering_smm_into`] for f32).
///
/// # Errors
/// Shapes that do not fit `rows` or each other, other dtypes or devices.
pub fn scattering_smm(
    threads: &Threads,
    rows: &Arc<SparseRows>,
    x: &Tensor,
    w_up: &Tensor,
) -> Result<Tensor> {
    x.contiguous()?.apply_op2(&w_up.contiguous()?, scattering::Op(SmmContext::new(threads, rows, None)))
}

/// [`scattering_smm`] whose weight gradient is added to `sink`.
///
/// # Errors
/// As [`scattering_smm`].
pub fn scattering_smm_into(
    threads: &Threads,
    rows: &Arc<SparseRows>,
    x: &Tensor,
    w_up: &Tensor,
    sink: &GradSink,
) -> Result<Tensor> {
    x.contiguous()?.apply_op2(&w_up.contiguous()?, scattering::Op(SmmContext::new(threads, rows, Some(sink))))
}

/// Merging sparse matmul: `y[r] = sum over expanded rows n of r, experts ascending, of w_n W_down[expert of n] h_n`
/// with `h_n = silu(gate_n) * up_n`.
///
/// `pre` `[N, 2F]` f32 from [`scattering_smm`], `w_down` `[e, D, F]` as stored, `row_weights` `[N]` f32, result
/// `[R, D]` f32. The gradient of a row weight is `<h_n, W_down^T dy>`.
///
/// # Errors
/// Shapes that do not fit `rows` or each other, other dtypes or devices.
pub fn merging_smm(
    threads: &Threads,
    rows: &Arc<SparseRows>,
    pre: &Tensor,
    w_down: &Tensor,
    row_weights: &Tensor,
) -> Result<Tensor> {
    let op = merging::Op(SmmContext::new(threads, rows, None));
    pre.contiguous()?.apply_op3(&w_down.contiguous()?, &row_weights.contiguous()?, op)
}

/// [`merging_smm`] whose weight gradient is added to `sink`.
///
/// # Errors
/// As [`merging_smm`].
pub fn merging_smm_into(
    threads: &Threads,
    rows: &Arc<SparseRows>,
    pre: &Tensor,
    w_down: &Tensor,
    row_weights: &Tensor,
    sink: &GradSink,
) -> Result<Tensor> {
    let op = merging::Op(SmmContext::new(threads, rows, Some(sink)));
    pre.contiguous()?.apply_op3(&w_down.contiguous()?, &row_weights.contiguous()?, op)
}

/// What both operations hold besides their tensors.
struct SmmContext {
    threads: Threads,
    rows: Arc<SparseRows>,
    sink: Option<GradSink>,
}

impl SmmContext {
    fn new(threads: &Threads, rows: &Arc<SparseRows>, sink: Option<&GradSink>) -> Self {
        Self { threads: threads.clone(), rows: Arc::clone(rows), sink: sink.cloned() }
    }

    /// Refuses weights of another number of experts than the rows have.
    fn check_experts(&self, experts: usize) -> Result<()> {
        if experts != self.rows.num_experts() {
            bail!("weights of {experts} experts, rows of {}", self.rows.num_experts());
        }
        Ok(())
    }
}

/// D and F of `w_up` `[e, 2F, D]`.
fn up_dims(context: &SmmContext, w: &[usize], x: &[usize]) -> Result<ExpertDims> {
    let &[e, f2, d] = w else { bail!("scattering-smm: w_up {w:?}, not [e, 2F, D]") };
    context.check_experts(e)?;
    if f2 % 2 != 0 || x != [context.rows.num_rows(), d] {
        bail!("scattering-smm: x {x:?}, w_up {w:?}, {} rows", context.rows.num_rows());
    }
    Ok(ExpertDims { hidden: d, intermediate: f2 / 2 })
}

/// D and F of `w_down` `[e, D, F]`.
fn down_dims(context: &SmmContext, w: &[usize], pre: &[usize], row_weights: &[usize]) -> Result<ExpertDims> {
    let &[e, d, f] = w else { bail!("merging-smm: w_down {w:?}, not [e, D, F]") };
    context.check_experts(e)?;
    let n = context.rows.num_expanded();
    if pre != [n, 2 * f] || row_weights != [n] {
        bail!("merging-smm: pre {pre:?}, w_down {w:?}, row weights {row_weights:?}, {n} expanded rows");
    }
    Ok(ExpertDims { hidden: d, intermediate: f })
}

//! Sparse matmuls: each expert works on the rows that chose it.
//!
//! [`scatter`] is the first half of an expert (few rows become more), [`merge`] the second (more rows add into fewer).
//! [`expert_ffn`] does both for inference and keeps nothing. `reference` holds the definitions.

mod backward;
mod check;
mod forward;
mod pieces;
pub mod reference;
mod weights;

use crate::error::expect_floats;
use crate::quant::{self, QuantisedExpert};
use crate::{KernelError, Matrix, Result, SparseRows, Threads};

/// Sizes of the experts of one layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExpertDims {
    /// D: hidden size.
    pub hidden: usize,
    /// F: intermediate size of one expert.
    pub intermediate: usize,
}

/// The two matrices an expert begins with, each `[F, D]`.
#[derive(Debug, Clone, Copy)]
pub struct GateUp<'a> {
    /// The branch that goes through SiLU.
    pub gate: Matrix<'a>,
    /// The branch it is multiplied with.
    pub up: Matrix<'a>,
}

impl<'a> GateUp<'a> {
    /// The halves of a fused `[2F, D]` matrix, gate first. `None` when it has not 2 F D values.
    #[must_use]
    pub fn from_fused(fused: Matrix<'a>, dims: ExpertDims) -> Option<Self> {
        let (gate, up) = fused.split_rows(dims.intermediate, dims.hidden)?;
        (gate.len() == up.len()).then_some(Self { gate, up })
    }
}

/// All weights of one expert.
#[derive(Debug, Clone, Copy)]
pub struct ExpertMatrices<'a> {
    /// `[F, D]`: the branch that goes through SiLU.
    pub gate: Matrix<'a>,
    /// `[F, D]`: the branch it is multiplied with.
    pub up: Matrix<'a>,
    /// `[D, F]`
    pub down: Matrix<'a>,
}

/// What a forward [`merge`] was called with.
#[derive(Debug, Clone, Copy)]
pub struct MergeInputs<'a> {
    /// `[N, 2F]`: pre-activation, gate then up.
    pub pre: &'a [f32],
    /// `[N]`: routing weight of each expanded row.
    pub row_weights: &'a [f32],
    /// e x `[D, F]`
    pub w_down: &'a [Matrix<'a>],
}

/// Where [`merge_bwd`] and [`merge_bwd_in_place`] write.
#[derive(Debug)]
pub struct MergeGrads<'a> {
    /// `[N, 2F]`, overwritten; [`merge_bwd_in_place`] finds the pre-activation here.
    pub d_pre: &'a mut [f32],
    /// `[N]`, overwritten.
    pub d_row_weights: &'a mut [f32],
    /// `[e, D, F]`, added to; `None` for frozen weights, or to make it later from `act` ([`weights_bwd`]).
    pub d_w_down: Option<&'a mut [f32]>,
    /// `[N, F]`, overwritten: activation times row weight.
    pub act: Option<&'a mut [f32]>,
}

/// Where [`scatter_bwd`] writes.
#[derive(Debug)]
pub struct ScatterGrads<'a> {
    /// `[R, D]`, overwritten; `None` when nobody asks for it.
    pub dx: Option<&'a mut [f32]>,
    /// `[e, 2F, D]`, added to; `None` for frozen weights.
    pub d_w_up: Option<&'a mut [f32]>,
}

/// What [`weights_bwd`] reads: rows of several parts one after the other.
#[derive(Debug, Clone, Copy)]
pub struct WeightInputs<'a> {
    /// `[R, D]`: the rows.
    pub x: &'a [f32],
    /// `[R, D]`: gradients of the merged outputs.
    pub dy: &'a [f32],
    /// `[N, F]`, as [`MergeGrads`] has it.
    pub act: &'a [f32],
    /// `[N, 2F]`: gradients of the pre-activation.
    pub d_pre: &'a [f32],
    /// `[N]`: where each expanded row stands in `act` and `d_pre`.
    pub stored: &'a [u32],
}

/// Where [`weights_bwd`] writes.
#[derive(Debug)]
pub struct WeightGrads<'a> {
    /// `[e, 2F, D]`; `None` when nobody asks for it.
    pub d_w_up: Option<&'a mut [f32]>,
    /// `[e, D, F]`
    pub d_w_down: Option<&'a mut [f32]>,
    /// Adds to what is there instead of overwriting it.
    pub add: bool,
}

/// Scattering sparse matmul: `out[n] = W_up[expert of n] x[row_idx[n]]`, gate then up.
///
/// - `x` `[R, D]`
/// - `w_up` e x (`[F, D]`, `[F, D]`)
/// - `out` `[N, 2F]`, overwritten
///
/// # Errors
/// [`crate::KernelError::Length`] when a slice does not have its shape.
pub fn scatter(
    threads: &Threads,
    rows: &SparseRows,
    dims: ExpertDims,
    x: &[f32],
    w_up: &[GateUp<'_>],
    out: &mut [f32],
) -> Result<()> {
    check::scatter(rows, dims, x.len(), w_up, out.len())?;
    forward::scatter(threads, rows, dims, x, w_up, out);
    Ok(())
}

/// Merging sparse matmul: `y[r] = sum over expanded rows n of r, experts ascending, of W_down[expert] (w_n h_n)` with
/// `h_n = silu(gate_n) * up_n` of the pre-activation.
///
/// - `inputs`: see [`MergeInputs`]
/// - `y` `[R, D]`, overwritten; rows nobody works on become 0
///
/// # Errors
/// [`crate::KernelError::Length`] when a slice does not have its shape.
pub fn merge(
    threads: &Threads,
    rows: &SparseRows,
    dims: ExpertDims,
    inputs: MergeInputs<'_>,
    y: &mut [f32],
) -> Result<()> {
    check::merge(rows, dims, &inputs, y.len())?;
    forward::merge(threads, rows, dims, inputs, y);
    Ok(())
}

/// Gradients of [`merge`].
///
/// - `dy` `[R, D]`: gradient of its result
/// - `grads`: see [`MergeGrads`]; `d_row_weights[n] = <h_n, W_down^T dy>`
///
/// # Errors
/// [`crate::KernelError::Length`] when a slice does not have its shape.
pub fn merge_bwd(
    threads: &Threads,
    rows: &SparseRows,
    dims: ExpertDims,
    inputs: MergeInputs<'_>,
    dy: &[f32],
    grads: MergeGrads<'_>,
) -> Result<()> {
    check::merge(rows, dims, &inputs, dy.len())?;
    check::merge_grads(rows, dims, &grads)?;
    let MergeInputs { pre, row_weights, w_down } = inputs;
    backward::merge_bwd(threads, rows, dims, Some(pre), (row_weights, w_down), dy, grads);
    Ok(())
}

/// [`merge_bwd`] without a second `[N, 2F]`: `grads.d_pre` holds the pre-activation, which becomes its gradient. The same
/// bits.
///
/// - `row_weights`, `w_down`: as in [`MergeInputs`]
/// - `dy`, `grads`: as in [`merge_bwd`]
///
/// # Errors
/// [`crate::KernelError::Length`] when a slice does not have its shape; then nothing is overwritten.
pub fn merge_bwd_in_place(
    threads: &Threads,
    rows: &SparseRows,
    dims: ExpertDims,
    row_weights: &[f32],
    w_down: &[Matrix<'_>],
    dy: &[f32],
    grads: MergeGrads<'_>,
) -> Result<()> {
    check::merge(rows, dims, &MergeInputs { pre: grads.d_pre, row_weights, w_down }, dy.len())?;
    check::merge_grads(rows, dims, &grads)?;
    backward::merge_bwd(threads, rows, dims, None, (row_weights, w_down), dy, grads);
    Ok(())
}

/// Gradients of [`scatter`].
///
/// - `d_pre` `[N, 2F]`: gradient of its result
/// - `x`, `w_up`: as given to it
/// - `grads`: see [`ScatterGrads`]. A row of `dx` adds experts ascending, of each the gate branch first.
///
/// # Errors
/// [`crate::KernelError::Length`] when a slice does not have its shape.
pub fn scatter_bwd(
    threads: &Threads,
    rows: &SparseRows,
    dims: ExpertDims,
    x: &[f32],
    w_up: &[GateUp<'_>],
    d_pre: &[f32],
    grads: ScatterGrads<'_>,
) -> Result<()> {
    check::scatter(rows, dims, x.len(), w_up, d_pre.len())?;
    check::scatter_grads(rows, dims, &grads)?;
    backward::scatter_bwd(threads, rows, dims, x, w_up, d_pre, grads);
    Ok(())
}

/// Gradients of the weights alone: `dW_down[expert] (+)= sum over its n of dy[row_idx[n]] act[n]^T` and
/// `dW_up[expert] (+)= sum over its n of d_pre[n] x[row_idx[n]]^T`, rows ascending.
///
/// - `rows`: of all parts, one after the other
/// - `inputs`, `grads`: see [`WeightInputs`], [`WeightGrads`]
///
/// # Errors
/// [`crate::KernelError::Length`] when a slice does not have its shape, [`crate::KernelError::Rows`] when an expanded row
/// stands outside.
pub fn weights_bwd(
    threads: &Threads,
    rows: &SparseRows,
    dims: ExpertDims,
    inputs: WeightInputs<'_>,
    grads: WeightGrads<'_>,
) -> Result<()> {
    check::weights(rows, dims, &inputs, &grads)?;
    weights::weights_bwd(threads, rows, dims, inputs, grads);
    Ok(())
}

/// The experts as inference needs them: [`scatter`], activation, row weight and [`merge`], nothing kept.
///
/// - `x` `[R, D]`
/// - `experts` e of them
/// - `row_weights` `[N]`
/// - `y` `[R, D]`, overwritten
///
/// # Errors
/// [`crate::KernelError::Length`] when a slice does not have its shape.
pub fn expert_ffn(
    threads: &Threads,
    rows: &SparseRows,
    dims: ExpertDims,
    x: &[f32],
    experts: &[ExpertMatrices<'_>],
    row_weights: &[f32],
    y: &mut [f32],
) -> Result<()> {
    check::expert_ffn(rows, dims, x.len(), experts, row_weights.len(), y.len())?;
    if let Some(experts) = quantised(dims, experts)? {
        return Ok(quant::expert_ffn(threads, rows, x, &experts, row_weights, y)?);
    }
    forward::expert_ffn(threads, rows, dims, x, experts, row_weights, y);
    Ok(())
}

/// The experts where all their matrices are quantised, `None` where none is.
fn quantised<'a>(
    dims: ExpertDims,
    experts: &[ExpertMatrices<'a>],
) -> Result<Option<Vec<QuantisedExpert<'a>>>> {
    let ExpertDims { hidden: d, intermediate: f } = dims;
    let mut list = Vec::new();
    for expert in experts {
        if let (Matrix::Quantised(gate), Matrix::Quantised(up), Matrix::Quantised(down)) =
            (expert.gate, expert.up, expert.down)
        {
            gate.expect_shape("gate", f, d)?;
            up.expect_shape("up", f, d)?;
            down.expect_shape("down", d, f)?;
            list.push(QuantisedExpert { gate, up, down });
        } else {
            expect_floats("an expert with other matrices in floats", &[expert.gate, expert.up, expert.down])?;
        }
    }
    if !list.is_empty() && list.len() < experts.len() {
        let reason = format!("{} of {} experts are quantised", list.len(), experts.len());
        return Err(KernelError::Quantised { reason });
    }
    Ok((!list.is_empty()).then_some(list))
}

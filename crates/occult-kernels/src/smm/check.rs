//! Every shape is checked once, here, before a kernel runs.

use super::{
    ExpertDims, ExpertMatrices, GateUp, MergeGrads, MergeInputs, ScatterGrads, WeightGrads, WeightInputs,
};
use crate::error::{expect_floats, expect_len};
use crate::{KernelError, Result, SparseRows};

pub(super) fn scatter(
    rows: &SparseRows,
    dims: ExpertDims,
    x: usize,
    w_up: &[GateUp<'_>],
    out: usize,
) -> Result<()> {
    let ExpertDims { hidden, intermediate } = dims;
    expect_len("x [R, D]", x, &[rows.num_rows(), hidden])?;
    expect_len("pre-activation [N, 2F]", out, &[rows.num_expanded(), 2, intermediate])?;
    expect_len("experts [e]", w_up.len(), &[rows.num_experts()])?;
    for expert in w_up {
        expect_len("gate [F, D]", expert.gate.len(), &[intermediate, hidden])?;
        expect_len("up [F, D]", expert.up.len(), &[intermediate, hidden])?;
        expect_floats("a scattering sparse matmul", &[expert.gate, expert.up])?;
    }
    Ok(())
}

pub(super) fn merge(rows: &SparseRows, dims: ExpertDims, inputs: &MergeInputs<'_>, y: usize) -> Result<()> {
    let ExpertDims { hidden, intermediate } = dims;
    expect_len("pre-activation [N, 2F]", inputs.pre.len(), &[rows.num_expanded(), 2, intermediate])?;
    expect_len("row weights [N]", inputs.row_weights.len(), &[rows.num_expanded()])?;
    expect_len("experts [e]", inputs.w_down.len(), &[rows.num_experts()])?;
    for down in inputs.w_down {
        expect_len("down [D, F]", down.len(), &[hidden, intermediate])?;
    }
    expect_floats("a merging sparse matmul", inputs.w_down)?;
    expect_len("y [R, D]", y, &[rows.num_rows(), hidden])
}

pub(super) fn merge_grads(rows: &SparseRows, dims: ExpertDims, grads: &MergeGrads<'_>) -> Result<()> {
    let ExpertDims { hidden, intermediate } = dims;
    expect_len("d_pre [N, 2F]", grads.d_pre.len(), &[rows.num_expanded(), 2, intermediate])?;
    expect_len("d_row_weights [N]", grads.d_row_weights.len(), &[rows.num_expanded()])?;
    if let Some(act) = &grads.act {
        expect_len("activation [N, F]", act.len(), &[rows.num_expanded(), intermediate])?;
    }
    match &grads.d_w_down {
        Some(grad) => {
            expect_len("d_w_down [e, D, F]", grad.len(), &[rows.num_experts(), hidden, intermediate])
        }
        None => Ok(()),
    }
}

pub(super) fn scatter_grads(rows: &SparseRows, dims: ExpertDims, grads: &ScatterGrads<'_>) -> Result<()> {
    let ExpertDims { hidden, intermediate } = dims;
    if let Some(dx) = &grads.dx {
        expect_len("dx [R, D]", dx.len(), &[rows.num_rows(), hidden])?;
    }
    match &grads.d_w_up {
        Some(grad) => {
            expect_len("d_w_up [e, 2F, D]", grad.len(), &[rows.num_experts(), 2, intermediate, hidden])
        }
        None => Ok(()),
    }
}

pub(super) fn weights(
    rows: &SparseRows,
    dims: ExpertDims,
    inputs: &WeightInputs<'_>,
    grads: &WeightGrads<'_>,
) -> Result<()> {
    let ExpertDims { hidden, intermediate } = dims;
    let (r, n, e) = (rows.num_rows(), rows.num_expanded(), rows.num_experts());
    expect_len("x [R, D]", inputs.x.len(), &[r, hidden])?;
    expect_len("dy [R, D]", inputs.dy.len(), &[r, hidden])?;
    expect_len("activation [N, F]", inputs.act.len(), &[n, intermediate])?;
    expect_len("d_pre [N, 2F]", inputs.d_pre.len(), &[n, 2, intermediate])?;
    expect_len("places of the expanded rows [N]", inputs.stored.len(), &[n])?;
    if let Some(place) = inputs.stored.iter().find(|&&place| place as usize >= n) {
        return Err(KernelError::Rows { reason: format!("an expanded row stands at {place} of {n}") });
    }
    if let Some(grad) = &grads.d_w_up {
        expect_len("d_w_up [e, 2F, D]", grad.len(), &[e, 2, intermediate, hidden])?;
    }
    if let Some(grad) = &grads.d_w_down {
        expect_len("d_w_down [e, D, F]", grad.len(), &[e, hidden, intermediate])?;
    }
    Ok(())
}

pub(super) fn expert_ffn(
    rows: &SparseRows,
    dims: ExpertDims,
    x: usize,
    experts: &[ExpertMatrices<'_>],
    row_weights: usize,
    y: usize,
) -> Result<()> {
    let ExpertDims { hidden, intermediate } = dims;
    expect_len("x [R, D]", x, &[rows.num_rows(), hidden])?;
    expect_len("experts [e]", experts.len(), &[rows.num_experts()])?;
    for expert in experts {
        expect_len("gate [F, D]", expert.gate.len(), &[intermediate, hidden])?;
        expect_len("up [F, D]", expert.up.len(), &[intermediate, hidden])?;
        expect_len("down [D, F]", expert.down.len(), &[hidden, intermediate])?;
    }
    expect_len("row weights [N]", row_weights, &[rows.num_expanded()])?;
    expect_len("y [R, D]", y, &[rows.num_rows(), hidden])
}

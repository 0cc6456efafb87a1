//! The sparse matmuls as they are defined: one expert, one row, one value after the other, all in `f32`.
//!
//! Shapes as in the functions of the same name in [`crate::smm`]; slices that are too short panic.

use super::{
    ExpertDims, ExpertMatrices, GateUp, MergeGrads, MergeInputs, ScatterGrads, WeightGrads, WeightInputs,
};
use crate::{Matrix, SparseRows};

/// Logistic function.
#[must_use]
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

/// SiLU, `x sigmoid(x)`.
#[must_use]
pub fn silu(x: f32) -> f32 {
    x / (1.0 + (-x).exp())
}

/// Derivative of [`silu`]: `s + x s (1 - s)` with `s = sigmoid(x)`.
#[must_use]
pub fn silu_grad(x: f32) -> f32 {
    let s = sigmoid(x);
    s + x * s * (1.0 - s)
}

/// See [`crate::smm::scatter`].
pub fn scatter(rows: &SparseRows, dims: ExpertDims, x: &[f32], w_up: &[GateUp<'_>], out: &mut [f32]) {
    let ExpertDims { hidden: d, intermediate: f } = dims;
    for (expert, weights) in w_up.iter().enumerate() {
        for n in rows.expanded_of(expert) {
            let x = &x[rows.row_idx()[n] as usize * d..][..d];
            for j in 0..2 * f {
                let (w, j_of_w) = if j < f { (weights.gate, j) } else { (weights.up, j - f) };
                out[n * 2 * f + j] = (0..d).map(|k| x[k] * w.at(j_of_w * d + k)).sum();
            }
        }
    }
}

/// See [`crate::smm::merge`].
pub fn merge(rows: &SparseRows, dims: ExpertDims, inputs: MergeInputs<'_>, y: &mut [f32]) {
    let ExpertDims { hidden: d, intermediate: f } = dims;
    y.fill(0.0);
    for (expert, w_down) in inputs.w_down.iter().enumerate() {
        for n in rows.expanded_of(expert) {
            let h = activation(&inputs.pre[n * 2 * f..][..2 * f]);
            let y = &mut y[rows.row_idx()[n] as usize * d..][..d];
            for (j, y) in y.iter_mut().enumerate() {
                *y += (0..f).map(|k| inputs.row_weights[n] * h[k] * w_down.at(j * f + k)).sum::<f32>();
            }
        }
    }
}

/// `silu(gate) * up` of one pre-activation row `[2F]`.
fn activation(pre: &[f32]) -> Vec<f32> {
    let (gate, up) = pre.split_at(pre.len() / 2);
    gate.iter().zip(up).map(|(&g, &u)| silu(g) * u).collect()
}

/// See [`crate::smm::merge_bwd`].
pub fn merge_bwd(
    rows: &SparseRows,
    dims: ExpertDims,
    inputs: MergeInputs<'_>,
    dy: &[f32],
    grads: MergeGrads<'_>,
) {
    let ExpertDims { hidden: d, intermediate: f } = dims;
    let MergeGrads { d_pre, d_row_weights, mut d_w_down, mut act } = grads;
    for (expert, w_down) in inputs.w_down.iter().enumerate() {
        for n in rows.expanded_of(expert) {
            let weight = inputs.row_weights[n];
            let pre = &inputs.pre[n * 2 * f..][..2 * f];
            let h = activation(pre);
            let dy = &dy[rows.row_idx()[n] as usize * d..][..d];
            d_row_weights[n] = 0.0;
            for k in 0..f {
                // Gradient of w_n h_n.
                let dh: f32 = (0..d).map(|j| dy[j] * w_down.at(j * f + k)).sum();
                d_row_weights[n] += h[k] * dh;
                if let Some(act) = &mut act {
                    act[n * f + k] = weight * h[k];
                }
                d_pre[n * 2 * f + k] = weight * dh * pre[f + k] * silu_grad(pre[k]);
                d_pre[n * 2 * f + f + k] = weight * dh * silu(pre[k]);
                if let Some(grad) = &mut d_w_down {
                    for j in 0..d {
                        grad[(expert * d + j) * f + k] += dy[j] * weight * h[k];
                    }
                }
            }
        }
    }
}

/// See [`crate::smm::merge_bwd_in_place`].
pub fn merge_bwd_in_place(
    rows: &SparseRows,
    dims: ExpertDims,
    row_weights: &[f32],
    w_down: &[Matrix<'_>],
    dy: &[f32],
    grads: MergeGrads<'_>,
) {
    let pre = grads.d_pre.to_vec();
    merge_bwd(rows, dims, MergeInputs { pre: &pre, row_weights, w_down }, dy, grads);
}

/// See [`crate::smm::scatter_bwd`].
pub fn scatter_bwd(
    rows: &SparseRows,
    dims: ExpertDims,
    x: &[f32],
    w_up: &[GateUp<'_>],
    d_pre: &[f32],
    grads: ScatterGrads<'_>,
) {
    let ExpertDims { hidden: d, intermediate: f } = dims;
    let ScatterGrads { mut dx, mut d_w_up } = grads;
    if let Some(dx) = &mut dx {
        dx.fill(0.0);
    }
    for (expert, weights) in w_up.iter().enumerate() {
        for n in rows.expanded_of(expert) {
            let row = rows.row_idx()[n] as usize;
            let d_pre = &d_pre[n * 2 * f..][..2 * f];
            if let Some(dx) = &mut dx {
                for k in 0..d {
                    dx[row * d + k] += (0..f).map(|j| d_pre[j] * weights.gate.at(j * d + k)).sum::<f32>();
                    dx[row * d + k] += (0..f).map(|j| d_pre[f + j] * weights.up.at(j * d + k)).sum::<f32>();
                }
            }
            if let Some(grad) = &mut d_w_up {
                for j in 0..2 * f {
                    for k in 0..d {
                        grad[(expert * 2 * f + j) * d + k] += d_pre[j] * x[row * d + k];
                    }
                }
            }
        }
    }
}

/// See [`crate::smm::weights_bwd`].
pub fn weights_bwd(rows: &SparseRows, dims: ExpertDims, inputs: WeightInputs<'_>, grads: WeightGrads<'_>) {
    let ExpertDims { hidden: d, intermediate: f } = dims;
    let WeightGrads { mut d_w_up, mut d_w_down, add } = grads;
    for grad in [&mut d_w_up, &mut d_w_down].into_iter().flatten().filter(|_| !add) {
        grad.fill(0.0);
    }
    for expert in 0..rows.num_experts() {
        for n in rows.expanded_of(expert) {
            let (row, at) = (rows.row_idx()[n] as usize, inputs.stored[n] as usize);
            let (x, dy) = (&inputs.x[row * d..][..d], &inputs.dy[row * d..][..d]);
            let (act, d_pre) = (&inputs.act[at * f..][..f], &inputs.d_pre[at * 2 * f..][..2 * f]);
            for (i, (&x, &dy)) in x.iter().zip(dy).enumerate() {
                if let Some(grad) = &mut d_w_down {
                    (0..f).for_each(|j| grad[(expert * d + i) * f + j] += dy * act[j]);
                }
                if let Some(grad) = &mut d_w_up {
                    (0..2 * f).for_each(|j| grad[(expert * 2 * f + j) * d + i] += d_pre[j] * x);
                }
            }
        }
    }
}

/// See [`crate::smm::expert_ffn`].
pub fn expert_ffn(
    rows: &SparseRows,
    dims: ExpertDims,
    x: &[f32],
    experts: &[ExpertMatrices<'_>],
    row_weights: &[f32],
    y: &mut [f32],
) {
    let mut pre = vec![0.0; rows.num_expanded() * 2 * dims.intermediate];
    let w_up: Vec<_> = experts.iter().map(|expert| GateUp { gate: expert.gate, up: expert.up }).collect();
    let w_down: Vec<_> = experts.iter().map(|expert| expert.down).collect();
    scatter(rows, dims, x, &w_up, &mut pre);
    merge(rows, dims, MergeInputs { pre: &pre, row_weights, w_down: &w_down }, y);
}

//! Gradients of the weights, of rows that may have come in several parts: one product per expert and matrix over all of
//! them, so that each gradient is written once.

use super::{ExpertDims, WeightGrads, WeightInputs};
use crate::core::divide::run;
use crate::core::product::{Left, Product, Right, Target};
use crate::threads::{SendPtr, input};
use crate::{Matrix, SparseRows, Threads};

/// See [`super::weights_bwd`]; shapes and indices are checked.
pub(super) fn weights_bwd(
    threads: &Threads,
    rows: &SparseRows,
    dims: ExpertDims,
    inputs: WeightInputs<'_>,
    grads: WeightGrads<'_>,
) {
    let ExpertDims { hidden: d, intermediate: f } = dims;
    let WeightInputs { x, dy, act, d_pre, stored } = inputs;
    // An expert without rows has a product over nothing: zeros, unless it is added.
    if let Some(grad) = grads.d_w_down {
        let to = SendPtr(grad.as_mut_ptr());
        let products: Vec<Product<'_>> = (0..rows.num_experts())
            .map(|expert| Product {
                m: d,
                n: f,
                k: rows.expanded_of(expert).len(),
                a: Left { data: input(dy), stride: d, idx: Some(rows.rows_of(expert)), by_steps: true },
                b: Right::Plain { matrix: Matrix::F32(act), idx: Some(&stored[rows.expanded_of(expert)]) },
                c: Target {
                    to: SendPtr(to.get().wrapping_add(expert * d * f)),
                    stride: f,
                    idx: None,
                    add: grads.add,
                },
                few_rows: false,
            })
            .collect();
        // SAFETY: shapes and indices are checked; each product writes the gradient of its expert.
        unsafe { run(threads, &products) };
    }
    if let Some(grad) = grads.d_w_up {
        // SAFETY: as above.
        unsafe { up_bwd(threads, rows, dims, x, (d_pre, Some(stored)), (grad, grads.add)) };
    }
}

/// Gradients of gate and up, of every expert. Expanded row `n` of `d_pre` `[N, 2F]` stands at `stored[n]`, or at n.
///
/// # Safety
/// Shapes are checked, and so are `stored`'s indices.
pub(super) unsafe fn up_bwd(
    threads: &Threads,
    rows: &SparseRows,
    dims: ExpertDims,
    x: &[f32],
    (d_pre, stored): (&[f32], Option<&[u32]>),
    (grad, add): (&mut [f32], bool),
) {
    let ExpertDims { hidden: d, intermediate: f } = dims;
    let to = SendPtr(grad.as_mut_ptr());
    let products: Vec<Product<'_>> = (0..rows.num_experts())
        .map(|expert| {
            let n = rows.expanded_of(expert);
            let first = if stored.is_some() { 0 } else { n.start * 2 * f };
            Product {
                m: 2 * f,
                n: d,
                k: n.len(),
                a: Left {
                    data: SendPtr(input(d_pre).get().wrapping_add(first)),
                    stride: 2 * f,
                    idx: stored.map(|stored| &stored[n]),
                    by_steps: true,
                },
                b: Right::Plain { matrix: Matrix::F32(x), idx: Some(rows.rows_of(expert)) },
                c: Target {
                    to: SendPtr(to.get().wrapping_add(expert * 2 * f * d)),
                    stride: d,
                    idx: None,
                    add,
                },
                few_rows: false,
            }
        })
        .collect();
    // SAFETY: the caller's promise; row indices are below R by `SparseRows`, and each product writes the gradient of its
    // expert.
    unsafe { run(threads, &products) };
}

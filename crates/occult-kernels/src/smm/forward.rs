//! Forward: products over the rows of each expert.

use super::pieces::{Group, Piece, groups};
use super::{ExpertDims, ExpertMatrices, GateUp, MergeInputs};
use crate::core::divide::{for_each_block, run, run_merged};
use crate::core::product::{Left, Product, Right, Target};
use crate::threads::{SendPtr, input};
use crate::{Matrix, SparseRows, Threads};

/// Rows whose activation is one task.
pub(super) const ROWS_PER_TASK: usize = 16;

/// See [`super::scatter`]; shapes are checked.
pub(super) fn scatter(
    threads: &Threads,
    rows: &SparseRows,
    dims: ExpertDims,
    x: &[f32],
    w_up: &[GateUp<'_>],
    out: &mut [f32],
) {
    let f = dims.intermediate;
    let out = SendPtr(out.as_mut_ptr());
    let products: Vec<Product<'_>> = (0..rows.num_experts())
        .filter(|&expert| !rows.expanded_of(expert).is_empty())
        .flat_map(|expert| {
            let all = rows.expanded_of(expert);
            let piece = Piece { expert, rows_of_expert: all.len(), rows: all };
            let to = out.get().wrapping_add(piece.rows.start * 2 * f);
            let GateUp { gate, up } = w_up[expert];
            [
                up_product(threads, rows, dims, &piece, x, gate, to),
                up_product(threads, rows, dims, &piece, x, up, to.wrapping_add(f)),
            ]
        })
        .collect();
    // SAFETY: shapes are checked, row indices are below R by `SparseRows`, and each product writes its own part.
    unsafe { run(threads, &products) };
}

/// One of the branches for the rows of `piece`; `to` is its first value, rows are `[2F]`.
fn up_product<'a>(
    threads: &Threads,
    rows: &'a SparseRows,
    dims: ExpertDims,
    piece: &Piece,
    x: &[f32],
    matrix: Matrix<'a>,
    to: *mut f32,
) -> Product<'a> {
    let ExpertDims { hidden: d, intermediate: f } = dims;
    Product {
        m: piece.rows.len(),
        n: f,
        k: d,
        a: Left {
            data: input(x),
            stride: d,
            idx: Some(&rows.row_idx()[piece.rows.clone()]),
            by_steps: false,
        },
        b: Right::Transposed { matrix },
        c: Target { to: SendPtr(to), stride: 2 * f, idx: None, add: false },
        few_rows: threads.isa().is_few(piece.rows_of_expert, matrix),
    }
}

/// Adds the down projection of activations `[rows of group, stride]` to `y`.
///
/// # Safety
/// `act` holds F values for each row of the group, `stride` apart; `y` is `[R, D]` and nobody else touches it.
unsafe fn add_down<'a>(
    threads: &Threads,
    rows: &SparseRows,
    dims: ExpertDims,
    group: &Group,
    act: (SendPtr<f32>, usize),
    w_down: impl Fn(usize) -> Matrix<'a>,
    y: SendPtr<f32>,
) {
    let ExpertDims { hidden: d, intermediate: f } = dims;
    let (act, stride) = act;
    let products: Vec<Product<'_>> = group
        .pieces
        .iter()
        .map(|piece| {
            let matrix = w_down(piece.expert);
            Product {
                m: piece.rows.len(),
                n: d,
                k: f,
                a: Left {
                    data: SendPtr(act.get().wrapping_add((piece.rows.start - group.rows.start) * stride)),
                    stride,
                    idx: None,
                    by_steps: false,
                },
                b: Right::Transposed { matrix },
                c: Target { to: y, stride: d, idx: Some(&rows.row_idx()[piece.rows.clone()]), add: true },
                few_rows: threads.isa().is_few(piece.rows_of_expert, matrix),
            }
        })
        .collect();
    // SAFETY: the caller's promise; row indices are below R and ascend within a piece.
    unsafe { run_merged(threads, rows.num_rows(), d, &products) };
}

/// Room for the largest group, `width` values per row.
pub(super) fn room(groups: &[Group], width: usize) -> Vec<f32> {
    vec![0.0; groups.iter().map(|group| group.rows.len()).max().unwrap_or(0) * width]
}

/// Fills a slice with 0, on all threads.
pub(super) fn zero(threads: &Threads, values: &mut [f32]) {
    threads.for_each_chunk(values, 1 << 16, |_, chunk| chunk.fill(0.0));
}

/// See [`super::merge`]; shapes are checked.
pub(super) fn merge(
    threads: &Threads,
    rows: &SparseRows,
    dims: ExpertDims,
    inputs: MergeInputs<'_>,
    y: &mut [f32],
) {
    let f = dims.intermediate;
    zero(threads, y);
    if f == 0 {
        return;
    }
    let groups = groups(rows, f);
    let mut act = room(&groups, f);
    for group in &groups {
        let first = group.rows.start;
        threads.for_each_chunk(&mut act[..group.rows.len() * f], ROWS_PER_TASK * f, |task, chunk| {
            for (i, act) in chunk.chunks_exact_mut(f).enumerate() {
                let n = first + task * ROWS_PER_TASK + i;
                let (gate, up) = inputs.pre[n * 2 * f..][..2 * f].split_at(f);
                // SAFETY: three slices of F values.
                unsafe {
                    (threads.isa().swiglu)(
                        f,
                        gate.as_ptr(),
                        up.as_ptr(),
                        inputs.row_weights[n],
                        act.as_mut_ptr(),
                    );
                }
            }
        });
        // SAFETY: `act` was filled for this group; `y` is borrowed mutably and `[R, D]`.
        unsafe {
            let y = SendPtr(y.as_mut_ptr());
            add_down(threads, rows, dims, group, (input(&act), f), |expert| inputs.w_down[expert], y);
        }
    }
}

/// See [`super::expert_ffn`]; shapes are checked.
pub(super) fn expert_ffn(
    threads: &Threads,
    rows: &SparseRows,
    dims: ExpertDims,
    x: &[f32],
    experts: &[ExpertMatrices<'_>],
    row_weights: &[f32],
    y: &mut [f32],
) {
    let f = dims.intermediate;
    zero(threads, y);
    if f == 0 {
        return;
    }
    let groups = groups(rows, 2 * f);
    let mut pre = room(&groups, 2 * f);
    for group in &groups {
        let pre = SendPtr(pre.as_mut_ptr());
        let products: Vec<[Product<'_>; 2]> = group
            .pieces
            .iter()
            .map(|piece| {
                let to = pre.get().wrapping_add((piece.rows.start - group.rows.start) * 2 * f);
                let ExpertMatrices { gate, up, .. } = experts[piece.expert];
                [
                    up_product(threads, rows, dims, piece, x, gate, to),
                    up_product(threads, rows, dims, piece, x, up, to.wrapping_add(f)),
                ]
            })
            .collect();
        let shapes: Vec<_> = products.iter().map(|[gate, _]| (gate.m, gate.n)).collect();
        for_each_block(threads, &shapes, |i, block_rows, cols, next| {
            let first = group.pieces[i].rows.start;
            // SAFETY: shapes are checked; each block writes its own rows and columns of both branches, and then reads
            // and writes only those. `pre` has room for the group.
            unsafe {
                let [gate, up] = &products[i];
                gate.block(threads.isa(), block_rows.clone(), cols.clone(), Some((up, cols.clone())));
                let next = next.map(|(i, cols)| (&products[i][0], cols));
                up.block(threads.isa(), block_rows.clone(), cols.clone(), next);
                for row in block_rows {
                    let gate = products[i][0].c.to.get().add(row * 2 * f + cols.start);
                    (threads.isa().swiglu)(cols.len(), gate, gate.add(f), row_weights[first + row], gate);
                }
            }
        });
        // SAFETY: the first half of each row of `pre` holds the activation; `y` is borrowed mutably and `[R, D]`.
        unsafe {
            let y = SendPtr(y.as_mut_ptr());
            add_down(threads, rows, dims, group, (pre, 2 * f), |expert| experts[expert].down, y);
        }
    }
}

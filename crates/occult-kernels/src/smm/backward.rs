//! Backward: the same products with the roles of the sides changed, and weight gradients added up over the rows.

use super::forward::{ROWS_PER_TASK, room, zero};
use super::pieces::groups;
use super::weights::up_bwd;
use super::{ExpertDims, GateUp, MergeGrads, ScatterGrads};
use crate::core::activation::SwigluBwd;
use crate::core::divide::{run, run_merged};
use crate::core::product::{Left, Product, Right, Target};
use crate::threads::{SendPtr, input};
use crate::{Matrix, SparseRows, Threads};

/// See [`super::merge_bwd`] and, where there is no `pre`, [`super::merge_bwd_in_place`]; shapes are checked. `weights` are
/// those of the rows and `w_down`.
pub(super) fn merge_bwd(
    threads: &Threads,
    rows: &SparseRows,
    dims: ExpertDims,
    pre: Option<&[f32]>,
    weights: (&[f32], &[Matrix<'_>]),
    dy: &[f32],
    grads: MergeGrads<'_>,
) {
    let ExpertDims { hidden: d, intermediate: f } = dims;
    let MergeGrads { d_pre, d_row_weights, d_w_down, act: mut kept } = grads;
    if f == 0 {
        d_row_weights.fill(0.0);
        return;
    }
    let d_w_down = d_w_down.map(|grad| SendPtr(grad.as_mut_ptr()));
    let (row_weights, w_down) = weights;
    let d_pre = SendPtr(d_pre.as_mut_ptr());
    let pre = pre.map_or(d_pre, input);
    let groups = groups(rows, f);
    let mut act = if kept.is_some() { Vec::new() } else { room(&groups, f) };
    for group in &groups {
        // Where the activations of the group go: to who keeps them all, or into room for one group.
        let act: &mut [f32] = match &mut kept {
            Some(kept) => &mut kept[group.rows.start * f..group.rows.end * f],
            None => &mut act,
        };
        let act_at = SendPtr(act.as_mut_ptr());
        let first = group.rows.start;
        // W_down^T dy, to where the activations will be: pre-activations may have to stand in d_pre until then.
        let products: Vec<Product<'_>> = group
            .pieces
            .iter()
            .map(|piece| Product {
                m: piece.rows.len(),
                n: f,
                k: d,
                a: Left {
                    data: input(dy),
                    stride: d,
                    idx: Some(&rows.row_idx()[piece.rows.clone()]),
                    by_steps: false,
                },
                b: Right::Plain { matrix: w_down[piece.expert], idx: None },
                c: Target {
                    to: SendPtr(act_at.get().wrapping_add((piece.rows.start - first) * f)),
                    stride: f,
                    idx: None,
                    add: false,
                },
                few_rows: false,
            })
            .collect();
        // SAFETY: shapes are checked; each product writes the rows of its piece, for which `act` has room.
        unsafe { run(threads, &products) };

        // Through the activation, row by row.
        let weights_at = SendPtr(d_row_weights.as_mut_ptr());
        threads.for_each(group.rows.len().div_ceil(ROWS_PER_TASK), |task| {
            let start = first + task * ROWS_PER_TASK;
            let of = start..group.rows.end.min(start + ROWS_PER_TASK);
            for (n, &weight) in of.clone().zip(&row_weights[of]) {
                // SAFETY: row `n` belongs to this task; `act` has room for the group, pre, d_pre and d_row_weights have N
                // rows. `pre` is d_pre or apart from it.
                unsafe {
                    let (gate, d_gate) = (pre.get().add(n * 2 * f), d_pre.get().add(n * 2 * f));
                    *weights_at.get().add(n) = (threads.isa().swiglu_bwd)(&SwigluBwd {
                        len: f,
                        gate,
                        up: gate.add(f),
                        weight,
                        d_gate,
                        d_up: d_gate.add(f),
                        act: act_at.get().add((n - first) * f),
                    });
                }
            }
        });

        // dW_down += dy^T act.
        let Some(d_w_down) = d_w_down else { continue };
        for round in rounds(group.pieces.iter().map(|piece| piece.expert)) {
            let products: Vec<Product<'_>> = group.pieces[round]
                .iter()
                .map(|piece| {
                    let at = (piece.rows.start - first) * f;
                    Product {
                        m: d,
                        n: f,
                        k: piece.rows.len(),
                        a: Left {
                            data: input(dy),
                            stride: d,
                            idx: Some(&rows.row_idx()[piece.rows.clone()]),
                            by_steps: true,
                        },
                        b: Right::Plain {
                            matrix: Matrix::F32(&act[at..at + piece.rows.len() * f]),
                            idx: None,
                        },
                        c: Target {
                            to: SendPtr(d_w_down.get().wrapping_add(piece.expert * d * f)),
                            stride: f,
                            idx: None,
                            add: true,
                        },
                        few_rows: false,
                    }
                })
                .collect();
            // SAFETY: shapes are checked; the products of a round belong to different experts.
            unsafe { run(threads, &products) };
        }
    }
}

/// Runs of experts in which each occurs once.
fn rounds(experts: impl Iterator<Item = usize>) -> Vec<std::ops::Range<usize>> {
    let mut rounds: Vec<std::ops::Range<usize>> = Vec::new();
    let mut last = None;
    for (i, expert) in experts.enumerate() {
        match rounds.last_mut() {
            Some(round) if last != Some(expert) => round.end = i + 1,
            _ => rounds.push(i..i + 1),
        }
        last = Some(expert);
    }
    rounds
}

/// See [`super::scatter_bwd`]; shapes are checked.
pub(super) fn scatter_bwd(
    threads: &Threads,
    rows: &SparseRows,
    dims: ExpertDims,
    x: &[f32],
    w_up: &[GateUp<'_>],
    d_pre: &[f32],
    grads: ScatterGrads<'_>,
) {
    let ExpertDims { hidden: d, intermediate: f } = dims;
    let busy = || (0..rows.num_experts()).filter(|&expert| !rows.expanded_of(expert).is_empty());
    if let Some(dx) = grads.dx {
        zero(threads, dx);
        let to = SendPtr(dx.as_mut_ptr());
        let products: Vec<Product<'_>> = busy()
            .flat_map(|expert| {
                [(0, w_up[expert].gate), (f, w_up[expert].up)].map(|(offset, matrix)| {
                    let n = rows.expanded_of(expert);
                    Product {
                        m: n.len(),
                        n: d,
                        k: f,
                        a: Left {
                            data: SendPtr(input(d_pre).get().wrapping_add(n.start * 2 * f + offset)),
                            stride: 2 * f,
                            idx: None,
                            by_steps: false,
                        },
                        b: Right::Plain { matrix, idx: None },
                        c: Target { to, stride: d, idx: Some(rows.rows_of(expert)), add: true },
                        few_rows: false,
                    }
                })
            })
            .collect();
        // SAFETY: shapes are checked, row indices are below R and ascend within an expert; `dx` is borrowed mutably.
        unsafe { run_merged(threads, rows.num_rows(), d, &products) };
    }
    if let Some(grad) = grads.d_w_up {
        // SAFETY: shapes are checked; rows stand where their numbers say.
        unsafe { up_bwd(threads, rows, dims, x, (d_pre, None), (grad, true)) };
    }
}

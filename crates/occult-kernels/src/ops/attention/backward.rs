//! Gradients: probabilities are computed again from the log-sum-exp.
//!
//! With `P = exp(S - log_sum)` and `D_i = <dO_i, O_i>`: `dV = Pᵀ dO`, `dS = P (dO Vᵀ - D)`, `dQ = scale dS K`,
//! `dK = scale dSᵀ Q`. One task per key head; query blocks ascend, so sums over queries have one order.

use super::Inputs;
use super::tile::{Block, KEYS, LANES};
use crate::Threads;
use crate::ops::gemm::{Left, gemm};
use crate::ops::shared::Shared;
use crate::ops::simd::{dot, exp, vectorised};

/// What forward left and what comes from above.
#[derive(Clone, Copy)]
pub(super) struct Given<'a> {
    /// `[B, T, H * d_v]`
    pub(super) out: &'a [f32],
    /// `[B, T, H * d_v]`
    pub(super) d_out: &'a [f32],
    /// `[B, Hkv, rows]`
    pub(super) log_sums: &'a [f32],
}

/// `dq` `[B, H, T, d_k]`, `dk` `[B, Hkv, S, d_k]`, `dv` `[B, Hkv, S, d_v]`, all zero before.
pub(super) fn backward(
    threads: &Threads,
    inputs: &Inputs<'_>,
    given: Given<'_>,
    dq: &mut [f32],
    dk: &mut [f32],
    dv: &mut [f32],
) {
    let (of_q, of_k, of_v) = (inputs.rows() * inputs.dk, inputs.keys * inputs.dk, inputs.keys * inputs.dv);
    let (dq, dk, dv) = (Shared::new(dq), Shared::new(dk), Shared::new(dv));
    threads.for_each(inputs.batch * inputs.kv_heads, |head| {
        // SAFETY: every key head has its own part of each gradient, and one task.
        let (dq, dk, dv) =
            unsafe { (dq.part(head * of_q, of_q), dk.part(head * of_k, of_k), dv.part(head * of_v, of_v)) };
        let mut room = Room::new(inputs);
        for row in (0..inputs.rows()).step_by(LANES) {
            let block = Block::new(inputs, head / inputs.kv_heads, head % inputs.kv_heads, row);
            let dq = &mut dq[row * inputs.dk..][..block.count * inputs.dk];
            room.block(inputs, &block, given, dq, dk, dv);
        }
    });
}

/// Scratch of one task.
struct Room {
    /// `[d_k, lanes]` and `[lanes, d_k]`, scaled
    q_lanes: Vec<f32>,
    q_rows: Vec<f32>,
    /// `[d_v, lanes]` and `[lanes, d_v]`
    d_out_lanes: Vec<f32>,
    d_out_rows: Vec<f32>,
    /// `[keys, lanes]`
    p: Vec<f32>,
    ds: Vec<f32>,
    /// `[d_k, lanes]`
    dq_lanes: Vec<f32>,
}

impl Room {
    fn new(inputs: &Inputs<'_>) -> Self {
        let of = |d: usize| vec![0.0; d * LANES];
        Self {
            q_lanes: of(inputs.dk),
            q_rows: of(inputs.dk),
            d_out_lanes: of(inputs.dv),
            d_out_rows: of(inputs.dv),
            p: of(KEYS),
            ds: of(KEYS),
            dq_lanes: of(inputs.dk),
        }
    }

    fn block(
        &mut self,
        inputs: &Inputs<'_>,
        block: &Block,
        given: Given<'_>,
        dq: &mut [f32],
        to_k: &mut [f32],
        to_v: &mut [f32],
    ) {
        let (w, dk, dv) = (block.lanes, inputs.dk, inputs.dv);
        let (k, k_row) = inputs.k.head(block.b, block.kv_head);
        let (v, v_row) = inputs.v.head(block.b, block.kv_head);
        let (mut log_sums, mut inner) = ([0.0; LANES], [0.0; LANES]);
        block.queries(inputs, &mut self.q_lanes);
        self.d_out_lanes.fill(0.0);
        self.d_out_rows.fill(0.0);
        for lane in 0..block.count {
            let at = inputs.result_at(block.b, block.kv_head, block.row + lane);
            let d_out = &given.d_out[at..at + dv];
            inner[lane] = dot(d_out, &given.out[at..at + dv]);
            let head = block.b * inputs.kv_heads + block.kv_head;
            let log_sum = given.log_sums[head * inputs.rows() + block.row + lane];
            // Of a row that sees nothing all scores are minus infinity; any finite shift will do.
            log_sums[lane] = if log_sum == f32::NEG_INFINITY { 0.0 } else { log_sum };
            self.d_out_rows[lane * dv..][..dv].copy_from_slice(d_out);
            for (c, x) in d_out.iter().enumerate() {
                self.d_out_lanes[c * w + lane] = *x;
            }
        }
        transpose(&self.q_lanes, dk, w, &mut self.q_rows);
        self.dq_lanes[..dk * w].fill(0.0);
        for (key, n) in block.key_tiles() {
            let keys = Left { values: &k[key * k_row..], row: k_row, col: 1 };
            gemm((n, w, dk), keys, (&self.q_lanes, w), (&mut self.p, w), false);
            block.mask(key, n, &mut self.p);
            let values = Left { values: &v[key * v_row..], row: v_row, col: 1 };
            gemm((n, w, dv), values, (&self.d_out_lanes, w), (&mut self.ds, w), false);
            probabilities(&mut self.p[..n * w], &mut self.ds[..n * w], &log_sums[..w], &inner[..w]);
            let (p, ds) =
                (Left { values: &self.p, row: w, col: 1 }, Left { values: &self.ds, row: w, col: 1 });
            gemm((n, dv, w), p, (&self.d_out_rows, dv), (&mut to_v[key * dv..], dv), true);
            gemm((n, dk, w), ds, (&self.q_rows, dk), (&mut to_k[key * dk..], dk), true);
            let keys = Left { values: &k[key * k_row..], row: 1, col: k_row };
            gemm((dk, w, n), keys, (&self.ds, w), (&mut self.dq_lanes, w), true);
        }
        for (lane, dq) in dq.chunks_exact_mut(dk.max(1)).enumerate() {
            for (c, to) in dq.iter_mut().enumerate() {
                *to = self.dq_lanes[c * w + lane] * inputs.shape.scale;
            }
        }
    }
}

/// `[rows, cols]` to `[cols, rows]`.
fn transpose(from: &[f32], rows: usize, cols: usize, to: &mut [f32]) {
    for c in 0..cols {
        for r in 0..rows {
            to[c * rows + r] = from[r * cols + c];
        }
    }
}

vectorised! {
    /// Scores become probabilities, and `<dO_i, v_j>` becomes the gradient of the score.
    fn probabilities(p: &mut [f32], ds: &mut [f32], log_sums: &[f32], inner: &[f32]) {
        let w = log_sums.len();
        for (p, ds) in p.chunks_exact_mut(w).zip(ds.chunks_exact_mut(w)) {
            for (((p, ds), log_sum), inner) in p.iter_mut().zip(ds.iter_mut()).zip(log_sums).zip(inner) {
                *p = exp::<ISA>(*p - *log_sum);
                *ds = *p * (*ds - *inner);
            }
        }
    }
}

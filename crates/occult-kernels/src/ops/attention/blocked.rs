//! Many query rows: tiles through the small matrix product.

use super::Inputs;
use super::tile::{Block, KEYS, LANES};
use crate::Threads;
use crate::ops::gemm::{Left, gemm};
use crate::ops::shared::Shared;
use crate::ops::simd::{exp, vectorised};

pub(super) fn forward(threads: &Threads, inputs: &Inputs<'_>, out: &mut [f32], log_sums: &mut [f32]) {
    let blocks = inputs.rows().div_ceil(LANES);
    let heads = inputs.batch * inputs.kv_heads;
    let (out, log_sums) = (Shared::new(out), Shared::new(log_sums));
    threads.for_each(heads * blocks, |task| {
        // The last blocks of a causal sequence see most: they go first.
        let (row, head) = ((blocks - 1 - task / heads) * LANES, task % heads);
        let block = Block::new(inputs, head / inputs.kv_heads, head % inputs.kv_heads, row);
        let (sums, values) = one(inputs, &block);
        // SAFETY: rows of blocks of a key head are disjoint, and so are the rows of different key heads.
        let to = unsafe { log_sums.part(head * inputs.rows() + row, block.count) };
        to.copy_from_slice(&sums[..block.count]);
        for lane in 0..block.count {
            let at = inputs.result_at(block.b, block.kv_head, row + lane);
            // SAFETY: every query row has its own place in the result and belongs to one block.
            let to = unsafe { out.part(at, inputs.dv) };
            for (c, to) in to.iter_mut().enumerate() {
                *to = values[c * block.lanes + lane];
            }
        }
    });
}

/// Log-sum-exp of each lane, and the result `[d_v, lanes]`.
fn one(inputs: &Inputs<'_>, block: &Block) -> ([f32; LANES], Vec<f32>) {
    let (w, dk, dv) = (block.lanes, inputs.dk, inputs.dv);
    let (k, k_row) = inputs.k.head(block.b, block.kv_head);
    let (v, v_row) = inputs.v.head(block.b, block.kv_head);
    let mut room = vec![0.0; (dk + KEYS + dv) * w];
    let (q, rest) = room.split_at_mut(dk * w);
    let (scores, out) = rest.split_at_mut(KEYS * w);
    block.queries(inputs, q);
    let mut maxima = [f32::NEG_INFINITY; LANES];
    let mut sums = [0.0; LANES];
    for (key, n) in block.key_tiles() {
        let keys = Left { values: &k[key * k_row..], row: k_row, col: 1 };
        gemm((n, w, dk), keys, (q, w), (scores, w), false);
        block.mask(key, n, scores);
        let scores = &mut scores[..n * w];
        softmax_tile(scores, w, &mut maxima[..w], &mut sums[..w], out);
        let values = Left { values: &v[key * v_row..], row: 1, col: v_row };
        gemm((dv, w, n), values, (scores, w), (out, w), true);
    }
    let mut log_sums = [f32::NEG_INFINITY; LANES];
    for lane in 0..w {
        log_sums[lane] = maxima[lane] + sums[lane].ln();
        // A row that sees nothing is zero.
        sums[lane] = if sums[lane] == 0.0 { 0.0 } else { 1.0 / sums[lane] };
    }
    scale_lanes(out, w, &sums[..w]);
    room.drain(..(dk + KEYS) * w);
    (log_sums, room)
}

vectorised! {
    /// Multiplies each lane of `[.., w]` by its factor.
    fn scale_lanes(values: &mut [f32], w: usize, factors: &[f32]) {
        for row in values.chunks_exact_mut(w) {
            for (x, f) in row.iter_mut().zip(factors) {
                *x *= *f;
            }
        }
    }
}

vectorised! {
    /// One step of the running softmax: scores `[n, w]` become exponentials, `maxima` and `sums` `[w]` are those of all
    /// keys so far, and `out` `[d_v, w]` is brought to the new maximum.
    fn softmax_tile(scores: &mut [f32], w: usize, maxima: &mut [f32], sums: &mut [f32], out: &mut [f32]) {
        let (mut shift, mut factor) = ([0f32; LANES], [0f32; LANES]);
        let (shift, factor) = (&mut shift[..w], &mut factor[..w]);
        shift.copy_from_slice(maxima);
        for row in scores.chunks_exact(w) {
            for (m, s) in shift.iter_mut().zip(row) {
                // A NaN becomes the maximum and stays it, so that it reaches the result.
                *m = if *s <= *m { *m } else { *s };
            }
        }
        let mut same = true;
        for (((m, old), f), sum) in shift.iter_mut().zip(maxima.iter_mut()).zip(factor.iter_mut()).zip(sums.iter_mut()) {
            same &= *m == *old;
            let now = *m;
            // Nothing seen yet: any finite shift makes every exponential 0.
            *m = if now == f32::NEG_INFINITY { 0.0 } else { now };
            *f = exp::<ISA>(*old - *m);
            *old = now;
            *sum *= *f;
        }
        for row in scores.chunks_exact_mut(w) {
            for ((s, m), sum) in row.iter_mut().zip(shift.iter()).zip(sums.iter_mut()) {
                *s = exp::<ISA>(*s - *m);
                *sum += *s;
            }
        }
        if !same {
            for row in out.chunks_exact_mut(w) {
                for (x, f) in row.iter_mut().zip(factor.iter()) {
                    *x *= *f;
                }
            }
        }
    }
}

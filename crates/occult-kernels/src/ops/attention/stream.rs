//! Few query rows per key head (decode): keys and values are streamed once.

use super::Inputs;
use crate::Threads;
use crate::ops::shared::Shared;
use crate::ops::simd::{dot_body, exp, fma, vectorised};

/// Keys of one task; a longer sequence is several tasks whose results are merged in order.
const CHUNK: usize = 1024;
/// Keys whose scores are held at a time.
const TILE: usize = 64;

pub(super) fn forward(threads: &Threads, inputs: &Inputs<'_>, out: &mut [f32], log_sums: &mut [f32]) {
    let (rows, dv) = (inputs.rows(), inputs.dv);
    let heads = inputs.batch * inputs.kv_heads;
    let chunks = inputs.keys.div_ceil(CHUNK).max(1);
    // Of each (head, chunk, row): result before division, maximum, sum.
    let size = dv + 2;
    let mut partial = vec![0.0; heads * chunks * rows * size];
    threads.for_each_chunk(&mut partial, rows * size, |task, parts| {
        let (head, chunk) = (task / chunks, task % chunks);
        one(inputs, head / inputs.kv_heads, head % inputs.kv_heads, chunk * CHUNK, parts);
    });
    let out = Shared::new(out);
    for (at, log_sum) in log_sums.iter_mut().enumerate() {
        let (head, row) = (at / rows, at % rows);
        let to = inputs.result_at(head / inputs.kv_heads, head % inputs.kv_heads, row);
        // SAFETY: one thread, one part alive at a time.
        let to = unsafe { out.part(to, dv) };
        let part = |chunk: usize| &partial[((head * chunks + chunk) * rows + row) * size..][..size];
        // A NaN maximum makes everything NaN, as it should.
        let larger = |m: f32, x: f32| if x <= m { m } else { x };
        let max = (0..chunks).map(|c| part(c)[dv]).fold(f32::NEG_INFINITY, larger);
        let shift = if max == f32::NEG_INFINITY { 0.0 } else { max };
        let mut sum = 0.0;
        for part in (0..chunks).map(part) {
            let factor = (part[dv] - shift).exp();
            sum += part[dv + 1] * factor;
            to.iter_mut().zip(part).for_each(|(to, x)| *to += x * factor);
        }
        if sum != 0.0 {
            to.iter_mut().for_each(|to| *to /= sum);
        }
        *log_sum = max + sum.ln();
    }
}

/// All rows of one key head over the keys from `from` on.
fn one(inputs: &Inputs<'_>, b: usize, kv_head: usize, from: usize, parts: &mut [f32]) {
    let (dk, dv) = (inputs.dk, inputs.dv);
    let (k, k_row) = inputs.k.head(b, kv_head);
    let (v, v_row) = inputs.v.head(b, kv_head);
    let mut queries = vec![0.0; inputs.rows() * dk];
    let mut ranges = Vec::with_capacity(inputs.rows());
    for row in 0..inputs.rows() {
        let (head, t) = inputs.head_and_query(kv_head, row);
        for (to, x) in queries[row * dk..][..dk].iter_mut().zip(inputs.q.row(b, head, t)) {
            *to = x * inputs.shape.scale;
        }
        let (first, end) = inputs.shape.range(b, t, inputs.keys);
        ranges.push((first.max(from), end.min(from + CHUNK)));
    }
    for part in parts.chunks_exact_mut(dv + 2) {
        part[dv] = f32::NEG_INFINITY;
    }
    let first = ranges.iter().map(|r| r.0).min().unwrap_or(0);
    let end = ranges.iter().map(|r| r.1).max().unwrap_or(0);
    for key in (first..end).step_by(TILE) {
        let tile_end = (key + TILE).min(end);
        for ((part, range), q) in parts.chunks_exact_mut(dv + 2).zip(&ranges).zip(queries.chunks_exact(dk)) {
            let (first, end) = (range.0.clamp(key, tile_end), range.1.clamp(key, tile_end));
            if first < end {
                let n = end - first;
                tile(q, &k[first * k_row..], k_row, &v[first * v_row..], v_row, n, part);
            }
        }
    }
}

vectorised! {
    /// One step of the running softmax of one row over `n <= TILE` keys; `part` is (result, maximum, sum).
    fn tile(q: &[f32], k: &[f32], k_row: usize, v: &[f32], v_row: usize, n: usize, part: &mut [f32]) {
        let dk = q.len();
        let dv = part.len() - 2;
        let mut room = [0f32; TILE];
        let scores = &mut room[..n];
        let mut max = part[dv];
        for (key, score) in scores.iter_mut().enumerate() {
            *score = dot_body::<ISA>(q, &k[key * k_row..][..dk]);
            max = if *score <= max { max } else { *score };
        }
        let shift = if max == f32::NEG_INFINITY { 0.0 } else { max };
        let factor = exp::<ISA>(part[dv] - shift);
        let mut sum = 0.0;
        for score in scores.iter_mut() {
            *score = exp::<ISA>(*score - shift);
        }
        for score in scores.iter() {
            sum += *score;
        }
        let (out, state) = part.split_at_mut(dv);
        state[1] = state[1] * factor + sum;
        state[0] = max;
        if factor != 1.0 {
            for x in out.iter_mut() {
                *x *= factor;
            }
        }
        let mut key = 0;
        while key + 4 <= n {
            let row = |i: usize| &v[(key + i) * v_row..][..dv];
            let (a, b, c, d) = (row(0), row(1), row(2), row(3));
            let p = [scores[key], scores[key + 1], scores[key + 2], scores[key + 3]];
            for ((((x, a), b), c), d) in out.iter_mut().zip(a).zip(b).zip(c).zip(d) {
                let first = fma::<ISA>(p[0], *a, *x);
                let second = fma::<ISA>(p[1], *b, first);
                let third = fma::<ISA>(p[2], *c, second);
                *x = fma::<ISA>(p[3], *d, third);
            }
            key += 4;
        }
        for key in key..n {
            for (x, v) in out.iter_mut().zip(&v[key * v_row..][..dv]) {
                *x = fma::<ISA>(scores[key], *v, *x);
            }
        }
    }
}

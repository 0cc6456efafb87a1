//! A dense layer with quantised weights.

use super::activations::{quantise_all, row_bytes};
use super::error::{QuantError, Result, check_len};
use super::isa::Isa;
use super::kernel::TILE_COLS;
use super::matrix::{PANEL_ROWS, Quantised};
use super::product::{CHUNK_ROWS, Chunk, chunks, num_pairs, pair_of, per_task};
use crate::core::scratch;
use crate::threads::{SendPtr, Threads};

/// Fewest rows that columns are shared out for: below that each thread would read the weights for too little.
const LEAST_ROWS: usize = 24;

/// `out = x Wᵀ`: `x` `[M, K]`, `w` `[N, K]`, `out` `[M, N]`, all row-major. Defined by [`super::reference::linear`], to the bit.
///
/// # Errors
/// When a length does not fit the matrix.
pub fn linear(threads: &Threads, x: &[f32], w: Quantised<'_>, out: &mut [f32]) -> Result<()> {
    linear_with(Isa::best(), threads, x, w, out)
}

/// [`linear`] with the instructions of `isa`.
///
/// # Errors
/// When a length does not fit the matrix, or the processor does not have the instructions.
pub fn linear_with(isa: Isa, threads: &Threads, x: &[f32], w: Quantised<'_>, out: &mut [f32]) -> Result<()> {
    let kernels = isa.kernels().ok_or(QuantError::Isa(isa))?;
    let layout = w.layout();
    let (n, k) = (layout.rows(), layout.cols());
    let m = x.len().checked_div(k).unwrap_or(out.len() / n.max(1));
    check_len("x", x.len(), m * k)?;
    check_len("out", out.len(), m * n)?;
    if m == 0 || n == 0 || k == 0 {
        out.fill(0.0);
        return Ok(());
    }
    let (pairs, bytes) = (num_pairs(layout), row_bytes(layout));
    let per_task = per_task(pairs, m.div_ceil(CHUNK_ROWS), 2 * layout.panel_bytes(), threads.count());
    let tasks = pairs.div_ceil(per_task);
    // Few columns for many threads: the rows are divided more finely.
    let wanted = (8 * threads.count()).div_ceil(tasks);
    let rows: Vec<_> = chunks(m, m.div_ceil(wanted).clamp(LEAST_ROWS, CHUNK_ROWS)).collect();
    let target = SendPtr(out.as_mut_ptr());
    scratch::with(m * bytes / size_of::<f32>(), |records| {
        let records = SendPtr(records.as_mut_ptr().cast::<u8>());
        // SAFETY: room for the records of M rows.
        unsafe { quantise_all(threads, kernels, x, layout, records) };
        threads.for_each(rows.len() * tasks, |task| {
            let (rows, first) = (rows[task / tasks].clone(), task % tasks * per_task);
            let chunk = Chunk::new(records.get(), bytes, rows.clone());
            let count = per_task.min(pairs - first);
            let after = pair_of(&w, (first + threads.count() * per_task) % pairs).0;
            let done = |i: usize, c: &[f32]| {
                for (p, from) in pair_of(&w, first + i).1.into_iter().enumerate() {
                    let len = PANEL_ROWS.min(n - from);
                    for (row, c) in rows.clone().zip(c.chunks_exact(TILE_COLS)) {
                        // SAFETY: columns of a row of `[M, N]` which belong to this task alone; `out` is borrowed until
                        // the call ends.
                        let out =
                            unsafe { std::slice::from_raw_parts_mut(target.get().add(row * n + from), len) };
                        out.copy_from_slice(&c[p * PANEL_ROWS..][..len]);
                    }
                }
            };
            // SAFETY: records were written above, panels are those of `w`, and the instructions are there.
            unsafe { chunk.multiply(kernels, layout, count, |i| pair_of(&w, first + i).0, after, done) };
        });
    });
    Ok(())
}

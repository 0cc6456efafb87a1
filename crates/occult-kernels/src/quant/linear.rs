//! A dense layer with quantised weights.

use super::activations::{Blocks, Rows, block_sizes};
use super::error::{QuantError, Result, check_len};
use super::isa::Isa;
use super::kernel::{Panel, Tile, tile};
use super::matrix::{Layout, PANEL_ROWS, Quantised};
use crate::threads::{SendPtr, Threads};

/// Bytes of weights that a task goes over again for every block of rows: they stay in the second-level cache.
const TASK_BYTES: usize = 256 << 10;

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
    check_isa(isa)?;
    let layout = w.layout();
    let (n, k) = (layout.rows(), layout.cols());
    let m = x.len().checked_div(k).unwrap_or(out.len() / n.max(1));
    check_len("x", x.len(), m * k)?;
    check_len("out", out.len(), m * n)?;
    if m == 0 || n == 0 || k == 0 {
        out.fill(0.0);
        return Ok(());
    }
    let rows = Rows::new(threads, isa, x, layout);
    let blocks = Blocks::new(threads, &rows, layout, |r| r, block_sizes(m, isa.max_rows()));
    let pairs = layout.panels().div_ceil(2);
    let per_task = pairs_per_task(layout, pairs, threads.count());
    let tasks = pairs.div_ceil(per_task);
    // Few columns for many threads: the rows are divided as well.
    let row_parts = (8 * threads.count()).div_ceil(tasks).min(blocks.len().div_ceil(4)).max(1);
    let target = SendPtr(out.as_mut_ptr());
    threads.for_each(tasks * row_parts, |task| {
        let (part, task) = (task % row_parts, task / row_parts);
        let mut result = Tile::new();
        for b in blocks.len() * part / row_parts..blocks.len() * (part + 1) / row_parts {
            let block = blocks.block(b);
            for pair in task * per_task..pairs.min((task + 1) * per_task) {
                let (panels, count) = pair_of(&w, pair);
                tile(isa, layout, block, &panels[..count], &mut result);
                let (from, to) = (pair * 2 * PANEL_ROWS, n.min((pair + 1) * 2 * PANEL_ROWS));
                for (i, values) in result.0[..block.rows].iter().enumerate() {
                    let at = (blocks.first_row(b) + i) * n + from;
                    // SAFETY: columns `from..to` of a row of `[M, N]`, which belong to this task and part alone; `out` is
                    // borrowed until the call ends.
                    let out = unsafe { std::slice::from_raw_parts_mut(target.get().add(at), to - from) };
                    out.copy_from_slice(&values[..to - from]);
                }
            }
        }
    });
    Ok(())
}

pub(super) fn check_isa(isa: Isa) -> Result<()> {
    if isa.available() { Ok(()) } else { Err(QuantError::Isa(isa)) }
}

/// How many pairs of panels a task takes: as fit the cache, but enough tasks that threads end together.
pub(super) fn pairs_per_task(layout: &Layout, pairs: usize, threads: usize) -> usize {
    let cached = TASK_BYTES / (2 * layout.panel_bytes()).max(1);
    let balanced = if threads == 1 { pairs } else { pairs / (8 * threads) };
    cached.min(balanced).max(1)
}

/// Panels `2 pair` and `2 pair + 1`, and how many of them there are.
pub(super) fn pair_of<'a>(w: &Quantised<'a>, pair: usize) -> ([Panel<'a>; 2], usize) {
    let first = w.panel(2 * pair);
    if 2 * pair + 1 < w.layout().panels() { ([first, w.panel(2 * pair + 1)], 2) } else { ([first, first], 1) }
}

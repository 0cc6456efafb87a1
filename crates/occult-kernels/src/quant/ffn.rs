//! The expert network over quantised weights: `y[r] += weight * down(silu(gate(x[r])) * up(x[r]))`, experts ascending.

use super::activations::{Blocks, Rows, block_sizes};
use super::error::{QuantError, Result, check_len};
use super::isa::Isa;
use super::kernel::{Tile, tile};
use super::linear::{check_isa, pair_of, pairs_per_task};
use super::matrix::{PANEL_ROWS, Quantised};
use super::silu::swiglu;
use crate::SparseRows;
use crate::threads::{SendPtr, Threads};

/// Most expanded rows that are worked on at once: bounds the memory between the two matmuls.
const BATCH_ROWS: usize = 4096;

/// The matrices of one expert.
#[derive(Debug, Clone, Copy)]
pub struct QuantisedExpert<'a> {
    /// `[F, D]`
    pub gate: Quantised<'a>,
    /// `[F, D]`
    pub up: Quantised<'a>,
    /// `[D, F]`
    pub down: Quantised<'a>,
}

/// Part of a batch: consecutive blocks of rows of one expert.
struct Unit<'a> {
    expert: QuantisedExpert<'a>,
    from_block: usize,
    to_block: usize,
}

/// The experts' network for inference: `x` `[R, D]`, `row_weights` `[N]` (one per expanded row), `y` `[R, D]`, overwritten.
///
/// Rows of `x` are quantised once, the hidden rows once per expert. A row of `y` adds its experts in ascending order,
/// `y + weight * value`; the sums inside are those of [`super::linear()`]. Every expert's matrices are read once per batch of
/// 4,096 expanded rows.
///
/// # Errors
/// When lengths do not fit, or experts differ in shape or format.
pub fn expert_ffn(
    threads: &Threads,
    rows: &SparseRows,
    x: &[f32],
    experts: &[QuantisedExpert<'_>],
    row_weights: &[f32],
    y: &mut [f32],
) -> Result<()> {
    expert_ffn_with(Isa::best(), threads, rows, x, experts, row_weights, y)
}

/// [`expert_ffn`] with the instructions of `isa`.
///
/// # Errors
/// As [`expert_ffn`], and when the processor does not have the instructions.
pub fn expert_ffn_with(
    isa: Isa,
    threads: &Threads,
    rows: &SparseRows,
    x: &[f32],
    experts: &[QuantisedExpert<'_>],
    row_weights: &[f32],
    y: &mut [f32],
) -> Result<()> {
    check_isa(isa)?;
    y.fill(0.0);
    let (d, f) = check(rows, experts)?;
    check_len("x", x.len(), rows.num_rows() * d)?;
    check_len("y", y.len(), rows.num_rows() * d)?;
    check_len("row_weights", row_weights.len(), rows.num_expanded())?;
    let Some(first) = experts.first().filter(|_| d > 0 && f > 0) else { return Ok(()) };
    let inputs = Rows::new(threads, isa, x, first.gate.layout());
    let mut hidden = vec![0.0; rows.num_expanded().min(BATCH_ROWS) * f];
    let mut from = 0;
    while from < rows.num_expanded() {
        let to = rows.num_expanded().min(from + BATCH_ROWS);
        let (units, sizes) = units(isa, rows, experts, from, to);
        let idx = |i: usize| rows.row_idx()[from + i] as usize;
        let hidden = &mut hidden[..(to - from) * f];
        let blocks = Blocks::new(threads, &inputs, first.gate.layout(), idx, sizes.iter().copied());
        up(isa, threads, &units, &blocks, hidden);
        let quantised = Rows::new(threads, isa, hidden, first.down.layout());
        let blocks = Blocks::new(threads, &quantised, first.down.layout(), |i| i, sizes.iter().copied());
        let merge = |i: usize| (idx(i), row_weights[from + i]);
        down(isa, threads, &units, &blocks, merge, y);
        from = to;
    }
    Ok(())
}

/// D and F.
fn check(rows: &SparseRows, experts: &[QuantisedExpert<'_>]) -> Result<(usize, usize)> {
    if rows.num_experts() != experts.len() {
        let message = format!("{} experts for the rows of {}", experts.len(), rows.num_experts());
        return Err(QuantError::Shape(message));
    }
    let Some(first) = experts.first() else { return Ok((0, 0)) };
    let (up, down) = (*first.gate.layout(), *first.down.layout());
    if down.rows() != up.cols() || down.cols() != up.rows() {
        let shape = |l: &super::Layout| format!("[{}, {}]", l.rows(), l.cols());
        return Err(QuantError::Shape(format!("gate {}, down {}", shape(&up), shape(&down))));
    }
    for (i, e) in experts.iter().enumerate() {
        if *e.gate.layout() != up || *e.up.layout() != up || *e.down.layout() != down {
            return Err(QuantError::Shape(format!("expert {i} has other shapes or formats than expert 0")));
        }
    }
    Ok((up.cols(), up.rows()))
}

/// The experts of the expanded rows `from..to`, and the rows of every block.
fn units<'a>(
    isa: Isa,
    rows: &SparseRows,
    experts: &[QuantisedExpert<'a>],
    from: usize,
    to: usize,
) -> (Vec<Unit<'a>>, Vec<usize>) {
    let (mut units, mut sizes) = (Vec::new(), Vec::new());
    for (i, &expert) in experts.iter().enumerate() {
        let range = rows.expanded_of(i);
        let num_rows = range.end.min(to).saturating_sub(range.start.max(from));
        if num_rows > 0 {
            let from_block = sizes.len();
            sizes.extend(block_sizes(num_rows, isa.max_rows()));
            units.push(Unit { expert, from_block, to_block: sizes.len() });
        }
    }
    (units, sizes)
}

/// `hidden` `[rows of the batch, F]` = `silu(gate) * up`.
fn up(isa: Isa, threads: &Threads, units: &[Unit<'_>], blocks: &Blocks, hidden: &mut [f32]) {
    let Some(layout) = units.first().map(|u| *u.expert.gate.layout()) else { return };
    let (f, panels) = (layout.rows(), layout.panels());
    // A pair is a panel of gate and the same panel of up.
    let per_task = pairs_per_task(&layout, panels * units.len(), threads.count()).min(panels);
    let tasks = panels.div_ceil(per_task);
    let target = SendPtr(hidden.as_mut_ptr());
    threads.for_each(tasks * units.len(), |task| {
        let (unit, task) = (&units[task / tasks], task % tasks);
        let mut result = Tile::new();
        for b in unit.from_block..unit.to_block {
            let block = blocks.block(b);
            for p in task * per_task..panels.min((task + 1) * per_task) {
                let pair = [unit.expert.gate.panel(p), unit.expert.up.panel(p)];
                tile(isa, &layout, block, &pair, &mut result);
                swiglu(isa, &mut result, block.rows);
                let (from, to) = (p * PANEL_ROWS, f.min((p + 1) * PANEL_ROWS));
                for (i, values) in result.0[..block.rows].iter().enumerate() {
                    let at = (blocks.first_row(b) + i) * f + from;
                    // SAFETY: columns `from..to` of a row of the unit, which belong to this task alone; `hidden` is
                    // borrowed until the call ends.
                    let out = unsafe { std::slice::from_raw_parts_mut(target.get().add(at), to - from) };
                    out.copy_from_slice(&values[..to - from]);
                }
            }
        }
    });
}

/// Adds `weight * down(hidden)` to the rows of `y`. A task owns columns of `y` and takes the experts in order.
fn down(
    isa: Isa,
    threads: &Threads,
    units: &[Unit<'_>],
    blocks: &Blocks,
    merge: impl Fn(usize) -> (usize, f32) + Sync,
    y: &mut [f32],
) {
    let Some(layout) = units.first().map(|u| *u.expert.down.layout()) else { return };
    let d = layout.rows();
    let pairs = layout.panels().div_ceil(2);
    let per_task = pairs_per_task(&layout, pairs, threads.count());
    let target = SendPtr(y.as_mut_ptr());
    threads.for_each(pairs.div_ceil(per_task), |task| {
        let mut result = Tile::new();
        for unit in units {
            for b in unit.from_block..unit.to_block {
                let block = blocks.block(b);
                for pair in task * per_task..pairs.min((task + 1) * per_task) {
                    let (panels, count) = pair_of(&unit.expert.down, pair);
                    tile(isa, &layout, block, &panels[..count], &mut result);
                    let (from, to) = (pair * 2 * PANEL_ROWS, d.min((pair + 1) * 2 * PANEL_ROWS));
                    for (i, values) in result.0[..block.rows].iter().enumerate() {
                        let (row, weight) = merge(blocks.first_row(b) + i);
                        // SAFETY: columns `from..to` of row `row` < R of `[R, D]`; these columns belong to this task
                        // alone, and `y` is borrowed until the call ends.
                        let y = unsafe {
                            std::slice::from_raw_parts_mut(target.get().add(row * d + from), to - from)
                        };
                        for (y, v) in y.iter_mut().zip(values) {
                            *y += weight * v;
                        }
                    }
                }
            }
        }
    });
}

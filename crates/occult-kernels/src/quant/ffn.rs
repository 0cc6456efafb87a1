//! The expert network over quantised weights: `y[r] += weight * down(silu(gate(x[r])) * up(x[r]))`, experts ascending.

use std::ops::Range;

use super::activations::{Rows, quantise_all, row_bytes};
use super::error::{QuantError, Result, check_len};
use super::isa::Isa;
use super::kernel::{Kernels, Merge};
use super::matrix::{PANEL_ROWS, Quantised};
use super::product::{CHUNK_ROWS, Chunk, Panel, chunks, num_pairs, pair_of, per_task};
use crate::SparseRows;
use crate::core::scratch;
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

/// Some rows of one expert.
struct Unit<'a> {
    expert: QuantisedExpert<'a>,
    /// Expanded rows.
    rows: Range<usize>,
}

impl<'a> Unit<'a> {
    /// A panel of gate and the same panel of up.
    fn pair(&self, i: usize) -> [Panel<'a>; 2] {
        [self.expert.gate.panel(i), self.expert.up.panel(i)]
    }
}

/// The experts' network for inference: `x` `[R, D]`, `row_weights` `[N]` (one per expanded row), `y` `[R, D]`, overwritten.
///
/// Rows of `x` are quantised once, the hidden rows once per expert. A row of `y` adds its experts in ascending order,
/// `y + weight * value`; the sums inside are those of [`super::linear()`]. Every expert's matrices are read once per batch of
/// 4,096 expanded rows. Defined by [`super::reference::expert_ffn`], to the bit.
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
    let kernels = isa.kernels().ok_or(QuantError::Isa(isa))?;
    let (d, f) = check(rows, experts)?;
    check_len("x", x.len(), rows.num_rows() * d)?;
    check_len("y", y.len(), rows.num_rows() * d)?;
    check_len("row_weights", row_weights.len(), rows.num_expanded())?;
    threads.for_each_chunk(y, 1 << 16, |_, y| y.fill(0.0));
    let Some(first) = experts.first().filter(|_| d > 0 && f > 0) else { return Ok(()) };
    let layouts = (first.gate.layout(), first.down.layout());
    let (x_bytes, hidden_bytes) = (row_bytes(layouts.0), row_bytes(layouts.1));
    let batch = rows.num_expanded().min(BATCH_ROWS);
    let bytes = (rows.num_rows() * x_bytes).next_multiple_of(64) + batch * hidden_bytes;
    scratch::with(bytes / size_of::<f32>(), |memory| {
        let records = SendPtr(memory.as_mut_ptr().cast::<u8>());
        // SAFETY: room for the records of R rows, and behind them for those of a batch.
        let hidden = unsafe {
            quantise_all(threads, kernels, x, layouts.0, records);
            SendPtr(records.get().add((rows.num_rows() * x_bytes).next_multiple_of(64)))
        };
        let network =
            Network { kernels, threads, rows, x: records, hidden, row_weights, y: SendPtr(y.as_mut_ptr()) };
        for from in (0..rows.num_expanded()).step_by(BATCH_ROWS) {
            let units = units(rows, experts, from..rows.num_expanded().min(from + BATCH_ROWS));
            // SAFETY: the records have room as said above, `y` is `[R, D]` and borrowed until this function ends.
            unsafe {
                network.up(&units, from);
                network.down(&units, from);
            }
        }
    });
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

/// The experts of these expanded rows; one with many rows is several units.
fn units<'a>(rows: &SparseRows, experts: &[QuantisedExpert<'a>], batch: Range<usize>) -> Vec<Unit<'a>> {
    let of = |(i, &expert): (usize, &QuantisedExpert<'a>)| {
        let all = rows.expanded_of(i);
        let (from, to) = (all.start.max(batch.start), all.end.min(batch.end));
        chunks(to.saturating_sub(from), CHUNK_ROWS)
            .map(move |rows| Unit { expert, rows: from + rows.start..from + rows.end })
    };
    experts.iter().enumerate().flat_map(of).collect()
}

/// What both matmuls work on.
struct Network<'a> {
    kernels: &'static Kernels,
    threads: &'a Threads,
    rows: &'a SparseRows,
    /// Records of the R rows.
    x: SendPtr<u8>,
    /// Records of the hidden rows of a batch.
    hidden: SendPtr<u8>,
    row_weights: &'a [f32],
    y: SendPtr<f32>,
}

impl Network<'_> {
    /// `hidden = silu(gate x) * up x`, quantised. `batch`: first expanded row of the batch.
    ///
    /// # Safety
    /// The records of x are written, and there is room for those of the batch.
    unsafe fn up(&self, units: &[Unit<'_>], batch: usize) {
        let Some(first) = units.first().map(|unit| unit.expert) else { return };
        let (layout, hidden) = (first.gate.layout(), first.down.layout());
        let (x_bytes, hidden_bytes, group) = (row_bytes(layout), row_bytes(hidden), hidden.group());
        // A pair is a panel of gate and the same panel of up; so many make a group of hidden columns.
        let in_group = group / PANEL_ROWS;
        let per_task =
            per_task(hidden.groups(), units.len(), 2 * in_group * layout.panel_bytes(), self.threads.count());
        let tasks = hidden.groups().div_ceil(per_task);
        self.threads.for_each(tasks * units.len(), |task| {
            let place = |task: usize| (&units[task / tasks], task % tasks * per_task);
            let (unit, first_group) = place(task);
            let (next_unit, next_group) = place((task + self.threads.count()) % (tasks * units.len()));
            let pairs = first_group * in_group..layout.panels().min((first_group + per_task) * in_group);
            let idx = self.rows.row_idx()[unit.rows.clone()].iter().map(|&row| row as usize);
            let chunk = Chunk::new(self.x.get(), x_bytes, idx);
            scratch::with(unit.rows.len() * group, |values| {
                let values = values.as_mut_ptr();
                let done = |i: usize, c: &[f32]| {
                    let panel = pairs.start + i;
                    let (g, place) = (panel / in_group, panel % in_group);
                    // SAFETY: `values` has a group of columns for every row of the unit, and `c` is those rows; once a
                    // group is whole its records, which are this task's alone, are written.
                    unsafe {
                        let to = values.add(place * PANEL_ROWS);
                        (self.kernels.swiglu)(c.as_ptr(), unit.rows.len(), to, group);
                        if place + 1 == in_group || panel + 1 == pairs.end {
                            let from = Rows {
                                x: values,
                                stride: group,
                                rows: unit.rows.len(),
                                cols: group.min(hidden.cols() - g * group),
                                group,
                                to_stride: hidden_bytes,
                            };
                            let row = (unit.rows.start - batch) * hidden_bytes;
                            let to = self.hidden.get().add(row + g * (hidden_bytes / hidden.groups()));
                            (self.kernels.quantise)(&from, to);
                        }
                    }
                };
                let after = next_unit.pair(next_group * in_group);
                // SAFETY: the caller's promise, and panels of matrices of this layout.
                unsafe {
                    chunk.multiply(
                        self.kernels,
                        layout,
                        pairs.len(),
                        |i| unit.pair(pairs.start + i),
                        after,
                        done,
                    );
                }
            });
        });
    }

    /// Adds `weight * down(hidden)` to the rows of `y`. A task owns columns of `y` and takes the experts in order.
    ///
    /// # Safety
    /// The records of the batch are written, and `y` is `[R, D]` that nobody else touches.
    unsafe fn down(&self, units: &[Unit<'_>], batch: usize) {
        let Some(layout) = units.first().map(|unit| *unit.expert.down.layout()) else { return };
        let (d, bytes, pairs) = (layout.rows(), row_bytes(&layout), num_pairs(&layout));
        // A task goes over all units: more and shorter ones.
        let per_task = per_task(pairs, 1, 2 * layout.panel_bytes(), 2 * self.threads.count());
        self.threads.for_each(pairs.div_ceil(per_task), |task| {
            let first = task * per_task;
            let count = per_task.min(pairs - first);
            for (u, unit) in units.iter().enumerate() {
                let chunk =
                    Chunk::new(self.hidden.get(), bytes, unit.rows.start - batch..unit.rows.end - batch);
                let down = &unit.expert.down;
                let done = |i: usize, c: &[f32]| {
                    for (p, col) in pair_of(down, first + i).1.into_iter().enumerate() {
                        let to = Merge {
                            rows: &self.rows.row_idx()[unit.rows.clone()],
                            weights: &self.row_weights[unit.rows.clone()],
                            y: self.y.get(),
                            stride: d,
                            col,
                            cols: PANEL_ROWS.min(d - col),
                        };
                        // SAFETY: rows below R of `[R, D]` and columns that belong to this task alone.
                        unsafe { (self.kernels.merge)(c[p * PANEL_ROWS..].as_ptr(), &to) };
                    }
                };
                let after = units.get(u + 1).unwrap_or(unit).expert.down;
                // SAFETY: the caller's promise, and panels of a matrix of this layout.
                unsafe {
                    let after = pair_of(&after, first).0;
                    chunk.multiply(self.kernels, &layout, count, |i| pair_of(down, first + i).0, after, done);
                }
            }
        });
    }
}

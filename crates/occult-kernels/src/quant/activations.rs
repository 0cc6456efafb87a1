//! Activations in 8 bits. A row of them is a *record* for each group: the scale (f32), -128 times the sum of the levels
//! (i32: takes the 128 of the weights out again), the levels (i8, the last group padded with zeros).

use super::kernel::Kernels;
use super::matrix::{Layout, ZERO_POINT};
use super::reference::SMALLEST;
use crate::threads::{SendPtr, Threads, input};

/// 1.5 * 2^23: added to a small float it leaves the nearest whole number (ties to even) in the low bits.
const TO_WHOLE: f32 = 12_582_912.0;

/// Bytes of a record before its levels.
pub(super) const HEAD: usize = 8;

/// Bytes of a row of records for weights of this layout.
pub(super) fn row_bytes(layout: &Layout) -> usize {
    layout.groups() * (HEAD + layout.group())
}

/// Rows of floats and where their records go.
pub(super) struct Rows {
    pub(super) x: *const f32,
    /// Distance of two rows of `x`.
    pub(super) stride: usize,
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) group: usize,
    /// Bytes from one row of records to the next.
    pub(super) to_stride: usize,
}

/// Quantises one group, `levels` at least as long as `x`; the rest becomes zero. Gives the scale and the sum of the levels.
/// Same results as [`super::reference::quantise_group`].
#[inline(always)]
fn group(x: &[f32], levels: &mut [i8]) -> (f32, i32) {
    // Magnitudes compare like their bits, and NaN is above infinity.
    let max = f32::from_bits(x.iter().fold(0, |m, v| m.max(v.to_bits() & 0x7fff_ffff)));
    let (used, rest) = levels.split_at_mut(x.len());
    rest.fill(0);
    if !max.is_finite() || max < SMALLEST {
        used.fill(0);
        return (if max.is_finite() { 0.0 } else { f32::NAN }, 0);
    }
    let inverse = 127.0 / max;
    let mut sum = 0;
    for (q, v) in used.iter_mut().zip(x) {
        let level = (v * inverse + TO_WHOLE).to_bits() as i32 - TO_WHOLE.to_bits() as i32;
        *q = level as i8;
        sum += level;
    }
    (max * (1.0 / 127.0), sum)
}

/// # Safety
/// `from` describes valid memory, `to` has room for the records and starts at a multiple of 4 bytes.
#[inline(always)]
pub(super) unsafe fn quantise(from: &Rows, to: *mut u8) {
    for row in 0..from.rows {
        // SAFETY: the caller's promise.
        let (x, to) = unsafe {
            (
                std::slice::from_raw_parts(from.x.add(row * from.stride), from.cols),
                to.add(row * from.to_stride),
            )
        };
        for (g, x) in x.chunks(from.group).enumerate() {
            // SAFETY: a record of this row.
            let (record, levels) = unsafe {
                let record = to.add(g * (HEAD + from.group));
                (record, std::slice::from_raw_parts_mut(record.add(HEAD).cast::<i8>(), from.group))
            };
            // Whole groups of known size become straight vector code.
            let (scale, sum) = match x.len() {
                32 if levels.len() == 32 => group(&x[..32], &mut levels[..32]),
                64 if levels.len() == 64 => group(&x[..64], &mut levels[..64]),
                _ => group(x, levels),
            };
            // SAFETY: the head of the record, at a multiple of 4 bytes: records are as long as that.
            unsafe {
                record.cast::<f32>().write(scale);
                record.add(4).cast::<i32>().write(-ZERO_POINT * sum);
            }
        }
    }
}

/// Quantises `x` `[R, K]` for weights of this layout.
///
/// # Safety
/// `to` has room for R rows of records and starts at a multiple of 4 bytes.
pub(super) unsafe fn quantise_all(
    threads: &Threads,
    kernels: &Kernels,
    x: &[f32],
    layout: &Layout,
    to: SendPtr<u8>,
) {
    const ROWS: usize = 8;
    let (cols, to_stride) = (layout.cols(), row_bytes(layout));
    let (x, num_rows) = (input(x), x.len() / cols);
    threads.for_each(num_rows.div_ceil(ROWS), |task| {
        let first = task * ROWS;
        // SAFETY: rows of `x`, and records that this task alone writes; the instructions are there because `kernels` is.
        unsafe {
            let x = x.get().add(first * cols).cast_const();
            let rows = ROWS.min(num_rows - first);
            let from = Rows { x, stride: cols, rows, cols, group: layout.group(), to_stride };
            (kernels.quantise)(&from, to.get().add(first * to_stride));
        }
    });
}

//! Activations in 8 bits: quantised row by row, then interleaved for the kernels.

use super::isa::Isa;
use super::kernel::Block;
use super::matrix::{Layout, ZERO_POINT};
use super::reference::SMALLEST;
use crate::threads::{SendPtr, Threads};

/// 1.5 * 2^23: added to a small float it leaves the nearest whole number (ties to even) in the low bits.
const TO_WHOLE: f32 = 12_582_912.0;

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

#[inline(always)]
fn row(x: &[f32], group_cols: usize, levels: &mut [i8], mut out: impl FnMut(usize, f32, i32)) {
    let groups = x.chunks(group_cols).zip(levels.chunks_exact_mut(group_cols));
    for (g, (x, levels)) in groups.enumerate() {
        // Whole groups of known size become straight vector code.
        let (scale, sum) = match x.len() {
            32 if levels.len() == 32 => group(&x[..32], &mut levels[..32]),
            64 if levels.len() == 64 => group(&x[..64], &mut levels[..64]),
            _ => group(x, levels),
        };
        out(g, scale, -ZERO_POINT * sum);
    }
}

/// Rows of activations, `[R, K']` levels and `[R, G]` scales and starts.
#[derive(Debug, Default)]
pub(super) struct Rows {
    levels: Vec<i8>,
    scales: Vec<f32>,
    starts: Vec<i32>,
}

/// One row into its parts of [`Rows`].
#[inline(always)]
fn row_of(x: &[f32], group_cols: usize, levels: &mut [i8], scales: &mut [f32], starts: &mut [i32]) {
    row(x, group_cols, levels, |g, scale, start| (scales[g], starts[g]) = (scale, start));
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
fn row_avx512(x: &[f32], group_cols: usize, levels: &mut [i8], scales: &mut [f32], starts: &mut [i32]) {
    row_of(x, group_cols, levels, scales, starts);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn row_avx2(x: &[f32], group_cols: usize, levels: &mut [i8], scales: &mut [f32], starts: &mut [i32]) {
    row_of(x, group_cols, levels, scales, starts);
}

/// Quantises a row, `[K]` to levels `[K']`, scales and starts `[G]`.
fn quantise_row(
    isa: Isa,
    x: &[f32],
    group: usize,
    levels: &mut [i8],
    scales: &mut [f32],
    starts: &mut [i32],
) {
    match isa {
        // SAFETY: the drivers of this module only use instruction sets that are available.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512Vnni => unsafe { row_avx512(x, group, levels, scales, starts) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::AvxVnni | Isa::Avx2 => unsafe { row_avx2(x, group, levels, scales, starts) },
        _ => row_of(x, group, levels, scales, starts),
    }
}

impl Rows {
    /// Quantises `x` `[R, K]` for weights of this layout.
    pub(super) fn new(threads: &Threads, isa: Isa, x: &[f32], layout: &Layout) -> Self {
        let (k, padded, groups) = (layout.cols(), layout.padded_cols(), layout.groups());
        let rows = x.len().checked_div(k).unwrap_or(0);
        let mut this = Self {
            levels: vec![0; rows * padded],
            scales: vec![0.0; rows * groups],
            starts: vec![0; rows * groups],
        };
        let (levels, scales, starts) = (
            SendPtr(this.levels.as_mut_ptr()),
            SendPtr(this.scales.as_mut_ptr()),
            SendPtr(this.starts.as_mut_ptr()),
        );
        const ROWS: usize = 8;
        threads.for_each(rows.div_ceil(ROWS), |task| {
            for r in task * ROWS..rows.min((task + 1) * ROWS) {
                // SAFETY: the parts of row `r`, which this task alone writes; the vectors outlive the call.
                let (levels, scales, starts) = unsafe {
                    (
                        std::slice::from_raw_parts_mut(levels.get().add(r * padded), padded),
                        std::slice::from_raw_parts_mut(scales.get().add(r * groups), groups),
                        std::slice::from_raw_parts_mut(starts.get().add(r * groups), groups),
                    )
                };
                quantise_row(isa, &x[r * k..][..k], layout.group(), levels, scales, starts);
            }
        });
        this
    }
}

/// How many rows each block of `rows` gets: as equal as possible, at most `max`.
pub(super) fn block_sizes(rows: usize, max: usize) -> impl Iterator<Item = usize> {
    let blocks = rows.div_ceil(max);
    (0..blocks).map(move |b| rows / blocks + usize::from(b < rows % blocks))
}

/// Blocks of interleaved rows, ready for the kernels.
#[derive(Debug)]
pub(super) struct Blocks {
    padded: usize,
    groups: usize,
    /// First row of every block, and the number of rows.
    firsts: Vec<usize>,
    levels: Vec<i8>,
    scales: Vec<f32>,
    starts: Vec<i32>,
}

impl Blocks {
    /// `row_idx` are the rows to take, `sizes` how many go into each block.
    pub(super) fn new(
        threads: &Threads,
        rows: &Rows,
        layout: &Layout,
        row_idx: impl Fn(usize) -> usize + Sync,
        sizes: impl Iterator<Item = usize>,
    ) -> Self {
        let (padded, groups) = (layout.padded_cols(), layout.groups());
        let mut firsts = vec![0];
        firsts.extend(sizes.scan(0, |sum, size| {
            *sum += size;
            Some(*sum)
        }));
        let total = firsts.last().copied().unwrap_or(0);
        let mut this = Self {
            padded,
            groups,
            firsts,
            levels: vec![0; total * padded],
            scales: vec![0.0; total * groups],
            starts: vec![0; total * groups],
        };
        let (levels, scales, starts) = (
            SendPtr(this.levels.as_mut_ptr()),
            SendPtr(this.scales.as_mut_ptr()),
            SendPtr(this.starts.as_mut_ptr()),
        );
        let firsts = &this.firsts;
        threads.for_each(firsts.len() - 1, |b| {
            let (first, size) = (firsts[b], firsts[b + 1] - firsts[b]);
            // SAFETY: the parts of block `b`, which this task alone writes; the vectors outlive the call.
            let (levels, scales, starts) = unsafe {
                (
                    std::slice::from_raw_parts_mut(levels.get().add(first * padded), size * padded),
                    std::slice::from_raw_parts_mut(scales.get().add(first * groups), size * groups),
                    std::slice::from_raw_parts_mut(starts.get().add(first * groups), size * groups),
                )
            };
            for m in 0..size {
                let r = row_idx(first + m);
                let source = rows.levels[r * padded..][..padded].chunks_exact(4);
                for (to, from) in levels.chunks_exact_mut(4 * size).zip(source) {
                    to[4 * m..4 * m + 4].copy_from_slice(from);
                }
                for g in 0..groups {
                    scales[g * size + m] = rows.scales[r * groups + g];
                    starts[g * size + m] = rows.starts[r * groups + g];
                }
            }
        });
        this
    }

    /// Number of blocks.
    pub(super) fn len(&self) -> usize {
        self.firsts.len() - 1
    }

    /// The first row of a block.
    pub(super) fn first_row(&self, b: usize) -> usize {
        self.firsts[b]
    }

    pub(super) fn block(&self, b: usize) -> Block<'_> {
        let (first, rows) = (self.firsts[b], self.firsts[b + 1] - self.firsts[b]);
        Block {
            rows,
            levels: &self.levels[first * self.padded..][..rows * self.padded],
            scales: &self.scales[first * self.groups..][..rows * self.groups],
            starts: &self.starts[first * self.groups..][..rows * self.groups],
        }
    }
}

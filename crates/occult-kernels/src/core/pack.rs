//! Packing of B panels: widening, and transposing where the weight is stored the other way round; and of A panels that are
//! stored by steps.

use crate::simd::{Simd, Stored};

/// Where a B panel comes from.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Panel<T> {
    /// First value.
    pub(crate) from: *const T,
    /// Distance of two stored rows.
    pub(crate) stride: usize,
    /// Columns of the panel that exist; the rest becomes 0.
    pub(crate) cols: usize,
    /// Steps of k.
    pub(crate) k: usize,
}

/// `to[s, j] = from[j * stride + s]`: a panel `[k, NV * LANES]` of a weight stored `[out, in]`.
///
/// # Safety
/// As [`Simd`]; `panel` describes valid memory and `to` has room for the panel.
#[inline(always)]
pub(super) unsafe fn transposed<S: Simd, T: Stored, const NV: usize>(panel: &Panel<T>, to: *mut f32) {
    let (width, whole) = (NV * S::LANES, panel.k - panel.k % S::LANES);
    for group in 0..NV {
        let first = group * S::LANES;
        let cols = panel.cols.saturating_sub(first).min(S::LANES);
        // SAFETY: the caller's promise; full groups of columns and steps are read as vectors, the rest one by one.
        unsafe {
            let (from, to) = (panel.from.wrapping_add(first * panel.stride), to.add(first));
            let mut done = 0;
            if cols == S::LANES {
                while done < whole {
                    let at = from.add(done);
                    S::transpose(|j| T::load::<S>(at.add(j * panel.stride)), to.add(done * width), width);
                    done += S::LANES;
                }
            }
            for j in 0..S::LANES {
                for step in done..panel.k {
                    *to.add(step * width + j) =
                        if j < cols { (*from.add(j * panel.stride + step)).widen() } else { 0.0 };
                }
            }
        }
    }
}

/// `to[s, j] = from[idx(s) * stride + j]`: a panel `[k, NV * LANES]` of rows, gathered through `idx` unless it is null.
///
/// # Safety
/// As [`Simd`]; `panel` and `idx` describe valid memory and `to` has room for the panel.
#[inline(always)]
pub(super) unsafe fn plain<S: Simd, T: Stored, const NV: usize>(
    panel: &Panel<T>,
    idx: *const u32,
    to: *mut f32,
) {
    let width = NV * S::LANES;
    // SAFETY: the caller's promise.
    unsafe {
        for step in 0..panel.k {
            let row = if idx.is_null() { step } else { *idx.add(step) as usize };
            let (from, to) = (panel.from.add(row * panel.stride), to.add(step * width));
            if panel.cols == width {
                for j in 0..NV {
                    S::store(to.add(j * S::LANES), T::load::<S>(from.add(j * S::LANES)));
                }
            } else {
                for j in 0..width {
                    *to.add(j) = if j < panel.cols { (*from.add(j)).widen() } else { 0.0 };
                }
            }
        }
    }
}

/// Where A panels come from whose stored rows are steps.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Steps<'a> {
    /// First value of the first step.
    pub(crate) from: *const f32,
    /// Distance of two stored rows.
    pub(crate) stride: usize,
    /// Stored rows by number, or null.
    pub(crate) idx: *const u32,
    /// Steps of k.
    pub(crate) k: usize,
    /// First row of each panel, ascending.
    pub(crate) firsts: &'a [usize],
}

/// Steps that are asked for ahead: stored rows lie apart, where no hardware looks for them.
const AHEAD: usize = 8;

/// `to[p * distance + s * LEN + i] = from[idx(s) * stride + firsts[p] + i]` for `i < LEN`, a multiple of the lanes: all panels
/// step by step, because the cache lines they share may evict each other from one step to another.
///
/// # Safety
/// As [`Simd`]; each `firsts[p] + LEN` is at most the length of a stored row, with the `k` rows that are there (through
/// `idx`, if that is not null), and `to` has room for `k * LEN` values of each panel.
#[inline(always)]
pub(super) unsafe fn steps<S: Simd, const LEN: usize>(steps: &Steps<'_>, to: *mut f32, distance: usize) {
    let (Some(&first), Some(&last)) = (steps.firsts.first(), steps.firsts.last()) else { return };
    // SAFETY: the caller's promise.
    unsafe {
        let row = |step: usize| {
            let row = if steps.idx.is_null() { step } else { *steps.idx.add(step) as usize };
            steps.from.add(row * steps.stride)
        };
        for step in 0..steps.k {
            let ahead = row((step + AHEAD).min(steps.k - 1));
            for line in (first..last + LEN).step_by(16) {
                S::prefetch(ahead.wrapping_add(line));
            }
            let from = row(step);
            for (panel, &first) in steps.firsts.iter().enumerate() {
                let to = to.add(panel * distance + step * LEN);
                for i in (0..LEN).step_by(S::LANES) {
                    S::store(to.add(i), S::load(from.add(first + i)));
                }
            }
        }
    }
}

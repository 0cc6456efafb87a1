//! Packing of B panels: widening, and transposing where the weight is stored the other way round.

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

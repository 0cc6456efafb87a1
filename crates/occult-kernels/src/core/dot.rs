//! Products with few rows: weights are read once, as they are stored, at the speed of memory.

use crate::simd::{Simd, Stored};

/// Weight rows times x rows, a block of dot products at a time.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Dot<T> {
    /// Length of the dot products.
    pub(crate) k: usize,
    /// First weight row.
    pub(crate) w: *const T,
    /// Distance of two weight rows.
    pub(crate) stride: usize,
    /// Weight rows.
    pub(crate) cols: usize,
    /// x rows.
    pub(crate) x: *const *const f32,
    /// For each x row where its results go: `cols` consecutive values.
    pub(crate) out: *const *mut f32,
    /// Adds to the results instead of overwriting them.
    pub(crate) add: bool,
}

/// All dot products of `WR` weight rows with `XR` x rows. Lanes are added up in ascending k, then summed, then the rest
/// of k that does not fill a vector is added in ascending order.
#[inline(always)]
unsafe fn block<S: Simd, T: Stored, const WR: usize, const XR: usize>(dot: &Dot<T>, col: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        let w = dot.w.add(col * dot.stride);
        let mut acc = [[S::splat(0.0); WR]; XR];
        let whole = dot.k - dot.k % S::LANES;
        let mut step = 0;
        while step < whole {
            let mut weights = [S::splat(0.0); WR];
            for (j, weight) in weights.iter_mut().enumerate() {
                let at = w.add(j * dot.stride + step);
                *weight = T::load::<S>(at);
                // The same place of the next block, so that memory never waits for the end of a row.
                S::prefetch(at.wrapping_add(WR * dot.stride).cast());
            }
            for (i, acc) in acc.iter_mut().enumerate() {
                let x = S::load((*dot.x.add(i)).add(step));
                for j in 0..WR {
                    acc[j] = S::mul_add(x, weights[j], acc[j]);
                }
            }
            step += S::LANES;
        }
        for (i, acc) in acc.iter().enumerate() {
            let (x, out) = (*dot.x.add(i), (*dot.out.add(i)).add(col));
            for (j, &acc) in acc.iter().enumerate() {
                let mut sum = S::sum(acc);
                for step in whole..dot.k {
                    sum += *x.add(step) * (*w.add(j * dot.stride + step)).widen();
                }
                let to = out.add(j);
                *to = if dot.add { *to + sum } else { sum };
            }
        }
    }
}

/// [`Dot`] for `XR` x rows.
///
/// # Safety
/// As [`Simd`]; `dot` describes valid memory with `XR` x rows, and nobody else writes the results.
#[inline(always)]
pub(super) unsafe fn rows<S: Simd, T: Stored, const WR: usize, const XR: usize>(dot: &Dot<T>) {
    let whole = dot.cols - dot.cols % WR;
    let mut col = 0;
    // SAFETY: the caller's promise.
    unsafe {
        while col < whole {
            block::<S, T, WR, XR>(dot, col);
            col += WR;
        }
        while col < dot.cols {
            block::<S, T, 1, XR>(dot, col);
            col += 1;
        }
    }
}

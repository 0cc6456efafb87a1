//! Products with few rows: weights are read as they are stored, from memory once.

use crate::simd::{Simd, Stored};

/// Bytes of a cache line.
const LINE: usize = 64;

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
    /// Weight rows that will most likely be asked for after these, so that memory is asked for them meanwhile; need not
    /// be valid.
    pub(crate) next: *const T,
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
        let line = (LINE / size_of::<T>()).max(S::LANES);
        // The same place of the next block, so that memory never waits for the end of a row.
        let next = if col + WR < dot.cols { w.wrapping_add(WR * dot.stride) } else { dot.next };
        while step < whole {
            // Each line once, into the second-level cache: the first would have too few places for what is under way.
            if step % line == 0 {
                for j in 0..WR {
                    S::prefetch_far(next.wrapping_add(j * dot.stride + step).cast());
                }
            }
            let mut weights = [S::splat(0.0); WR];
            for (j, weight) in weights.iter_mut().enumerate() {
                *weight = T::load::<S>(w.add(j * dot.stride + step));
            }
            for (i, acc) in acc.iter_mut().enumerate() {
                let x = S::load((*dot.x.add(i)).add(step));
                for j in 0..WR {
                    acc[j] = S::mul_add(x, weights[j], acc[j]);
                }
            }
            step += S::LANES;
        }
        // A loop of its own with nothing else in it: so that it is unrolled and the accumulators stay in registers.
        let mut sums = [[0.0; WR]; XR];
        for (sums, acc) in sums.iter_mut().zip(&acc) {
            let (fours, rest) = acc.as_chunks::<4>();
            let (to_fours, to_rest) = sums.as_chunks_mut::<4>();
            for (sums, &acc) in to_fours.iter_mut().zip(fours) {
                *sums = S::sum4(acc);
            }
            // In the same order as four at once: every column gives the same bits.
            for (sum, &acc) in to_rest.iter_mut().zip(rest) {
                let nothing = S::splat(0.0);
                *sum = S::sum4([acc, nothing, nothing, nothing])[0];
            }
        }
        for (i, sums) in sums.iter().enumerate() {
            let (x, out) = (*dot.x.add(i), (*dot.out.add(i)).add(col));
            for (j, &sum) in sums.iter().enumerate() {
                let rest = (whole..dot.k)
                    .fold(sum, |sum, step| sum + *x.add(step) * (*w.add(j * dot.stride + step)).widen());
                let to = out.add(j);
                *to = if dot.add { *to + rest } else { rest };
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

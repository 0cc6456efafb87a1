//! `y = x Wᵀ` with f32 rows and weights in their stored format.
//!
//! Accumulation is f32; 16-bit weights are widened (exactly) a block of rows at a time, so no copy of a whole matrix is
//! made. The sum over columns is in the order of the GEMM library's kernels and does not depend on the number of threads.

use gemm::{Parallelism, gemm};
use rayon::prelude::*;

use crate::weight::Values;

/// Who shares the work of one product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Threads {
    /// The calling thread alone; the caller is parallel.
    One,
    /// All threads, by blocks of output columns.
    All,
}

/// Rows of `W` that are widened and multiplied at a time. The GEMM library packs `x` once per block: few rows of `x` want
/// small blocks (more threads, a panel that stays in cache), many rows want large ones.
fn block_rows(m: usize) -> usize {
    if m <= 8 { 64 } else { 256 }
}

/// `x` `[m, k]`, `w` `[n, k]` starting at value `w_from`, result `[m, n]`.
pub(crate) fn matmul_nt(
    x: &[f32],
    w: Values<'_>,
    w_from: usize,
    dims: (usize, usize, usize),
    threads: Threads,
) -> Vec<f32> {
    let (m, n, k) = dims;
    assert_eq!(x.len(), m * k, "rows of the left side");
    let mut out = vec![0.0; m * n];
    if out.is_empty() || k == 0 {
        return out;
    }
    let shared = Output(out.as_mut_ptr());
    let size = block_rows(m);
    let block = |b: usize| {
        let (from, to) = (b * size, ((b + 1) * size).min(n));
        let mut panel = Vec::new();
        let w: &[f32] = match w {
            Values::F32(w) => &w[w_from + from * k..w_from + to * k],
            _ => {
                panel.resize((to - from) * k, 0.0);
                w.widen(w_from + from * k, &mut panel);
                &panel
            }
        };
        // SAFETY: this closure runs once per block; blocks are disjoint ranges of columns within `[m, n]`, so no two
        // threads get the same element, and `out` outlives the loop.
        unsafe { product(x, w, (m, to - from, k), shared.at(from), n) };
    };
    let blocks = n.div_ceil(size);
    if threads == Threads::One || blocks == 1 {
        (0..blocks).for_each(block);
    } else {
        (0..blocks).into_par_iter().for_each(block);
    }
    out
}

/// Start of an output that several threads fill in disjoint parts.
#[derive(Clone, Copy)]
struct Output(*mut f32);

impl Output {
    /// Address of column `from` of the first row.
    fn at(&self, from: usize) -> *mut f32 {
        self.0.wrapping_add(from)
    }
}

// SAFETY: the pointer is only used by `matmul_nt`, which gives every thread its own columns.
unsafe impl Send for Output {}
// SAFETY: as above.
unsafe impl Sync for Output {}

/// Writes `x wᵀ` into `m` rows of `n` columns at `out`, rows `stride` values apart.
///
/// # Safety
/// `out` must be valid for writing `n` values at `stride * i` for every `i < m`, and nobody else may use them meanwhile.
unsafe fn product(x: &[f32], w: &[f32], dims: (usize, usize, usize), out: *mut f32, stride: usize) {
    let (m, n, k) = dims;
    assert!(x.len() >= m * k && w.len() >= n * k, "sides of the product");
    // SAFETY: both sides were just checked against the dimensions and strides given here; `out` is the caller's promise.
    // The result is written, not read (`read_dst` false).
    unsafe {
        gemm(
            m,
            n,
            k,
            out,
            1,
            stride as isize,
            false,
            x.as_ptr(),
            1,
            k as isize,
            w.as_ptr(),
            k as isize,
            1,
            0.0f32,
            1.0f32,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}

/// `silu(gate) * up` into `gate`.
pub(crate) fn silu(gate: &mut [f32], up: &[f32]) {
    for (g, u) in gate.iter_mut().zip(up) {
        *g = *g / (1.0 + (-*g).exp()) * u;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::{bf16, f16};

    /// The definition, in f64.
    fn reference(x: &[f32], w: &[f32], (m, n, k): (usize, usize, usize)) -> Vec<f64> {
        let dot =
            |i: usize, j: usize| (0..k).map(|c| f64::from(x[i * k + c]) * f64::from(w[j * k + c])).sum();
        (0..m * n).map(|o| dot(o / n, o % n)).collect()
    }

    #[test]
    fn products_of_all_formats_match_the_definition() {
        let value = |i: usize| ((i * 7919) % 1009) as f32 / 504.0 - 1.0;
        for dims in [(1, 1, 1), (1, 64, 32), (3, 65, 17), (5, 200, 96), (40, 130, 64), (9, 515, 33)] {
            let (m, n, k) = dims;
            let x: Vec<f32> = (0..m * k).map(value).collect();
            let w: Vec<f32> = (0..n * k).map(|i| bf16::from_f32(value(i + 5)).to_f32()).collect();
            let w16: Vec<bf16> = w.iter().map(|&v| bf16::from_f32(v)).collect();
            let h: Vec<f16> = w.iter().map(|&v| f16::from_f32(v)).collect();
            let wide: Vec<f32> = h.iter().map(|v| v.to_f32()).collect();
            for threads in [Threads::One, Threads::All] {
                for (values, exact) in
                    [(Values::F32(&w), &w), (Values::Bf16(&w16), &w), (Values::F16(&h), &wide)]
                {
                    let want = reference(&x, exact, dims);
                    let got = matmul_nt(&x, values, 0, dims, threads);
                    for (g, w) in got.iter().zip(&want) {
                        assert!((f64::from(*g) - w).abs() < 1e-4, "{dims:?}: {g} for {w}");
                    }
                }
            }
        }
    }

    #[test]
    fn threads_do_not_change_a_bit() {
        let x: Vec<f32> = (0..7 * 96).map(|i| (i as f32 * 0.37).sin()).collect();
        let w: Vec<f32> = (0..300 * 96).map(|i| (i as f32 * 0.11).cos()).collect();
        let dims = (7, 300, 96);
        assert_eq!(
            matmul_nt(&x, Values::F32(&w), 0, dims, Threads::One),
            matmul_nt(&x, Values::F32(&w), 0, dims, Threads::All)
        );
    }
}

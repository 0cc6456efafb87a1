//! A small matrix product for tiles that are in the cache already: nothing is packed, one thread.
//!
//! `C (+)= A B`. Values of A are read one at a time with any two strides, so it may be transposed or a view; rows of B
//! and C are contiguous. The sum over k ascends, in one chain per value.

use super::simd::{Isa, isa};

/// The left side: value (i, k) at `row * i + col * k`.
#[derive(Clone, Copy)]
pub(crate) struct Left<'a> {
    pub(crate) values: &'a [f32],
    pub(crate) row: usize,
    pub(crate) col: usize,
}

/// `c[i, j] = (c[i, j] or 0) + sum over k of a[i, k] b[k, j]` for `dims` = (m, n, k); rows of `b` and `c` are `ldb` and
/// `ldc` apart.
///
/// # Panics
/// When a side is shorter than the dimensions say.
pub(crate) fn gemm(
    dims: (usize, usize, usize),
    a: Left<'_>,
    (b, ldb): (&[f32], usize),
    (c, ldc): (&mut [f32], usize),
    accumulate: bool,
) {
    let (m, n, k) = dims;
    if m == 0 || n == 0 {
        return;
    }
    assert!((m - 1) * ldc + n <= c.len(), "the result of a product is too short");
    if k > 0 {
        assert!(
            (m - 1) * a.row + (k - 1) * a.col < a.values.len(),
            "the left side of a product is too short"
        );
        assert!((k - 1) * ldb + n <= b.len(), "the right side of a product is too short");
    }
    let p =
        Pointers { a: a.values.as_ptr(), row: a.row, col: a.col, b: b.as_ptr(), ldb, c: c.as_mut_ptr(), ldc };
    match isa() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `isa` found the features; the assertions above are what `all` asks for.
        Isa::Avx512 => unsafe { x86::avx512(dims, p, accumulate) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx2 => unsafe { x86::avx2(dims, p, accumulate) },
        // SAFETY: as above; no feature is needed.
        Isa::Base => unsafe { all::<[f32; 4], 4>(dims, p, accumulate) },
    }
}

#[derive(Clone, Copy)]
struct Pointers {
    a: *const f32,
    row: usize,
    col: usize,
    b: *const f32,
    ldb: usize,
    c: *mut f32,
    ldc: usize,
}

/// A register.
trait Lanes: Copy {
    const N: usize;
    /// # Safety
    /// `N` values can be read at `p`; the instruction set is there.
    unsafe fn load(p: *const f32) -> Self;
    /// # Safety
    /// `N` values can be written at `p`; the instruction set is there.
    unsafe fn store(self, p: *mut f32);
    /// # Safety
    /// The instruction set is there.
    unsafe fn splat(x: f32) -> Self;
    /// `a * b + self`.
    ///
    /// # Safety
    /// The instruction set is there.
    unsafe fn add_product(self, a: Self, b: Self) -> Self;
}

impl<const W: usize> Lanes for [f32; W] {
    const N: usize = W;
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: the caller's promise; an array of f32 has the alignment of f32.
        unsafe { p.cast::<Self>().read() }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: as above.
        unsafe { p.cast::<Self>().write(self) }
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        [x; W]
    }
    #[inline(always)]
    unsafe fn add_product(mut self, a: Self, b: Self) -> Self {
        for i in 0..W {
            self[i] = if cfg!(target_arch = "aarch64") {
                a[i].mul_add(b[i], self[i])
            } else {
                self[i] + a[i] * b[i]
            };
        }
        self
    }
}

/// The whole product, in tiles of `MR` rows by two registers, then one register, then single columns.
///
/// # Safety
/// As for [`tile`], over all rows and columns of `dims`.
#[inline(always)]
unsafe fn all<V: Lanes, const MR: usize>(dims: (usize, usize, usize), p: Pointers, accumulate: bool) {
    let (_, n, _) = dims;
    let mut j = 0;
    // SAFETY: columns j .. j + width stay below n in each loop.
    unsafe {
        while j + 2 * V::N <= n {
            columns::<V, MR, 2>(dims, j, p, accumulate);
            j += 2 * V::N;
        }
        while j + V::N <= n {
            columns::<V, MR, 1>(dims, j, p, accumulate);
            j += V::N;
        }
        while j < n {
            columns::<[f32; 1], MR, 1>(dims, j, p, accumulate);
            j += 1;
        }
    }
}

/// # Safety
/// As for [`tile`], over all rows of `dims`.
#[inline(always)]
unsafe fn columns<V: Lanes, const MR: usize, const NV: usize>(
    (m, _, k): (usize, usize, usize),
    j: usize,
    p: Pointers,
    accumulate: bool,
) {
    let mut i = 0;
    // SAFETY: rows i .. i + MR (or i alone) stay below m.
    unsafe {
        while i + MR <= m {
            tile::<V, MR, NV>(i, j, k, p, accumulate);
            i += MR;
        }
        while i < m {
            tile::<V, 1, NV>(i, j, k, p, accumulate);
            i += 1;
        }
    }
}

/// Rows `i .. i + MR`, columns `j .. j + NV * V::N`.
///
/// # Safety
/// The instruction set of `V` is there; with these rows, columns and `k`, every address `a + row * i + col * k`,
/// `b + ldb * k + j` can be read and `c + ldc * i + j` written, and nobody else uses `c`.
#[inline(always)]
unsafe fn tile<V: Lanes, const MR: usize, const NV: usize>(
    i: usize,
    j: usize,
    k: usize,
    p: Pointers,
    accumulate: bool,
) {
    // SAFETY: all addresses are those of the contract.
    unsafe {
        let mut sums = [[V::splat(0.0); NV]; MR];
        let c = p.c.add(i * p.ldc + j);
        if accumulate {
            for (r, row) in sums.iter_mut().enumerate() {
                for (v, sum) in row.iter_mut().enumerate() {
                    *sum = V::load(c.add(r * p.ldc + v * V::N));
                }
            }
        }
        let a = p.a.add(i * p.row);
        for step in 0..k {
            let b = p.b.add(step * p.ldb + j);
            let mut right = [V::splat(0.0); NV];
            for (v, right) in right.iter_mut().enumerate() {
                *right = V::load(b.add(v * V::N));
            }
            for (r, row) in sums.iter_mut().enumerate() {
                let left = V::splat(*a.add(r * p.row + step * p.col));
                for (sum, right) in row.iter_mut().zip(right) {
                    *sum = sum.add_product(left, right);
                }
            }
        }
        for (r, row) in sums.into_iter().enumerate() {
            for (v, sum) in row.into_iter().enumerate() {
                sum.store(c.add(r * p.ldc + v * V::N));
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        __m256, __m512, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_set1_ps, _mm256_storeu_ps, _mm512_fmadd_ps,
        _mm512_loadu_ps, _mm512_set1_ps, _mm512_storeu_ps,
    };

    use super::{Lanes, Pointers, all};

    macro_rules! lanes {
        ($register:ty, $n:literal, $load:ident, $store:ident, $splat:ident, $fma:ident) => {
            impl Lanes for $register {
                const N: usize = $n;
                #[inline(always)]
                unsafe fn load(p: *const f32) -> Self {
                    // SAFETY: the caller's promise.
                    unsafe { $load(p) }
                }
                #[inline(always)]
                unsafe fn store(self, p: *mut f32) {
                    // SAFETY: the caller's promise.
                    unsafe { $store(p, self) }
                }
                #[inline(always)]
                unsafe fn splat(x: f32) -> Self {
                    // SAFETY: the caller's promise.
                    unsafe { $splat(x) }
                }
                #[inline(always)]
                unsafe fn add_product(self, a: Self, b: Self) -> Self {
                    // SAFETY: the caller's promise.
                    unsafe { $fma(a, b, self) }
                }
            }
        };
    }
    lanes!(__m512, 16, _mm512_loadu_ps, _mm512_storeu_ps, _mm512_set1_ps, _mm512_fmadd_ps);
    lanes!(__m256, 8, _mm256_loadu_ps, _mm256_storeu_ps, _mm256_set1_ps, _mm256_fmadd_ps);

    /// # Safety
    /// As for [`all`].
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn avx512(dims: (usize, usize, usize), p: Pointers, accumulate: bool) {
        // SAFETY: the caller's promise.
        unsafe { all::<__m512, 8>(dims, p, accumulate) }
    }

    /// # Safety
    /// As for [`all`].
    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn avx2(dims: (usize, usize, usize), p: Pointers, accumulate: bool) {
        // SAFETY: the caller's promise.
        unsafe { all::<__m256, 4>(dims, p, accumulate) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check::values;
    use crate::ops::simd::for_each_isa;

    #[test]
    fn every_shape_and_layout_is_the_definition() {
        for (m, n, k) in [(1, 1, 1), (0, 3, 2), (3, 0, 2), (2, 3, 0), (8, 32, 5), (9, 49, 7), (21, 70, 33)] {
            let (ldb, ldc) = (n + 3, n + 1);
            let (a, b) = (values(1, m * (k + 2) + 2 * k), values(2, k * ldb));
            let before = values(3, m * ldc);
            for (row, col) in [(k + 2, 1), (1, m + 1)] {
                for accumulate in [false, true] {
                    let a = Left { values: &a, row, col };
                    let definition = |i: usize, j: usize| -> f64 {
                        let start = if accumulate { f64::from(before[i * ldc + j]) } else { 0.0 };
                        let term =
                            |t: usize| f64::from(a.values[i * row + t * col]) * f64::from(b[t * ldb + j]);
                        start + (0..k).map(term).sum::<f64>()
                    };
                    let Ok(()) = for_each_isa(|isa| {
                        let mut got = before.clone();
                        gemm((m, n, k), a, (&b, ldb), (&mut got, ldc), accumulate);
                        for (at, got) in got.iter().enumerate() {
                            let (i, j) = (at / ldc, at % ldc);
                            let want = if j < n { definition(i, j) } else { f64::from(before[at]) };
                            let off = (f64::from(*got) - want).abs();
                            assert!(off < 1e-5, "{m} {n} {k}: ({i}, {j}), {isa:?}");
                        }
                        Ok::<(), std::convert::Infallible>(())
                    });
                }
            }
        }
    }
}

//! The innermost loop: a tile of C in registers.

use super::ahead::{Ahead, STEPS};
use crate::simd::Simd;

/// `C (+)= A B` for a tile of `MR` rows and `NV` vectors.
///
/// - `k`: steps
/// - `a`: value of row i at step s is `a[i * A_ROW + s * A_STEP]`
/// - `b`: `[k, NV * LANES]`
/// - `c`: `[MR]` row pointers
/// - `add`: adds to C instead of overwriting it
/// - `ahead`: what to ask memory for meanwhile
///
/// Each value of C is one accumulator, added to in ascending k; then it is stored or added to C.
///
/// # Safety
/// As [`Simd`]; the pointers are valid for what is said above, and C is written by nobody else.
#[inline(always)]
pub(super) unsafe fn tile<
    S: Simd,
    const MR: usize,
    const NV: usize,
    const A_ROW: usize,
    const A_STEP: usize,
>(
    k: usize,
    mut a: *const f32,
    mut b: *const f32,
    c: *const *mut f32,
    add: bool,
    ahead: &Ahead,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut acc = [[S::splat(0.0); NV]; MR];
        if add {
            for i in 0..MR {
                let row = *c.add(i);
                for j in 0..NV {
                    S::prefetch(row.wrapping_add(j * S::LANES));
                }
            }
        }
        let mut left = k;
        let mut offset = 0;
        while left > 0 {
            for &line in &ahead.lines[..ahead.count] {
                S::prefetch_far(line.wrapping_add(offset));
            }
            offset += ahead.advance;
            let now = if ahead.count == 0 { left } else { left.min(STEPS) };
            left -= now;
            for _ in 0..now {
                let mut columns = [S::splat(0.0); NV];
                for (j, column) in columns.iter_mut().enumerate() {
                    *column = S::load(b.add(j * S::LANES));
                }
                for (i, acc) in acc.iter_mut().enumerate() {
                    let value = S::splat(*a.add(i * A_ROW));
                    for j in 0..NV {
                        acc[j] = S::mul_add(value, columns[j], acc[j]);
                    }
                }
                a = a.add(A_STEP);
                b = b.add(NV * S::LANES);
            }
        }
        for (i, acc) in acc.iter().enumerate() {
            let row = *c.add(i);
            for (j, &acc) in acc.iter().enumerate() {
                let to = row.add(j * S::LANES);
                S::store(to, if add { S::add(S::load(to), acc) } else { acc });
            }
        }
    }
}

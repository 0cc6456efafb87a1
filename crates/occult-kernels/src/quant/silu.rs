//! SwiGLU of a tile, the same bits on every instruction set.

use super::kernel::TILE_COLS;
use super::matrix::PANEL_ROWS;

const TO_WHOLE: f32 = 12_582_912.0;

/// `e^x`, relative error below 2e-7 for |x| <= 87; beyond that the value at the bound. NaN stays NaN.
///
/// `x = n ln 2 + r`, Taylor's polynomial of degree 7 for `e^r`, `n` added to the exponent.
#[inline(always)]
fn exp(x: f32) -> f32 {
    let x = x.clamp(-87.0, 87.0);
    let whole = x.mul_add(std::f32::consts::LOG2_E, TO_WHOLE);
    let n = whole - TO_WHOLE;
    // ln 2 in two parts: the first has few enough bits that its product with n is exact.
    let r = n.mul_add(-1.428_606_8e-6, n.mul_add(-0.693_145_75, x));
    let mut p = 1.0f32 / 5040.0;
    for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = p.mul_add(r, c);
    }
    let n = whole.to_bits() as i32 - TO_WHOLE.to_bits() as i32;
    p * f32::from_bits(((n + 127) << 23) as u32)
}

/// `silu(g) * u`
#[inline(always)]
pub(super) fn swiglu_one(g: f32, u: f32) -> f32 {
    g / (1.0 + exp(-g)) * u
}

/// `to[i, j] = silu(c[i, j]) * c[i, 16 + j]` for `rows` tile rows: the first panel is the gate, the second the other branch.
///
/// # Safety
/// `c` has as many tile rows, and `to` room for a panel's columns of as many rows that are `stride` apart.
#[inline(always)]
pub(super) unsafe fn swiglu(c: *const f32, rows: usize, to: *mut f32, stride: usize) {
    for i in 0..rows {
        // SAFETY: the caller's promise.
        let (row, to) = unsafe {
            let row = c.add(i * TILE_COLS).cast::<[f32; TILE_COLS]>();
            (&*row, &mut *to.add(i * stride).cast::<[f32; PANEL_ROWS]>())
        };
        for (j, to) in to.iter_mut().enumerate() {
            *to = swiglu_one(row[j], row[PANEL_ROWS + j]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exponential_is_as_exact_as_it_says() {
        for i in (-87_000..=87_000).step_by(if cfg!(miri) { 1009 } else { 1 }) {
            let x = i as f32 / 1000.0;
            let (got, want) = (f64::from(exp(x)), f64::from(x).exp());
            assert!((got / want - 1.0).abs() < 2e-7, "e^{x} = {got}, expected {want}");
        }
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    #[cfg_attr(miri, ignore = "too slow")]
    fn swiglu_is_that_of_f64() {
        for g in (-40_000..=40_000).map(|i| i as f32 / 1000.0) {
            let (got, exact) = (f64::from(swiglu_one(g, 0.7)), f64::from(g) / (1.0 + f64::from(-g).exp()));
            let want = exact * f64::from(0.7f32);
            assert!((got - want).abs() <= 1e-6 * want.abs(), "silu({g}) * 0.7 = {got}, expected {want}");
        }
    }

    #[test]
    fn the_ends_of_swiglu() {
        assert_eq!(swiglu_one(0.0, 3.0), 0.0);
        assert_eq!(swiglu_one(200.0, 2.0), 400.0);
        assert!(swiglu_one(-200.0, 2.0).abs() < 1e-30);
        assert!(swiglu_one(f32::NAN, 1.0).is_nan() && swiglu_one(1.0, f32::NAN).is_nan());
    }
}

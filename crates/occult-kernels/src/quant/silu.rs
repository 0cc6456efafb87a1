//! SwiGLU of a tile, the same bits on every instruction set.

use super::isa::Isa;
use super::kernel::{TILE_COLS, Tile};
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
fn swiglu_one(g: f32, u: f32) -> f32 {
    g / (1.0 + exp(-g)) * u
}

#[inline(always)]
fn rows_of(tile: &mut Tile, rows: usize) {
    for row in &mut tile.0[..rows] {
        let (gate, up) = row.split_at_mut(PANEL_ROWS);
        for c in 0..TILE_COLS - PANEL_ROWS {
            gate[c] = swiglu_one(gate[c], up[c]);
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,fma")]
fn rows_avx512(tile: &mut Tile, rows: usize) {
    rows_of(tile, rows);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn rows_avx2(tile: &mut Tile, rows: usize) {
    rows_of(tile, rows);
}

/// `silu(first panel) * second panel` into the first panel's columns.
pub(super) fn swiglu(isa: Isa, tile: &mut Tile, rows: usize) {
    match isa {
        // SAFETY: the drivers of this module only use instruction sets that are available.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512Vnni => unsafe { rows_avx512(tile, rows) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::AvxVnni | Isa::Avx2 => unsafe { rows_avx2(tile, rows) },
        _ => rows_of(tile, rows),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exponential_is_as_exact_as_it_says() {
        for i in -87_000..=87_000 {
            let x = i as f32 / 1000.0;
            let (got, want) = (f64::from(exp(x)), f64::from(x).exp());
            assert!((got / want - 1.0).abs() < 2e-7, "e^{x} = {got}, expected {want}");
        }
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn the_ends_of_swiglu() {
        assert_eq!(swiglu_one(0.0, 3.0), 0.0);
        assert_eq!(swiglu_one(200.0, 2.0), 400.0);
        assert!(swiglu_one(-200.0, 2.0).abs() < 1e-30);
        assert!(swiglu_one(f32::NAN, 1.0).is_nan() && swiglu_one(1.0, f32::NAN).is_nan());
    }
}

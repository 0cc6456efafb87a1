//! Tiles with AVX-512 VNNI.

use std::arch::x86_64::*;

use super::super::matrix::LEVELS;
use super::{Args, TILE_COLS};

/// Bytes ahead of the weights that are asked for: the processor's own look-ahead ends at every page.
const AHEAD: usize = 2048;

/// # Safety
/// AVX-512 F, BW, VL, DQ and VNNI; pointers of `args` valid for `rows` rows and `panels` panels as [`super::tile`] checks.
pub(super) unsafe fn tile(args: Args, rows: usize, panels: usize, q4: bool) {
    macro_rules! call {
        ($($m:literal)*) => {
            match (rows, panels, q4) {
                $(
                    // SAFETY: the caller's promise, for exactly these numbers of rows and panels.
                    ($m, 1, false) => unsafe { kernel::<$m, 1, false>(args) },
                    // SAFETY: as above.
                    ($m, 1, true) => unsafe { kernel::<$m, 1, true>(args) },
                    // SAFETY: as above.
                    ($m, _, false) => unsafe { kernel::<$m, 2, false>(args) },
                    // SAFETY: as above.
                    ($m, _, true) => unsafe { kernel::<$m, 2, true>(args) },
                )*
                _ => unreachable!("tile of {rows} rows"),
            }
        };
    }
    call!(1 2 3 4 5 6)
}

/// # Safety
/// As [`tile`], with `M` rows and `P` panels.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma")]
unsafe fn kernel<const M: usize, const P: usize, const Q4: bool>(args: Args) {
    let Args { mut levels, mut scales, mut starts, mut data, mut weight_scales, .. } = args;
    let low = _mm512_set1_epi8(15);
    // SAFETY: the table has 16 bytes.
    let table = _mm512_broadcast_i32x4(unsafe { _mm_loadu_si128(LEVELS.as_ptr().cast()) });
    let mut total = [[_mm512_setzero_ps(); P]; M];
    for _ in 0..args.groups {
        let mut sums = [[_mm512_setzero_si512(); P]; M];
        for (m, sums) in sums.iter_mut().enumerate() {
            // SAFETY: `starts` points to the M values of this group.
            *sums = [_mm512_set1_epi32(unsafe { *starts.add(m) }); P];
        }
        for _ in 0..args.quads / 2 {
            let mut w = [[_mm512_setzero_si512(); P]; 2];
            for p in 0..P {
                let at = data[p];
                _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(AHEAD).cast());
                if Q4 {
                    // SAFETY: 64 bytes hold two quads of this panel.
                    let codes = unsafe { _mm512_loadu_si512(at.cast()) };
                    let high = _mm512_srli_epi16::<4>(codes);
                    w[0][p] = _mm512_shuffle_epi8(table, _mm512_and_si512(codes, low));
                    w[1][p] = _mm512_shuffle_epi8(table, _mm512_and_si512(high, low));
                    data[p] = at.wrapping_add(64);
                } else {
                    // SAFETY: 64 bytes for each of the two quads of this panel.
                    (w[0][p], w[1][p]) =
                        unsafe { (_mm512_loadu_si512(at.cast()), _mm512_loadu_si512(at.add(64).cast())) };
                    _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(AHEAD + 64).cast());
                    data[p] = at.wrapping_add(128);
                }
            }
            for (half, w) in w.iter().enumerate() {
                for (m, sums) in sums.iter_mut().enumerate() {
                    // SAFETY: M quads of four levels each for both halves.
                    let x = unsafe { levels.add((half * M + m) * 4).cast::<i32>().read_unaligned() };
                    let x = _mm512_set1_epi32(x);
                    for p in 0..P {
                        sums[p] = _mm512_dpbusd_epi32(sums[p], w[p], x);
                    }
                }
            }
            levels = levels.wrapping_add(8 * M);
        }
        let mut scale = [_mm512_setzero_ps(); P];
        for p in 0..P {
            // SAFETY: 16 scales of this group; a bf16 is the upper half of an f32.
            let halves = unsafe { _mm256_loadu_si256(weight_scales[p].cast()) };
            scale[p] = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(halves)));
            weight_scales[p] = weight_scales[p].wrapping_add(16);
        }
        for (m, sums) in sums.iter().enumerate() {
            // SAFETY: the M scales of this group.
            let x_scale = _mm512_set1_ps(unsafe { *scales.add(m) });
            for p in 0..P {
                let both = _mm512_mul_ps(x_scale, scale[p]);
                total[m][p] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[p]), both, total[m][p]);
            }
        }
        scales = scales.wrapping_add(M);
        starts = starts.wrapping_add(M);
    }
    for (m, total) in total.iter().enumerate() {
        for (p, total) in total.iter().enumerate() {
            // SAFETY: row `m` of the tile has 32 values.
            unsafe { _mm512_storeu_ps(args.out.add(m * TILE_COLS + p * 16), *total) };
        }
    }
}

//! Tiles with 256-bit registers: AVX-VNNI, or AVX2 alone. A panel is two registers; panels are taken one after the other.

use std::arch::x86_64::*;

use super::super::matrix::LEVELS;
use super::{Args, TILE_COLS};

/// Four products per lane and their sum, added to `sum`: the bytes of `w` unsigned, those of `x` signed.
#[target_feature(enable = "avx2,avxvnni")]
fn dot_vnni(sum: __m256i, w: __m256i, x: __m256i) -> __m256i {
    _mm256_dpbusd_avx_epi32(sum, w, x)
}

/// The same in 16-bit products. (`maddubs` would saturate: 255 * 127 * 2 does not fit 16 bits.)
#[target_feature(enable = "avx2")]
fn dot_avx2(sum: __m256i, w: __m256i, x: __m256i) -> __m256i {
    let even = |v| _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(v));
    let (w_even, w_odd) = (_mm256_and_si256(w, _mm256_set1_epi16(255)), _mm256_srli_epi16::<8>(w));
    let odd = _mm256_madd_epi16(w_odd, _mm256_srai_epi16::<8>(x));
    _mm256_add_epi32(sum, _mm256_add_epi32(_mm256_madd_epi16(w_even, even(x)), odd))
}

macro_rules! tile256 {
    ($tile:ident, $kernel:ident, $dot:ident, $features:literal, $($rows:literal)*) => {
        /// # Safety
        /// The features of its kernel; pointers of `args` valid for `rows` rows and `panels` panels as [`super::tile`]
        /// checks.
        pub(super) unsafe fn $tile(mut args: Args, rows: usize, panels: usize, q4: bool) {
            for p in 0..panels {
                args.data[0] = args.data[p];
                args.weight_scales[0] = args.weight_scales[p];
                let out = args.out.wrapping_add(p * 16);
                match (rows, q4) {
                    $(
                        // SAFETY: the caller's promise, for exactly this number of rows.
                        ($rows, false) => unsafe { $kernel::<$rows, false>(Args { out, ..args }) },
                        // SAFETY: as above.
                        ($rows, true) => unsafe { $kernel::<$rows, true>(Args { out, ..args }) },
                    )*
                    _ => unreachable!("tile of {rows} rows"),
                }
            }
        }

        /// # Safety
        /// As the function above, with `M` rows and one panel.
        #[target_feature(enable = $features)]
        unsafe fn $kernel<const M: usize, const Q4: bool>(args: Args) {
            let Args { mut levels, mut scales, mut starts, data: [mut data, _], mut weight_scales, .. } = args;
            let low = _mm256_set1_epi8(15);
            // SAFETY: the table has 16 bytes.
            let table = _mm256_broadcastsi128_si256(unsafe { _mm_loadu_si128(LEVELS.as_ptr().cast()) });
            for _ in 0..args.groups {
                let mut sums = [[_mm256_setzero_si256(); 2]; M];
                for (m, sums) in sums.iter_mut().enumerate() {
                    // SAFETY: `starts` points to the M values of this group.
                    *sums = [_mm256_set1_epi32(unsafe { *starts.add(m) }); 2];
                }
                for quad in 0..args.quads {
                    // SAFETY: 64 bytes hold one quad of the panel, or two of 4 bits; the second of those is read with
                    // the same bytes shifted.
                    let mut w = unsafe {
                        [_mm256_loadu_si256(data.cast()), _mm256_loadu_si256(data.add(32).cast())]
                    };
                    if Q4 {
                        for w in &mut w {
                            let codes = if quad % 2 == 0 { *w } else { _mm256_srli_epi16::<4>(*w) };
                            *w = _mm256_shuffle_epi8(table, _mm256_and_si256(codes, low));
                        }
                    }
                    if !Q4 || quad % 2 == 1 {
                        data = data.wrapping_add(64);
                    }
                    for (m, sums) in sums.iter_mut().enumerate() {
                        // SAFETY: M quads of four levels.
                        let x = unsafe { levels.add(m * 4).cast::<i32>().read_unaligned() };
                        let x = _mm256_set1_epi32(x);
                        *sums = [$dot(sums[0], w[0], x), $dot(sums[1], w[1], x)];
                    }
                    levels = levels.wrapping_add(4 * M);
                }
                let mut scale = [_mm256_setzero_ps(); 2];
                for (h, scale) in scale.iter_mut().enumerate() {
                    // SAFETY: 16 scales of this group; a bf16 is the upper half of an f32.
                    let halves = unsafe { _mm_loadu_si128(weight_scales[0].add(8 * h).cast()) };
                    *scale = _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(halves)));
                }
                weight_scales[0] = weight_scales[0].wrapping_add(16);
                for (m, sums) in sums.iter().enumerate() {
                    // SAFETY: the M scales of this group.
                    let x_scale = _mm256_set1_ps(unsafe { *scales.add(m) });
                    for h in 0..2 {
                        let out = args.out.wrapping_add(m * TILE_COLS + 8 * h);
                        let both = _mm256_mul_ps(x_scale, scale[h]);
                        // SAFETY: this panel's half of row `m` of the tile has 16 values and starts at a multiple of 64
                        // bytes. Volatile: otherwise the compiler keeps the tile in registers that it does not have.
                        unsafe {
                            let before = out.cast::<__m256>().read_volatile();
                            let sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[h]), both, before);
                            out.cast::<__m256>().write(sum);
                        }
                    }
                }
                scales = scales.wrapping_add(M);
                starts = starts.wrapping_add(M);
            }
        }
    };
}

tile256!(tile_vnni, kernel_vnni, dot_vnni, "avx2,fma,avxvnni", 1 2 3 4 5 6);
tile256!(tile, kernel, dot_avx2, "avx2,fma", 1 2 3 4);

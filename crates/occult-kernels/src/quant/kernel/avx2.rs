//! Tiles with 256-bit registers: AVX-VNNI, or AVX2 alone. A panel is two registers; panels are taken one after the other.

use std::arch::x86_64::*;

use super::super::activations::HEAD;
use super::super::matrix::LEVELS;
use super::{Args, TILE_COLS, TileFn};

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

#[inline]
#[target_feature(enable = "avx2")]
fn table() -> __m256i {
    // SAFETY: the table has 16 bytes.
    _mm256_broadcastsi128_si256(unsafe { _mm_loadu_si128(LEVELS.as_ptr().cast()) })
}

/// The levels of the low halves of 32 bytes of codes.
#[inline]
#[target_feature(enable = "avx2")]
fn levels(table: __m256i, codes: __m256i) -> __m256i {
    _mm256_shuffle_epi8(table, _mm256_and_si256(codes, _mm256_set1_epi8(15)))
}

/// # Safety
/// AVX2; as [`super::decode`].
#[inline]
#[target_feature(enable = "avx2")]
pub(super) unsafe fn decode(from: *const u8, len: usize, to: *mut u8) {
    let table = table();
    for at in (0..len).step_by(32) {
        // SAFETY: the caller's promise; both halves of 64 bytes of codes lead to the same halves of two quads.
        unsafe {
            let codes = _mm256_loadu_si256(from.add(at).cast());
            let to = to.add(at / 64 * 128 + at % 64);
            _mm256_storeu_si256(to.cast(), levels(table, codes));
            _mm256_storeu_si256(to.add(64).cast(), levels(table, _mm256_srli_epi16::<4>(codes)));
        }
    }
}

macro_rules! tile256 {
    ($tile:ident, $q8:ident, $q4:ident, $dot:ident, $features:literal, $count:literal: $($m:literal)*) => {
        pub(super) const $q8: [TileFn; $count] = [$($tile::<$m, false>),*];
        pub(super) const $q4: [TileFn; $count] = [$($tile::<$m, true>),*];

        /// # Safety
        /// The features; pointers of `args` valid for `M` rows.
        #[target_feature(enable = $features)]
        unsafe fn $tile<const M: usize, const Q4: bool>(args: &Args) {
            let table = table();
            for p in 0..2 {
                let (mut data, mut scales, mut ahead) = (args.data[p], args.scales[p], args.ahead[p]);
                let mut rows: [*const u8; M] = std::array::from_fn(|m| {
                    // SAFETY: M rows; `skip` leads to a record of each.
                    unsafe { (*args.rows.add(m)).add(args.skip) }
                });
                for _ in 0..args.groups {
                    let mut sums: [[__m256i; 2]; M] = std::array::from_fn(|m| {
                        // SAFETY: the start of a record.
                        let start = unsafe { rows[m].add(4).cast::<i32>().read() };
                        [_mm256_set1_epi32(start); 2]
                    });
                    for quad in 0..args.quads {
                        // SAFETY: 64 bytes hold one quad of the panel, or two of 4 bits; the second of those is read
                        // with the same bytes shifted.
                        let mut w = unsafe {
                            [_mm256_loadu_si256(data.cast()), _mm256_loadu_si256(data.add(32).cast())]
                        };
                        if quad % 2 == 0 {
                            for _ in 0..args.lines {
                                _mm_prefetch::<_MM_HINT_T1>(ahead.cast());
                                ahead = ahead.wrapping_add(64);
                            }
                        }
                        if Q4 {
                            for w in &mut w {
                                *w = levels(table, if quad % 2 == 0 { *w } else { _mm256_srli_epi16::<4>(*w) });
                            }
                        }
                        if !Q4 || quad % 2 == 1 {
                            data = data.wrapping_add(64);
                        }
                        for (m, sums) in sums.iter_mut().enumerate() {
                            // SAFETY: a quad of levels of the record.
                            let x = unsafe { rows[m].add(HEAD + 4 * quad).cast::<i32>().read() };
                            let x = _mm256_set1_epi32(x);
                            *sums = [$dot(sums[0], w[0], x), $dot(sums[1], w[1], x)];
                        }
                    }
                    let mut scale = [_mm256_setzero_ps(); 2];
                    for (h, scale) in scale.iter_mut().enumerate() {
                        // SAFETY: 16 scales of this group; a bf16 is the upper half of an f32.
                        let halves = unsafe { _mm_loadu_si128(scales.add(8 * h).cast()) };
                        *scale = _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(halves)));
                    }
                    scales = scales.wrapping_add(16);
                    for (m, sums) in sums.iter().enumerate() {
                        // SAFETY: the scale of the record.
                        let x_scale = _mm256_set1_ps(unsafe { rows[m].cast::<f32>().read() });
                        rows[m] = rows[m].wrapping_add(HEAD + 4 * args.quads);
                        for h in 0..2 {
                            let out = args.out.wrapping_add(m * TILE_COLS + p * 16 + 8 * h);
                            let both = _mm256_mul_ps(x_scale, scale[h]);
                            // SAFETY: this panel's half of row `m` of the tile has 16 values and starts at a multiple
                            // of 64 bytes. Volatile: otherwise the compiler keeps the tile in registers that it does
                            // not have.
                            unsafe {
                                let before = out.cast::<__m256>().read_volatile();
                                let sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[h]), both, before);
                                out.cast::<__m256>().write(sum);
                            }
                        }
                    }
                }
            }
        }
    };
}

tile256!(vnni, VNNI_Q8, VNNI_Q4, dot_vnni, "avx2,fma,avxvnni", 6: 1 2 3 4 5 6);
tile256!(plain, PLAIN_Q8, PLAIN_Q4, dot_avx2, "avx2,fma", 4: 1 2 3 4);

//! Tiles with AVX-512 VNNI.

use std::arch::x86_64::*;

use super::super::activations::HEAD;
use super::super::matrix::LEVELS;
use super::{Args, TILE_COLS, TileFn};

macro_rules! tiles {
    ($q4:literal, $($m:literal)*) => { [$(tile::<$m, $q4>),*] };
}
// More rows do not fit the registers beside the f32 sums, and were slower without those.
pub(super) const Q8: [TileFn; 6] = tiles!(false, 1 2 3 4 5 6);
pub(super) const Q4: [TileFn; 6] = tiles!(true, 1 2 3 4 5 6);

#[inline]
#[target_feature(enable = "avx512f")]
fn table() -> __m512i {
    // SAFETY: the table has 16 bytes.
    _mm512_broadcast_i32x4(unsafe { _mm_loadu_si128(LEVELS.as_ptr().cast()) })
}

/// The levels of 64 bytes of codes: two quads.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn levels(table: __m512i, codes: __m512i) -> [__m512i; 2] {
    let low = _mm512_set1_epi8(15);
    let level = |codes| _mm512_shuffle_epi8(table, _mm512_and_si512(codes, low));
    [level(codes), level(_mm512_srli_epi16::<4>(codes))]
}

/// # Safety
/// AVX-512 F and BW; as [`super::decode`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) unsafe fn decode(from: *const u8, len: usize, to: *mut u8) {
    let table = table();
    for at in (0..len).step_by(64) {
        // SAFETY: the caller's promise.
        unsafe {
            let [first, second] = levels(table, _mm512_loadu_si512(from.add(at).cast()));
            _mm512_storeu_si512(to.add(2 * at).cast(), first);
            _mm512_storeu_si512(to.add(2 * at + 64).cast(), second);
        }
    }
}

/// # Safety
/// AVX-512 F, BW, VL, DQ and VNNI; pointers of `args` valid for `M` rows.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma")]
unsafe fn tile<const M: usize, const Q4: bool>(args: &Args) {
    let Args { mut data, mut scales, mut ahead, lines, .. } = *args;
    // SAFETY: M rows and tile rows; `skip` leads to a record of each row.
    let (mut rows, mut total): ([*const u8; M], [[__m512; 2]; M]) = unsafe {
        (
            std::array::from_fn(|m| (*args.rows.add(m)).add(args.skip)),
            std::array::from_fn(|m| {
                std::array::from_fn(|p| _mm512_loadu_ps(args.out.add(m * TILE_COLS + p * 16)))
            }),
        )
    };
    let table = table();
    for _ in 0..args.groups {
        // SAFETY: the start of a record.
        let mut sums: [[__m512i; 2]; M] =
            std::array::from_fn(|m| [_mm512_set1_epi32(unsafe { rows[m].add(4).cast::<i32>().read() }); 2]);
        for pair in 0..args.quads / 2 {
            for _ in 0..lines {
                for ahead in &mut ahead {
                    _mm_prefetch::<_MM_HINT_T1>(ahead.cast());
                    *ahead = ahead.wrapping_add(64);
                }
            }
            let mut w = [[_mm512_setzero_si512(); 2]; 2];
            for (p, data) in data.iter_mut().enumerate() {
                let at = *data;
                if Q4 {
                    // SAFETY: 64 bytes hold two quads of this panel.
                    [w[0][p], w[1][p]] = levels(table, unsafe { _mm512_loadu_si512(at.cast()) });
                    *data = at.wrapping_add(64);
                } else {
                    // SAFETY: 64 bytes for each of the two quads of this panel.
                    (w[0][p], w[1][p]) =
                        unsafe { (_mm512_loadu_si512(at.cast()), _mm512_loadu_si512(at.add(64).cast())) };
                    *data = at.wrapping_add(128);
                }
            }
            for (half, w) in w.iter().enumerate() {
                for (m, sums) in sums.iter_mut().enumerate() {
                    // SAFETY: a quad of levels of the record.
                    let x = unsafe { rows[m].add(HEAD + 8 * pair + 4 * half).cast::<i32>().read() };
                    let x = _mm512_set1_epi32(x);
                    for (sum, &w) in sums.iter_mut().zip(w) {
                        *sum = _mm512_dpbusd_epi32(*sum, w, x);
                    }
                }
            }
        }
        let mut scale = [_mm512_setzero_ps(); 2];
        for (scale, from) in scale.iter_mut().zip(&mut scales) {
            // SAFETY: 16 scales of this group; a bf16 is the upper half of an f32.
            let halves = unsafe { _mm256_loadu_si256(from.cast()) };
            *scale = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(halves)));
            *from = from.wrapping_add(16);
        }
        for (m, sums) in sums.iter().enumerate() {
            // SAFETY: the scale of the record.
            let x_scale = _mm512_set1_ps(unsafe { rows[m].cast::<f32>().read() });
            for (p, &scale) in scale.iter().enumerate() {
                let both = _mm512_mul_ps(x_scale, scale);
                total[m][p] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[p]), both, total[m][p]);
            }
            rows[m] = rows[m].wrapping_add(HEAD + 4 * args.quads);
        }
    }
    for (m, total) in total.iter().enumerate() {
        for (p, total) in total.iter().enumerate() {
            // SAFETY: row `m` of the tile has 32 values.
            unsafe { _mm512_storeu_ps(args.out.add(m * TILE_COLS + p * 16), *total) };
        }
    }
}

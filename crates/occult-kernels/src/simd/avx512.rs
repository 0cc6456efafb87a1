//! x86-64 with AVX-512 F.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::Simd;

#[derive(Clone, Copy)]
pub(crate) struct Avx512;

type V = __m512;

// SAFETY of the blocks below: AVX-512 F is there and sixteen values are behind each pointer, as the trait asks of the
// caller.
impl Simd for Avx512 {
    type V = V;
    const LANES: usize = 16;

    #[inline(always)]
    unsafe fn splat(x: f32) -> V {
        // SAFETY: see above.
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> V {
        // SAFETY: see above.
        unsafe { _mm512_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16) -> V {
        // SAFETY: see above; a bf16 is the upper half of an f32.
        unsafe {
            let halves = _mm256_loadu_si256(from.cast());
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(halves)))
        }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const f16) -> V {
        // SAFETY: see above.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, v: V) {
        // SAFETY: see above.
        unsafe { _mm512_storeu_ps(to, v) }
    }
    #[inline(always)]
    unsafe fn mul_add(a: V, b: V, c: V) -> V {
        // SAFETY: see above.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn add(a: V, b: V) -> V {
        // SAFETY: see above.
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn mul(a: V, b: V) -> V {
        // SAFETY: see above.
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn div(a: V, b: V) -> V {
        // SAFETY: see above.
        unsafe { _mm512_div_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn at_most(v: V, limit: V) -> V {
        // SAFETY: see above. The instruction gives its second operand where one is NaN.
        unsafe { _mm512_min_ps(limit, v) }
    }
    #[inline(always)]
    unsafe fn at_least(v: V, limit: V) -> V {
        // SAFETY: see above. The instruction gives its second operand where one is NaN.
        unsafe { _mm512_max_ps(limit, v) }
    }
    #[inline(always)]
    unsafe fn round_and_pow2(v: V) -> (V, V) {
        // SAFETY: see above.
        unsafe {
            let n = _mm512_cvtps_epi32(v);
            let bits = _mm512_slli_epi32::<23>(_mm512_add_epi32(n, _mm512_set1_epi32(127)));
            (_mm512_cvtepi32_ps(n), _mm512_castsi512_ps(bits))
        }
    }
    #[inline(always)]
    unsafe fn sum(v: V) -> f32 {
        // SAFETY: see above.
        unsafe { _mm512_reduce_add_ps(v) }
    }
    #[inline(always)]
    unsafe fn sum4([a, b, c, d]: [V; 4]) -> [f32; 4] {
        // SAFETY: see above.
        unsafe {
            // Two lanes of each, in turns; then all four of each 128-bit lane; then the 128-bit lanes.
            let ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
            let cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
            let all = _mm512_add_ps(_mm512_shuffle_ps::<0x44>(ab, cd), _mm512_shuffle_ps::<0xee>(ab, cd));
            let halves = _mm256_add_ps(
                _mm512_castps512_ps256(all),
                _mm512_castps512_ps256(_mm512_shuffle_f32x4::<0xee>(all, all)),
            );
            let sums = _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps::<1>(halves));
            let mut out = [0.0; 4];
            _mm_storeu_ps(out.as_mut_ptr(), sums);
            out
        }
    }
    #[inline(always)]
    unsafe fn transpose(load: impl Fn(usize) -> V, to: *mut f32, stride: usize) {
        // SAFETY: see above; the caller gives room for sixteen rows of sixteen.
        unsafe {
            let mut quads = [_mm512_setzero_ps(); 16];
            // 4x4 blocks inside each 128-bit lane: quads[4 q + i] holds, in lane l, column 4 l + i of rows 4 q ..
            for q in 0..4 {
                let (a, b, c, d) = (load(4 * q), load(4 * q + 1), load(4 * q + 2), load(4 * q + 3));
                let (ab_lo, ab_hi) = (_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
                let (cd_lo, cd_hi) = (_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
                quads[4 * q] = _mm512_shuffle_ps::<0x44>(ab_lo, cd_lo);
                quads[4 * q + 1] = _mm512_shuffle_ps::<0xee>(ab_lo, cd_lo);
                quads[4 * q + 2] = _mm512_shuffle_ps::<0x44>(ab_hi, cd_hi);
                quads[4 * q + 3] = _mm512_shuffle_ps::<0xee>(ab_hi, cd_hi);
            }
            // Then the 4x4 blocks of lanes.
            for i in 0..4 {
                let (a, b, c, d) = (quads[i], quads[4 + i], quads[8 + i], quads[12 + i]);
                let (ab_lo, ab_hi) = (_mm512_shuffle_f32x4::<0x44>(a, b), _mm512_shuffle_f32x4::<0xee>(a, b));
                let (cd_lo, cd_hi) = (_mm512_shuffle_f32x4::<0x44>(c, d), _mm512_shuffle_f32x4::<0xee>(c, d));
                Self::store(to.add(i * stride), _mm512_shuffle_f32x4::<0x88>(ab_lo, cd_lo));
                Self::store(to.add((4 + i) * stride), _mm512_shuffle_f32x4::<0xdd>(ab_lo, cd_lo));
                Self::store(to.add((8 + i) * stride), _mm512_shuffle_f32x4::<0x88>(ab_hi, cd_hi));
                Self::store(to.add((12 + i) * stride), _mm512_shuffle_f32x4::<0xdd>(ab_hi, cd_hi));
            }
        }
    }
    #[inline(always)]
    unsafe fn prefetch(at: *const f32) {
        // SAFETY: a prefetch never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }
    #[inline(always)]
    unsafe fn prefetch_far(at: *const u8) {
        // SAFETY: a prefetch never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
    }
}

//! x86-64 with AVX2, FMA and F16C.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::Simd;

#[derive(Clone, Copy)]
pub(crate) struct Avx2;

type V = __m256;

// SAFETY of the blocks below: AVX2, FMA and F16C are there and eight values are behind each pointer, as the trait asks
// of the caller.
impl Simd for Avx2 {
    type V = V;
    const LANES: usize = 8;

    #[inline(always)]
    unsafe fn splat(x: f32) -> V {
        // SAFETY: see above.
        unsafe { _mm256_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> V {
        // SAFETY: see above.
        unsafe { _mm256_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16) -> V {
        // SAFETY: see above; a bf16 is the upper half of an f32.
        unsafe {
            let halves = _mm_loadu_si128(from.cast());
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(halves)))
        }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const f16) -> V {
        // SAFETY: see above.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) }
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, v: V) {
        // SAFETY: see above.
        unsafe { _mm256_storeu_ps(to, v) }
    }
    #[inline(always)]
    unsafe fn mul_add(a: V, b: V, c: V) -> V {
        // SAFETY: see above.
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn add(a: V, b: V) -> V {
        // SAFETY: see above.
        unsafe { _mm256_add_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn mul(a: V, b: V) -> V {
        // SAFETY: see above.
        unsafe { _mm256_mul_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn div(a: V, b: V) -> V {
        // SAFETY: see above.
        unsafe { _mm256_div_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn at_most(v: V, limit: V) -> V {
        // SAFETY: see above. The instruction gives its second operand where one is NaN.
        unsafe { _mm256_min_ps(limit, v) }
    }
    #[inline(always)]
    unsafe fn at_least(v: V, limit: V) -> V {
        // SAFETY: see above. The instruction gives its second operand where one is NaN.
        unsafe { _mm256_max_ps(limit, v) }
    }
    #[inline(always)]
    unsafe fn round_and_pow2(v: V) -> (V, V) {
        // SAFETY: see above.
        unsafe {
            let n = _mm256_cvtps_epi32(v);
            let bits = _mm256_slli_epi32::<23>(_mm256_add_epi32(n, _mm256_set1_epi32(127)));
            (_mm256_cvtepi32_ps(n), _mm256_castsi256_ps(bits))
        }
    }
    #[inline(always)]
    unsafe fn sum(v: V) -> f32 {
        // SAFETY: see above.
        unsafe {
            let four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        }
    }
    #[inline(always)]
    unsafe fn transpose(load: impl Fn(usize) -> V, to: *mut f32, stride: usize) {
        // SAFETY: see above; the caller gives room for eight rows of eight.
        unsafe {
            let mut quads = [_mm256_setzero_ps(); 8];
            // 4x4 blocks inside each 128-bit lane: quads[4 q + i] holds, in lane l, column 4 l + i of rows 4 q ..
            for q in 0..2 {
                let (a, b, c, d) = (load(4 * q), load(4 * q + 1), load(4 * q + 2), load(4 * q + 3));
                let (ab_lo, ab_hi) = (_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
                let (cd_lo, cd_hi) = (_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
                quads[4 * q] = _mm256_shuffle_ps::<0x44>(ab_lo, cd_lo);
                quads[4 * q + 1] = _mm256_shuffle_ps::<0xee>(ab_lo, cd_lo);
                quads[4 * q + 2] = _mm256_shuffle_ps::<0x44>(ab_hi, cd_hi);
                quads[4 * q + 3] = _mm256_shuffle_ps::<0xee>(ab_hi, cd_hi);
            }
            for i in 0..4 {
                let (a, b) = (quads[i], quads[4 + i]);
                Self::store(to.add(i * stride), _mm256_permute2f128_ps::<0x20>(a, b));
                Self::store(to.add((4 + i) * stride), _mm256_permute2f128_ps::<0x31>(a, b));
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

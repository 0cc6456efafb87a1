//! aarch64, where NEON is always there.

use std::arch::aarch64::*;

use half::{bf16, f16};

use super::Simd;

#[derive(Clone, Copy)]
pub(crate) struct Neon;

type V = float32x4_t;

// SAFETY of the blocks below: NEON belongs to every aarch64 processor, and four values are behind each pointer, as the
// trait asks of the caller.
impl Simd for Neon {
    type V = V;
    const LANES: usize = 4;

    #[inline(always)]
    unsafe fn splat(x: f32) -> V {
        // SAFETY: see above.
        unsafe { vdupq_n_f32(x) }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> V {
        // SAFETY: see above.
        unsafe { vld1q_f32(from) }
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16) -> V {
        // SAFETY: see above; a bf16 is the upper half of an f32.
        unsafe { vreinterpretq_f32_u32(vshlq_n_u32::<16>(vmovl_u16(vld1_u16(from.cast())))) }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const f16) -> V {
        // SAFETY: see above.
        unsafe {
            let wide = from.cast::<[f16; 4]>().read_unaligned().map(f16::to_f32);
            vld1q_f32(wide.as_ptr())
        }
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, v: V) {
        // SAFETY: see above.
        unsafe { vst1q_f32(to, v) }
    }
    #[inline(always)]
    unsafe fn mul_add(a: V, b: V, c: V) -> V {
        // SAFETY: see above.
        unsafe { vfmaq_f32(c, a, b) }
    }
    #[inline(always)]
    unsafe fn add(a: V, b: V) -> V {
        // SAFETY: see above.
        unsafe { vaddq_f32(a, b) }
    }
    #[inline(always)]
    unsafe fn mul(a: V, b: V) -> V {
        // SAFETY: see above.
        unsafe { vmulq_f32(a, b) }
    }
    #[inline(always)]
    unsafe fn div(a: V, b: V) -> V {
        // SAFETY: see above.
        unsafe { vdivq_f32(a, b) }
    }
    #[inline(always)]
    unsafe fn at_most(v: V, limit: V) -> V {
        // SAFETY: see above. The instruction gives NaN where one operand is.
        unsafe { vminq_f32(v, limit) }
    }
    #[inline(always)]
    unsafe fn at_least(v: V, limit: V) -> V {
        // SAFETY: see above. The instruction gives NaN where one operand is.
        unsafe { vmaxq_f32(v, limit) }
    }
    #[inline(always)]
    unsafe fn round_and_pow2(v: V) -> (V, V) {
        // SAFETY: see above.
        unsafe {
            let n = vcvtnq_s32_f32(v);
            let bits = vshlq_n_s32::<23>(vaddq_s32(n, vdupq_n_s32(127)));
            (vcvtq_f32_s32(n), vreinterpretq_f32_s32(bits))
        }
    }
    #[inline(always)]
    unsafe fn sum(v: V) -> f32 {
        // SAFETY: see above.
        unsafe { vaddvq_f32(v) }
    }
    #[inline(always)]
    unsafe fn transpose(load: impl Fn(usize) -> V, to: *mut f32, stride: usize) {
        // SAFETY: see above; the caller gives room for four rows of four.
        unsafe {
            let (a, b, c, d) = (load(0), load(1), load(2), load(3));
            let (ab_even, ab_odd) = (vtrn1q_f32(a, b), vtrn2q_f32(a, b));
            let (cd_even, cd_odd) = (vtrn1q_f32(c, d), vtrn2q_f32(c, d));
            let wide = |v| vreinterpretq_f64_f32(v);
            let narrow = |v| vreinterpretq_f32_f64(v);
            Self::store(to, narrow(vtrn1q_f64(wide(ab_even), wide(cd_even))));
            Self::store(to.add(stride), narrow(vtrn1q_f64(wide(ab_odd), wide(cd_odd))));
            Self::store(to.add(2 * stride), narrow(vtrn2q_f64(wide(ab_even), wide(cd_even))));
            Self::store(to.add(3 * stride), narrow(vtrn2q_f64(wide(ab_odd), wide(cd_odd))));
        }
    }
}

//! Plain Rust, four values at a time: the fallback, and what Miri can read.

use half::{bf16, f16};

use super::Simd;

#[derive(Clone, Copy)]
pub(crate) struct Scalar;

const LANES: usize = 4;
type V = [f32; LANES];

#[inline(always)]
fn zip(a: V, b: V, f: impl Fn(f32, f32) -> f32) -> V {
    std::array::from_fn(|i| f(a[i], b[i]))
}

// SAFETY of the blocks below: four values behind each pointer, as the trait asks of the caller.
impl Simd for Scalar {
    type V = V;
    const LANES: usize = LANES;

    #[inline(always)]
    unsafe fn splat(x: f32) -> V {
        [x; LANES]
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> V {
        // SAFETY: see above.
        unsafe { from.cast::<V>().read() }
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16) -> V {
        // SAFETY: see above.
        unsafe { from.cast::<[bf16; LANES]>().read() }.map(bf16::to_f32)
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const f16) -> V {
        // SAFETY: see above.
        unsafe { from.cast::<[f16; LANES]>().read() }.map(f16::to_f32)
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, v: V) {
        // SAFETY: see above.
        unsafe { to.cast::<V>().write(v) }
    }
    #[inline(always)]
    unsafe fn mul_add(a: V, b: V, c: V) -> V {
        // Not fused: without the instruction that is a slow library call.
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    unsafe fn add(a: V, b: V) -> V {
        zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn mul(a: V, b: V) -> V {
        zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    unsafe fn div(a: V, b: V) -> V {
        zip(a, b, |a, b| a / b)
    }
    #[inline(always)]
    unsafe fn at_most(v: V, limit: V) -> V {
        zip(v, limit, |v, limit| if v > limit { limit } else { v })
    }
    #[inline(always)]
    unsafe fn at_least(v: V, limit: V) -> V {
        zip(v, limit, |v, limit| if v < limit { limit } else { v })
    }
    #[inline(always)]
    unsafe fn round_and_pow2(v: V) -> (V, V) {
        let n = v.map(f32::round_ties_even);
        (n, n.map(|n| f32::from_bits((((n as i32) + 127) as u32) << 23)))
    }
    #[inline(always)]
    unsafe fn sum(v: V) -> f32 {
        (v[0] + v[2]) + (v[1] + v[3])
    }
    #[inline(always)]
    unsafe fn transpose(load: impl Fn(usize) -> V, to: *mut f32, stride: usize) {
        let rows: [V; LANES] = std::array::from_fn(load);
        let columns: [V; LANES] = std::array::from_fn(|i| rows.map(|row| row[i]));
        for (i, column) in columns.into_iter().enumerate() {
            // SAFETY: the caller gives room for four rows of four.
            unsafe { Self::store(to.add(i * stride), column) };
        }
    }
}

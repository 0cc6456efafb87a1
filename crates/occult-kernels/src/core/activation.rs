//! SwiGLU with a row weight, forward and backward, on one row.

use crate::simd::Simd;
use crate::smm::reference;

/// `exp(x)`, relative error below 3e-7; about 1e-38 where the result would be less, infinity above x = 88.37, NaN for
/// NaN.
///
/// Cody-Waite reduction by `ln 2` and the polynomial of Cephes' `expf`.
#[inline(always)]
unsafe fn exp<S: Simd>(x: S::V) -> S::V {
    // SAFETY: the caller's promise.
    unsafe {
        // The limits of round_and_pow2.
        let x = S::at_most(S::at_least(x, S::splat(-87.3)), S::splat(88.9));
        let (n, pow2) = S::round_and_pow2(S::mul(x, S::splat(std::f32::consts::LOG2_E)));
        let r = S::mul_add(n, S::splat(-0.693_359_4), x);
        let r = S::mul_add(n, S::splat(2.121_944_4e-4), r);
        let mut p = S::splat(1.987_569_2e-4);
        for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
            p = S::mul_add(p, r, S::splat(c));
        }
        let p = S::add(S::mul_add(p, S::mul(r, r), r), S::splat(1.0));
        S::mul(p, pow2)
    }
}

/// `out = weight * silu(gate) * up`; `out` may be `gate` or `up` itself.
///
/// # Safety
/// As [`Simd`]; `len` values behind each pointer, `out` equal to an input or apart from both.
#[inline(always)]
pub(super) unsafe fn swiglu<S: Simd>(
    len: usize,
    gate: *const f32,
    up: *const f32,
    weight: f32,
    out: *mut f32,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let (one, w) = (S::splat(1.0), S::splat(weight));
        let mut i = 0;
        while i + S::LANES <= len {
            let (g, u) = (S::load(gate.add(i)), S::load(up.add(i)));
            let silu = S::div(g, S::add(one, exp::<S>(S::mul(g, S::splat(-1.0)))));
            S::store(out.add(i), S::mul(w, S::mul(silu, u)));
            i += S::LANES;
        }
        while i < len {
            *out.add(i) = weight * (reference::silu(*gate.add(i)) * *up.add(i));
            i += 1;
        }
    }
}

/// One row of the backward pass of `weight * silu(gate) * up`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SwigluBwd {
    /// Values.
    pub(crate) len: usize,
    /// Pre-activation, first branch.
    pub(crate) gate: *const f32,
    /// Pre-activation, second branch.
    pub(crate) up: *const f32,
    /// The row's weight.
    pub(crate) weight: f32,
    /// Out: gradient of `gate`.
    pub(crate) d_gate: *mut f32,
    /// Out: gradient of `up`.
    pub(crate) d_up: *mut f32,
    /// In: gradient of `weight * silu(gate) * up`. Out: these values themselves.
    pub(crate) act: *mut f32,
}

/// Does what [`SwigluBwd`] says and returns the gradient of the weight.
///
/// # Safety
/// As [`Simd`]; `len` values behind each pointer. `d_gate` may be `gate` itself and `d_up` may be `up`; nothing else
/// overlaps.
#[inline(always)]
pub(super) unsafe fn swiglu_bwd<S: Simd>(row: &SwigluBwd) -> f32 {
    // SAFETY: the caller's promise.
    unsafe {
        let (one, w) = (S::splat(1.0), S::splat(row.weight));
        let minus = S::splat(-1.0);
        let mut sum = S::splat(0.0);
        let mut i = 0;
        while i + S::LANES <= row.len {
            let (g, u) = (S::load(row.gate.add(i)), S::load(row.up.add(i)));
            let dh = S::load(row.act.add(i));
            let below = S::add(one, exp::<S>(S::mul(g, minus)));
            let (s, silu) = (S::div(one, below), S::div(g, below));
            let h = S::mul(silu, u);
            sum = S::mul_add(h, dh, sum);
            let w_dh = S::mul(w, dh);
            // s + g s (1 - s)
            let slope = S::mul_add(S::mul(g, s), S::mul_add(s, minus, one), s);
            S::store(row.d_gate.add(i), S::mul(S::mul(w_dh, u), slope));
            S::store(row.d_up.add(i), S::mul(w_dh, silu));
            S::store(row.act.add(i), S::mul(w, h));
            i += S::LANES;
        }
        let mut sum = S::sum(sum);
        while i < row.len {
            let (g, u, dh) = (*row.gate.add(i), *row.up.add(i), *row.act.add(i));
            let silu = reference::silu(g);
            sum += silu * u * dh;
            *row.d_gate.add(i) = row.weight * dh * u * reference::silu_grad(g);
            *row.d_up.add(i) = row.weight * dh * silu;
            *row.act.add(i) = row.weight * (silu * u);
            i += 1;
        }
        sum
    }
}

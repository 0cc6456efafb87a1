//! Loops that the compiler vectorises, compiled once per instruction set and chosen at run time.

/// Instruction set of this machine, best first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Isa {
    /// AVX-512 F, BW, DQ, VL and FMA.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// AVX2 and FMA.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// What the compiler may assume.
    Base,
}

/// The instruction set to use: the best, but for tests that force another.
pub(crate) fn isa() -> Isa {
    #[cfg(test)]
    if let Some(isa) = forced::get() {
        return isa;
    }
    best()
}

/// What this machine has. The standard library remembers the answer.
fn best() -> Isa {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::is_x86_feature_detected as has;
        if has!("avx2") && has!("fma") {
            let wide = has!("avx512f") && has!("avx512bw") && has!("avx512dq") && has!("avx512vl");
            return if wide { Isa::Avx512 } else { Isa::Avx2 };
        }
    }
    Isa::Base
}

#[cfg(test)]
pub(crate) use forced::for_each_isa;

/// Tests run with every instruction set of the machine.
#[cfg(test)]
mod forced {
    use std::cell::Cell;

    use super::{Isa, best};
    use crate::threads::alone;

    thread_local! {
        static FORCED: Cell<Option<Isa>> = const { Cell::new(None) };
    }

    pub(super) fn get() -> Option<Isa> {
        FORCED.get()
    }

    /// Unforces, also when a test panics: another one may run on this thread.
    struct Unforce;

    impl Drop for Unforce {
        fn drop(&mut self) {
            FORCED.set(None);
        }
    }

    /// Calls `test` with the best instruction set, and then, on this thread alone, with each of the others forced.
    #[track_caller]
    pub(crate) fn for_each_isa<E>(mut test: impl FnMut(Isa) -> Result<(), E>) -> Result<(), E> {
        let all = [
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2,
            Isa::Base,
        ];
        test(best())?;
        // Each set includes those after it.
        for isa in all.into_iter().skip_while(|&isa| isa != best()).skip(1) {
            let _unforce = Unforce;
            FORCED.set(Some(isa));
            alone(|| test(isa))?;
        }
        Ok(())
    }
}

/// Lanes of the registers that a body compiled with `ISA` may count on, and whether it has fused multiply-add.
#[cfg(target_arch = "x86_64")]
pub(crate) const AVX512: u8 = 2;
#[cfg(target_arch = "x86_64")]
pub(crate) const AVX2: u8 = 1;
pub(crate) const BASE: u8 = 0;

/// Defines a function whose body is compiled for every instruction set; the body may use the constant `ISA`.
macro_rules! vectorised {
    ($(#[$doc:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$doc])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            #[allow(clippy::too_many_arguments, clippy::extra_unused_type_parameters)]
            fn body<const ISA: u8>($($arg: $ty),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
                #[allow(clippy::too_many_arguments)]
                fn avx512($($arg: $ty),*) $(-> $ret)? {
                    body::<{ $crate::ops::simd::AVX512 }>($($arg),*)
                }
                #[target_feature(enable = "avx2,fma")]
                #[allow(clippy::too_many_arguments)]
                fn avx2($($arg: $ty),*) $(-> $ret)? {
                    body::<{ $crate::ops::simd::AVX2 }>($($arg),*)
                }
                match $crate::ops::simd::isa() {
                    // SAFETY: `isa` found these features on this machine.
                    $crate::ops::simd::Isa::Avx512 => return unsafe { avx512($($arg),*) },
                    // SAFETY: as above.
                    $crate::ops::simd::Isa::Avx2 => return unsafe { avx2($($arg),*) },
                    $crate::ops::simd::Isa::Base => {}
                }
            }
            body::<{ $crate::ops::simd::BASE }>($($arg),*)
        }
    };
}
pub(crate) use vectorised;

/// `a * b + c`, fused where the instruction set has it (elsewhere a fused form would be a library call).
#[inline(always)]
pub(crate) fn fma<const ISA: u8>(a: f32, b: f32, c: f32) -> f32 {
    if ISA != BASE || cfg!(target_arch = "aarch64") { a.mul_add(b, c) } else { a * b + c }
}

/// `e^x` within 2 units in the last place, without branches; NaN stays NaN, overflow is infinite, underflow ends in 0.
///
/// Cephes' `expf`: `x = n ln 2 + r`, a polynomial of degree 5 for `(e^r - 1 - r) / r²`, and the exponent set by bits.
#[inline(always)]
pub(crate) fn exp<const ISA: u8>(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer
    let c = if x < -104.0 { -104.0 } else { x };
    let c = if c > 89.0 { 89.0 } else { c };
    let n = fma::<ISA>(c, std::f32::consts::LOG2_E, ROUND) - ROUND;
    // ln 2 = 355 / 512 - 2.1219444e-4; the first part times n is exact.
    let r = fma::<ISA>(n, -355.0 / 512.0, c);
    let r = fma::<ISA>(n, 2.121_944_4e-4, r);
    let mut p = 1.987_569_1e-4;
    for a in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 5e-1] {
        p = fma::<ISA>(p, r, a);
    }
    let e = fma::<ISA>(p, r * r, r) + 1.0;
    // 2^n in two factors, so that neither leaves the range of exponents. NaN has any n, and e keeps it NaN.
    // The sum below has the integer n in its low bits.
    let n = (n + ROUND).to_bits().wrapping_sub(ROUND.to_bits()) as i32;
    let half = n >> 1;
    let power = |n: i32| f32::from_bits(((n.wrapping_add(127)) as u32) << 23);
    e * power(half) * power(n.wrapping_sub(half))
}

/// Lanes of the running sums below: enough independent chains for every instruction set.
const SUMS: usize = 64;

/// Sum of the lanes, halving.
#[inline(always)]
fn fold(mut lanes: [f32; SUMS]) -> f32 {
    let mut n = SUMS;
    while n > 1 {
        n /= 2;
        for i in 0..n {
            lanes[i] += lanes[i + n];
        }
    }
    lanes[0]
}

vectorised! {
    /// `sum a_i b_i`.
    pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
        dot_body::<ISA>(a, b)
    }
}

/// [`dot`] for callers that are themselves compiled per instruction set.
#[inline(always)]
pub(crate) fn dot_body<const ISA: u8>(a: &[f32], b: &[f32]) -> f32 {
    let n = a.len().min(b.len());
    let (a, b) = (&a[..n], &b[..n]);
    let mut lanes = [0f32; SUMS];
    let (xs, ys) = (a.chunks_exact(SUMS), b.chunks_exact(SUMS));
    let (ra, rb) = (xs.remainder(), ys.remainder());
    for (x, y) in xs.zip(ys) {
        for i in 0..SUMS {
            lanes[i] = fma::<ISA>(x[i], y[i], lanes[i]);
        }
    }
    let (xs, ys) = (ra.chunks_exact(16), rb.chunks_exact(16));
    let (ra, rb) = (xs.remainder(), ys.remainder());
    for (x, y) in xs.zip(ys) {
        for i in 0..16 {
            lanes[i] = fma::<ISA>(x[i], y[i], lanes[i]);
        }
    }
    let mut tail = 0.0;
    for (x, y) in ra.iter().zip(rb) {
        tail = fma::<ISA>(*x, *y, tail);
    }
    fold(lanes) + tail
}

vectorised! {
    /// Largest value, minus infinity of nothing. NaN is skipped.
    pub(crate) fn max(a: &[f32]) -> f32 {
        let mut lanes = [f32::NEG_INFINITY; SUMS];
        let chunks = a.chunks_exact(SUMS);
        let tail = chunks.remainder();
        for x in chunks {
            for i in 0..SUMS {
                lanes[i] = if x[i] > lanes[i] { x[i] } else { lanes[i] };
            }
        }
        lanes.iter().chain(tail).copied().fold(f32::NEG_INFINITY, f32::max)
    }
}

vectorised! {
    /// `sum e^(a_i - shift)`.
    pub(crate) fn sum_exp(a: &[f32], shift: f32) -> f32 {
        let mut lanes = [0f32; SUMS];
        let chunks = a.chunks_exact(SUMS);
        let tail = chunks.remainder();
        for x in chunks {
            for i in 0..SUMS {
                lanes[i] += exp::<ISA>(x[i] - shift);
            }
        }
        let mut rest = 0.0;
        for x in tail {
            rest += exp::<ISA>(*x - shift);
        }
        fold(lanes) + rest
    }
}

vectorised! {
    /// `a_i = factor * e^(a_i - shift)`.
    pub(crate) fn scaled_exp(a: &mut [f32], shift: f32, factor: f32) {
        for x in a.iter_mut() {
            *x = exp::<ISA>(*x - shift) * factor;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    vectorised! {
        fn exps(x: &[f32], out: &mut [f32]) {
            for (o, x) in out.iter_mut().zip(x) {
                *o = exp::<ISA>(*x);
            }
        }
    }

    /// [`for_each_isa`] for tests that return nothing.
    #[track_caller]
    fn every(mut test: impl FnMut(Isa)) {
        let Ok(()) = for_each_isa(|isa| {
            test(isa);
            Ok::<(), std::convert::Infallible>(())
        });
    }

    #[test]
    fn the_forced_set_is_the_one_that_runs() {
        vectorised! {
            fn compiled_for() -> u8 {
                ISA
            }
        }
        let mut seen = Vec::new();
        every(|isa| {
            assert_eq!(super::isa(), isa);
            seen.push(compiled_for());
        });
        assert_eq!(super::isa(), best());
        assert!(seen.iter().rev().copied().eq(0..=compiled_for()), "{seen:?}");
    }

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        let mut xs: Vec<f32> = (0..200_000).map(|i| -104.0 + i as f32 * 1e-3).filter(|x| *x < 89.0).collect();
        xs.extend([0.0, -0.0, 88.72, -87.3, 1e-30, -1e-30]);
        let mut found = vec![0.0; xs.len()];
        every(|isa| {
            exps(&xs, &mut found);
            for (x, got) in xs.iter().zip(&found) {
                let want = f64::from(*x).exp();
                if want > f64::from(f32::MAX) {
                    assert!(*got > 3.4e38, "e^{x} = {got}");
                    continue;
                }
                // One unit in the last place, down to the subnormal step; two roundings there.
                let unit = (want * 2f64.powi(-23)).max(f64::from(f32::from_bits(1)));
                assert!((f64::from(*got) - want).abs() <= 2.0 * unit, "e^{x} = {got}, not {want} ({isa:?})");
            }
        });
    }

    #[test]
    fn exp_of_the_extremes() {
        let xs = [f32::NEG_INFINITY, -1e30, f32::INFINITY, 1e30, 0.0, f32::NAN];
        every(|isa| {
            let mut got = [0.0; 6];
            exps(&xs, &mut got);
            assert_eq!(got[..5], [0.0, 0.0, f32::INFINITY, f32::INFINITY, 1.0], "{isa:?}");
            assert!(got[5].is_nan(), "{isa:?}");
        });
    }

    #[test]
    fn sums_are_those_of_f64_at_every_length() {
        for n in [0, 1, 15, 63, 64, 65, 200] {
            let a: Vec<f32> = (0..n).map(|i| (i as f32 * 0.7).sin()).collect();
            let b: Vec<f32> = (0..n).map(|i| (i as f32 * 0.3).cos()).collect();
            every(|isa| {
                let want: f64 = a.iter().zip(&b).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum();
                assert!((f64::from(dot(&a, &b)) - want).abs() < 1e-5, "dot of {n}, {isa:?}");
                let want: f64 = a.iter().map(|x| f64::from(*x - 0.5).exp()).sum();
                let off = (f64::from(sum_exp(&a, 0.5)) - want).abs();
                assert!(off < 1e-5 * (n as f64 + 1.0), "exp of {n}, {isa:?}");
                assert_eq!(max(&a), a.iter().copied().fold(f32::NEG_INFINITY, f32::max), "{isa:?}");
                let mut scaled = a.clone();
                scaled_exp(&mut scaled, 0.5, 3.0);
                for (x, got) in a.iter().zip(&scaled) {
                    let want = 3.0 * f64::from(*x - 0.5).exp();
                    assert!((f64::from(*got) / want - 1.0).abs() < 1e-6, "{got} for {want}, {isa:?}");
                }
            });
        }
    }
}

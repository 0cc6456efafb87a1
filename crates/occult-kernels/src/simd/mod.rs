//! What the kernels need of a vector unit. The kernels are written once over [`Simd`]; `isa` compiles them for each
//! instruction set and picks one at run time.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;
mod scalar;

#[cfg(target_arch = "x86_64")]
pub(crate) use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) use avx512::Avx512;
use half::{bf16, f16};
#[cfg(target_arch = "aarch64")]
pub(crate) use neon::Neon;
pub(crate) use scalar::Scalar;

/// A vector unit with `LANES` lanes of `f32`.
///
/// # Safety
/// All functions may be called only where the processor has the instruction set (and, to be fast, only inlined into a
/// function that is compiled for it). Loads and stores need as many valid values behind the pointer as there are
/// lanes; no alignment beyond the type's.
pub(crate) trait Simd: Copy + 'static {
    type V: Copy;
    const LANES: usize;

    unsafe fn splat(x: f32) -> Self::V;
    unsafe fn load(from: *const f32) -> Self::V;
    unsafe fn load_bf16(from: *const bf16) -> Self::V;
    unsafe fn load_f16(from: *const f16) -> Self::V;
    unsafe fn store(to: *mut f32, v: Self::V);
    /// `a b + c`, fused where the unit can.
    unsafe fn mul_add(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V;
    /// The smaller lane by lane; NaN where `v` is NaN.
    unsafe fn at_most(v: Self::V, limit: Self::V) -> Self::V;
    /// The larger lane by lane; NaN where `v` is NaN.
    unsafe fn at_least(v: Self::V, limit: Self::V) -> Self::V;
    /// The nearest whole number `n` of each lane and `2^n`, for `-126 <= n <= 128`; `2^128` is infinity.
    unsafe fn round_and_pow2(v: Self::V) -> (Self::V, Self::V);
    /// Sum of all lanes, in a fixed order.
    unsafe fn sum(v: Self::V) -> f32;
    /// Sums of all lanes of four vectors, each in a fixed order.
    #[inline(always)]
    unsafe fn sum4(v: [Self::V; 4]) -> [f32; 4] {
        // SAFETY: the caller's promise.
        v.map(|v| unsafe { Self::sum(v) })
    }
    /// Stores the transpose of `LANES` vectors: lane `i` of `load(j)` goes to `to[i * stride + j]`.
    unsafe fn transpose(load: impl Fn(usize) -> Self::V, to: *mut f32, stride: usize);
    /// Asks for the cache line at `at`, which need not be valid.
    #[inline(always)]
    unsafe fn prefetch(at: *const f32) {
        let _ = at;
    }
    /// As [`Simd::prefetch`], for later: into the second-level cache.
    #[inline(always)]
    unsafe fn prefetch_far(at: *const u8) {
        let _ = at;
    }
}

/// A type weights are stored in.
pub(crate) trait Stored: Copy + Send + Sync + 'static {
    /// # Safety
    /// As [`Simd::load`].
    unsafe fn load<S: Simd>(from: *const Self) -> S::V;
    fn widen(self) -> f32;
}

impl Stored for f32 {
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const Self) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { S::load(from) }
    }
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
}

impl Stored for bf16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const Self) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { S::load_bf16(from) }
    }
    #[inline(always)]
    fn widen(self) -> f32 {
        self.to_f32()
    }
}

impl Stored for f16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const Self) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { S::load_f16(from) }
    }
    #[inline(always)]
    fn widen(self) -> f32 {
        self.to_f32()
    }
}

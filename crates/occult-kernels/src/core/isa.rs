//! The kernels compiled for each instruction set, and the choice of one.

use std::sync::OnceLock;

use half::{bf16, f16};

use super::activation::{SwigluBwd, swiglu, swiglu_bwd};
use super::ahead::Ahead;
use super::dot::{self, Dot};
use super::pack::{self, Panel, Steps};
use super::tile::tile;
use super::{A_STRIDE, MAX_TILE_COLS, MAX_TILE_ROWS};
use crate::Matrix;
use crate::simd::{Scalar, Simd};

/// Vector instructions the kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum InstructionSet {
    /// Plain Rust; anywhere.
    Scalar,
    /// aarch64.
    Neon,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// x86-64 with AVX-512 F and VL.
    Avx512,
}

impl InstructionSet {
    /// What this processor has, slowest first. [`InstructionSet::Scalar`] is always there.
    #[must_use]
    pub fn available() -> Vec<Self> {
        let all = [Self::Scalar, Self::Neon, Self::Avx2, Self::Avx512];
        all.into_iter().filter(|&set| Isa::get(set).is_some()).collect()
    }

    /// The fastest this processor has.
    #[must_use]
    pub fn best() -> Self {
        Isa::best().set
    }

    /// Lower-case name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Neon => "neon",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
        }
    }
}

/// Independent sums of [`Isa::fma_loop`]: more than two units times their latency, and few enough for 16 registers.
pub(crate) const FMA_CHAINS: usize = 12;

type TileFn = unsafe fn(usize, *const f32, *const f32, *const *mut f32, bool, &Ahead);

/// Kernels that read a stored type.
pub(crate) struct ForType<T: 'static> {
    pub(crate) pack_transposed: unsafe fn(&Panel<T>, *mut f32),
    pub(crate) pack_plain: unsafe fn(&Panel<T>, *const u32, *mut f32),
    /// For 1, 2, .. x rows.
    pub(crate) dot: &'static [unsafe fn(&Dot<T>)],
}

/// All kernels of one instruction set. Calling one is sound only where the processor has it: [`Isa::get`] checks.
pub(crate) struct Isa {
    pub(crate) set: InstructionSet,
    /// Columns of a tile.
    pub(crate) tile_cols: usize,
    /// Tiles of 1, 2, .. rows; A packed as rows [`A_STRIDE`] apart.
    pub(crate) tile_rows: &'static [TileFn],
    /// The same; A packed as steps [`Isa::step_len`] apart.
    pub(crate) tile_steps: &'static [TileFn],
    /// Distance of two steps of a packed A panel: the rows of a tile, filled up to whole vectors.
    pub(crate) step_len: usize,
    pub(crate) pack_steps: unsafe fn(&Steps<'_>, *mut f32, usize),
    pub(crate) f32: ForType<f32>,
    pub(crate) bf16: ForType<bf16>,
    pub(crate) f16: ForType<f16>,
    pub(crate) swiglu: unsafe fn(usize, *const f32, *const f32, f32, *mut f32),
    pub(crate) swiglu_bwd: unsafe fn(&SwigluBwd) -> f32,
    /// `calls` rounds of [`FMA_CHAINS`] independent multiply-adds of a vector; returns their sum. For [`crate::peak`].
    pub(crate) fma_loop: unsafe fn(usize) -> f32,
    /// Sum of (nearly all of) the values behind the pointer. For [`crate::peak`].
    pub(crate) read_loop: unsafe fn(usize, *const f32) -> f32,
    /// Lanes of a vector.
    pub(crate) lanes: usize,
    /// See [`Isa::is_few`]: for weights of four bytes and of two.
    few_rows: [usize; 2],
}

impl Isa {
    /// Whether a product of so many rows with a transposed weight reads the weight as it is stored instead of packing it:
    /// packing costs as much for few rows as for many, but wide tiles of packed values need fewer loads. Weights of two bytes
    /// need fewer anyway.
    pub(crate) fn is_few(&self, rows: usize, weight: Matrix<'_>) -> bool {
        rows <= self.few_rows[usize::from(!matches!(weight, Matrix::F32(_)))]
    }

    /// The fastest kernels this processor can run; looked up once.
    pub(crate) fn best() -> &'static Isa {
        static BEST: OnceLock<&'static Isa> = OnceLock::new();
        BEST.get_or_init(|| {
            InstructionSet::available().into_iter().filter_map(Isa::get).next_back().unwrap_or(&scalar::ISA)
        })
    }

    /// The kernels of `set`, if the processor has it.
    pub(crate) fn get(set: InstructionSet) -> Option<&'static Isa> {
        match set {
            InstructionSet::Scalar => Some(&scalar::ISA),
            #[cfg(all(target_arch = "x86_64", not(miri)))]
            InstructionSet::Avx2 => (is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c"))
            .then_some(&avx2::ISA),
            #[cfg(all(target_arch = "x86_64", not(miri)))]
            // VL: without it the compiler keeps half of the registers free for what follows the loops.
            InstructionSet::Avx512 => (is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512vl"))
            .then_some(&avx512::ISA),
            #[cfg(all(target_arch = "aarch64", not(miri)))]
            InstructionSet::Neon => Some(&neon::ISA),
            #[allow(unreachable_patterns, reason = "the sets of other processors")]
            _ => None,
        }
    }
}

/// See [`Isa::fma_loop`].
#[inline(always)]
unsafe fn fma_loop<S: Simd>(calls: usize) -> f32 {
    // SAFETY: the caller's promise; no memory is touched.
    unsafe {
        // Factors unknown to the compiler and all different, so that no two sums can be shared.
        let factors: [S::V; FMA_CHAINS] =
            std::array::from_fn(|i| S::splat(std::hint::black_box(1.0 / (i + 2) as f32)));
        let mut acc = factors;
        let b = S::splat(std::hint::black_box(1.0));
        for _ in 0..calls {
            for acc in &mut acc {
                *acc = S::mul_add(*acc, factors[0], b);
            }
        }
        acc.iter().map(|&acc| S::sum(acc)).sum()
    }
}

/// See [`Isa::read_loop`]: four streams, asked for ahead.
#[inline(always)]
unsafe fn read_loop<S: Simd>(len: usize, from: *const f32) -> f32 {
    // SAFETY: the caller's promise: `len` values.
    unsafe {
        let quarter = len / 4 - (len / 4) % (2 * S::LANES);
        let mut acc = [[S::splat(0.0); 2]; 4];
        for step in (0..quarter).step_by(2 * S::LANES) {
            for (stream, acc) in acc.iter_mut().enumerate() {
                let at = from.add(stream * quarter + step);
                S::prefetch(at.wrapping_add(1024));
                S::prefetch(at.wrapping_add(1024 + S::LANES));
                acc[0] = S::add(acc[0], S::load(at));
                acc[1] = S::add(acc[1], S::load(at.add(S::LANES)));
            }
        }
        acc.iter().flatten().map(|&acc| S::sum(acc)).sum()
    }
}

/// Compiles every kernel with the given features and fills the table.
macro_rules! isa {
    ($module:ident, $simd:ty, $set:ident, vectors $nv:literal, rows [$($mr:literal)*], dot $wr:literal x [$($xr:literal)*],
     few $few:expr
     $(, features $features:literal)?) => {
        mod $module {
            use super::*;
            use crate::simd::Stored;

            const STEP_LEN: usize = [$($mr),*].len().next_power_of_two();
            // Packed steps fit into an A panel and are whole vectors; a tile fits into the spare one.
            const _: () = assert!(STEP_LEN <= MAX_TILE_ROWS && STEP_LEN % <$simd as Simd>::LANES == 0);
            const _: () = assert!($nv * <$simd as Simd>::LANES <= MAX_TILE_COLS);

            // SAFETY of the functions: each has the contract of the generic kernel it compiles, and is called only
            // after `Isa::get` has found the features.
            $(#[target_feature(enable = $features)])?
            unsafe fn by_rows<const MR: usize>(
                k: usize, a: *const f32, b: *const f32, c: *const *mut f32, add: bool, ahead: &Ahead,
            ) {
                // SAFETY: see above.
                unsafe { tile::<$simd, MR, $nv, A_STRIDE, 1>(k, a, b, c, add, ahead) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn by_steps<const MR: usize>(
                k: usize, a: *const f32, b: *const f32, c: *const *mut f32, add: bool, ahead: &Ahead,
            ) {
                // SAFETY: see above.
                unsafe { tile::<$simd, MR, $nv, 1, STEP_LEN>(k, a, b, c, add, ahead) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn transposed<T: Stored>(panel: &Panel<T>, to: *mut f32) {
                // SAFETY: see above.
                unsafe { pack::transposed::<$simd, T, $nv>(panel, to) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn plain<T: Stored>(panel: &Panel<T>, idx: *const u32, to: *mut f32) {
                // SAFETY: see above.
                unsafe { pack::plain::<$simd, T, $nv>(panel, idx, to) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn steps(panels: &Steps<'_>, to: *mut f32, distance: usize) {
                // SAFETY: see above.
                unsafe { pack::steps::<$simd, STEP_LEN>(panels, to, distance) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn dots<T: Stored, const XR: usize>(dot: &Dot<T>) {
                // SAFETY: see above.
                unsafe { dot::rows::<$simd, T, $wr, XR>(dot) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn activate(len: usize, gate: *const f32, up: *const f32, weight: f32, out: *mut f32) {
                // SAFETY: see above.
                unsafe { swiglu::<$simd>(len, gate, up, weight, out) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn activate_bwd(row: &SwigluBwd) -> f32 {
                // SAFETY: see above.
                unsafe { swiglu_bwd::<$simd>(row) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn fmas(calls: usize) -> f32 {
                // SAFETY: see above.
                unsafe { fma_loop::<$simd>(calls) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn reads(len: usize, from: *const f32) -> f32 {
                // SAFETY: see above.
                unsafe { read_loop::<$simd>(len, from) }
            }

            const fn for_type<T: Stored>() -> ForType<T> {
                ForType {
                    pack_transposed: transposed::<T>,
                    pack_plain: plain::<T>,
                    dot: const { &[$(dots::<T, $xr>),*] },
                }
            }

            pub(super) static ISA: Isa = Isa {
                set: InstructionSet::$set,
                tile_cols: $nv * <$simd>::LANES,
                tile_rows: &[$(by_rows::<$mr>),*],
                tile_steps: &[$(by_steps::<$mr>),*],
                step_len: STEP_LEN,
                pack_steps: steps,
                f32: for_type(),
                bf16: for_type(),
                f16: for_type(),
                swiglu: activate,
                swiglu_bwd: activate_bwd,
                fma_loop: fmas,
                read_loop: reads,
                lanes: <$simd>::LANES,
                few_rows: $few,
            };
        }
    };
}

isa!(scalar, Scalar, Scalar, vectors 2, rows [1 2 3 4], dot 2 x [1 2], few [12, 12]);
#[cfg(all(target_arch = "x86_64", not(miri)))]
isa!(avx2, crate::simd::Avx2, Avx2, vectors 2, rows [1 2 3 4 5 6], dot 2 x [1 2 3 4], few [12, 12],
    features "avx2,fma,f16c");
#[cfg(all(target_arch = "x86_64", not(miri)))]
isa!(avx512, crate::simd::Avx512, Avx512, vectors 2, rows [1 2 3 4 5 6 7 8 9 10 11 12 13 14],
    dot 4 x [1 2 3 4 5 6], few [48, 128], features "avx512f,avx512vl");
#[cfg(all(target_arch = "aarch64", not(miri)))]
isa!(neon, crate::simd::Neon, Neon, vectors 4, rows [1 2 3 4 5 6], dot 4 x [1 2 3 4], few [12, 12],
    features "neon");

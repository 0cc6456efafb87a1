//! What is compiled for each instruction set: tiles of up to 6 rows of activations by two panels of weights, and the
//! steps before and after them.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod scalar;

use half::bf16;

use super::activations::{self, Rows};
use super::isa::Isa;
use super::matrix::{LEVELS, PANEL_ROWS};
use super::silu;

/// Values of a row of a tile: two panels.
pub(super) const TILE_COLS: usize = 2 * PANEL_ROWS;

/// What a tile is given.
#[derive(Clone, Copy)]
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code, reason = "plain Rust asks for no memory ahead"))]
pub(super) struct Args {
    /// The record that each row begins with, see [`activations`].
    pub(super) rows: *const *const u8,
    /// Bytes from there to the first record that counts.
    pub(super) skip: usize,
    /// Number of groups.
    pub(super) groups: usize,
    /// Groups of four columns in a group.
    pub(super) quads: usize,
    /// Two panels, from the first group that counts.
    pub(super) data: [*const u8; 2],
    pub(super) scales: [*const bf16; 2],
    /// `[rows, TILE_COLS]`, added to: the second panel's columns after those of the first.
    pub(super) out: *mut f32,
    /// Where memory is asked for meanwhile, `lines` cache lines of both for every two quads (spread out, and into the
    /// second-level cache: both are faster than all at once or into the first); need not be valid.
    pub(super) ahead: [*const u8; 2],
    pub(super) lines: usize,
}

/// Adds groups in ascending order, each with one fused multiply-add. Safe to call where the instructions are and the
/// pointers are valid for what [`Args`] says.
pub(super) type TileFn = unsafe fn(&Args);

/// Everything for one instruction set; calling it is safe only where the processor has that: [`Isa::kernels`] checks.
pub(super) struct Kernels {
    /// For 1, 2, .. rows, over weights of 8 bits.
    pub(super) q8: &'static [TileFn],
    /// The same over weights of 4 bits.
    pub(super) q4: &'static [TileFn],
    pub(super) decode: unsafe fn(*const u8, usize, *mut u8),
    pub(super) quantise: unsafe fn(&Rows, *mut u8),
    pub(super) swiglu: unsafe fn(*const f32, usize, *mut f32, usize),
    pub(super) merge: unsafe fn(*const f32, &Merge<'_>),
}

/// Where one panel's results of a tile are added: `y[rows[i], col + j] += weights[i] * c[i, j]`.
pub(super) struct Merge<'a> {
    pub(super) rows: &'a [u32],
    pub(super) weights: &'a [f32],
    pub(super) y: *mut f32,
    /// Distance of two rows of `y`.
    pub(super) stride: usize,
    pub(super) col: usize,
    /// Columns that exist, at most [`PANEL_ROWS`].
    pub(super) cols: usize,
}

/// # Safety
/// `c` has a tile row for each of the rows, which `y` has as well, with the columns; nobody else touches those.
#[inline(always)]
unsafe fn merge(c: *const f32, to: &Merge<'_>) {
    for (i, (&row, &weight)) in to.rows.iter().zip(to.weights).enumerate() {
        // SAFETY: the caller's promise.
        let (from, y) = unsafe { (c.add(i * TILE_COLS), to.y.add(row as usize * to.stride + to.col)) };
        let add = |j: usize| {
            // SAFETY: the caller's promise, for j below `cols`.
            unsafe { *y.add(j) += weight * *from.add(j) }
        };
        if to.cols == PANEL_ROWS { (0..PANEL_ROWS).for_each(add) } else { (0..to.cols).for_each(add) }
    }
}

/// `len` bytes of codes, 64 at a time two quads of a panel, become twice as many levels.
///
/// # Safety
/// `from` has `len` bytes, a multiple of 64, and `to` room for twice as many.
#[inline(always)]
unsafe fn decode(from: *const u8, len: usize, to: *mut u8) {
    for at in (0..len).step_by(64) {
        for i in 0..64 {
            // SAFETY: the caller's promise.
            unsafe {
                let codes = *from.add(at + i);
                *to.add(2 * at + i) = LEVELS[usize::from(codes & 15)];
                *to.add(2 * at + 64 + i) = LEVELS[usize::from(codes >> 4)];
            }
        }
    }
}

/// Compiles what needs no instructions of its own for the given features, and fills the table.
macro_rules! kernels {
    ($module:ident, q8 $q8:expr, q4 $q4:expr, decode $decode:path $(, features $features:literal)?) => {
        pub(super) mod $module {
            use super::*;

            // SAFETY of the functions: each has the contract of the function it compiles, and is called only after
            // `Isa::kernels` has found the features.
            $(#[target_feature(enable = $features)])?
            unsafe fn decode_codes(from: *const u8, len: usize, to: *mut u8) {
                // SAFETY: see above.
                unsafe { $decode(from, len, to) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn quantise(rows: &Rows, to: *mut u8) {
                // SAFETY: see above.
                unsafe { activations::quantise(rows, to) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn swiglu(c: *const f32, rows: usize, to: *mut f32, stride: usize) {
                // SAFETY: see above.
                unsafe { silu::swiglu(c, rows, to, stride) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn merge_panel(c: *const f32, to: &Merge<'_>) {
                // SAFETY: see above.
                unsafe { merge(c, to) }
            }

            pub(in crate::quant) static KERNELS: Kernels =
                Kernels { q8: $q8, q4: $q4, decode: decode_codes, quantise, swiglu, merge: merge_panel };
        }
    };
}

kernels!(plain, q8 &scalar::Q8, q4 &scalar::Q4, decode decode);
#[cfg(target_arch = "x86_64")]
kernels!(avx2_only, q8 &avx2::PLAIN_Q8, q4 &avx2::PLAIN_Q4, decode avx2::decode, features "avx2,fma");
#[cfg(target_arch = "x86_64")]
kernels!(avx_vnni, q8 &avx2::VNNI_Q8, q4 &avx2::VNNI_Q4, decode avx2::decode, features "avx2,fma");
#[cfg(target_arch = "x86_64")]
kernels!(avx512_vnni, q8 &avx512::Q8, q4 &avx512::Q4, decode avx512::decode,
    features "avx512f,avx512bw,avx512vl,avx512dq,fma");

impl Isa {
    /// The kernels; `None` where the processor does not have the instructions.
    pub(super) fn kernels(self) -> Option<&'static Kernels> {
        self.available().then_some(match self {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Vnni => &avx512_vnni::KERNELS,
            #[cfg(target_arch = "x86_64")]
            Isa::AvxVnni => &avx_vnni::KERNELS,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => &avx2_only::KERNELS,
            _ => &plain::KERNELS,
        })
    }
}

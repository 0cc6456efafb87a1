//! Tiles: up to 6 rows of activations times one or two panels of weights, over all columns.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod scalar;

use half::bf16;

use super::isa::Isa;
use super::matrix::{Format, Layout, PANEL_ROWS};

/// Rows of the largest tile.
pub(super) const MAX_ROWS: usize = 6;
/// Values of a row of a tile: two panels.
pub(super) const TILE_COLS: usize = 2 * PANEL_ROWS;

/// Results: `[row][column]`, the second panel's columns after those of the first.
#[repr(align(64))]
#[derive(Debug, Clone)]
pub(super) struct Tile(pub(super) [[f32; TILE_COLS]; MAX_ROWS]);

impl Tile {
    pub(super) fn new() -> Self {
        Self([[0.0; TILE_COLS]; MAX_ROWS])
    }
}

/// Some rows of activations, quantised and interleaved.
#[derive(Debug, Clone, Copy)]
pub(super) struct Block<'a> {
    /// At most [`Isa::max_rows`].
    pub(super) rows: usize,
    /// `[K' / 4][rows][4]`
    pub(super) levels: &'a [i8],
    /// `[G][rows]`
    pub(super) scales: &'a [f32],
    /// `[G][rows]`: -128 times the sum of the levels, which takes the 128 of the weights out again.
    pub(super) starts: &'a [i32],
}

// Only x86-64 has kernels that are given this.
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
/// What a kernel is given: sizes checked, pointers valid for them.
#[derive(Clone, Copy)]
struct Args {
    groups: usize,
    /// Groups of four columns in a group.
    quads: usize,
    levels: *const i8,
    scales: *const f32,
    starts: *const i32,
    data: [*const u8; 2],
    weight_scales: [*const bf16; 2],
    out: *mut f32,
}

/// A panel's bytes and scales.
pub(super) type Panel<'a> = (&'a [u8], &'a [bf16]);

/// `out[i][16 p + j] = block[i] · panels[p][j]` for one or two panels of matrices of the same layout.
///
/// # Panics
/// When a slice has the wrong length for the layout, or the block too many rows: errors of this crate, not of its callers.
#[cfg_attr(not(target_arch = "x86_64"), allow(unused_variables))]
pub(super) fn tile(isa: Isa, layout: &Layout, block: Block<'_>, panels: &[Panel<'_>], out: &mut Tile) {
    let (rows, groups) = (block.rows, layout.groups());
    assert!(rows >= 1 && rows <= isa.max_rows() && isa.available(), "rows of the block");
    assert!(block.levels.len() == rows * layout.padded_cols(), "levels of the block");
    assert!(
        block.scales.len() == rows * groups && block.starts.len() == rows * groups,
        "scales of the block"
    );
    let (&first, &last) = match panels {
        [one] => (one, one),
        [first, last] => (first, last),
        _ => panic!("one or two panels"),
    };
    for (data, scales) in [first, last] {
        assert!(data.len() == layout.panel_bytes() && scales.len() == layout.panel_scales(), "panel");
    }
    for row in &mut out.0[..rows] {
        row.fill(0.0);
    }
    let args = Args {
        groups,
        quads: layout.group() / 4,
        levels: block.levels.as_ptr(),
        scales: block.scales.as_ptr(),
        starts: block.starts.as_ptr(),
        data: [first.0.as_ptr(), last.0.as_ptr()],
        weight_scales: [first.1.as_ptr(), last.1.as_ptr()],
        out: out.0.as_mut_ptr().cast(),
    };
    let q4 = layout.format() == Format::Q4;
    match isa {
        // SAFETY: the lengths were checked above against the layout, the tile holds MAX_ROWS rows, and the processor has
        // the instructions (`available`).
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512Vnni => unsafe { avx512::tile(args, rows, panels.len(), q4) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::AvxVnni => unsafe { avx2::tile_vnni(args, rows, panels.len(), q4) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { avx2::tile(args, rows, panels.len(), q4) },
        _ => scalar::tile(layout, block, panels, out),
    }
}

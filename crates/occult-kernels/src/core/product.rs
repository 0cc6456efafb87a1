//! One matrix product: packing, the loops around the tile, and the way out through an index.

use std::ops::Range;

use super::ahead::{self, Ahead};
use super::dot::Dot;
use super::isa::{ForType, Isa};
use super::pack::{Panel, Steps};
use super::{A_STRIDE, K_BLOCK, MAX_TILE_COLS, MAX_TILE_ROWS, scratch};
use crate::Matrix;
use crate::simd::Stored;
use crate::threads::SendPtr;

/// Rows of A packed at a time when A is packed by steps, so that whole cache lines of what is stored are used.
const STEP_ROWS: usize = 112;
/// Bytes of weights that several groups of few rows share while they are in the cache.
const DOT_BYTES: usize = 128 << 10;

/// The side that is broadcast, `[m, k]`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Left<'a> {
    pub(crate) data: SendPtr<f32>,
    /// Distance of two stored rows.
    pub(crate) stride: usize,
    /// Stored rows by number; without it they are taken as they come.
    pub(crate) idx: Option<&'a [u32]>,
    /// False: stored rows are rows, `A[i, s] = data[idx(i), s]`. True: stored rows are steps, `A[i, s] = data[idx(s), i]`.
    pub(crate) by_steps: bool,
}

/// The side that is read in vectors, `[k, n]`.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Right<'a> {
    /// `B[s, j] = matrix[j, s]`: a weight as stored, `[n, k]`.
    Transposed {
        /// `[n, k]`
        matrix: Matrix<'a>,
    },
    /// `B[s, j] = matrix[idx(s), j]`, with `n` columns.
    Plain {
        /// `[.., n]`
        matrix: Matrix<'a>,
        /// Stored rows by number; without it they are taken as they come.
        idx: Option<&'a [u32]>,
    },
}

/// Where C goes: row `i` begins at `to + idx(i) * stride`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Target<'a> {
    pub(crate) to: SendPtr<f32>,
    pub(crate) stride: usize,
    pub(crate) idx: Option<&'a [u32]>,
    /// Adds to what is there.
    pub(crate) add: bool,
}

/// `C (+)= A B`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Product<'a> {
    pub(crate) m: usize,
    pub(crate) n: usize,
    pub(crate) k: usize,
    pub(crate) a: Left<'a>,
    pub(crate) b: Right<'a>,
    pub(crate) c: Target<'a>,
    /// Streams the weights ([`Isa::is_few`]); only for rows times a transposed weight.
    pub(crate) few_rows: bool,
}

impl Product<'_> {
    /// Computes the given rows and columns of C. For each of them the order of additions is that of k, in blocks of
    /// [`k_block`].
    ///
    /// # Safety
    /// Pointers and indices stay inside their memory for all of the product, A and B are not written meanwhile, and
    /// nobody else touches these values of C.
    ///
    /// `next`: what the caller will most likely ask for next, so that memory is asked for it meanwhile.
    pub(crate) unsafe fn block(
        &self,
        isa: &Isa,
        rows: Range<usize>,
        cols: Range<usize>,
        next: Option<(&Self, Range<usize>)>,
    ) {
        if rows.is_empty() || cols.is_empty() {
            return;
        }
        // SAFETY: the caller's promise, handed on.
        unsafe {
            if self.k == 0 {
                for row in rows.filter(|_| !self.c.add) {
                    self.c_row(row).add(cols.start).write_bytes(0, cols.len());
                }
            } else if self.few_rows {
                self.dots(isa, rows, cols, next);
            } else {
                self.packed(isa, rows, cols, next);
            }
        }
    }

    unsafe fn c_row(&self, row: usize) -> *mut f32 {
        // SAFETY: the caller's promise: the row exists.
        unsafe { self.c.to.get().add(at(self.c.idx, row) * self.c.stride) }
    }

    unsafe fn packed(
        &self,
        isa: &Isa,
        rows: Range<usize>,
        cols: Range<usize>,
        next: Option<(&Self, Range<usize>)>,
    ) {
        let width = isa.tile_cols;
        let num_panels = cols.len().div_ceil(width);
        let step = k_block(self.k);
        let panel_len = width * step;
        let num_row_panels = rows.len().div_ceil(isa.tile_rows.len());
        let row_panel = |i: usize| {
            rows.start + i * rows.len() / num_row_panels..rows.start + (i + 1) * rows.len() / num_row_panels
        };
        let a_panel_len = A_STRIDE * MAX_TILE_ROWS;
        let (tiles, group_len) = match self.a.by_steps {
            true => (isa.tile_steps, STEP_ROWS / isa.tile_steps.len()),
            false => (isa.tile_rows, 1),
        };
        let spare_len = MAX_TILE_ROWS * MAX_TILE_COLS;
        scratch::with(spare_len + group_len * a_panel_len + num_panels * panel_len, |memory| {
            let (spare, memory) = memory.split_at_mut(spare_len);
            let (a_panels, b_panels) = memory.split_at_mut(group_len * a_panel_len);
            for k0 in (0..self.k).step_by(step) {
                let k = step.min(self.k - k0);
                let add = self.c.add || k0 > 0;
                for (panel, to) in b_panels.chunks_exact_mut(panel_len).take(num_panels).enumerate() {
                    let col = cols.start + panel * width;
                    // SAFETY: the caller's promise; `to` has room for a panel of `k <= step` steps.
                    unsafe { self.pack_b(isa, col, width.min(cols.end - col), k0, k, to.as_mut_ptr()) };
                }
                let mut coming = if k0 + k < self.k {
                    ahead::Block::of(self, cols.clone(), k0 + k..self.k.min(k0 + k + step))
                } else {
                    next.clone().and_then(|(product, cols)| {
                        ahead::Block::of(product, cols, 0..k_block(product.k).min(product.k))
                    })
                };
                let mut num_tiles = num_row_panels * num_panels;
                for group in (0..num_row_panels).step_by(group_len) {
                    let group = group..num_row_panels.min(group + group_len);
                    // SAFETY: the caller's promise; there is room for a group of panels of `k <= K_BLOCK` steps.
                    unsafe {
                        if self.a.by_steps {
                            self.pack_steps(isa, group.clone().map(row_panel), k0, k, a_panels, a_panel_len);
                        } else {
                            self.pack_rows(row_panel(group.start), k0, k, a_panels.as_mut_ptr());
                        }
                    }
                    for (i, a) in group.zip(a_panels.chunks_exact(a_panel_len)) {
                        let tile_rows = row_panel(i);
                        // SAFETY: rows of C that exist, by the caller's promise.
                        let c_rows = unsafe { self.c_rows(tile_rows.clone()) };
                        let tile = tiles[tile_rows.len() - 1];
                        let coming_rows = match i + 1 {
                            _ if self.a.by_steps => None,
                            next if next < num_row_panels => Some((row_panel(next), k0)),
                            _ if k0 + k < self.k => Some((row_panel(0), k0 + k)),
                            _ => None,
                        };
                        for (panel, b) in b_panels.chunks_exact(panel_len).take(num_panels).enumerate() {
                            let col = cols.start + panel * width;
                            let len = width.min(cols.end - col);
                            let mut ahead = match &mut coming {
                                Some(block) => block.next(k, num_tiles),
                                None => Ahead::NOTHING,
                            };
                            num_tiles -= 1;
                            if let Some((rows, k0)) = &coming_rows {
                                let share = |panel| rows.start + panel * rows.len() / num_panels;
                                for row in share(panel)..share(panel + 1) {
                                    ahead.also(self.a_row(row).wrapping_add(*k0).cast());
                                }
                            }
                            // SAFETY: panels were packed for `k` steps just now; C as the caller promises, and the
                            // tile kernel's instructions are there because `isa` is.
                            unsafe {
                                if len == width {
                                    let c = c_rows.map(|row| row.wrapping_add(col));
                                    tile(k, a.as_ptr(), b.as_ptr(), c.as_ptr(), add, &ahead);
                                } else {
                                    let at = spare.as_mut_ptr();
                                    let c: [_; MAX_TILE_ROWS] =
                                        std::array::from_fn(|i| at.wrapping_add(i * MAX_TILE_COLS));
                                    tile(k, a.as_ptr(), b.as_ptr(), c.as_ptr(), false, &ahead);
                                    for i in 0..tile_rows.len() {
                                        for j in 0..len {
                                            let (value, to) = (*c[i].add(j), c_rows[i].add(col + j));
                                            *to = if add { *to + value } else { value };
                                        }
                                    }
                                }
                            }
                        }
                    }
                }
            }
        });
    }

    /// Pointers to rows of C; the last one again where there are fewer.
    unsafe fn c_rows(&self, rows: Range<usize>) -> [*mut f32; MAX_TILE_ROWS] {
        // SAFETY: the caller's promise.
        std::array::from_fn(|i| unsafe { self.c_row((rows.start + i).min(rows.end - 1)) })
    }

    /// Where row `row` of A begins, if A is stored by rows.
    fn a_row(&self, row: usize) -> *const f32 {
        self.a.data.get().wrapping_add(at(self.a.idx, row) * self.a.stride)
    }

    /// One panel of rows that are stored as such, [`A_STRIDE`] apart.
    unsafe fn pack_rows(&self, rows: Range<usize>, k0: usize, k: usize, to: *mut f32) {
        for (i, row) in rows.enumerate() {
            // SAFETY: the caller's promise: rows and steps exist and `to` has room.
            unsafe { to.add(i * A_STRIDE).copy_from_nonoverlapping(self.a_row(row).add(k0), k) };
        }
    }

    /// A group of panels, `panel_len` apart, of rows whose values are stored step by step.
    unsafe fn pack_steps(
        &self,
        isa: &Isa,
        panels: impl Iterator<Item = Range<usize>>,
        k0: usize,
        k: usize,
        to: &mut [f32],
        panel_len: usize,
    ) {
        let Left { data, stride, idx, .. } = self.a;
        let (mut firsts, mut count) = ([0; STEP_ROWS], 0);
        for (rows, to) in panels.zip(to.chunks_exact_mut(panel_len)) {
            if rows.start + isa.step_len <= self.m {
                firsts[count] = rows.start;
                count += 1;
            } else {
                // The last panels, where whole vectors would read more than there is.
                for (step, to) in (k0..k0 + k).zip(to.chunks_exact_mut(isa.step_len)) {
                    for (row, to) in rows.clone().zip(to) {
                        // SAFETY: the caller's promise: rows and steps exist.
                        *to = unsafe { *data.get().add(at(idx, step) * stride + row) };
                    }
                }
            }
        }
        let (from, idx) = match idx {
            Some(idx) => (data.get(), idx[k0..].as_ptr()),
            None => (data.get().wrapping_add(k0 * stride), std::ptr::null()),
        };
        let steps = Steps { from, stride, idx, k, firsts: &firsts[..count] };
        // SAFETY: the caller's promise; whole vectors exist, see above, and there is room for `count` panels.
        unsafe { (isa.pack_steps)(&steps, to.as_mut_ptr(), panel_len) };
    }

    unsafe fn pack_b(&self, isa: &Isa, col: usize, cols: usize, k0: usize, k: usize, to: *mut f32) {
        let matrix = match self.b {
            Right::Transposed { matrix } | Right::Plain { matrix, .. } => matrix,
        };
        // SAFETY: the caller's promise.
        unsafe {
            match matrix {
                Matrix::F32(values) => self.pack_typed(&isa.f32, values, col, cols, k0, k, to),
                Matrix::Bf16(values) => self.pack_typed(&isa.bf16, values, col, cols, k0, k, to),
                Matrix::F16(values) => self.pack_typed(&isa.f16, values, col, cols, k0, k, to),
                Matrix::Quantised(_) => unreachable!("refused by the checks"),
            }
        }
    }

    #[allow(clippy::too_many_arguments, reason = "private; a place in B and where it goes")]
    unsafe fn pack_typed<T: Stored>(
        &self,
        kernels: &ForType<T>,
        values: &[T],
        col: usize,
        cols: usize,
        k0: usize,
        k: usize,
        to: *mut f32,
    ) {
        // SAFETY: the caller's promise.
        unsafe {
            match self.b {
                Right::Transposed { .. } => {
                    let from = values.as_ptr().add(col * self.k + k0);
                    (kernels.pack_transposed)(&Panel { from, stride: self.k, cols, k }, to);
                }
                Right::Plain { idx: None, .. } => {
                    let from = values.as_ptr().add(k0 * self.n + col);
                    (kernels.pack_plain)(&Panel { from, stride: self.n, cols, k }, std::ptr::null(), to);
                }
                Right::Plain { idx: Some(idx), .. } => {
                    let from = values.as_ptr().add(col);
                    (kernels.pack_plain)(&Panel { from, stride: self.n, cols, k }, idx[k0..].as_ptr(), to);
                }
            }
        }
    }

    /// Where row `row` of a transposed weight begins.
    fn stored_row(&self, row: usize) -> Option<*const u8> {
        let Right::Transposed { matrix } = self.b else { return None };
        let (values, size): (*const u8, usize) = matrix.stored()?;
        Some(values.wrapping_add(row * self.k * size))
    }

    unsafe fn dots(
        &self,
        isa: &Isa,
        rows: Range<usize>,
        cols: Range<usize>,
        next: Option<(&Self, Range<usize>)>,
    ) {
        let next = next.and_then(|(product, cols)| product.stored_row(cols.start));
        let Right::Transposed { matrix } = self.b else {
            unreachable!("few rows of a transposed weight only")
        };
        // SAFETY: the caller's promise.
        unsafe {
            match matrix {
                Matrix::F32(values) => self.dots_typed(&isa.f32, values, rows, cols, next),
                Matrix::Bf16(values) => self.dots_typed(&isa.bf16, values, rows, cols, next),
                Matrix::F16(values) => self.dots_typed(&isa.f16, values, rows, cols, next),
                Matrix::Quantised(_) => unreachable!("refused by the checks"),
            }
        }
    }

    unsafe fn dots_typed<T: Stored>(
        &self,
        kernels: &ForType<T>,
        values: &[T],
        rows: Range<usize>,
        cols: Range<usize>,
        next: Option<*const u8>,
    ) {
        let at_once = (DOT_BYTES / (self.k * size_of::<T>())).max(8);
        let groups = rows.len().div_ceil(kernels.dot.len());
        for col in cols.clone().step_by(at_once) {
            let num_cols = at_once.min(cols.end - col);
            let last = col + num_cols == cols.end;
            for group in 0..groups {
                let first = rows.start + group * rows.len() / groups;
                let len = rows.start + (group + 1) * rows.len() / groups - first;
                let row = |i: usize| first + i.min(len - 1);
                // SAFETY: the caller's promise: rows exist, and `len` is at most the number of kernels.
                unsafe {
                    let x: [*const f32; MAX_TILE_ROWS] = std::array::from_fn(|i| {
                        self.a.data.get().add(at(self.a.idx, row(i)) * self.a.stride).cast_const()
                    });
                    let out: [*mut f32; MAX_TILE_ROWS] = std::array::from_fn(|i| self.c_row(row(i)).add(col));
                    kernels.dot[len - 1](&Dot {
                        k: self.k,
                        w: values.as_ptr().add(col * self.k),
                        stride: self.k,
                        cols: num_cols,
                        x: x.as_ptr(),
                        out: out.as_ptr(),
                        add: self.c.add,
                        next: match next.filter(|_| last) {
                            Some(next) => next.cast(),
                            None => values.as_ptr().wrapping_add((col + num_cols) * self.k),
                        },
                    });
                }
            }
        }
    }
}

/// Number of stored row `i`.
pub(super) fn at(idx: Option<&[u32]>, i: usize) -> usize {
    idx.map_or(i, |idx| idx[i] as usize)
}

/// Steps packed at a time for a product over `k`: equal blocks of at most [`K_BLOCK`], in whole vectors.
fn k_block(k: usize) -> usize {
    k.div_ceil(k.div_ceil(K_BLOCK).max(1)).next_multiple_of(16)
}

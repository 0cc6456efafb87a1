//! Asking memory for the next block of B while tiles of this one are computed: packing then finds it in the cache.

use std::ops::Range;

use super::product::{Product, Right, at};

/// Steps of a tile between two requests.
pub(crate) const STEPS: usize = 16;
/// Most requests at a time, and how many there are when tiles suffice.
const LINES: usize = 8;
const USUAL_LINES: usize = 4;
/// Bytes of a cache line.
const LINE: usize = 64;

/// What one tile asks for: every [`STEPS`] steps the lines at the first `count` of `lines`, `advance` bytes further each time.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ahead {
    pub(crate) lines: [*const u8; LINES],
    pub(crate) count: usize,
    pub(crate) advance: usize,
}

/// A block of B that will be packed next: consecutive bytes of stored rows.
#[derive(Debug)]
pub(super) struct Block<'a> {
    first: *const u8,
    stride: usize,
    idx: Option<&'a [u32]>,
    /// Stored rows not asked for yet.
    rows: Range<usize>,
    /// Bytes of each.
    len: usize,
    /// Bytes of the first of them that were asked for.
    done: usize,
}

impl<'a> Block<'a> {
    /// Columns `cols` and steps `steps` of the B of `product`; `None` where B is not packed.
    pub(super) fn of(product: &Product<'a>, cols: Range<usize>, steps: Range<usize>) -> Option<Self> {
        if product.few_rows {
            return None;
        }
        let (Right::Transposed { matrix } | Right::Plain { matrix, .. }) = product.b;
        let (values, size) = matrix.stored()?;
        let (stride, idx, rows, inside) = match product.b {
            Right::Transposed { .. } => (product.k, None, cols, steps),
            Right::Plain { idx, .. } => (product.n, idx, steps, cols),
        };
        let first = values.wrapping_add(inside.start * size);
        Some(Self { first, stride: stride * size, idx, rows, len: inside.len() * size, done: 0 })
    }

    /// The part that a tile of `k` steps asks for when `tiles` tiles, this one included, are left: nothing as long as the
    /// later ones suffice, so that it does not push out what is in use.
    pub(super) fn next(&mut self, k: usize, tiles: usize) -> Ahead {
        let times = k.div_ceil(STEPS);
        // Of a row, one tile reaches this much.
        let reach = times * LINE;
        let pieces = self.rows.len() * self.len.div_ceil(reach);
        let mut ahead = Ahead::NOTHING;
        if tiles * USUAL_LINES > pieces {
            return ahead;
        }
        ahead.advance = if self.len < reach { self.len.div_ceil(times) } else { LINE };
        for line in ahead.lines.iter_mut().take(pieces.div_ceil(tiles.max(1))) {
            if self.rows.is_empty() {
                break;
            }
            *line = self.first.wrapping_add(at(self.idx, self.rows.start) * self.stride + self.done);
            ahead.count += 1;
            self.done += reach;
            if self.done >= self.len {
                self.rows.start += 1;
                self.done = 0;
            }
        }
        ahead
    }
}

impl Ahead {
    /// Asks for nothing.
    pub(super) const NOTHING: Self = Self { lines: [std::ptr::null(); LINES], count: 0, advance: 0 };

    /// Asks for the line at `line` and those that follow it, too, where there is room.
    pub(super) fn also(&mut self, line: *const u8) {
        if self.count == 0 {
            self.advance = LINE;
        }
        if self.count < LINES && self.advance == LINE {
            self.lines[self.count] = line;
            self.count += 1;
        }
    }
}

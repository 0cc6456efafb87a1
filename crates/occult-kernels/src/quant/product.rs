//! The loops around the tiles: rows of records times pairs of panels.

use half::bf16;

use super::kernel::{Args, Kernels, TILE_COLS};
use super::matrix::{Format, Layout, PANEL_ROWS, Quantised};
use crate::core::scratch;

/// Most rows that are taken together: their records stay in the second-level cache while weights pass.
pub(super) const CHUNK_ROWS: usize = 256;
/// Columns that all rows are multiplied with before the next: a pair of panels of so many fills half of a usual
/// first-level cache.
const STEP_COLS: usize = 512;
/// Tasks wanted for each thread, so that none waits long for the last.
const TASKS_PER_THREAD: usize = 8;

/// Most weights of a task: much more than it costs to begin one, little enough that no thread waits long.
const TASK_BYTES: usize = 1 << 20;

/// Data and scales of a panel.
pub(super) type Panel<'a> = (&'a [u8], &'a [bf16]);

/// How many of `len` steps, of each of `units`, a task takes so that there are enough tasks; `bytes` are the weights of a
/// step.
pub(super) fn per_task(len: usize, units: usize, bytes: usize, threads: usize) -> usize {
    let balanced = if threads == 1 { len } else { len * units / (TASKS_PER_THREAD * threads) };
    balanced.min(TASK_BYTES / bytes.max(1)).max(1)
}

/// As few nearly equal ranges of at most `max` as cover `0..len`.
pub(super) fn chunks(len: usize, max: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
    let count = len.div_ceil(max);
    (0..count).map(move |i| i * len / count..(i + 1) * len / count)
}

/// Pair `i` of a single matrix, and the first output of each panel: of both halves of the matrix, so that consecutive
/// pairs are two streams of memory. The second panel of the last pair may be a repeat: then its output is N.
pub(super) fn pair_of<'a>(w: &Quantised<'a>, i: usize) -> ([Panel<'a>; 2], [usize; 2]) {
    let (panels, half) = (w.layout().panels(), num_pairs(w.layout()));
    let second = if half + i < panels { half + i } else { i };
    let outputs = if second == i { w.layout().rows() } else { second * PANEL_ROWS };
    ([w.panel(i), w.panel(second)], [i * PANEL_ROWS, outputs])
}

/// Pairs of a single matrix.
pub(super) fn num_pairs(layout: &Layout) -> usize {
    layout.panels().div_ceil(2)
}

/// Rows of records, at most [`CHUNK_ROWS`].
pub(super) struct Chunk {
    rows: [*const u8; CHUNK_ROWS],
    len: usize,
}

impl Chunk {
    /// Rows by number of records that begin at `first`, `bytes` apart.
    pub(super) fn new(first: *const u8, bytes: usize, idx: impl Iterator<Item = usize>) -> Self {
        let mut this = Self { rows: [std::ptr::null(); CHUNK_ROWS], len: 0 };
        for (row, i) in this.rows.iter_mut().zip(idx) {
            *row = first.wrapping_add(i * bytes);
            this.len += 1;
        }
        this
    }

    /// Multiplies all rows with pairs `0..num_pairs` of panels of this layout and hands on `done(i, [rows, TILE_COLS])`.
    /// Memory is asked for the next pair meanwhile, in the end for that of `after`.
    ///
    /// # Safety
    /// Every row is records of this layout, and the panels are its panels; the processor has the kernels' instructions.
    pub(super) unsafe fn multiply<'w>(
        &self,
        kernels: &Kernels,
        layout: &Layout,
        num_pairs: usize,
        pair: impl Fn(usize) -> [Panel<'w>; 2],
        after: [Panel<'w>; 2],
        mut done: impl FnMut(usize, &[f32]),
    ) {
        let c_len = self.len * TILE_COLS;
        // Room for a step of both panels in 8 bits.
        let levels_len = 2 * PANEL_ROWS * STEP_COLS / size_of::<f32>();
        scratch::with(c_len + levels_len, |memory| {
            let (c, levels) = memory.split_at_mut(c_len);
            for i in 0..num_pairs {
                c.fill(0.0);
                let next = if i + 1 < num_pairs { pair(i + 1) } else { after };
                // SAFETY: the caller's promise; `c` and `levels` have the room.
                unsafe {
                    self.one(kernels, layout, pair(i), next, c.as_mut_ptr(), levels.as_mut_ptr().cast())
                };
                done(i, c);
            }
        });
    }

    unsafe fn one(
        &self,
        kernels: &Kernels,
        layout: &Layout,
        pair: [Panel<'_>; 2],
        next: [Panel<'_>; 2],
        c: *mut f32,
        levels: *mut u8,
    ) {
        let groups = layout.groups();
        let (quads, record) = (layout.group() / 4, super::activations::row_bytes(layout) / groups);
        let panel_group = layout.panel_bytes() / groups;
        let num_tiles = self.len.div_ceil(kernels.q8.len());
        let decode = layout.format() == Format::Q4 && num_tiles > 1;
        let tiles = if layout.format() == Format::Q4 && !decode { kernels.q4 } else { kernels.q8 };
        let step = STEP_COLS / layout.group();
        for first in (0..groups).step_by(step) {
            let count = step.min(groups - first);
            let mut data = pair.map(|(data, _)| data.as_ptr().wrapping_add(first * panel_group));
            let scales = pair.map(|(_, scales)| scales.as_ptr().wrapping_add(first * PANEL_ROWS));
            if decode {
                let len = count * panel_group;
                for (p, data) in data.iter_mut().enumerate() {
                    let to = levels.wrapping_add(p * PANEL_ROWS * STEP_COLS);
                    // SAFETY: a step of the panel, and room for one; see `multiply`.
                    unsafe { (kernels.decode)(*data, len, to) };
                    *data = to;
                }
            }
            let (coming, from) = if first + step < groups { (pair, first + step) } else { (next, 0) };
            let coming = coming.map(|(data, _)| data.as_ptr().wrapping_add(from * panel_group));
            let coming_lines = (step.min(groups - from) * panel_group).div_ceil(64);
            // Of one tile: how often it asks.
            let times = count * quads / 2;
            let lines = coming_lines.div_ceil(num_tiles * times);
            for (tile, rows) in chunks(self.len, kernels.q8.len()).enumerate() {
                let asked = tile * times * lines;
                let args = Args {
                    rows: self.rows[rows.clone()].as_ptr(),
                    skip: first * record,
                    groups: count,
                    quads,
                    data,
                    scales,
                    out: c.wrapping_add(rows.start * TILE_COLS),
                    ahead: coming.map(|at| at.wrapping_add(asked * 64)),
                    lines: if asked < coming_lines { lines } else { 0 },
                };
                // SAFETY: rows and panels as the caller of `multiply` promises; as many rows as the tile takes.
                unsafe { tiles[rows.len() - 1](&args) };
            }
        }
    }
}

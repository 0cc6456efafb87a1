//! How products are divided among threads: into blocks of rows and columns of C, never along k, so that the result does
//! not depend on the number of threads.

use std::ops::Range;

use super::product::Product;
use crate::Threads;

/// Most rows of a block: a hot expert is many blocks.
const ROW_BLOCK: usize = 1024;
/// Rows below which a block is not halved: each packs the weights again.
const LEAST_ROWS: usize = if cfg!(miri) { 8 } else { 128 };
/// Most columns of a block: a packed block of B fills half of a usual second-level cache.
const COL_BLOCK: usize = 256;
/// Columns of a merging product below which a block is not halved: each packs the rows of all experts again.
const LEAST_MERGED_COLS: usize = 128;
/// Blocks wanted for each thread, so that none waits long for the last.
const BLOCKS_PER_THREAD: usize = 4;

/// Calls `work(i, rows, cols, next)` for blocks that cover `shapes[i] = (m, n)`, for all i; `next` are i and columns of
/// the block that this thread is likely to work on then.
pub(crate) fn for_each_block(
    threads: &Threads,
    shapes: &[(usize, usize)],
    work: impl Fn(usize, Range<usize>, Range<usize>, Option<(usize, Range<usize>)>) + Sync,
) {
    let unit = 2 * threads.isa().tile_cols;
    let num_blocks = |height: usize, width: usize| -> usize {
        shapes.iter().map(|&(m, n)| m.div_ceil(height) * n.div_ceil(width)).sum()
    };
    let wanted = BLOCKS_PER_THREAD * threads.count();
    let (mut height, mut width) = (ROW_BLOCK, COL_BLOCK.max(unit));
    while width > unit && num_blocks(height, width) < wanted {
        width = (width / 2).max(unit);
    }
    // A router has few columns.
    while height > LEAST_ROWS && num_blocks(height, width) < wanted {
        height /= 2;
    }
    let row_blocks = |m: usize| m.div_ceil(height);
    // ends[i]: blocks of the shapes up to i.
    let ends: Vec<usize> = shapes
        .iter()
        .scan(0, |sum, &(m, n)| {
            *sum += row_blocks(m) * n.div_ceil(width);
            Some(*sum)
        })
        .collect();
    let last = ends.last().copied().unwrap_or(0);
    let place = |block: usize| {
        let i = ends.partition_point(|&end| end <= block);
        let (m, n) = shapes[i];
        let block = block - if i == 0 { 0 } else { ends[i - 1] };
        let num_cols = n.div_ceil(width);
        let (row, col) = (block / num_cols, block % num_cols);
        (i, part(m, row, row_blocks(m)), col * width..n.min((col + 1) * width))
    };
    threads.for_each(last, |block| {
        let (i, rows, cols) = place(block);
        let next = Some(block + threads.count()).filter(|&next| next < last).map(|next| {
            let (i, _, cols) = place(next);
            (i, cols)
        });
        work(i, rows, cols, next);
    });
}

/// Computes products whose results do not overlap.
///
/// # Safety
/// As [`Product::block`], for all of each product.
pub(crate) unsafe fn run(threads: &Threads, products: &[Product<'_>]) {
    let shapes: Vec<_> = products.iter().map(|product| (product.m, product.n)).collect();
    for_each_block(threads, &shapes, |i, rows, cols, next| {
        let next = next.map(|(i, cols)| (&products[i], cols));
        // SAFETY: the caller's promise; blocks do not overlap.
        unsafe { products[i].block(threads.isa(), rows, cols, next) };
    });
}

/// Computes products that add into the same `num_rows` rows of `n` columns through ascending indices, each value in the
/// order of the products.
///
/// # Safety
/// As [`Product::block`], for all of each product; all have `n` columns and an index of rows below `num_rows`.
pub(crate) unsafe fn run_merged(threads: &Threads, num_rows: usize, n: usize, products: &[Product<'_>]) {
    let unit = LEAST_MERGED_COLS.max(2 * threads.isa().tile_cols);
    // One thread waits for nobody.
    let wanted = if threads.count() == 1 { 1 } else { BLOCKS_PER_THREAD * threads.count() };
    let mut width = COL_BLOCK.max(unit);
    while width > unit && n.div_ceil(width) < wanted {
        width = (width / 2).max(unit);
    }
    let num_cols = n.div_ceil(width).max(1);
    // Only where columns do not suffice: each block of rows packs the weights again.
    let num_row_blocks = if threads.count() <= num_cols { 1 } else { threads.count().div_ceil(num_cols) };
    threads.for_each(num_cols * num_row_blocks, |block| {
        let (row, col) = (block / num_cols, block % num_cols);
        let wanted_rows = part(num_rows, row, num_row_blocks);
        let cols = col * width..n.min((col + 1) * width);
        for (i, product) in products.iter().enumerate() {
            let next = products.get(i + 1).map(|next| (next, cols.clone()));
            let idx = product.c.idx.unwrap_or_default();
            let below = |limit: usize| idx.partition_point(|&row| (row as usize) < limit);
            let rows = below(wanted_rows.start)..below(wanted_rows.end);
            // SAFETY: the caller's promise; blocks are apart in columns or in the rows of C.
            unsafe { product.block(threads.isa(), rows, cols.clone(), next) };
        }
    });
}

/// The `i`-th of `parts` nearly equal parts of `0..len`.
fn part(len: usize, i: usize, parts: usize) -> Range<usize> {
    i * len / parts..(i + 1) * len / parts
}

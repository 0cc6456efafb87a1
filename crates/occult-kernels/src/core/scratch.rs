//! Working memory of a thread, kept between calls.

use std::cell::RefCell;

/// One cache line of `f32`.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; 16]);

/// Lines of the largest buffer that is kept: 8 MiB.
const KEPT: usize = (8 << 20) / size_of::<Line>();

thread_local! {
    static BUFFERS: RefCell<Vec<Vec<Line>>> = const { RefCell::new(Vec::new()) };
}

/// Calls `work` with at least `len` values of any content, aligned to a cache line. Inside itself it gives other memory.
pub(crate) fn with<R>(len: usize, work: impl FnOnce(&mut [f32]) -> R) -> R {
    let mut lines = BUFFERS.with_borrow_mut(Vec::pop).unwrap_or_default();
    let wanted = len.div_ceil(16);
    if lines.len() < wanted {
        lines.resize(wanted, Line([0.0; 16]));
    }
    let start = lines.as_mut_ptr().cast::<f32>();
    // SAFETY: a line is sixteen f32 without padding, and the vector outlives the slice.
    let result = work(unsafe { std::slice::from_raw_parts_mut(start, lines.len() * 16) });
    if lines.len() <= KEPT {
        BUFFERS.with_borrow_mut(|buffers| buffers.push(lines));
    }
    result
}

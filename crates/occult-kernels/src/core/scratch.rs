//! Working memory of a thread, kept between calls.

use std::cell::RefCell;

/// One cache line of `f32`.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; 16]);

thread_local! {
    static LINES: RefCell<Vec<Line>> = const { RefCell::new(Vec::new()) };
}

/// Calls `work` with at least `len` values of any content, aligned to a cache line. Not from inside itself.
pub(super) fn with<R>(len: usize, work: impl FnOnce(&mut [f32]) -> R) -> R {
    LINES.with_borrow_mut(|lines| {
        let wanted = len.div_ceil(16);
        if lines.len() < wanted {
            lines.resize(wanted, Line([0.0; 16]));
        }
        let start = lines.as_mut_ptr().cast::<f32>();
        // SAFETY: a line is sixteen f32 without padding, and the vector is borrowed for the time of `work`.
        work(unsafe { std::slice::from_raw_parts_mut(start, lines.len() * 16) })
    })
}

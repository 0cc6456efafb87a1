//! Memory for the values of a step, used again by the next one on the same thread: fresh memory costs a page fault for
//! every 4 KiB and a pass to fill it with zeros.

use std::cell::RefCell;

use crate::error::{MoeError, Result};

/// Shorter ones are the allocator's business.
const LEAST: usize = 1 << 14;
/// Kept per thread, at most: what one layer's step uses at a time. More would be held while others need it.
const MOST: usize = 12;

thread_local! {
    static KEPT: RefCell<Vec<Vec<f32>>> = const { RefCell::new(Vec::new()) };
}

/// No values, with room for `len`; `what` for the error.
pub(crate) fn empty(what: &'static str, len: usize) -> Result<Vec<f32>> {
    let mut values = take(what, len)?;
    values.clear();
    Ok(values)
}

/// `len` values that nobody may count on: they must be overwritten.
pub(crate) fn any(what: &'static str, len: usize) -> Result<Vec<f32>> {
    let mut values = take(what, len)?;
    values.resize(len, 0.0);
    Ok(values)
}

fn take(what: &'static str, len: usize) -> Result<Vec<f32>> {
    // The smallest that is large enough; else the largest, which makes way for a larger one.
    let found = KEPT.with_borrow_mut(|kept| {
        let best = (0..kept.len()).min_by_key(|&i| match kept[i].capacity() {
            enough if enough >= len => (0, enough),
            less => (1, usize::MAX - less),
        });
        best.filter(|_| len >= LEAST).map(|best| kept.swap_remove(best))
    });
    let mut values = found.unwrap_or_default();
    if values.capacity() < len {
        // Growing would copy what nobody wants.
        values = Vec::new();
        let bytes = len.saturating_mul(size_of::<f32>());
        values.try_reserve_exact(len).map_err(|_| MoeError::Memory { what, bytes })?;
    }
    Ok(values)
}

/// Room for so many values more.
pub(crate) fn reserve(what: &'static str, values: &mut Vec<f32>, more: usize) -> Result<()> {
    let bytes = (values.len() + more).saturating_mul(size_of::<f32>());
    values.try_reserve(more).map_err(|_| MoeError::Memory { what, bytes })
}

/// Makes them at least `len` values long; nobody may count on those that are added.
pub(crate) fn lengthen(what: &'static str, values: &mut Vec<f32>, len: usize) -> Result<()> {
    if values.len() < len {
        reserve(what, values, len - values.len())?;
        values.resize(len, 0.0);
    }
    Ok(())
}

/// Gives memory back for the next step.
pub(crate) fn give(values: Vec<f32>) {
    if values.capacity() < LEAST {
        return;
    }
    // A thread that ends has nothing to keep for.
    let _ = KEPT.try_with(|kept| {
        if let Ok(mut kept) = kept.try_borrow_mut()
            && kept.len() < MOST
        {
            kept.push(values);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_used_again() {
        let first = any("test", 5 * LEAST).expect("memory");
        let at = first.as_ptr();
        give(first);
        give(vec![0.0; 2 * LEAST]);
        let small = empty("test", 2 * LEAST).expect("memory");
        assert!(small.is_empty() && small.capacity() >= 2 * LEAST && small.as_ptr() != at);
        let again = any("test", 4 * LEAST).expect("memory");
        assert_eq!((again.len(), again.as_ptr()), (4 * LEAST, at));
    }

    #[test]
    fn memory_that_is_not_there_is_an_error() {
        let error = any("rows of a test", usize::MAX / 8).expect_err("too much");
        assert!(error.to_string().contains("rows of a test"), "{error}");
    }
}

//! An output that several tasks fill in disjoint parts.

use std::marker::PhantomData;

/// Values of which each task takes its own part.
pub(crate) struct Shared<'a> {
    start: *mut f32,
    len: usize,
    values: PhantomData<&'a mut [f32]>,
}

// SAFETY: the only way to the values is `part`, whose caller promises disjoint parts.
unsafe impl Sync for Shared<'_> {}

impl<'a> Shared<'a> {
    pub(crate) fn new(values: &'a mut [f32]) -> Self {
        Self { start: values.as_mut_ptr(), len: values.len(), values: PhantomData }
    }

    /// The `len` values from `from` on.
    ///
    /// # Safety
    /// Parts that are alive at the same time do not overlap.
    ///
    /// # Panics
    /// When the part is outside.
    #[allow(clippy::mut_from_ref)] // that is the purpose; see the contract
    pub(crate) unsafe fn part(&self, from: usize, len: usize) -> &mut [f32] {
        assert!(from <= self.len && len <= self.len - from, "a part outside the output");
        // SAFETY: inside the borrowed slice by the check above; not shared by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(from), len) }
    }
}

//! Owned bytes that ranks hand to each other.

use bytemuck::{Pod, Zeroable};

use crate::CommError;

/// Alignment of the first byte of every buffer, in bytes: a cache line, and the widest vector register.
const ALIGNMENT_BYTES: usize = 64;

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
struct Line([u8; ALIGNMENT_BYTES]);

/// Owned bytes, aligned to 64, with typed views. The length is a number of bytes and need not be a multiple of 64.
///
/// Values are plain numbers, of which every bit pattern is one. `bool` is not: what another rank sent might be neither true
/// nor false, so it does not compile. Send `u8`.
///
/// ```compile_fail
/// occult_comm::Buffer::from_slice(&[true, false]);
/// ```
#[derive(Clone)]
pub struct Buffer {
    lines: Vec<Line>,
    len_bytes: usize,
}

impl Buffer {
    /// No bytes; allocates nothing.
    pub const fn empty() -> Self {
        Self { lines: Vec::new(), len_bytes: 0 }
    }

    /// A copy of `values`.
    ///
    /// # Errors
    /// [`CommError::Memory`] when the memory is not there.
    pub fn try_from_slice<T: Pod>(values: &[T]) -> Result<Self, CommError> {
        Self::concat(&[bytemuck::cast_slice(values)])
    }

    /// A copy of `values`. Aborts the process like `Vec` does when there is no memory; see
    /// [`try_from_slice`](Self::try_from_slice).
    pub fn from_slice<T: Pod>(values: &[T]) -> Self {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        let mut lines = Vec::with_capacity(bytes.len().div_ceil(ALIGNMENT_BYTES));
        fill(&mut lines, &[bytes]);
        Self { lines, len_bytes: bytes.len() }
    }

    /// `len` zeros of type `T`.
    ///
    /// # Errors
    /// [`CommError::Memory`] when the memory is not there.
    pub fn try_zeroed<T: Pod>(len: usize) -> Result<Self, CommError> {
        let len_bytes = len.checked_mul(size_of::<T>()).ok_or(CommError::Memory { bytes: usize::MAX })?;
        let mut lines = reserve(len_bytes)?;
        lines.resize(len_bytes.div_ceil(ALIGNMENT_BYTES), Line::zeroed());
        Ok(Self { lines, len_bytes })
    }

    /// `len` zeros of type `T`. Aborts the process like `Vec` does when there is no memory; see
    /// [`try_zeroed`](Self::try_zeroed).
    pub fn zeroed<T: Pod>(len: usize) -> Self {
        let len_bytes = len.saturating_mul(size_of::<T>());
        Self { lines: vec![Line::zeroed(); len_bytes.div_ceil(ALIGNMENT_BYTES)], len_bytes }
    }

    /// The pieces one after the other, each copied once.
    ///
    /// # Errors
    /// [`CommError::Memory`] when the memory is not there.
    pub fn concat(pieces: &[&[u8]]) -> Result<Self, CommError> {
        let len_bytes = pieces.iter().map(|piece| piece.len()).sum();
        let mut lines = reserve(len_bytes)?;
        fill(&mut lines, pieces);
        Ok(Self { lines, len_bytes })
    }

    /// Length in bytes.
    pub fn len_bytes(&self) -> usize {
        self.len_bytes
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len_bytes == 0
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        // The last line may be longer than what was asked for.
        &bytemuck::cast_slice(&self.lines)[..self.len_bytes]
    }

    /// The bytes, to be written.
    pub fn as_bytes_mut(&mut self) -> &mut [u8] {
        &mut bytemuck::cast_slice_mut(&mut self.lines)[..self.len_bytes]
    }

    /// The bytes as values of `T`.
    ///
    /// # Panics
    /// When the length is not a multiple of the size of `T`: use [`try_as_slice`](Self::try_as_slice) where another
    /// rank chose the length.
    pub fn as_slice<T: Pod>(&self) -> &[T] {
        bytemuck::cast_slice(self.as_bytes())
    }

    /// The bytes as values of `T`, to be written.
    ///
    /// # Panics
    /// When the length is not a multiple of the size of `T`.
    pub fn as_mut_slice<T: Pod>(&mut self) -> &mut [T] {
        bytemuck::cast_slice_mut(self.as_bytes_mut())
    }

    /// The bytes as values of `T`, or nothing when the length is not a multiple of its size.
    pub fn try_as_slice<T: Pod>(&self) -> Option<&[T]> {
        bytemuck::try_cast_slice(self.as_bytes()).ok()
    }
}

impl Default for Buffer {
    fn default() -> Self {
        Self::empty()
    }
}

impl PartialEq for Buffer {
    fn eq(&self, other: &Self) -> bool {
        self.as_bytes() == other.as_bytes()
    }
}

impl Eq for Buffer {}

impl std::fmt::Debug for Buffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Buffer({} bytes)", self.len_bytes)
    }
}

fn reserve(len_bytes: usize) -> Result<Vec<Line>, CommError> {
    let mut lines = Vec::new();
    lines
        .try_reserve_exact(len_bytes.div_ceil(ALIGNMENT_BYTES))
        .map_err(|_| CommError::Memory { bytes: len_bytes })?;
    Ok(lines)
}

/// Fills the reserved, still empty `lines` with the pieces and zeros up to the end of the last line. Writing zeros
/// first and the pieces then would touch large buffers twice.
fn fill(lines: &mut Vec<Line>, pieces: &[&[u8]]) {
    let len_bytes: usize = pieces.iter().map(|piece| piece.len()).sum();
    let num_lines = len_bytes.div_ceil(ALIGNMENT_BYTES);
    assert!(lines.is_empty() && lines.capacity() >= num_lines);
    let start = lines.as_mut_ptr().cast::<u8>();
    let mut at = 0;
    for piece in pieces {
        // SAFETY: `at + piece.len() <= len_bytes <= num_lines * 64`, which lies inside the allocation by the assertion
        // above. `lines` is borrowed mutably, so no piece overlaps it.
        unsafe { start.add(at).copy_from_nonoverlapping(piece.as_ptr(), piece.len()) };
        at += piece.len();
    }
    // SAFETY: from `at` to the end of the last line, inside the allocation as above; the first `num_lines` lines are
    // then written entirely (pieces, then these zeros), and a `Line` is valid for every bit pattern.
    unsafe {
        start.add(at).write_bytes(0, num_lines * ALIGNMENT_BYTES - at);
        lines.set_len(num_lines);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn views_keep_values_and_length() {
        let buffer = Buffer::from_slice(&[1.5f32, -2.0, 3.25]);
        assert_eq!(buffer.len_bytes(), 12);
        assert_eq!(buffer.as_slice::<f32>(), [1.5, -2.0, 3.25]);
        assert_eq!(buffer.as_slice::<u16>().len(), 6);
        assert!(buffer.try_as_slice::<f64>().is_none());
        assert_eq!(buffer.as_bytes().as_ptr().align_offset(ALIGNMENT_BYTES), 0);
    }

    #[test]
    fn concat_is_the_pieces_in_order_whatever_their_lengths() {
        let bytes: Vec<u8> = (0..=255).collect();
        for (a, b) in [(0, 0), (1, 1), (0, 64), (63, 65), (100, 256), (256, 256)] {
            let buffer = Buffer::concat(&[&bytes[..a], &bytes[a..b], &[]]).unwrap();
            assert_eq!(buffer.as_bytes(), &bytes[..b]);
        }
    }

    #[test]
    fn memory_that_is_not_there_is_an_error() {
        assert!(matches!(Buffer::try_zeroed::<u8>(usize::MAX / 2), Err(CommError::Memory { .. })));
        assert!(matches!(Buffer::try_zeroed::<u64>(usize::MAX / 2), Err(CommError::Memory { .. })));
    }

    #[test]
    fn zeroed_is_zero_and_writable() {
        let mut buffer = Buffer::zeroed::<u32>(33);
        assert!(buffer.as_slice::<u32>().iter().all(|&value| value == 0));
        buffer.as_mut_slice::<u32>()[32] = 7;
        assert_eq!(buffer.as_slice::<u32>()[32], 7);
        assert!(Buffer::empty().as_slice::<u64>().is_empty());
    }
}

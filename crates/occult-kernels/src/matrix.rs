use half::{bf16, f16};

use crate::quant::{Quantised, reference};

/// A weight matrix `[rows = out, cols = in]`, row-major, in the type it is stored in.
///
/// The number of columns is given by the call that uses it. Values are widened to `f32` while they are read; no copy
/// in another type is kept.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub enum Matrix<'a> {
    /// 32-bit floats.
    F32(&'a [f32]),
    /// bfloat16: the upper half of an `f32`.
    Bf16(&'a [bf16]),
    /// IEEE half precision.
    F16(&'a [f16]),
    /// 8 or 4 bits in groups, for inference: products are in integers, see [`crate::quant`].
    Quantised(Quantised<'a>),
}

impl<'a> Matrix<'a> {
    /// Number of values.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Matrix::F32(values) => values.len(),
            Matrix::Bf16(values) => values.len(),
            Matrix::F16(values) => values.len(),
            Matrix::Quantised(q) => q.layout().rows() * q.layout().cols(),
        }
    }

    /// True when there is no value.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes the values occupy as stored.
    #[must_use]
    pub fn len_bytes(&self) -> usize {
        match self {
            Matrix::F32(values) => size_of_val(*values),
            Matrix::Bf16(values) => size_of_val(*values),
            Matrix::F16(values) => size_of_val(*values),
            Matrix::Quantised(q) => q.bytes(),
        }
    }

    /// The first value and the bytes of each; `None` where values have no address of their own.
    pub(crate) fn stored(&self) -> Option<(*const u8, usize)> {
        match self {
            Matrix::F32(values) => Some((values.as_ptr().cast(), 4)),
            Matrix::Bf16(values) => Some((values.as_ptr().cast(), 2)),
            Matrix::F16(values) => Some((values.as_ptr().cast(), 2)),
            Matrix::Quantised(_) => None,
        }
    }

    /// The first `row` rows of `cols` columns, and the rest: a fused `[2F, D]` gate and up matrix becomes its halves.
    /// `None` when there are fewer rows, or the matrix is quantised.
    #[must_use]
    pub fn split_rows(self, row: usize, cols: usize) -> Option<(Self, Self)> {
        let at = row.checked_mul(cols)?;
        Some(match self {
            Matrix::F32(values) => {
                values.split_at_checked(at).map(|(a, b)| (Matrix::F32(a), Matrix::F32(b)))?
            }
            Matrix::Bf16(values) => {
                values.split_at_checked(at).map(|(a, b)| (Matrix::Bf16(a), Matrix::Bf16(b)))?
            }
            Matrix::F16(values) => {
                values.split_at_checked(at).map(|(a, b)| (Matrix::F16(a), Matrix::F16(b)))?
            }
            Matrix::Quantised(_) => return None,
        })
    }

    /// The value at `index` of the row-major order, widened. The slow definition of what the packing reads.
    ///
    /// # Panics
    /// When `index` is outside, like a slice.
    #[must_use]
    pub fn at(&self, index: usize) -> f32 {
        match self {
            Matrix::F32(values) => values[index],
            Matrix::Bf16(values) => values[index].to_f32(),
            Matrix::F16(values) => values[index].to_f32(),
            Matrix::Quantised(q) => {
                reference::weight(q, index / q.layout().cols(), index % q.layout().cols())
            }
        }
    }
}

impl<'a> From<&'a [f32]> for Matrix<'a> {
    fn from(values: &'a [f32]) -> Self {
        Matrix::F32(values)
    }
}

impl<'a> From<&'a [bf16]> for Matrix<'a> {
    fn from(values: &'a [bf16]) -> Self {
        Matrix::Bf16(values)
    }
}

impl<'a> From<&'a [f16]> for Matrix<'a> {
    fn from(values: &'a [f16]) -> Self {
        Matrix::F16(values)
    }
}

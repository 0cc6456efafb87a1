use thiserror::Error;

/// What a kernel refuses to work on.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum KernelError {
    /// A slice is longer or shorter than its shape says.
    #[error("{what}: expected {expected} values, found {found}")]
    Length {
        /// The argument.
        what: &'static str,
        /// Values its shape asks for.
        expected: usize,
        /// Values it has.
        found: usize,
    },
    /// The row tables of [`crate::SparseRows`] contradict each other.
    #[error("sparse rows: {reason}")]
    Rows {
        /// What is wrong with them.
        reason: String,
    },
    /// A shape too large to be addressed.
    #[error("{what}: the shape overflows")]
    Overflow {
        /// The argument.
        what: &'static str,
    },
}

/// Result of a kernel call.
pub type Result<T> = std::result::Result<T, KernelError>;

/// Refuses a slice whose length is not the product of `shape`.
pub(crate) fn expect_len(what: &'static str, found: usize, shape: &[usize]) -> Result<()> {
    let expected = shape
        .iter()
        .try_fold(1_usize, |product, &size| product.checked_mul(size))
        .ok_or(KernelError::Overflow { what })?;
    if found == expected { Ok(()) } else { Err(KernelError::Length { what, expected, found }) }
}

use thiserror::Error;

use crate::Matrix;
use crate::quant::QuantError;

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
    /// Quantised weights where there is no kernel for them, or whose layout does not fit.
    #[error("quantised weights: {reason}")]
    Quantised {
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

/// Refuses quantised weights: `what` has no kernel for them.
pub(crate) fn expect_floats(what: &str, weights: &[Matrix<'_>]) -> Result<()> {
    if weights.iter().any(|w| matches!(w, Matrix::Quantised(_))) {
        return Err(KernelError::Quantised { reason: format!("{what} takes weights of f32, bf16 or f16") });
    }
    Ok(())
}

impl From<QuantError> for KernelError {
    fn from(error: QuantError) -> Self {
        match error {
            QuantError::Length { what, found, expected } => KernelError::Length { what, expected, found },
            other => KernelError::Quantised { reason: other.to_string() },
        }
    }
}

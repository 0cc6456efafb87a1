//! What can be wrong with quantised weights and their use.

use thiserror::Error;

/// An error of this module.
#[derive(Debug, Clone, PartialEq, Error)]
#[non_exhaustive]
pub enum QuantError {
    /// A weight that no level can stand for.
    #[error("row {row}, column {col} is {value}: only finite weights can be quantised")]
    NotFinite {
        /// Row of the matrix.
        row: usize,
        /// Column of the matrix.
        col: usize,
        /// The value found.
        value: f32,
    },
    /// A scale of stored weights that is NaN or infinite.
    #[error("scale {at} is {value}")]
    BadScale {
        /// Index into the scales.
        at: usize,
        /// The value found.
        value: f32,
    },
    /// A group size that the kernels do not have.
    #[error("groups of {0} columns; supported: 32, 64, 128")]
    Group(usize),
    /// A buffer of the wrong length.
    #[error("{what}: {found} values, expected {expected}")]
    Length {
        /// Which buffer.
        what: &'static str,
        /// Its length.
        found: usize,
        /// What the shapes ask for.
        expected: usize,
    },
    /// Sizes that do not belong together.
    #[error("{0}")]
    Shape(String),
    /// An instruction set that this processor does not have.
    #[error("this processor has no {0:?}")]
    Isa(super::Isa),
}

/// Result of this module.
pub type Result<T> = std::result::Result<T, QuantError>;

pub(super) fn check_len(what: &'static str, found: usize, expected: usize) -> Result<()> {
    if found == expected { Ok(()) } else { Err(QuantError::Length { what, found, expected }) }
}

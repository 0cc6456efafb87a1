//! One error type for the layer: what failed, and on whose account.

use occult_comm::CommError;
use occult_plan::PlanError;

/// Why a layer could not run.
#[derive(Debug, thiserror::Error)]
pub enum MoeError {
    /// Moving rows failed; names rank, operation and what was awaited.
    #[error(transparent)]
    Comm(#[from] CommError),
    /// A decision could not be made, or what a peer sent is not a plan.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The arithmetic, or the autograd, failed.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
    /// An argument does not fit the layer.
    #[error("{what}: expected {expected}, found {found}")]
    #[allow(missing_docs, reason = "the message names the fields")]
    Argument { what: &'static str, expected: String, found: String },
    /// A message of a peer is not what was agreed.
    #[error("{what} from rank {peer}: expected {expected}, found {found}")]
    #[allow(missing_docs, reason = "the message names the fields")]
    Message { what: &'static str, peer: usize, expected: String, found: String },
    /// No memory for the values of a step.
    #[error("{what}: no memory for {bytes} bytes")]
    #[allow(missing_docs, reason = "the message names the fields")]
    Memory { what: &'static str, bytes: usize },
    /// A router logit is NaN or infinite.
    #[error("row {row}: router logit of expert {expert} is {value}")]
    #[allow(missing_docs, reason = "the message names the fields")]
    RouterLogit { row: usize, expert: usize, value: f32 },
}

/// Result of this crate.
pub type Result<T, E = MoeError> = std::result::Result<T, E>;

impl MoeError {
    /// Shorthand for [`MoeError::Argument`].
    pub(crate) fn argument(what: &'static str, expected: impl ToString, found: impl ToString) -> Self {
        Self::Argument { what, expected: expected.to_string(), found: found.to_string() }
    }

    /// For use inside a custom op, whose errors are candle's.
    pub(crate) fn into_candle(self) -> candle_core::Error {
        match self {
            Self::Tensor(error) => error,
            other => candle_core::Error::msg(other),
        }
    }
}

/// Checks a length that an argument must have.
pub(crate) fn check_len(what: &'static str, expected: usize, found: usize) -> Result<()> {
    if expected == found { Ok(()) } else { Err(MoeError::argument(what, expected, found)) }
}

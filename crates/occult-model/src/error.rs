//! One error type for models: which file, which tensor or option, what was expected and what was found.

use std::io;
use std::path::{Path, PathBuf};

/// Why a model could not be read, run or written.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The operating system refused.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was being done: "open", "read", "write" ...
        action: &'static str,
        /// To which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file does not hold what its format says, or what the model needs.
    #[error("{}: {place}{}{message}", file.display(), if place.is_empty() { "" } else { ": " })]
    Bad {
        /// The file.
        file: PathBuf,
        /// Where in it (a tensor, a key of the configuration); empty for the file as a whole.
        place: String,
        /// What was expected and what was found.
        message: String,
    },
    /// The model uses something that is not implemented.
    #[error("{}: {option} = {found} is not supported; supported: {supported}", file.display())]
    Unsupported {
        /// The file that asks for it.
        file: PathBuf,
        /// The option.
        option: String,
        /// Its value.
        found: String,
        /// What would be possible.
        supported: String,
    },
    /// A value that must be a number is NaN or infinite.
    #[error("layer {layer}, row {row}: router logit of expert {expert} is {value}")]
    RouterLogit {
        /// The model's layer.
        layer: usize,
        /// Row of the batch.
        row: usize,
        /// Column.
        expert: usize,
        /// The value.
        value: f32,
    },
    /// The request cannot be met: a prompt that is too long, an id outside the vocabulary ...
    #[error("{0}")]
    Request(String),
    /// An error of the tensor library.
    #[error("{what}: {source}")]
    Tensor {
        /// What was being computed.
        what: String,
        /// What the library said.
        source: candle_core::Error,
    },
    /// The routed experts of a layer could not run.
    #[error("layer {layer}: {source}")]
    Moe {
        /// The model's layer.
        layer: usize,
        /// Why.
        source: occult_moe::MoeError,
    },
    /// Another rank failed or did not come.
    #[error("{0}")]
    Ranks(String),
    /// A kernel refused its arguments.
    #[error(transparent)]
    Kernel(#[from] occult_kernels::KernelError),
    /// A placement that does not fit.
    #[error(transparent)]
    Plan(#[from] occult_plan::PlanError),
}

impl ModelError {
    /// An I/O error with what was being done to which file.
    pub fn io(action: &'static str, path: impl AsRef<Path>, source: io::Error) -> Self {
        ModelError::Io { action, path: path.as_ref().to_path_buf(), source }
    }

    /// A file that is not what it should be. `place` may be empty.
    pub fn bad(file: impl AsRef<Path>, place: impl Into<String>, message: impl Into<String>) -> Self {
        ModelError::Bad { file: file.as_ref().to_path_buf(), place: place.into(), message: message.into() }
    }

    /// A request that cannot be met.
    pub fn request(message: impl Into<String>) -> Self {
        ModelError::Request(message.into())
    }
}

impl From<candle_core::Error> for ModelError {
    fn from(source: candle_core::Error) -> Self {
        ModelError::Tensor { what: "tensor operation".into(), source }
    }
}

/// Result of a model function.
pub type Result<T, E = ModelError> = std::result::Result<T, E>;

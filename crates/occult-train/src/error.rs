//! One error type for training: which file, line, step or option, what was expected and what was found.

use std::io;
use std::path::{Path, PathBuf};

/// Why data could not be read, or training could not go on.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// The operating system refused.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was being done: "open", "write" ...
        action: &'static str,
        /// To which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A data file does not hold what its format says.
    #[error("{}{}: {message}", file.display(), line.map_or(String::new(), |l| format!(", line {l}")))]
    Data {
        /// The file.
        file: PathBuf,
        /// Line, counted from 1, where it is known.
        line: Option<usize>,
        /// What was expected and what was found.
        message: String,
    },
    /// The request cannot be met: an option outside its range, no data left ...
    #[error("{0}")]
    Request(String),
    /// A checkpoint of another format version.
    #[error("{}: checkpoint format version {found}, this program reads version {expected}", path.display())]
    Version {
        /// The checkpoint.
        path: PathBuf,
        /// Its version.
        found: u64,
        /// The version of this program.
        expected: u64,
    },
    /// A checkpoint of another model or another configuration.
    #[error("{}: checkpoint of another {what}: it has {found}, this run has {expected}", path.display())]
    Other {
        /// The checkpoint.
        path: PathBuf,
        /// What differs: "model", "configuration", "shape of parameter x" ...
        what: String,
        /// In the checkpoint.
        found: String,
        /// In this run.
        expected: String,
    },
    /// A file of a checkpoint is shorter or longer than it was when it was written.
    #[error("{}: truncated: {found} bytes, the checkpoint says {expected}", file.display())]
    Truncated {
        /// The file.
        file: PathBuf,
        /// Bytes it had.
        expected: u64,
        /// Bytes it has.
        found: u64,
    },
    /// A file of a checkpoint is damaged.
    #[error("{}: damaged: {message}", file.display())]
    Damaged {
        /// The file.
        file: PathBuf,
        /// What does not hold.
        message: String,
    },
    /// A checkpoint could not be written: a full disk, mostly.
    #[error("the checkpoint of step {step} is not complete: {source}; {}", good(last_good))]
    NotSaved {
        /// The step.
        step: u64,
        /// Why.
        source: Box<TrainError>,
        /// Where to go on from.
        last_good: Option<PathBuf>,
    },
    /// The loss or the gradients left the range in which training makes sense.
    #[error("training diverged at step {step}: {reason}; {}", good(last_good))]
    Diverged {
        /// The step, counted from 1.
        step: u64,
        /// What was seen.
        reason: String,
        /// The newest checkpoint from before the loss rose.
        last_good: Option<PathBuf>,
    },
    /// A number inside the model is NaN or infinite.
    #[error("{0}")]
    NotFinite(String),
    /// An error of the model.
    #[error("{what}: {source}")]
    Model {
        /// What was being done.
        what: String,
        /// What the model said.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

fn good(checkpoint: &Option<PathBuf>) -> String {
    let named = |p: &PathBuf| format!("last good checkpoint: {}", p.display());
    checkpoint.as_ref().map_or("there is no good checkpoint yet".into(), named)
}

/// Shorthand.
pub type Result<T, E = TrainError> = std::result::Result<T, E>;

impl TrainError {
    pub(crate) fn io(action: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io { action, path: path.to_owned(), source }
    }

    pub(crate) fn data(file: &Path, line: impl Into<Option<usize>>, message: impl Into<String>) -> Self {
        Self::Data { file: file.to_owned(), line: line.into(), message: message.into() }
    }

    pub(crate) fn damaged(file: &Path, message: impl Into<String>) -> Self {
        Self::Damaged { file: file.to_owned(), message: message.into() }
    }

    pub(crate) fn other(path: &Path, what: impl Into<String>, found: String, expected: String) -> Self {
        Self::Other { path: path.to_owned(), what: what.into(), found, expected }
    }

    /// A request that cannot be met.
    pub fn request(message: impl Into<String>) -> Self {
        Self::Request(message.into())
    }

    /// Wraps an error of the model.
    pub fn model(
        what: impl Into<String>,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self::Model { what: what.into(), source: source.into() }
    }
}

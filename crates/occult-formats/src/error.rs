//! One error type for every file: which file, where in it, what was expected and what was found.

use std::io;
use std::path::{Path, PathBuf};

use occult_plan::PlanError;

/// Why a file could not be read or written. Layers are indices of the MoE layers in the file (not the model's layer
/// numbers) and rows are rows of that layer, both zero-based.
#[derive(Debug, thiserror::Error)]
pub enum FormatError {
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
    /// The file does not hold what its format says, or holds what this program cannot use.
    #[error("{}: {place}{}{message}", file.display(), if place.is_empty() { "" } else { ": " })]
    Bad {
        /// The file.
        file: PathBuf,
        /// Where in it ("line 7", "layer 3", "tensor layers.0.counts"); empty for the file as a whole.
        place: String,
        /// What was expected and what was found.
        message: String,
    },
    /// The values of one layer are not routing (an id out of range, a duplicate expert, NaN ...).
    #[error("{}: layer {layer}: {source}", file.display())]
    Plan {
        /// The file the values come from.
        file: PathBuf,
        /// Index of the MoE layer in the file.
        layer: usize,
        /// What is wrong; its row counts from the start of that layer in that file.
        source: PlanError,
    },
    /// The request itself cannot be met: an option is missing or contradicts the files.
    #[error("{0}")]
    Request(String),
}

impl FormatError {
    /// An I/O error with what was being done to which file.
    pub fn io(action: &'static str, path: impl AsRef<Path>, source: io::Error) -> Self {
        FormatError::Io { action, path: path.as_ref().to_path_buf(), source }
    }

    /// A file that is not what it should be. `place` may be empty.
    pub fn bad(file: impl AsRef<Path>, place: impl Into<String>, message: impl Into<String>) -> Self {
        FormatError::Bad { file: file.as_ref().to_path_buf(), place: place.into(), message: message.into() }
    }

    /// Bad values in one layer; `first_row` is added to the row that `source` names, so that a chunk's error names the
    /// row of the file.
    pub fn plan(file: impl AsRef<Path>, layer: usize, first_row: usize, source: PlanError) -> Self {
        FormatError::Plan { file: file.as_ref().to_path_buf(), layer, source: shift_row(source, first_row) }
    }
}

fn shift_row(error: PlanError, first_row: usize) -> PlanError {
    match error {
        PlanError::ExpertOutOfRange { row, id, num_experts } => {
            PlanError::ExpertOutOfRange { row: row + first_row, id, num_experts }
        }
        PlanError::DuplicateExpert { row, id } => PlanError::DuplicateExpert { row: row + first_row, id },
        PlanError::NotFinite { row, what, value } => {
            PlanError::NotFinite { row: row + first_row, what, value }
        }
        PlanError::InLayer { layer, source } => {
            PlanError::InLayer { layer, source: Box::new(shift_row(*source, first_row)) }
        }
        other => other,
    }
}

/// Result of reading or writing a file.
pub type Result<T, E = FormatError> = std::result::Result<T, E>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_name_file_place_and_row() {
        let e = FormatError::bad("a.json", "line 7", "expected a list");
        assert_eq!(e.to_string(), "a.json: line 7: expected a list");
        assert_eq!(FormatError::bad("a.json", "", "is empty").to_string(), "a.json: is empty");
        let e = FormatError::plan("a.npz", 3, 4096, PlanError::DuplicateExpert { row: 2, id: 5 });
        assert_eq!(e.to_string(), "a.npz: layer 3: row 4098: expert 5 appears twice");
    }
}

//! What can go wrong between ranks.

use std::time::Duration;

/// Result of a call of this crate.
pub type Result<T, E = CommError> = std::result::Result<T, E>;

/// Why an operation failed. Ranks are those of the whole world.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CommError {
    /// Other ranks did not come, or their data did not.
    #[error("rank {rank}: `{what}` waited {} s for rank {}", .after.as_secs_f64(), list(.waiting_for))]
    Timeout {
        /// The operation.
        what: &'static str,
        /// The rank that waited.
        rank: usize,
        /// The ranks whose part was missing, ascending.
        waiting_for: Vec<usize>,
        /// How long it waited.
        after: Duration,
    },
    /// The process was asked to end (by the launcher, usually because another rank died) while it waited.
    #[error("rank {rank}: `{what}` was told to stop while it waited for rank {}", list(.waiting_for))]
    Stopped {
        /// The operation.
        what: &'static str,
        /// The rank that was stopped.
        rank: usize,
        /// The ranks whose part was missing, ascending.
        waiting_for: Vec<usize>,
    },
    /// Another rank failed or left.
    #[error("rank {rank} failed: {reason} (seen in `{what}`)")]
    Peer {
        /// The operation in which this rank learned of it.
        what: &'static str,
        /// The rank that failed.
        rank: usize,
        /// What that rank said.
        reason: String,
    },
    /// Two ranks disagree about the operation or about a number of bytes.
    #[error("rank {rank}: `{what}` with rank {peer}: expected {expected}, found {found}")]
    Mismatch {
        /// The operation of this rank.
        what: &'static str,
        /// The rank that noticed.
        rank: usize,
        /// The rank it disagrees with (itself, when its own part does not fit what it expects).
        peer: usize,
        /// What this rank's call means.
        expected: String,
        /// What came from the peer.
        found: String,
    },
    /// The caller's arguments contradict each other.
    #[error("rank {rank}: `{what}`: {reason}")]
    Argument {
        /// The operation.
        what: &'static str,
        /// The rank that called.
        rank: usize,
        /// What is wrong.
        reason: String,
    },
    /// No memory for a buffer.
    #[error("no memory for {bytes} bytes")]
    Memory {
        /// Size of the buffer.
        bytes: usize,
    },
    /// The transport itself reported an error.
    #[error("rank {rank}: transport: {reason}")]
    Transport {
        /// The rank that saw it.
        rank: usize,
        /// The transport's words.
        reason: String,
    },
}

/// Ranks in a sentence.
pub(crate) fn list(ranks: &[usize]) -> String {
    ranks.iter().map(usize::to_string).collect::<Vec<_>>().join(", ")
}

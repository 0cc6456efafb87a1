//! Moves rows between ranks: collective calls with bounded waits over threads or MPI.
//!
//! Words: a *rank* is one participant of a group, a *peer* another one. A call is *collective* when every rank of the
//! group must make it, in the same order. `what` is the name of an operation: it appears in errors and in the counts,
//! and ranks that call differently named operations at the same place are told so.
//!
//! | backend | ranks are | made by |
//! |---|---|---|
//! | [`SoloComm`] | this one | [`SoloComm::new`] |
//! | threads | threads of this process | [`run_threads`] |
//! | MPI (feature `mpi`) | processes | `run_mpi` |
//!
//! All of them pass one conformance suite (`tests/conformance/`). This crate knows no token, expert or layer.
//!
//! # Failure
//! Every wait ends: with the data, with the failure of a peer ([`CommError::Peer`]), with a disagreement
//! ([`CommError::Mismatch`]) or at its deadline ([`CommError::Timeout`]). Ranks in errors are those of the whole world,
//! also in a group made by [`Communicator::split`]. After an error a communicator is of no more use.

mod buffer;
mod communicator;
mod error;
mod group;
mod letter;
mod mailbox;
mod metered;
#[cfg(feature = "mpi")]
mod mpi;
mod post;
mod solo;
mod thread;

pub use buffer::Buffer;
pub use communicator::{Communicator, Exchange, Expect, Received};
pub use error::{CommError, Result};
pub use metered::{Counts, Meter, Metered, Reach, Snapshot};
#[cfg(feature = "mpi")]
pub use mpi::{MpiOptions, end_mpi, leave_mpi, run_mpi};
pub use solo::SoloComm;
pub use thread::{RankError, RankResults, ThreadOptions, run_threads};

//! A data-only reader of Python pickles, `torch.save` archives and pickled numpy arrays.
//!
//! A pickle is a program for a small stack machine that may call any Python function. This reader executes nothing:
//! names in the stream are compared with the short list of `globals`, each of which stands for *data* (a tensor, an
//! array, an ordered dict, bytes), and any other name is an error that quotes it.
//!
//! Memory is bounded by the input: no size that the stream claims is allocated before the bytes are there, objects and
//! values are counted, and the arena has no owners, so that a stream that nests a million lists (or a list inside
//! itself) costs neither stack nor time.
//!
//! - [`Pickle::parse`]: bytes to an arena of objects; [`Item`] walks it.
//! - [`TorchFile`]: a `.pt` zip archive: `data.pkl` plus storages that are read when asked for.

mod array;
mod element;
mod globals;
mod machine;
mod opcodes;
mod reduce;
mod torch;
mod value;

pub use array::Array;
pub use element::Element;
pub use torch::{Tensor, TorchFile};
pub use value::{Item, Pickle};

/// Why a pickle could not be read: where in the stream, and what was found.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("pickle, byte {offset}: {message}")]
pub struct PickleError {
    /// Offset of the instruction in the stream.
    pub offset: u64,
    /// What was expected and found.
    pub message: String,
}

/// Longest stream that is read, in bytes.
pub const MAX_STREAM_BYTES: u64 = 1 << 30;
/// Most objects (strings, lists, dicts, tensors) in one pickle.
pub const MAX_OBJECTS: usize = 8 << 20;
/// Most elements on the stack and in containers, together.
pub const MAX_VALUES: usize = 64 << 20;

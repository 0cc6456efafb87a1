//! Every file that Occult reads or writes: routing profiles, placements, and the formats of other engines.
//!
//! - [`Profile`] and [`ProfileWriter`]: the routing profile, one safetensors file, written and read as a stream.
//! - [`PlacementFile`]: the placement, JSON; [`export()`] and [`import_placement`]: expert maps of other engines.
//! - [`describe`]: what a file is. [`pickle`]: pickles and `.pt` files as data.
//! - [`import()`]: routing records and expert statistics of other engines, into a profile.
//! - [`cluster`]: links and compute for the cost model, with presets.
//!
//! Files are not trusted. A size or offset read from a file is checked against the file before anything of that size
//! is allocated, every error is a [`FormatError`] that names the file, and an output appears under its name only when it
//! is complete.
#![forbid(unsafe_code)]

mod array;
pub mod cluster;
pub mod error;
pub mod export;
pub mod import;
pub mod inspect;
mod io;
pub mod limit_file;
mod npy;
pub mod pickle;
pub mod placement_file;
pub mod profile;
pub mod similarity_file;
mod tensors;

pub use error::{FormatError, Result};
pub use export::{ExportFormat, ExportOptions, Exported, MapOptions, export, import_placement};
pub use import::{ImportFormat, ImportOptions, ImportSummary, detect, import};
pub use inspect::{Description, FileKind, describe};
pub use limit_file::{LIMIT_FILE, LimitFile};
pub use placement_file::{PlacementFile, PlacementMeta, write_atomic, write_atomic_with};
pub use profile::{
    Chunk, Columns, LayerRows, Profile, ProfileMeta, ProfileWriter, RouterInfo, Scoring, Source,
};
pub use similarity_file::{read_similarity, write_similarity};

/// Most experts a layer may have. Released models have at most 512; the limit bounds the co-activation table, which is
/// quadratic in a number that a file may lie about.
pub const MAX_EXPERTS: usize = 4096;
/// Most MoE layers a profile may have.
pub const MAX_LAYERS: usize = 1024;
/// Largest total of one layer's counts: exact in JSON and in an `f64`.
pub const MAX_COUNT: u64 = 1 << 53;

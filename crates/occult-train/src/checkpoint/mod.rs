//! Checkpoints that are complete or absent.
//!
//! A checkpoint is a directory `step-00000100` holding one `rank-0000.safetensors` per rank (master weights and both moments of
//! AdamW), one `rank-0000.json` beside each (length and CRC-32) and `checkpoint.json` (state, list of shards). `latest` names
//! the one to go on from. Order of writing, each step flushed to the disk before the next:
//!
//! 1. every rank writes its files into `step-00000100.partial`;
//! 2. after a barrier rank 0 reads all ranks' notes, writes `checkpoint.json` there and renames the directory;
//! 3. rank 0 replaces `latest` by a rename: from here on the new checkpoint counts;
//! 4. rank 0 removes checkpoints beyond the number to keep, never the one that `latest` names, nor the newest one from before
//!    the loss rose.
//!
//! Whatever is interrupted, `latest` names a complete checkpoint.

mod files;
mod read;
mod shard;
mod write;

pub use files::{DiskFiles, Files, Fill};
pub use read::{Checkpoint, latest};
pub use shard::{Kind, Saved};
pub(crate) use write::name;
pub use write::{Writer, remove_partial};

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::trainer::Losses;

/// Version of the format that this program writes and reads.
pub const VERSION: u64 = 2;

/// Where a run stands.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Steps taken.
    pub step: u64,
    /// Sequences that all ranks together have consumed.
    pub consumed: u64,
    /// Tokens that were inputs so far, padding not counted.
    pub tokens: u64,
    /// Seed of the run: every random number is a function of it and of what it is for.
    pub seed: u64,
    /// What the model is: its architecture, by whatever text identifies it.
    pub model: String,
    /// The options that must not change over a run, by name.
    pub config: BTreeMap<String, String>,
    /// The divergence guard's memory.
    pub losses: Losses,
    /// Step of the newest checkpoint from before any rise of the loss: it is kept.
    #[serde(default)]
    pub good: Option<u64>,
    /// Steps in a row that were not taken because the gradients were not finite.
    #[serde(default)]
    pub skipped: u32,
    /// Whatever else a caller keeps: balancing biases, placement, rule ...
    #[serde(default)]
    pub extra: serde_json::Value,
}

/// One file of a checkpoint.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct ShardNote {
    pub(crate) file: String,
    pub(crate) bytes: u64,
    pub(crate) crc32: u32,
}

/// `checkpoint.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Manifest {
    pub(crate) version: u64,
    pub(crate) shards: Vec<ShardNote>,
    pub(crate) state: State,
}

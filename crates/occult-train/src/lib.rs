//! Trains MoE language models: data, optimisers, schedules, checkpoints and the loop around them.
//!
//! Everything here works on numbers in flat slices: the model comes in by a trait, ranks by another, so that each part is
//! tested without them.

pub mod balance;
pub mod checkpoint;
pub mod data;
mod error;
pub mod log;
pub mod lora;
pub mod model;
pub mod optim;
pub mod random;
pub mod schedule;
pub mod trainer;

pub use error::{Result, TrainError};

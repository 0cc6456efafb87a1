//! Hugging Face model directories: configuration, tensor names, weights. Everything that knows a family by name is here.

mod checkpoint;
mod config;
mod generation;
mod keys;
mod names;
pub(crate) mod quant_names;
mod rope;
mod shard;
mod training;
pub(crate) mod write;

pub use checkpoint::Checkpoint;
pub(crate) use checkpoint::{INDEX, SINGLE, read_json};
pub use config::read_spec;
pub(crate) use config::{CONFIG, QUANT_METHOD};
pub use generation::GenerationDefaults;
pub use names::{ExpertLayout, Matrix, Names, ParameterCounts, Role, TensorInfo};
pub use training::{BalanceLoss, TrainingDefaults};

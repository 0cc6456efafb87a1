//! From gradients to new weights: AdamW on flat f32 slices, clipping by the global norm.

pub mod adamw;
pub mod clip;

pub use adamw::{AdamW, Moments, StepRates};
pub use clip::{Clip, clip, squared_norm};

//! One expert-parallel MoE layer.
pub mod error;
pub mod exchange;
pub mod ops;
pub mod router;
pub mod row_plan;
mod tensor;
pub mod timers;
pub mod wire;

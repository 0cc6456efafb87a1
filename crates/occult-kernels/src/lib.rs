//! The arithmetic of expert-parallel MoE layers: sparse matmuls and the dense operations they share a core with.
//!
//! Everything is row-major and `f32`; weights may be stored in another type ([`Matrix`]) and are widened on the fly.
//! Letters in shapes: R rows received, N expanded rows (one per row and chosen expert), e experts, D hidden size,
//! F expert intermediate size; M, N, K for a dense product.
//!
//! - [`smm`]: the scattering and the merging sparse matmul, forward and backward, and the whole expert network.
//! - [`linear`]: a dense layer, forward and backward.
//! - [`quant`]: 8-bit and 4-bit weights, products in integers, inference only.
//! - `ops` (feature `candle`): operations on candle tensors with forward and backward. `examples/candle_moe.rs` is a
//!   candle model with a mixture-of-experts layer made of them, trained with candle's own optimiser.
//! - [`Threads`]: how many cores a call may use; each rank owns one.
//! - [`SparseRows`]: which rows an expert works on.
//!
//! # Order of additions
//! A dot product over k is added in an order that depends on k and on the kernel that was chosen for the number of
//! rows of the expert only: never on the number of threads, nor on where a row or a column stands. A merge adds
//! experts ascending.

mod core;
mod error;
pub mod linear;
mod matrix;
#[cfg(feature = "candle")]
pub mod ops;
pub mod peak;
pub mod quant;
mod rows;
mod simd;
pub mod smm;
mod threads;

pub use crate::core::isa::InstructionSet;
pub use error::{KernelError, Result};
pub use matrix::Matrix;
pub use rows::SparseRows;
pub use threads::Threads;

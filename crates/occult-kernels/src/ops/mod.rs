//! Operations on candle tensors, each with its own backward.
//!
//! All of them compute in f32 on CPU. They take views where the last dimension is contiguous and copy only what is
//! not; they keep for backward what the description of each says, and give no gradient to an input that does not
//! lead to a variable. Gradients of gradients are not available.
//!
//! | letter | meaning |
//! |---|---|
//! | B, T, S | sequences, positions of queries, positions of keys |
//! | H, Hkv | query heads, key heads |
//! | D, V | hidden size, vocabulary |
//! | E, e, K, F | experts, experts of this rank, experts per token, expert width |
//! | R, N | rows received, expanded rows |

pub mod attention;
pub mod cross_entropy;
pub mod embedding;
pub mod inference;
pub mod linear;
pub mod rms_norm;
pub mod rope;
pub mod router;
pub mod smm;
pub mod swiglu;

mod gemm;
mod shared;
mod simd;
mod sink;
mod tensor;

#[cfg(test)]
mod check;

pub use attention::{AttentionShape, attention};
pub use cross_entropy::{
    CrossEntropy, SummedLoss, cross_entropy, linear_cross_entropy, linear_cross_entropy_into,
};
pub use embedding::embedding;
pub use linear::{linear, linear_into};
pub use rms_norm::rms_norm;
pub use rope::{RopeStyle, rope};
pub use sink::GradSink;
pub use smm::{merging_smm, merging_smm_into, scattering_smm, scattering_smm_into};
pub use swiglu::{swiglu, swiglu_packed};

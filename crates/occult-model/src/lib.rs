//! Mixture-of-Experts language models: released checkpoints in, the same logits out, routing recorded.
//!
//! - [`ModelFiles::open`] reads a Hugging Face directory (headers only), [`ModelFiles::load`] makes a [`Decoder`].
//! - [`Decoder::forward`] runs a [`Batch`], with or without a [`KvCache`], and shows a [`RoutingObserver`] what the
//!   routers decided.
//! - [`for_each_pass`] feeds many sequences in few passes: short ones share them, long ones are cut.
//! - [`MoeLayer`] is the seam for other ways to compute the routed experts; [`LocalExperts`] is the plain exact one.
//! - [`generate()`], [`eval`], [`convert()`], [`permute()`]: text, measures, and checkpoints written back.
//!
//! A text continued, token by token:
//!
//! ```no_run
//! # #[cfg(feature = "tokenizer")]
//! # fn main() -> occult_model::Result<()> {
//! use occult_model::{GenerateOptions, LoadOptions, ModelFiles, TextTokenizer, generate};
//! use std::{ops::ControlFlow, path::Path};
//!
//! let dir = Path::new("OLMoE-1B-7B-0125");
//! let model = ModelFiles::open(dir, LoadOptions::default())?.load()?;
//! let tokenizer = TextTokenizer::open(dir, model.spec())?;
//! let options = GenerateOptions { max_new_tokens: Some(32), ..GenerateOptions::default() };
//! let mut text = tokenizer.stream();
//! generate(&model, &tokenizer.encode("The sea is", true)?, &options, &mut |id| {
//!     print!("{}", text(id)?);
//!     Ok(ControlFlow::Continue(()))
//! })?;
//! # Ok(())
//! # }
//! # #[cfg(not(feature = "tokenizer"))]
//! # fn main() {}
//! ```
//!
//! Letters: `B` sequences, `T` positions of a batch, `S` positions with those before, `D` hidden size, `E` experts,
//! `K` top_k, `F` width of an expert, `V` vocabulary.
//!
//! Activations and arithmetic are f32 on CPU; weights stay in the format they are stored in.
#![deny(unsafe_op_in_unsafe_fn)]

mod batch;
mod build;
mod decoder;
pub mod error;
pub mod eval;
mod generate;
pub mod hf;
mod kv_cache;
mod layer;
mod layers;
mod load;
mod moe;
mod parameters;
mod passes;
mod permute;
mod quantise;
mod ranks;
mod rewrite;
mod sample;
pub mod spec;
#[cfg(feature = "tokenizer")]
mod text;
mod train;
mod weight;

pub use batch::Batch;
pub use decoder::{Decoder, Logits};
pub use error::{ModelError, Result};
pub use generate::{GenerateOptions, Generated, PREFILL_CHUNK, Stop, check_prompt, generate, prefill};
pub use kv_cache::KvCache;
pub use layers::{Linear, Mlp};
pub use load::{LoadOptions, MakeMoeLayer, ModelFiles};
pub use moe::{
    ExpertWeights, LocalExperts, MoeLayer, MoeOutput, ParallelExperts, Router, RoutingObserver,
    RoutingRecord, Shared, StackedExperts,
};
pub use occult_kernels::ops::router::router_z_loss;
pub use occult_kernels::{Threads, quant};
pub use parameters::{Gradient, MakeTrainableMoe, ModelParameters, Parameter, ParameterKind};
pub use passes::{PASS_ROWS, Pass, PassObserver, for_each_pass, passes};
pub use permute::{Beside, MAX_LOGIT_DIFFERENCE, PermuteReport, expert_order, permute};
pub use quantise::{QuantisedClass, quantise};
pub use ranks::{MAX_PLACEMENT_DIFFERENCE, Ranks, Replaced, Spread, logit_difference};
pub use rewrite::{ConvertOptions, Progress, convert, files_beside_weights};
pub use sample::{Sampler, Sampling};
pub use spec::{Family, ModelSpec};
#[cfg(feature = "tokenizer")]
pub use text::{Message, TextTokenizer};
pub use train::{BalanceCounts, IGNORE, TrainBatch, TrainOptions, TrainOutput};
pub use weight::{StoredDtype, Values, Weight};

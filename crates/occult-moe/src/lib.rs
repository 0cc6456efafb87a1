//! One expert-parallel MoE layer: route, prune, plan, exchange, compute, combine - forward and backward.
//!
//! [`layer`] has the algorithm in numbered prose; [`exchange`] moves rows and is the only caller of the communicator in a
//! forward or backward pass; [`mod@reference`] is the definition that everything is tested against.
//!
//! # Letters
//! `T` tokens of this rank, `D` hidden size, `E` experts, `e` experts on this rank, `K` top_k, `F` expert intermediate
//! size, `W` ranks, `S` rows sent, `R` rows received, `N` expanded rows.
#![forbid(unsafe_code)]

mod autograd;
pub mod config;
pub mod error;
pub mod exchange;
pub mod gradients;
mod inference;
pub mod layer;
mod ops;
pub mod overlap;
mod parts;
pub mod predict;
pub mod reference;
mod room;
pub mod router;
pub mod row_plan;
mod tensor;
pub mod timers;
pub mod wire;

pub use config::{LayerOptions, Mode, Overlap, PruneRule, Pruning, Step, TwoLevel, topology_of};
pub use error::{MoeError, Result};
pub use gradients::{all_reduce_gradients, all_reduce_replicas};
pub use layer::{Decision, ExpertParallelLayer, ExpertTensors, Meanwhile};
pub use overlap::Pass;
pub use router::{GroupLimit, RouterSpec, routing_weights};
pub use timers::{PhaseSeconds, Timers};

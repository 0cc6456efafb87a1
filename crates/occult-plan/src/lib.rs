//! The planning core of Occult: *who goes where*.
//!
//! Arrays in, tables out. This crate has no tensors, no threads, no files and no clock; the same input gives
//! the same bytes on any machine (ties are broken by id, randomness comes from a seed, nothing hashes).
//!
//! # Letters
//! `T` tokens (rows), `K` top_k, `E` experts, `e` experts on one rank, `W` ranks, `L` layers,
//! `S` rows sent, `R` rows received, `N` expanded rows.
//!
//! # Words
//! - *Routing*: the top-k decision of a router, `expert_ids` `[T, K]` with optional `weights` `[T, K]` and `scores` `[T, E]`.
//! - *Placement*: which rank holds which expert. The only way from an expert to a rank.
//! - *Token copy*: one (token, rank) pair. `C_T`, copies per token, is the mean number of distinct ranks a token visits.
//! - *Co-activation*: the number of tokens that chose both of two experts; the weights of the *collaboration graph*.
//! - *Intra-/inter-collaboration*: a co-active pair on one rank / on two ranks.
//! - *Load*: (token, expert) pairs a rank computes. `max/mean` is 1 when the work is even.
#![forbid(unsafe_code)]

pub mod brim;
pub mod coactivation;
pub mod cost;
pub mod dispatch_plan;
pub mod error;
pub mod graph;
pub mod placement;
pub mod prune;
pub mod replicas;
pub mod routing;
pub mod similarity;
pub mod topology;
pub mod traffic;

pub use brim::{Brim, DenseBrim, ExpertRows};
pub use coactivation::{CoActivation, tokens_per_expert};
pub use dispatch_plan::{DispatchPlan, RowExperts};
pub use error::PlanError;
pub use placement::{LayerPlacement, Placement};
pub use prune::{Budget, PruneSpec, PruneStats, Pruned, RouterRule, Rule, Scoring, prune};
pub use replicas::ReplicaChooser;
pub use routing::{Routing, RoutingBuf};
pub use similarity::{SimilarityAccumulator, SimilarityTable};
pub use topology::Topology;
pub use traffic::{HomeRanks, LayerTraffic, TrafficMeter, TrafficSummary};

/// Global (logical) id of a routed expert, `0..E`.
pub type ExpertId = u16;
/// Position of an expert in the ascending list of experts of one rank.
pub type LocalExpert = u16;
/// A device of the expert-parallel group, `0..W`.
pub type Rank = u16;

/// Result of a planning function.
pub type Result<T, E = PlanError> = std::result::Result<T, E>;

//! Predicted time of one MoE layer on a cluster of links and compute.
//!
//! # The formula
//! Times in seconds, sizes in bytes, bandwidths in bytes per second, one direction at a time (links are full duplex).
//!
//! ```text
//! forward  = dispatch + compute + combine          backward = dispatch' + 2 compute + combine'
//!
//! one exchange step   = latency * peers + max over ends of max(bytes out, bytes in) / bandwidth
//! one exchange        = step over the links between nodes + step over the links within a node
//! bytes               = rows * hidden * dtype_bytes + (token, expert) pairs * bytes that travel with each
//! compute             = max over ranks of max(flops / FLOP/s, weight bytes / memory bandwidth)
//! flops of a rank     = 2 * num_matrices * hidden * ffn * (token, expert) pairs it computes
//! weight bytes        = num_matrices * hidden * ffn * weight_dtype_bytes * experts of the rank with a token
//! ```
//!
//! The rows depend on the [`Exchange`]:
//! - *per node, then rank*: between nodes one row per (token, remote node), to the rank at the home rank's position there;
//!   within the node one row per further (token, rank). The two steps follow each other.
//! - *per rank* and *per expert*: one row per (token, rank) or (token, expert), straight to its rank, over the links between
//!   nodes when the rank is on another node and over the links within the node otherwise.
//!
//! An *end* is a rank; where the links between nodes are shared by a node, the node. A pair carries its expert id and weight
//! (2 + 4 bytes) in dispatch, nothing in combine, nothing with the gradients of the outputs (`dispatch'`), and the gradient
//! of its weight (4 bytes) with those of the inputs (`combine'`); backward computes twice the products of forward.
//!
//! What it leaves out: overlap of communication with compute, attention and shared experts, activation memory traffic,
//! contention of switches, kernel launches. It says which placement is faster and by about how much, not what a clock will show.
//!
//! With overlap a pass is a schedule on cores and the two directions of the wire instead of a sum: [`PassWork::timeline`], from which the
//! parts are chosen, too ([`best_cut`]).
//!
//! A step of another size than the measured tokens scales rows and flops; the experts that get a token are then those a
//! sample of that many independent tokens would touch on average, `1 - (1 - share)^tokens` for each.

mod cluster;
mod cut;
mod exchange;
mod explain;
mod predict;
mod schedule;

pub use cluster::{Cluster, Compute, InterLink, Link, LinkEnd};
pub use cut::Cut;
pub use exchange::{Exchange, ExchangeStep, ExchangeTime};
pub use explain::explain;
pub use predict::{ComputeTime, LayerShape, PassTime, StepTime, predict};
pub use schedule::{MAX_PARTS, PassWork, Timeline, Within, best_cut};

#[cfg(test)]
mod tests;

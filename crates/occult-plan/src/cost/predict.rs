//! Time of one step of one layer.

use super::exchange::Flows;
use super::{Cluster, Exchange, ExchangeTime};
use crate::traffic::{ID_BYTES, WEIGHT_BYTES};
use crate::{LayerTraffic, PlanError, Rank, Result};

/// Sizes of the experts of one layer.
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct LayerShape {
    /// Elements of a token row.
    pub hidden: usize,
    /// Intermediate size of one expert.
    pub ffn: usize,
    /// `hidden x ffn` matrices of an expert: 3 with a gate (SwiGLU), 2 without.
    pub num_matrices: usize,
    /// Bytes of an element of a row on the wire.
    pub dtype_bytes: f64,
    /// Bytes of an element of a weight, scales included (0.53 for MXFP4).
    pub weight_dtype_bytes: f64,
}

impl LayerShape {
    /// Gated experts (three matrices), rows and weights of the same type.
    pub fn gated(hidden: usize, ffn: usize, dtype_bytes: f64) -> Self {
        Self { hidden, ffn, num_matrices: 3, dtype_bytes, weight_dtype_bytes: dtype_bytes }
    }

    fn check(&self) -> Result<()> {
        let sizes = [
            ("hidden size", self.hidden as f64),
            ("expert intermediate size", self.ffn as f64),
            ("matrices per expert", self.num_matrices as f64),
            ("bytes per element of a row", self.dtype_bytes),
            ("bytes per element of a weight", self.weight_dtype_bytes),
        ];
        match sizes.into_iter().find(|&(_, size)| size.is_nan() || size <= 0.0 || size.is_infinite()) {
            Some((what, found)) => Err(PlanError::range(what, "a positive number", found)),
            None => Ok(()),
        }
    }

    /// Elements of all matrices of one expert.
    pub(super) fn expert_elements(&self) -> f64 {
        self.num_matrices as f64 * self.hidden as f64 * self.ffn as f64
    }
}

/// The expert products of one rank, forward.
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct ComputeTime {
    /// (token, expert) pairs.
    pub pairs: f64,
    /// Floating-point operations.
    pub flops: f64,
    /// Experts with a token.
    pub experts_touched: f64,
    /// Bytes of their weights.
    pub weight_bytes: f64,
    /// `max(flops / FLOP/s, weight_bytes / memory bandwidth)`.
    pub seconds: f64,
}

/// Forward or backward.
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct PassTime {
    /// Rows to the experts (backward: gradients of the outputs).
    pub dispatch: ExchangeTime,
    /// The slowest rank.
    pub compute_s: f64,
    /// Rows back (backward: gradients of the inputs).
    pub combine: ExchangeTime,
    /// Sum of the three.
    pub total_s: f64,
}

impl PassTime {
    fn new(dispatch: ExchangeTime, compute_s: f64, combine: ExchangeTime) -> Self {
        let total_s = dispatch.seconds + compute_s + combine.seconds;
        Self { dispatch, compute_s, combine, total_s }
    }

    /// Dispatch and combine.
    pub fn exchange_s(&self) -> f64 {
        self.dispatch.seconds + self.combine.seconds
    }
}

/// Predicted time of one step of one layer.
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct StepTime {
    /// What travels.
    pub exchange: Exchange,
    /// Tokens of the step, over all ranks.
    pub tokens: f64,
    /// The expert products of each rank, forward, `[W]`.
    pub ranks: Vec<ComputeTime>,
    /// Rank whose products take longest, the lowest among equals.
    pub slowest_rank: usize,
    /// Inference, or the first half of training.
    pub forward: PassTime,
    /// The second half of training.
    pub backward: PassTime,
}

/// Predicts one layer's step by the formula of [the module](super). `tokens` is the size of the step over all ranks;
/// `None` takes the measured tokens as one step.
///
/// Errors when the cluster has another topology than the traffic, a size or bandwidth is impossible, or `tokens` is 0.
pub fn predict(
    cluster: &Cluster,
    shape: &LayerShape,
    traffic: &LayerTraffic,
    exchange: Exchange,
    tokens: Option<u64>,
) -> Result<StepTime> {
    cluster.check()?;
    shape.check()?;
    let (expected, found) = (cluster.topology()?, traffic.topology());
    if expected != found {
        return Err(PlanError::range(
            "topology of the traffic",
            format!("{} ranks on {} nodes, as the cluster has", expected.num_ranks(), expected.num_nodes()),
            format!("{} ranks on {} nodes", found.num_ranks(), found.num_nodes()),
        ));
    }
    if tokens == Some(0) {
        return Err(PlanError::NoTokens);
    }
    let step_tokens = tokens.unwrap_or(traffic.num_tokens()) as f64;
    let scale = step_tokens / traffic.num_tokens() as f64;
    let ranks: Vec<ComputeTime> = (0..found.num_ranks())
        .map(|r| compute(cluster, shape, traffic, r as Rank, tokens.map(|_| step_tokens), scale))
        .collect();
    let (mut slowest_rank, mut compute_s) = (0, 0.0);
    for (rank, time) in ranks.iter().enumerate() {
        if time.seconds > compute_s {
            (slowest_rank, compute_s) = (rank, time.seconds);
        }
    }
    let flows = Flows::new(cluster, traffic, exchange);
    let row_bytes = shape.hidden as f64 * shape.dtype_bytes * scale;
    let exchange_of = |pair_bytes: f64| flows.time(row_bytes, pair_bytes * scale);
    let rows_only = exchange_of(0.0);
    Ok(StepTime {
        exchange,
        tokens: step_tokens,
        ranks,
        slowest_rank,
        forward: PassTime::new(exchange_of(ID_BYTES + WEIGHT_BYTES), compute_s, rows_only.clone()),
        backward: PassTime::new(rows_only, 2.0 * compute_s, exchange_of(WEIGHT_BYTES)),
    })
}

fn compute(
    cluster: &Cluster,
    shape: &LayerShape,
    traffic: &LayerTraffic,
    rank: Rank,
    step_tokens: Option<f64>,
    scale: f64,
) -> ComputeTime {
    let slots = traffic.tokens_per_local_expert(rank);
    let pairs = slots.iter().sum::<u64>() as f64 * scale;
    let touched = |&n: &u64| match step_tokens {
        // The measured tokens are the step.
        None => f64::from(u8::from(n > 0)),
        Some(tokens) => 1.0 - libm::pow(1.0 - n as f64 / traffic.num_tokens() as f64, tokens),
    };
    let experts_touched: f64 = slots.iter().map(touched).sum();
    let flops = 2.0 * shape.expert_elements() * pairs;
    let weight_bytes = shape.expert_elements() * shape.weight_dtype_bytes * experts_touched;
    let seconds = (flops / cluster.compute.flops_per_s)
        .max(weight_bytes / cluster.compute.memory_bandwidth_bytes_per_s);
    ComputeTime { pairs, flops, experts_touched, weight_bytes, seconds }
}

//! The plain exact MoE layer on CPU: every expert computes the rows that chose it, and every row adds up its experts.

use candle_core::{Device, Tensor};
use occult_plan::RoutingBuf;
use rayon::prelude::*;

use super::{MoeLayer, Router};
use crate::error::{ModelError, Result};
use crate::layers::{Threads, matmul_nt, silu};
use crate::weight::Weight;

/// The matrices of one expert, as stored.
#[derive(Debug, Clone)]
pub struct ExpertWeights {
    /// `[F, D]`
    pub gate: Weight,
    /// `[F, D]`
    pub up: Weight,
    /// `[D, F]`
    pub down: Weight,
}

impl ExpertWeights {
    /// `x` `[n, D]` gives `[n, D]`, f32, on the calling thread.
    fn forward(&self, x: &[f32], hidden: usize) -> Vec<f32> {
        let (n, f) = (x.len() / hidden, self.gate.shape()[0]);
        let mut gate = matmul_nt(x, self.gate.values(), 0, (n, f, hidden), Threads::One);
        let up = matmul_nt(x, self.up.values(), 0, (n, f, hidden), Threads::One);
        silu(&mut gate, &up);
        matmul_nt(&gate, self.down.values(), 0, (n, hidden, f), Threads::One)
    }
}

/// All experts of a layer in this process.
///
/// Order of additions: a row's output is `((w_a y_a + w_b y_b) + w_c y_c) + ...` in f32 with experts in ascending id,
/// whatever the number of threads.
#[derive(Debug)]
pub struct LocalExperts {
    router: Router,
    experts: Vec<ExpertWeights>,
    hidden: usize,
}

impl LocalExperts {
    /// One entry per expert, all of the same shapes.
    pub fn new(router: Router, experts: Vec<ExpertWeights>) -> Result<Self> {
        let Some(first) = experts.first() else {
            return Err(ModelError::request("an MoE layer without experts"));
        };
        let &[f, hidden] = first.gate.shape() else {
            return Err(ModelError::request(format!("expert matrix {}: not a matrix", first.gate.name())));
        };
        for e in &experts {
            if e.gate.shape() != [f, hidden] || e.up.shape() != [f, hidden] || e.down.shape() != [hidden, f] {
                return Err(ModelError::request(format!("expert matrix {}: wrong shape", e.gate.name())));
            }
        }
        if experts.len() != router.spec().num_experts {
            let message = format!("{} experts for a router of {}", experts.len(), router.spec().num_experts);
            return Err(ModelError::request(message));
        }
        Ok(Self { router, experts, hidden })
    }

    /// The weighted sum for a given routing.
    fn compute(&self, x: &[f32], routing: &RoutingBuf) -> Vec<f32> {
        let (d, k) = (self.hidden, routing.top_k);
        // Slots (token, choice) by expert.
        let mut slots: Vec<Vec<usize>> = vec![Vec::new(); self.experts.len()];
        for (slot, &id) in routing.expert_ids.iter().enumerate() {
            slots[usize::from(id)].push(slot);
        }
        let outputs: Vec<Vec<f32>> = slots
            .par_iter()
            .zip(&self.experts)
            .map(|(slots, expert)| {
                let mut rows = Vec::with_capacity(slots.len() * d);
                for slot in slots {
                    rows.extend_from_slice(&x[slot / k * d..][..d]);
                }
                expert.forward(&rows, d)
            })
            .collect();
        let mut y = vec![0.0; x.len()];
        let weights = routing.weights.as_deref().unwrap_or_default();
        for (slots, rows) in slots.iter().zip(&outputs) {
            for (&slot, row) in slots.iter().zip(rows.chunks_exact(d)) {
                let weight = weights[slot];
                for (y, v) in y[slot / k * d..][..d].iter_mut().zip(row) {
                    *y += v * weight;
                }
            }
        }
        y
    }
}

impl MoeLayer for LocalExperts {
    fn forward(&self, x: &Tensor) -> Result<(Tensor, RoutingBuf)> {
        let (tokens, hidden) = x.dims2()?;
        if hidden != self.hidden {
            return Err(ModelError::request(format!("rows of width {hidden}, expected {}", self.hidden)));
        }
        let routing = self.router.route(x)?;
        let rows = x.flatten_all()?.to_vec1::<f32>()?;
        let y = Tensor::from_vec(self.compute(&rows, &routing), (tokens, hidden), &Device::Cpu)?;
        Ok((y, routing))
    }
}

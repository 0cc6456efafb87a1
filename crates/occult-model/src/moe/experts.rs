//! The plain exact MoE layer on CPU: every expert computes the rows that chose it, and every row adds up its experts.

use std::sync::Arc;

use candle_core::{Device, Tensor};
use occult_kernels::ops::{self, GradSink};
use occult_kernels::smm::{ExpertDims, ExpertMatrices, expert_ffn};
use occult_kernels::{SparseRows, Threads};
use occult_plan::RoutingBuf;

use super::{MoeLayer, MoeOutput, Router, Shared};
use crate::error::{ModelError, Result};
use crate::layers::with_f32;
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
    /// As the kernels read them.
    pub fn matrices(&self) -> ExpertMatrices<'_> {
        ExpertMatrices { gate: self.gate.matrix(), up: self.up.matrix(), down: self.down.matrix() }
    }
}

/// The matrices of all experts of a layer as tensors, which may be variables.
#[derive(Debug, Clone)]
pub struct StackedExperts {
    /// `[e, 2F, D]` f32: gate rows, then up rows.
    pub w_up: Tensor,
    /// `[e, D, F]` f32.
    pub w_down: Tensor,
    /// Where the gradients of the two go, instead of into the gradient store.
    pub sinks: Option<[GradSink; 2]>,
}

/// Weights of some experts of a layer.
#[derive(Debug)]
pub(super) enum Experts {
    Stored(Vec<ExpertWeights>),
    Stacked(StackedExperts),
}

/// All experts of a layer in this process.
///
/// Order of additions: a row's output is `((w_a y_a + w_b y_b) + w_c y_c) + ...` in f32 with experts in ascending id,
/// whatever the number of threads.
#[derive(Debug)]
pub struct LocalExperts {
    threads: Threads,
    router: Router,
    experts: Experts,
    dims: ExpertDims,
}

impl LocalExperts {
    /// Weights as stored, for inference: one entry per expert, all of the same shapes.
    pub fn new(threads: &Threads, router: Router, experts: Vec<ExpertWeights>) -> Result<Self> {
        let found = dims_of(&experts)?;
        Self::checked(threads, router, Experts::Stored(experts), found)
    }

    /// Weights as tensors, for training.
    pub fn stacked(threads: &Threads, router: Router, experts: StackedExperts) -> Result<Self> {
        let found = dims_of_stacked(&experts)?;
        Self::checked(threads, router, Experts::Stacked(experts), found)
    }

    fn checked(
        threads: &Threads,
        router: Router,
        experts: Experts,
        (found, dims): (usize, ExpertDims),
    ) -> Result<Self> {
        if found != router.spec().num_experts {
            let message = format!("{found} experts for a router of {}", router.spec().num_experts);
            return Err(ModelError::request(message));
        }
        Ok(Self { threads: threads.clone(), router, experts, dims })
    }

    fn compute(&self, x: &Tensor, logits: &Tensor, routing: &RoutingBuf) -> Result<Tensor> {
        let (rows, slots) = expand(routing)?;
        match &self.experts {
            Experts::Stored(_) if x.track_op() => {
                Err(ModelError::request("experts as stored are for inference: they give no gradients"))
            }
            Experts::Stored(experts) => {
                let weights = routing.weights.as_deref().unwrap_or_default();
                let row_weights: Vec<f32> = slots.iter().map(|&slot| weights[slot as usize]).collect();
                let matrices: Vec<_> = experts.iter().map(ExpertWeights::matrices).collect();
                let mut y = vec![0.0; x.elem_count()];
                with_f32(&x.contiguous()?, |x| {
                    expert_ffn(&self.threads, &rows, self.dims, x, &matrices, &row_weights, &mut y)
                })??;
                Ok(Tensor::from_vec(y, x.dims(), &Device::Cpu)?)
            }
            Experts::Stacked(StackedExperts { w_up, w_down, sinks }) => {
                let (t, rows) = (&self.threads, Arc::new(rows));
                let weights = self.router.weights(logits, routing)?.flatten_all()?;
                let n = slots.len();
                let row_weights = weights.index_select(&Tensor::from_vec(slots, n, &Device::Cpu)?, 0)?;
                Ok(match sinks {
                    None => {
                        let pre = ops::scattering_smm(t, &rows, x, w_up)?;
                        ops::merging_smm(t, &rows, &pre, w_down, &row_weights)?
                    }
                    Some([up, down]) => {
                        let pre = ops::scattering_smm_into(t, &rows, x, w_up, up)?;
                        ops::merging_smm_into(t, &rows, &pre, w_down, &row_weights, down)?
                    }
                })
            }
        }
    }
}

/// How many experts there are, and their sizes.
pub(super) fn dims_of_stacked(experts: &StackedExperts) -> Result<(usize, ExpertDims)> {
    let (e, hidden, intermediate) = experts.w_down.dims3()?;
    if experts.w_up.dims() != [e, 2 * intermediate, hidden] {
        let message = format!("expert weights {:?} and {:?}", experts.w_up, experts.w_down);
        return Err(ModelError::request(message));
    }
    Ok((e, ExpertDims { hidden, intermediate }))
}

/// How many experts there are, and their sizes, which must be equal.
pub(super) fn dims_of(experts: &[ExpertWeights]) -> Result<(usize, ExpertDims)> {
    let Some(first) = experts.first() else {
        return Err(ModelError::request("an MoE layer without experts"));
    };
    let &[f, hidden] = first.gate.shape() else {
        return Err(ModelError::request(format!("expert matrix {}: not a matrix", first.gate.name())));
    };
    for e in experts {
        if e.gate.shape() != [f, hidden] || e.up.shape() != [f, hidden] || e.down.shape() != [hidden, f] {
            return Err(ModelError::request(format!("expert matrix {}: wrong shape", e.gate.name())));
        }
    }
    Ok((experts.len(), ExpertDims { hidden, intermediate: f }))
}

/// The rows of each expert, and the slot (token * K + choice) of each expanded row.
fn expand(routing: &RoutingBuf) -> Result<(SparseRows, Vec<u32>)> {
    let (k, n) = (routing.top_k, routing.expert_ids.len());
    let mut offsets = vec![0u32; routing.num_experts + 1];
    for &id in &routing.expert_ids {
        offsets[usize::from(id) + 1] += 1;
    }
    for e in 0..routing.num_experts {
        offsets[e + 1] += offsets[e];
    }
    let mut next = offsets.clone();
    let (mut row_idx, mut slots) = (vec![0; n], vec![0; n]);
    for (slot, &id) in routing.expert_ids.iter().enumerate() {
        let at = &mut next[usize::from(id)];
        row_idx[*at as usize] = (slot / k) as u32;
        slots[*at as usize] = slot as u32;
        *at += 1;
    }
    Ok((SparseRows::new(n / k, offsets, row_idx)?, slots))
}

impl MoeLayer for LocalExperts {
    fn forward(&self, x: &Tensor, shared: Option<Shared<'_>>) -> Result<MoeOutput> {
        let (_, hidden) = x.dims2()?;
        if hidden != self.dims.hidden {
            let message = format!("rows of width {hidden}, expected {}", self.dims.hidden);
            return Err(ModelError::request(message));
        }
        let logits = self.router.logits(x)?;
        let routing = self.router.choose(&logits)?;
        let mut y = self.compute(x, &logits, &routing)?;
        if let Some(shared) = shared {
            y = (y + shared()?)?;
        }
        Ok(MoeOutput { y, logits, routing })
    }
}

//! Routed experts spread over ranks, in the place of [`LocalExperts`](super::LocalExperts).

use std::sync::Arc;

use candle_core::{Device, Tensor};
use occult_kernels::smm::ExpertDims;
use occult_moe::{ExpertParallelLayer, ExpertTensors, MoeError};

use super::experts::{Experts, dims_of, dims_of_stacked};
use super::{ExpertWeights, MoeLayer, MoeOutput, Router, Shared, StackedExperts};
use crate::error::{ModelError, Result};
use crate::layers::with_f32;
use crate::ranks::Ranks;

/// An [`ExpertParallelLayer`] with the weights of this rank's experts. Every forward and backward pass is collective.
#[derive(Debug)]
pub struct ParallelExperts {
    layer: ExpertParallelLayer,
    router: Router,
    experts: Experts,
    dims: ExpertDims,
    ranks: Option<Arc<Ranks>>,
}

impl ParallelExperts {
    /// For inference: weights as stored of [`local_experts`](ExpertParallelLayer::local_experts), in that order. `dims`: of
    /// every expert, which a rank without any cannot read off its weights.
    pub fn new(
        layer: ExpertParallelLayer,
        router: Router,
        dims: ExpertDims,
        experts: Vec<ExpertWeights>,
    ) -> Result<Self> {
        let found = if experts.is_empty() { (0, dims) } else { dims_of(&experts)? };
        if found.1 != dims {
            return Err(ModelError::request(format!("experts of {:?}, expected {dims:?}", found.1)));
        }
        Self::checked(layer, router, Experts::Stored(experts), found)
    }

    /// For training: the same as tensors.
    pub fn stacked(layer: ExpertParallelLayer, router: Router, experts: StackedExperts) -> Result<Self> {
        let found = dims_of_stacked(&experts)?;
        Self::checked(layer, router, Experts::Stacked(experts), found)
    }

    fn checked(
        layer: ExpertParallelLayer,
        router: Router,
        experts: Experts,
        (held, dims): (usize, ExpertDims),
    ) -> Result<Self> {
        if held != layer.local_experts().len() || layer.router() != router.rule() {
            let message = format!(
                "{held} experts for a rank of {}, router {:?} for {:?}",
                layer.local_experts().len(),
                router.rule(),
                layer.router()
            );
            return Err(ModelError::request(message));
        }
        Ok(Self { layer, router, experts, dims, ranks: None })
    }

    /// Takes from `ranks` how many tokens every rank has in a step, instead of asking in every layer: `ranks` must then be
    /// those of the [`Decoder`](crate::Decoder) (`with_ranks`).
    pub fn with_ranks(self, ranks: Arc<Ranks>) -> Self {
        Self { ranks: Some(ranks), ..self }
    }

    /// The layer, with its placement, options and timers.
    pub fn layer(&self) -> &ExpertParallelLayer {
        &self.layer
    }
}

/// For the layer's callbacks, whose errors are its own.
fn moe_error(error: ModelError) -> MoeError {
    MoeError::Tensor(candle_core::Error::wrap(error))
}

impl MoeLayer for ParallelExperts {
    fn forward(&self, x: &Tensor, shared: Option<Shared<'_>>) -> Result<MoeOutput> {
        let logits = self.router.logits(x)?;
        let failed = |error| self.router.error(error, 0);
        let step = self.ranks.as_ref().and_then(|ranks| ranks.step());
        let step = step.as_deref();
        match &self.experts {
            Experts::Stored(_) if x.track_op() => {
                Err(ModelError::request("experts as stored are for inference: they give no gradients"))
            }
            Experts::Stored(experts) => {
                let matrices: Vec<_> = experts.iter().map(ExpertWeights::matrices).collect();
                let mut extra = None;
                let mut compute = shared.map(|shared| {
                    || {
                        extra = Some(shared().map_err(moe_error)?);
                        Ok(())
                    }
                });
                let (rows, values) = (x.contiguous()?, logits.contiguous()?);
                let (y, decision) = with_f32(&rows, |x| {
                    with_f32(&values, |logits| {
                        let meanwhile =
                            compute.as_mut().map(|c| c as &mut dyn FnMut() -> Result<(), MoeError>);
                        self.layer.forward_inference(x, logits, self.dims, &matrices, step, meanwhile)
                    })
                })??
                .map_err(failed)?;
                let y = Tensor::from_vec(y, x.dims(), &Device::Cpu)?;
                let y = match extra {
                    Some(extra) => (y + extra)?,
                    None => y,
                };
                Ok(MoeOutput { y, logits, routing: decision.routing })
            }
            Experts::Stacked(StackedExperts { w_up, w_down, sinks }) => {
                let sinks = sinks.as_ref().map(|[up, down]| [up, down]);
                let mut compute = shared.map(|shared| || shared().map_err(moe_error));
                let shared = compute.as_mut().map(|c| c as &mut dyn FnMut() -> Result<Tensor, MoeError>);
                let experts = ExpertTensors { w_up, w_down, sinks };
                let (y, decision) = self.layer.forward(x, &logits, experts, step, shared).map_err(failed)?;
                Ok(MoeOutput { y, logits, routing: decision.routing })
            }
        }
    }
}

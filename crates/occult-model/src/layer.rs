//! One decoder layer.

use candle_core::Tensor;
use occult_plan::RoutingBuf;

use crate::error::Result;
use crate::kv_cache::LayerCache;
use crate::layers::{GroupedAttention, LatentAttention, Linear, Mlp, RmsNorm, Rotation, View};
use crate::moe::MoeLayer;

/// Attention, then experts or an MLP, each after a norm and added to the residual stream.
#[derive(Debug)]
pub(crate) struct Layer {
    pub(crate) attention_norm: RmsNorm,
    pub(crate) attention: Attention,
    pub(crate) ffn_norm: RmsNorm,
    pub(crate) ffn: Ffn,
    /// Positions a query sees; all when `None`.
    pub(crate) window: Option<usize>,
}

/// What the router of a layer did.
#[derive(Debug, Clone)]
pub(crate) struct Routed {
    /// `[B * T, E]`, differentiable.
    pub(crate) logits: Tensor,
    pub(crate) routing: RoutingBuf,
}

impl Layer {
    /// `x` `[B, T, D]` gives `[B, T, D]`, and what the router did where there is one.
    pub(crate) fn forward(
        &self,
        x: &Tensor,
        rotation: &Rotation,
        view: &View,
        cache: Option<&mut LayerCache>,
    ) -> Result<(Tensor, Option<Routed>)> {
        let view = view.with_window(self.window);
        let normed = self.attention_norm.forward(x)?;
        let x = (x + self.attention.forward(&normed, rotation, &view, cache)?)?;
        let normed = self.ffn_norm.forward(&x)?;
        let (y, routed) = match &self.ffn {
            Ffn::Dense(mlp) => (mlp.forward(&normed)?, None),
            Ffn::Moe { routed, shared } => {
                let rows = normed.flatten_to(1)?;
                let mut compute;
                let shared: Option<crate::moe::Shared<'_>> = match shared {
                    Some(shared) => {
                        compute = || shared.forward(&rows);
                        Some(&mut compute)
                    }
                    None => None,
                };
                let out = routed.forward(&rows, shared)?;
                let y = out.y.reshape(x.shape())?;
                (y, Some(Routed { logits: out.logits, routing: out.routing }))
            }
        };
        Ok(((x + y)?, routed))
    }
}

#[derive(Debug)]
pub(crate) enum Attention {
    Grouped(GroupedAttention),
    Latent(LatentAttention),
}

impl Attention {
    fn forward(
        &self,
        x: &Tensor,
        rotation: &Rotation,
        view: &View,
        cache: Option<&mut LayerCache>,
    ) -> Result<Tensor> {
        match self {
            Attention::Grouped(a) => a.forward(x, rotation, view, cache),
            Attention::Latent(a) => a.forward(x, rotation, view, cache),
        }
    }
}

#[derive(Debug)]
pub(crate) enum Ffn {
    Dense(Mlp),
    Moe { routed: Box<dyn MoeLayer>, shared: Option<SharedExpert> },
}

/// The expert that every token visits; with a gate, its output is multiplied by `sigmoid(gate(x))`.
#[derive(Debug)]
pub(crate) struct SharedExpert {
    pub(crate) mlp: Mlp,
    pub(crate) gate: Option<Linear>,
}

impl SharedExpert {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = self.mlp.forward(x)?;
        Ok(match &self.gate {
            // sigmoid(g) = 1 / (1 + exp(-g)): an infinite exponential gives 0, as it should.
            Some(gate) => y.broadcast_mul(&(gate.forward(x)?.neg()?.exp()? + 1.0)?.recip()?)?,
            None => y,
        })
    }
}

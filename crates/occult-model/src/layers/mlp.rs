//! The SwiGLU MLP: dense layers and shared experts.

use candle_core::Tensor;

use super::Linear;
use crate::error::Result;

/// `down(silu(gate(x)) * up(x))`.
#[derive(Debug, Clone)]
pub struct Mlp {
    gate: Linear,
    up: Linear,
    down: Linear,
}

impl Mlp {
    /// From its three linear layers.
    pub fn new(gate: Linear, up: Linear, down: Linear) -> Self {
        Self { gate, up, down }
    }

    /// `x` `[.., D]` gives `[.., D]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let hidden = (self.gate.forward(x)?.silu()? * self.up.forward(x)?)?;
        self.down.forward(&hidden)
    }
}

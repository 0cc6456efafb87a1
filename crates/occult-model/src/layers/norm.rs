//! RMS norm.

use candle_core::Tensor;

use crate::error::Result;
use crate::weight::Weight;

/// `x / sqrt(mean(x²) + eps) * weight` over the last dimension, in f32.
#[derive(Debug, Clone)]
pub(crate) struct RmsNorm {
    weight: Tensor,
    eps: f32,
}

impl RmsNorm {
    pub(crate) fn new(weight: &Weight, eps: f64) -> Result<Self> {
        Ok(Self { weight: weight.tensor_f32()?, eps: eps as f32 })
    }

    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(candle_nn::ops::rms_norm(&x.contiguous()?, &self.weight, self.eps)?)
    }
}

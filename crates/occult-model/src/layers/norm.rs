//! RMS norm.

use candle_core::Tensor;
use occult_kernels::ops;

use crate::error::Result;

/// `x / sqrt(mean(x²) + eps) * weight` over the last dimension, in f32.
#[derive(Debug, Clone)]
pub(crate) struct RmsNorm {
    weight: Tensor,
    eps: f32,
}

impl RmsNorm {
    /// `weight` `[D]` f32.
    pub(crate) fn new(weight: Tensor, eps: f64) -> Self {
        Self { weight, eps: eps as f32 }
    }

    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(ops::rms_norm(x, &self.weight, self.eps)?)
    }
}

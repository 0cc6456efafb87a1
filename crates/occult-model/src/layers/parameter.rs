//! Where a layer's matrix is: in the file it came from, or in a variable that is trained.

use candle_core::{Device, Tensor};
use occult_kernels::ops::{self, GradSink};

use crate::error::{ModelError, Result};
use crate::weight::Weight;

/// A matrix `[out, in]`.
#[derive(Debug, Clone)]
pub(crate) enum MatrixParameter {
    /// As stored; never copied, gets no gradient.
    Stored(Weight),
    /// A tensor, f32; with a sink its gradient goes there instead of into the gradient store.
    Variable { tensor: Tensor, sink: Option<GradSink> },
}

impl MatrixParameter {
    /// `[out, in]`.
    pub(crate) fn dims(&self) -> &[usize] {
        match self {
            MatrixParameter::Stored(weight) => weight.shape(),
            MatrixParameter::Variable { tensor, .. } => tensor.dims(),
        }
    }

    /// Rows `ids`, f32 `[ids.len(), in]`.
    pub(crate) fn rows(&self, ids: &[u32]) -> Result<Tensor> {
        let weight = match self {
            MatrixParameter::Variable { tensor, .. } => return Ok(ops::embedding(tensor, ids)?),
            MatrixParameter::Stored(weight) => weight,
        };
        let d = weight.shape().last().copied().unwrap_or(0);
        let mut out = vec![0.0; ids.len() * d];
        for (out, &id) in out.chunks_exact_mut(d.max(1)).zip(ids) {
            let from = id as usize * d;
            if from + d > weight.len() {
                return Err(ModelError::request(format!("row {id} of {}", weight.name())));
            }
            weight.values().widen(from, out);
        }
        Ok(Tensor::from_vec(out, (ids.len(), d), &Device::Cpu)?)
    }
}

//! A dense linear layer.

use candle_core::Tensor;
use occult_kernels::{Threads, ops};

use super::parameter::MatrixParameter;
use super::stored::StoredLinear;
use crate::error::{ModelError, Result};
use crate::weight::Weight;

/// `y = x Wᵀ + b`, `W` `[out, in]` in its stored format, arithmetic in f32.
#[derive(Debug, Clone)]
pub struct Linear {
    weight: MatrixParameter,
    bias: Option<Tensor>,
    threads: Threads,
}

impl Linear {
    /// From a stored weight `[out, in]`, which stays where it is, and a bias `[out]`.
    pub fn new(threads: &Threads, weight: &Weight, bias: Option<&Weight>) -> Result<Self> {
        let bias = bias.map(Weight::tensor_f32).transpose()?;
        Ok(Self::from_parts(threads, MatrixParameter::Stored(weight.clone()), bias))
    }

    pub(crate) fn from_parts(threads: &Threads, weight: MatrixParameter, bias: Option<Tensor>) -> Self {
        Self { weight, bias, threads: threads.clone() }
    }

    /// The weight where it is stored and nothing is added: what a fused operation can take in.
    pub(crate) fn plain(&self) -> Option<&Weight> {
        match (&self.weight, &self.bias) {
            (MatrixParameter::Stored(weight), None) => Some(weight),
            _ => None,
        }
    }

    pub(crate) fn weight(&self) -> &MatrixParameter {
        &self.weight
    }

    pub(crate) fn threads(&self) -> &Threads {
        &self.threads
    }

    /// `x` `[.., in]` f32 gives `[.., out]` f32.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = match &self.weight {
            MatrixParameter::Stored(weight) => x.contiguous().and_then(|x| {
                x.apply_op1(StoredLinear { weight: weight.clone(), threads: self.threads.clone() })
            }),
            MatrixParameter::Variable { tensor, sink: Some(sink) } => {
                ops::linear_into(&self.threads, x, tensor, sink)
            }
            MatrixParameter::Variable { tensor, sink: None } => ops::linear(&self.threads, x, tensor),
        };
        let y = y.map_err(|source| ModelError::Tensor { what: "linear layer".into(), source })?;
        Ok(match &self.bias {
            Some(bias) => y.broadcast_add(bias)?,
            None => y,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weight::StoredDtype;
    use candle_core::{Device, Var};

    #[test]
    fn gradients_are_those_of_the_plain_product() -> Result<()> {
        let threads = Threads::new(2);
        let x = Var::randn(0f32, 1.0, (2, 3, 8), &Device::Cpu)?;
        let w = Var::randn(0f32, 1.0, (70, 8), &Device::Cpu)?;
        let bias = Tensor::randn(0f32, 1.0, 70, &Device::Cpu)?;
        let probe = Tensor::randn(0f32, 1.0, (2, 3, 70), &Device::Cpu)?;
        let plain = (x.broadcast_matmul(&w.t()?)?.broadcast_add(&bias)? * &probe)?.sum_all()?.backward()?;
        let variable = MatrixParameter::Variable { tensor: w.as_tensor().clone(), sink: None };
        let values = w.flatten_all()?.to_vec1::<f32>()?;
        let stored = Weight::from_f32("w", &values, vec![70, 8], StoredDtype::F32)?;
        for (weight, vars) in [(variable, vec![&x, &w]), (MatrixParameter::Stored(stored), vec![&x])] {
            let layer = Linear::from_parts(&threads, weight, Some(bias.clone()));
            let ours = (layer.forward(&x)? * &probe)?.sum_all()?.backward()?;
            for var in vars {
                let (Some(a), Some(b)) = (ours.get(var), plain.get(var)) else {
                    panic!("a gradient is missing")
                };
                let diff = (a - b)?.abs()?.max_all()?.to_scalar::<f32>()?;
                assert!(diff < 1e-4, "difference {diff}");
            }
        }
        Ok(())
    }
}

//! A dense linear layer.

use candle_core::{CpuStorage, CustomOp2, DType, Layout, Shape, Tensor};

use super::matmul::{Threads, matmul_nt};
use crate::error::{ModelError, Result};
use crate::weight::{Values, Weight};

/// `y = x Wᵀ + b`, `W` `[out, in]` in its stored format, arithmetic in f32.
#[derive(Debug, Clone)]
pub struct Linear {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Linear {
    /// From a stored weight `[out, in]` and a bias `[out]`.
    pub fn new(weight: &Weight, bias: Option<&Weight>) -> Result<Self> {
        Ok(Self { weight: weight.tensor()?, bias: bias.map(Weight::tensor_f32).transpose()? })
    }

    /// From a tensor that is already there (tied embeddings).
    pub(crate) fn from_tensor(weight: Tensor) -> Self {
        Self { weight, bias: None }
    }

    /// `x` `[.., in]` f32 gives `[.., out]` f32.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = x
            .contiguous()
            .and_then(|x| x.apply_op2(&self.weight, MatmulNt))
            .map_err(|source| ModelError::Tensor { what: "linear layer".into(), source })?;
        Ok(match &self.bias {
            Some(bias) => y.broadcast_add(bias)?,
            None => y,
        })
    }
}

/// The product as an operation of the tensor library, with its gradients.
struct MatmulNt;

impl CustomOp2 for MatmulNt {
    fn name(&self) -> &'static str {
        "matmul-nt"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        w: &CpuStorage,
        w_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let dims = x_layout.dims();
        let (&k, rows) = dims.split_last().ok_or_else(|| candle_core::Error::msg("x is a scalar"))?;
        let (n, w_k) = w_layout.shape().dims2()?;
        if k != w_k {
            candle_core::bail!("x has {k} columns, the weight {w_k}");
        }
        let (Some((from, to)), Some((w_from, _))) =
            (x_layout.contiguous_offsets(), w_layout.contiguous_offsets())
        else {
            candle_core::bail!("both sides must be contiguous");
        };
        let CpuStorage::F32(x) = x else { candle_core::bail!("x must be f32") };
        let w = match w {
            CpuStorage::F32(w) => Values::F32(w),
            CpuStorage::BF16(w) => Values::Bf16(w),
            CpuStorage::F16(w) => Values::F16(w),
            _ => candle_core::bail!("the weight must be f32, bf16 or f16"),
        };
        let m = rows.iter().product();
        let y = matmul_nt(&x[from..to], w, w_from, (m, n, k), Threads::All);
        let shape: Vec<usize> = rows.iter().copied().chain([n]).collect();
        Ok((CpuStorage::F32(y), shape.into()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let (n, k) = w.dims2()?;
        let m = x.elem_count() / k;
        let (rows, grad) = (x.reshape((m, k))?, grad.reshape((m, n))?);
        let to_x = grad.matmul(&w.to_dtype(DType::F32)?)?.reshape(x.shape())?;
        let to_w = grad.t()?.matmul(&rows)?.to_dtype(w.dtype())?;
        Ok((Some(to_x), Some(to_w)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};

    #[test]
    fn gradients_are_those_of_the_plain_product() -> Result<()> {
        let x = Var::randn(0f32, 1.0, (2, 3, 8), &Device::Cpu)?;
        let w = Var::randn(0f32, 1.0, (70, 8), &Device::Cpu)?;
        let probe = Tensor::randn(0f32, 1.0, (2, 3, 70), &Device::Cpu)?;
        let ours =
            (Linear::from_tensor(w.as_tensor().clone()).forward(&x)? * &probe)?.sum_all()?.backward()?;
        let plain = (x.broadcast_matmul(&w.t()?)? * &probe)?.sum_all()?.backward()?;
        for var in [&x, &w] {
            let (a, b) = (ours.get(var), plain.get(var));
            let (Some(a), Some(b)) = (a, b) else { panic!("a gradient is missing") };
            let diff = (a - b)?.abs()?.max_all()?.to_scalar::<f32>()?;
            assert!(diff < 1e-4, "difference {diff}");
        }
        Ok(())
    }
}

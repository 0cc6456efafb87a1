//! The SwiGLU MLP: dense layers and shared experts.

use candle_core::{CpuStorage, CustomOp1, Layout, Shape, Tensor, bail};
use occult_kernels::smm::{ExpertDims, ExpertMatrices, expert_ffn};
use occult_kernels::{SparseRows, Threads, ops};

use super::Linear;
use super::stored::f32s;
use crate::error::Result;
use crate::weight::Weight;

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
        // Nothing to keep for backward: the whole network as one operation, an expert that every row visits.
        if let (false, Some(gate), Some(up), Some(down)) =
            (x.track_op(), self.gate.plain(), self.up.plain(), self.down.plain())
        {
            let [gate, up, down] = [gate, up, down].map(Clone::clone);
            return Ok(x.contiguous()?.apply_op1_no_bwd(&OneExpert {
                gate,
                up,
                down,
                threads: self.gate.threads().clone(),
            })?);
        }
        self.down.forward(&ops::swiglu(&self.gate.forward(x)?, &self.up.forward(x)?)?)
    }
}

struct OneExpert {
    gate: Weight,
    up: Weight,
    down: Weight,
    threads: Threads,
}

impl CustomOp1 for OneExpert {
    fn name(&self) -> &'static str {
        "mlp"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let &[intermediate, hidden] = self.gate.shape() else { bail!("{}: not a matrix", self.gate.name()) };
        if layout.dims().last() != Some(&hidden) {
            bail!("{}: x {:?}", self.gate.name(), layout.dims());
        }
        let x = f32s(x, layout)?;
        let t = x.len() / hidden;
        let mut y = vec![0.0; x.len()];
        let expert =
            ExpertMatrices { gate: self.gate.matrix(), up: self.up.matrix(), down: self.down.matrix() };
        SparseRows::new(t, vec![0, t as u32], (0..t as u32).collect())
            .and_then(|rows| {
                let dims = ExpertDims { hidden, intermediate };
                expert_ffn(&self.threads, &rows, dims, x, &[expert], &vec![1.0; t], &mut y)
            })
            .map_err(candle_core::Error::wrap)?;
        Ok((CpuStorage::F32(y), layout.shape().clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weight::StoredDtype;
    use candle_core::{Device, Var};

    #[test]
    fn the_fused_network_is_the_sum_of_its_parts() -> Result<()> {
        let threads = Threads::new(2);
        let (d, f) = (24, 40);
        let weight = |seed: usize, rows: usize, cols: usize| {
            let values: Vec<f32> = (0..rows * cols).map(|i| ((i + seed) as f32 * 0.71).sin() * 0.3).collect();
            Linear::new(&threads, &Weight::from_f32("w", &values, vec![rows, cols], StoredDtype::Bf16)?, None)
        };
        let mlp = Mlp::new(weight(1, f, d)?, weight(2, f, d)?, weight(3, d, f)?);
        let x = Tensor::randn(0f32, 1.0, (2, 3, d), &Device::Cpu)?;
        let fused = mlp.forward(&x)?;
        let parts = mlp.forward(Var::from_tensor(&x)?.as_tensor())?;
        assert_eq!(fused.dims(), parts.dims());
        let diff = (fused - parts)?.abs()?.max_all()?.to_scalar::<f32>()?;
        assert!(diff < 1e-5, "difference {diff}");
        Ok(())
    }
}

//! Weights of this rank's experts: some numbers, the same storage for every placement.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};
use candle_core::{CpuStorage, DType, Device, Storage, Tensor};
use occult_kernels::Matrix;
use occult_kernels::ops::GradSink;
use occult_kernels::smm::{ExpertDims, ExpertMatrices, GateUp};
use occult_moe::ExpertTensors;

use super::random::Random;
use crate::model_args::Dtype;

/// Up to so many experts of a rank.
pub(crate) struct Experts {
    pub(crate) dims: ExpertDims,
    by_count: BTreeMap<usize, Stack>,
}

/// The first experts of the storage, and where their gradients are added.
struct Stack {
    w_up: Tensor,
    w_down: Tensor,
    sinks: [GradSink; 2],
}

impl Experts {
    /// For placements that give this rank so many experts.
    pub(crate) fn new(counts: &[usize], dims: ExpertDims, dtype: Dtype, random: &mut Random) -> Result<Self> {
        let (d, f) = (dims.hidden, dims.intermediate);
        let most = counts.iter().copied().max().unwrap_or(0);
        let w_up = values([most, 2 * f, d], dtype, random)?;
        let w_down = values([most, d, f], dtype, random)?;
        let mut by_count = BTreeMap::new();
        for &count in counts {
            let first = |w: &Tensor| w.narrow(0, 0, count);
            let sinks = [GradSink::new(), GradSink::new()];
            by_count.insert(count, Stack { w_up: first(&w_up)?, w_down: first(&w_down)?, sinks });
        }
        Ok(Self { dims, by_count })
    }

    fn stack(&self, count: usize) -> Result<&Stack> {
        self.by_count.get(&count).with_context(|| format!("no weights for {count} experts"))
    }

    /// For autograd.
    pub(crate) fn tensors(&self, count: usize) -> Result<ExpertTensors<'_>> {
        let Stack { w_up, w_down, sinks: [up, down] } = self.stack(count)?;
        Ok(ExpertTensors { w_up, w_down, sinks: Some([up, down]) })
    }

    /// Every training step begins without gradients, in the memory of those before.
    pub(crate) fn forget_gradients(&self) {
        self.by_count.values().flat_map(|stack| &stack.sinks).for_each(GradSink::forget);
    }

    /// For inference.
    pub(crate) fn with_matrices<R>(
        &self,
        count: usize,
        work: impl FnOnce(&[ExpertMatrices<'_>]) -> Result<R>,
    ) -> Result<R> {
        let (dims, stack) = (self.dims, self.stack(count)?);
        let size = dims.hidden * dims.intermediate;
        with_matrix(&stack.w_up, |up| {
            with_matrix(&stack.w_down, |down| {
                let (mut experts, mut up, mut down) = (Vec::with_capacity(count), up, down);
                for _ in 0..count {
                    let (Some((gate_up, rest_up)), Some((one, rest_down))) =
                        (up.split_rows(2 * size, 1), down.split_rows(size, 1))
                    else {
                        bail!("a stack of too few experts");
                    };
                    let Some(GateUp { gate, up: of_up }) = GateUp::from_fused(gate_up, dims) else {
                        bail!("a stack of other sizes");
                    };
                    experts.push(ExpertMatrices { gate, up: of_up, down: one });
                    (up, down) = (rest_up, rest_down);
                }
                work(&experts)
            })
        })
    }
}

fn values(shape: [usize; 3], dtype: Dtype, random: &mut Random) -> Result<Tensor> {
    let n: usize = shape.iter().product();
    let values: Vec<f32> = (0..n).map(|_| (random.unit() - 0.5) * 0.1).collect();
    let to = match dtype {
        Dtype::F32 => DType::F32,
        Dtype::Bf16 => DType::BF16,
        Dtype::F16 => DType::F16,
    };
    Ok(Tensor::from_vec(values, &shape, &Device::Cpu)?.to_dtype(to)?)
}

fn with_matrix<R>(tensor: &Tensor, work: impl FnOnce(Matrix<'_>) -> Result<R>) -> Result<R> {
    let (storage, layout) = tensor.storage_and_layout();
    let (Storage::Cpu(storage), Some((from, to))) = (&*storage, layout.contiguous_offsets()) else {
        bail!("weights are not where they were made");
    };
    work(match storage {
        CpuStorage::F32(w) => Matrix::F32(&w[from..to]),
        CpuStorage::BF16(w) => Matrix::Bf16(&w[from..to]),
        CpuStorage::F16(w) => Matrix::F16(&w[from..to]),
        _ => bail!("weights of another type than was made"),
    })
}

//! Operations on weights that stay in the file they came from: differentiable in the activations only.

use candle_core::{CpuStorage, CustomOp1, Device, Layout, Shape, Storage, Tensor, bail};
use occult_kernels::Threads;
use occult_kernels::linear::{LinearDims, linear, linear_bwd_x};

use crate::weight::Weight;

type Result<T> = candle_core::Result<T>;

/// The values of a contiguous f32 tensor on CPU.
pub(crate) fn f32s<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let (CpuStorage::F32(values), Some((from, to))) = (storage, layout.contiguous_offsets()) else {
        bail!("expected contiguous f32 rows")
    };
    values.get(from..to).map_or_else(|| bail!("a layout outside its storage"), Ok)
}

/// Calls `f` with the values of a contiguous f32 tensor on CPU.
pub(crate) fn with_f32<R>(tensor: &Tensor, f: impl FnOnce(&[f32]) -> R) -> Result<R> {
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cpu(storage) = &*storage else { bail!("expected a tensor on CPU") };
    Ok(f(f32s(storage, layout)?))
}

/// `x Wᵀ` with `W` as stored.
pub(crate) struct StoredLinear {
    pub(crate) weight: Weight,
    pub(crate) threads: Threads,
}

impl StoredLinear {
    fn dims(&self, x: &[usize]) -> Result<(LinearDims, Vec<usize>)> {
        let (Some((&k, rows)), &[n, w_k]) = (x.split_last(), self.weight.shape()) else {
            bail!("{}: x {x:?}, weight {:?}", self.weight.name(), self.weight.shape())
        };
        if k != w_k {
            bail!("{}: rows of {k} values for a weight {:?}", self.weight.name(), self.weight.shape());
        }
        let shape = rows.iter().copied().chain([n]).collect();
        Ok((LinearDims { rows: rows.iter().product(), out: n, inner: k }, shape))
    }
}

impl CustomOp1 for StoredLinear {
    fn name(&self) -> &'static str {
        "stored-linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (dims, shape) = self.dims(layout.dims())?;
        let mut y = vec![0.0; dims.rows * dims.out];
        linear(&self.threads, dims, f32s(x, layout)?, self.weight.matrix(), &mut y)
            .map_err(candle_core::Error::wrap)?;
        Ok((CpuStorage::F32(y), shape.into()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let (dims, _) = self.dims(x.dims())?;
        let mut dx = vec![0.0; dims.rows * dims.inner];
        with_f32(&dy.contiguous()?, |dy| {
            linear_bwd_x(&self.threads, dims, dy, self.weight.matrix(), &mut dx)
        })?
        .map_err(candle_core::Error::wrap)?;
        Ok(Some(Tensor::from_vec(dx, x.shape(), &Device::Cpu)?))
    }
}

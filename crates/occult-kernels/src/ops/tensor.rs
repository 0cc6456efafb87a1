//! Values of candle tensors as slices, and back.

use candle_core::{CpuStorage, DType, Device, Layout, Result, Shape, Storage, Tensor, bail};

use crate::Matrix;

/// The f32 values of a contiguous CPU storage.
pub(crate) fn f32s<'a>(storage: &'a CpuStorage, layout: &Layout, what: &str) -> Result<&'a [f32]> {
    let CpuStorage::F32(values) = storage else { bail!("{what} must be f32") };
    let Some((from, to)) = layout.contiguous_offsets() else { bail!("{what} must be contiguous") };
    match values.get(from..to) {
        Some(values) => Ok(values),
        None => bail!("{what}: layout outside its storage"),
    }
}

/// The CPU side of a storage.
pub(crate) fn cpu<'a>(storage: &'a Storage, what: &str) -> Result<&'a CpuStorage> {
    match storage {
        Storage::Cpu(storage) => Ok(storage),
        _ => bail!("{what} must be on CPU"),
    }
}

/// Calls `f` with the values of a contiguous f32 tensor.
pub(crate) fn with_f32<R>(t: &Tensor, what: &str, f: impl FnOnce(&[f32]) -> Result<R>) -> Result<R> {
    let (storage, layout) = t.storage_and_layout();
    f(f32s(cpu(&storage, what)?, layout, what)?)
}

/// `t` itself if its last dimension is contiguous, else a contiguous copy.
pub(crate) fn rows_contiguous(t: &Tensor) -> Result<Tensor> {
    match t.stride().last() {
        Some(1) => Ok(t.clone()),
        _ => t.contiguous(),
    }
}

/// f32 values as a CPU tensor of the dtype of the input it is the gradient of: candle adds gradients in that dtype.
pub(crate) fn gradient(values: Vec<f32>, shape: impl Into<Shape>, dtype: DType) -> Result<Tensor> {
    Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(dtype)
}

/// Values of a 4-dimensional tensor whose last dimension is contiguous.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rows4<'a> {
    values: &'a [f32],
    pub(crate) dims: [usize; 4],
    strides: [usize; 3],
}

impl<'a> Rows4<'a> {
    /// Views are taken as they are; only the last dimension must be contiguous.
    pub(crate) fn new(storage: &'a CpuStorage, layout: &Layout, what: &str) -> Result<Self> {
        let CpuStorage::F32(values) = storage else { bail!("{what} must be f32") };
        let (b, h, t, d) = layout.shape().dims4()?;
        let strides = layout.stride();
        if strides[3] != 1 && d > 1 {
            bail!("the last dimension of {what} must be contiguous");
        }
        let empty = b * h * t * d == 0;
        let last =
            if empty { 0 } else { (b - 1) * strides[0] + (h - 1) * strides[1] + (t - 1) * strides[2] + d };
        let from = layout.start_offset();
        let Some(values) = values.get(from..from + last) else { bail!("{what}: layout outside its storage") };
        Ok(Self { values, dims: [b, h, t, d], strides: [strides[0], strides[1], strides[2]] })
    }

    /// Row `[b, h, t, ..]`.
    pub(crate) fn row(&self, b: usize, h: usize, t: usize) -> &'a [f32] {
        let from = b * self.strides[0] + h * self.strides[1] + t * self.strides[2];
        &self.values[from..from + self.dims[3]]
    }

    /// Rows of one head: the values from row `[b, h, 0]` on (none if the tensor is empty), and how far rows are apart.
    pub(crate) fn head(&self, b: usize, h: usize) -> (&'a [f32], usize) {
        (self.values.get(b * self.strides[0] + h * self.strides[1]..).unwrap_or_default(), self.strides[2])
    }
}

/// A contiguous weight in the type it is stored in.
pub(crate) fn matrix<'a>(storage: &'a CpuStorage, layout: &Layout, what: &str) -> Result<Matrix<'a>> {
    let Some((from, to)) = layout.contiguous_offsets() else { bail!("{what} must be contiguous") };
    let values = match storage {
        CpuStorage::F32(w) => w.get(from..to).map(Matrix::F32),
        CpuStorage::BF16(w) => w.get(from..to).map(Matrix::Bf16),
        CpuStorage::F16(w) => w.get(from..to).map(Matrix::F16),
        _ => bail!("{what} must be f32, bf16 or f16"),
    };
    match values {
        Some(values) => Ok(values),
        None => bail!("{what}: layout outside its storage"),
    }
}

/// The `count` matrices of `rows` by `cols` that are stacked in `all`.
pub(crate) fn unstack(
    mut all: Matrix<'_>,
    count: usize,
    rows: usize,
    cols: usize,
) -> Result<Vec<Matrix<'_>>> {
    let mut out = Vec::with_capacity(count);
    for _ in 0..count {
        let Some((one, rest)) = all.split_rows(rows, cols) else { bail!("a stack of too few matrices") };
        out.push(one);
        all = rest;
    }
    Ok(out)
}

/// An error of the slice core as one of candle.
pub(crate) fn core(error: crate::KernelError) -> candle_core::Error {
    candle_core::Error::wrap(error)
}

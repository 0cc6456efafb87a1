//! Values of candle tensors as slices.

use candle_core::{CpuStorage, Layout, Result, Storage, Tensor, bail};

/// The f32 values of a contiguous CPU storage.
pub(crate) fn f32s<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let CpuStorage::F32(values) = storage else { bail!("an MoE layer works on f32") };
    let Some((from, to)) = layout.contiguous_offsets() else {
        bail!("an MoE layer works on contiguous rows")
    };
    match values.get(from..to) {
        Some(values) => Ok(values),
        None => bail!("layout outside its storage"),
    }
}

/// Calls `f` with the values of a contiguous f32 tensor on CPU.
pub(crate) fn with_f32<R>(t: &Tensor, f: impl FnOnce(&[f32]) -> Result<R>) -> Result<R> {
    let (storage, layout) = t.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => f(f32s(storage, layout)?),
        _ => bail!("an MoE layer works on CPU"),
    }
}

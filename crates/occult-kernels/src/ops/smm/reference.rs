use candle_core::{Device, Result, Tensor};

use crate::SparseRows;

/// Rows of each expert: its id, where its expanded rows begin, how many, and the received rows they read.
fn groups(rows: &SparseRows) -> impl Iterator<Item = Result<(usize, usize, usize, Tensor)>> {
    (0..rows.num_experts()).filter(|&e| !rows.rows_of(e).is_empty()).map(|e| {
        let ids = rows.rows_of(e);
        Ok((e, rows.expanded_of(e).start, ids.len(), Tensor::from_slice(ids, ids.len(), &Device::Cpu)?))
    })
}

/// The definition of [`scattering_smm`](super::scattering_smm()) in candle's own operations, for f32 weights.
///
/// # Errors
/// Those of candle; at least one expanded row is needed.
pub fn scattering_smm(rows: &SparseRows, x: &Tensor, w_up: &Tensor) -> Result<Tensor> {
    let of_expert = groups(rows).map(|group| {
        let (e, _, _, ids) = group?;
        x.index_select(&ids, 0)?.matmul(&w_up.get(e)?.t()?)
    });
    Tensor::cat(&of_expert.collect::<Result<Vec<_>>>()?, 0)
}

/// The definition of [`merging_smm`](super::merging_smm()) in candle's own operations, for f32 weights.
///
/// # Errors
/// Those of candle.
pub fn merging_smm(rows: &SparseRows, pre: &Tensor, w_down: &Tensor, row_weights: &Tensor) -> Result<Tensor> {
    let (_, d, f) = w_down.dims3()?;
    let mut y = Tensor::zeros((rows.num_rows(), d), pre.dtype(), &Device::Cpu)?;
    for group in groups(rows) {
        let (e, from, len, ids) = group?;
        let pre = pre.narrow(0, from, len)?;
        let h = (pre.narrow(1, 0, f)?.silu()? * pre.narrow(1, f, f)?)?;
        let h = h.broadcast_mul(&row_weights.narrow(0, from, len)?.unsqueeze(1)?)?;
        y = y.index_add(&ids, &h.matmul(&w_down.get(e)?.t()?)?, 0)?;
    }
    Ok(y)
}

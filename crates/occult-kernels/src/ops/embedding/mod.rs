//! Embedding lookup.

mod reference;

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};
use half::slice::HalfFloatSliceExt;

pub use reference::embedding as reference;

use super::tensor::{gradient, with_f32};

/// Rows `ids` of `weight` `[V, D]` (f32, bf16 or f16), widened: `[ids.len(), D]` f32.
///
/// The gradient is dense, `[V, D]` in the dtype of the weight: rows are added in f32, in the order of `ids`.
///
/// # Errors
/// An id outside the table, a weight that is no matrix, other dtypes or devices.
pub fn embedding(weight: &Tensor, ids: &[u32]) -> Result<Tensor> {
    weight.contiguous()?.apply_op1(Embedding { ids: ids.into() })
}

struct Embedding {
    ids: Arc<[u32]>,
}

impl Embedding {
    /// The chosen rows, one after the other.
    fn pick<'a, T>(&'a self, table: &'a [T], d: usize) -> impl Iterator<Item = &'a [T]> + 'a {
        self.ids.iter().map(move |&id| &table[id as usize * d..][..d])
    }
}

impl CustomOp1 for Embedding {
    fn name(&self) -> &'static str {
        "embedding"
    }

    fn cpu_fwd(&self, weight: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (v, d) = layout.shape().dims2()?;
        if let Some(id) = self.ids.iter().find(|&&id| id as usize >= v) {
            bail!("embedding: id {id} in a table of {v} rows");
        }
        let Some((from, to)) = layout.contiguous_offsets() else { bail!("embedding: the table is a view") };
        let mut out = vec![0.0; self.ids.len() * d];
        let rows = out.chunks_exact_mut(d.max(1));
        match weight {
            CpuStorage::F32(w) => {
                rows.zip(self.pick(&w[from..to], d)).for_each(|(o, w)| o.copy_from_slice(w));
            }
            CpuStorage::BF16(w) => {
                rows.zip(self.pick(&w[from..to], d)).for_each(|(o, w)| w.convert_to_f32_slice(o));
            }
            CpuStorage::F16(w) => {
                rows.zip(self.pick(&w[from..to], d)).for_each(|(o, w)| w.convert_to_f32_slice(o));
            }
            _ => bail!("embedding: the table must be f32, bf16 or f16"),
        }
        Ok((CpuStorage::F32(out), (self.ids.len(), d).into()))
    }

    fn bwd(&self, weight: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let dy = dy.contiguous()?;
        let (_, d) = weight.dims2()?;
        let mut dw = vec![0f32; weight.elem_count()];
        with_f32(&dy, "the gradient", |dy| {
            for (&id, dy) in self.ids.iter().zip(dy.chunks_exact(d.max(1))) {
                for (w, g) in dw[id as usize * d..][..d].iter_mut().zip(dy) {
                    *w += g;
                }
            }
            Ok(())
        })?;
        Ok(Some(gradient(dw, weight.shape(), weight.dtype())?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check::{difference, op_is, tensor};
    use candle_core::{DType, Var};

    #[test]
    fn is_its_definition_with_its_gradient() -> Result<()> {
        for ids in [vec![0], vec![3, 1, 3, 3, 0, 6], vec![2; 9]] {
            op_is(&|w| embedding(&w[0], &ids), &|w| reference(&w[0], &ids), &[tensor(1, &[7, 5])?], 1e-6)?;
        }
        Ok(())
    }

    #[test]
    fn half_tables_are_widened_and_get_gradients_of_their_dtype() -> Result<()> {
        for dtype in [DType::BF16, DType::F16] {
            let w = Var::from_tensor(&tensor(1, &[7, 5])?.to_dtype(dtype)?)?;
            let y = embedding(w.as_tensor(), &[6, 6, 2])?;
            assert_eq!(difference(&y, &reference(&w.to_dtype(DType::F32)?, &[6, 6, 2])?)?, 0.0);
            let grads = y.sum_all()?.backward()?;
            let got = grads.get(&w).expect("a gradient");
            assert_eq!(got.dtype(), dtype);
            let rows = got.to_dtype(DType::F32)?.sum(1)?.to_vec1::<f32>()?;
            assert_eq!(rows, [0.0, 0.0, 5.0, 0.0, 0.0, 0.0, 10.0]);
        }
        Ok(())
    }

    #[test]
    fn ids_outside_and_no_ids() -> Result<()> {
        let w = tensor(1, &[7, 5])?;
        assert!(embedding(&w, &[0, 7]).is_err());
        assert_eq!(embedding(&w, &[])?.dims(), [0, 5]);
        assert!(embedding(&w.flatten_all()?, &[0]).is_err());
        Ok(())
    }
}

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};

use super::{SmmContext, down_dims};
use crate::ops::sink::weight_gradient;
use crate::ops::tensor::{core, cpu, f32s, gradient, matrix, unstack, with_f32};
use crate::smm::{MergeGrads, MergeInputs, merge, merge_bwd};

pub(super) struct Op(pub(super) SmmContext);

impl CustomOp3 for Op {
    fn name(&self) -> &'static str {
        "merging-smm"
    }

    fn cpu_fwd(
        &self,
        pre: &CpuStorage,
        pre_layout: &Layout,
        w: &CpuStorage,
        w_layout: &Layout,
        row_weights: &CpuStorage,
        row_weights_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let SmmContext { threads, rows, .. } = &self.0;
        let dims = down_dims(&self.0, w_layout.dims(), pre_layout.dims(), row_weights_layout.dims())?;
        let w = unstack(matrix(w, w_layout, "w_down")?, rows.num_experts(), dims.hidden, dims.intermediate)?;
        let inputs = MergeInputs {
            pre: f32s(pre, pre_layout, "pre")?,
            row_weights: f32s(row_weights, row_weights_layout, "the row weights")?,
            w_down: &w,
        };
        let mut y = vec![0.0; rows.num_rows() * dims.hidden];
        merge(threads, rows, dims, inputs, &mut y).map_err(core)?;
        Ok((CpuStorage::F32(y), (rows.num_rows(), dims.hidden).into()))
    }

    fn bwd(
        &self,
        pre: &Tensor,
        w: &Tensor,
        row_weights: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let SmmContext { threads, rows, sink } = &self.0;
        let dims = down_dims(&self.0, w.dims(), pre.dims(), row_weights.dims())?;
        let dy = dy.contiguous()?;
        let mut d_pre = vec![0.0; pre.elem_count()];
        let mut d_row_weights = vec![0.0; row_weights.elem_count()];
        let to_w = weight_gradient(w, sink.as_ref(), |dw| {
            let (storage, layout) = w.storage_and_layout();
            let all = matrix(cpu(&storage, "w_down")?, layout, "w_down")?;
            let w = unstack(all, rows.num_experts(), dims.hidden, dims.intermediate)?;
            let (d_pre, d_row_weights) = (&mut d_pre[..], &mut d_row_weights[..]);
            let grads = MergeGrads { d_pre, d_row_weights, d_w_down: dw, act: None };
            with_f32(pre, "pre", |pre| {
                with_f32(row_weights, "the row weights", |row_weights| {
                    with_f32(&dy, "the gradient", |dy| {
                        let inputs = MergeInputs { pre, row_weights, w_down: &w };
                        merge_bwd(threads, rows, dims, inputs, dy, grads).map_err(core)
                    })
                })
            })
        })?;
        let to_pre = pre.track_op().then(|| gradient(d_pre, pre.shape(), pre.dtype())).transpose()?;
        let to_weights = row_weights
            .track_op()
            .then(|| gradient(d_row_weights, row_weights.shape(), row_weights.dtype()))
            .transpose()?;
        Ok((to_pre, to_w, to_weights))
    }
}

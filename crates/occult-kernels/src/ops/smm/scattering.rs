use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};

use super::{SmmContext, up_dims};
use crate::Matrix;
use crate::ops::sink::weight_gradient;
use crate::ops::tensor::{core, cpu, f32s, gradient, matrix, unstack, with_f32};
use crate::smm::{ExpertDims, GateUp, ScatterGrads, scatter, scatter_bwd};

pub(super) struct Op(pub(super) SmmContext);

fn experts(all: Matrix<'_>, count: usize, dims: ExpertDims) -> Result<Vec<GateUp<'_>>> {
    let stacked = unstack(all, count, 2 * dims.intermediate, dims.hidden)?;
    let halves: Option<_> = stacked.into_iter().map(|w| GateUp::from_fused(w, dims)).collect();
    match halves {
        Some(halves) => Ok(halves),
        None => bail!("scattering-smm: w_up has no two halves"),
    }
}

impl CustomOp2 for Op {
    fn name(&self) -> &'static str {
        "scattering-smm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        w: &CpuStorage,
        w_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let SmmContext { threads, rows, .. } = &self.0;
        let dims = up_dims(&self.0, w_layout.dims(), x_layout.dims())?;
        let w = experts(matrix(w, w_layout, "w_up")?, rows.num_experts(), dims)?;
        let (n, width) = (rows.num_expanded(), 2 * dims.intermediate);
        let mut out = vec![0.0; n * width];
        scatter(threads, rows, dims, f32s(x, x_layout, "x")?, &w, &mut out).map_err(core)?;
        Ok((CpuStorage::F32(out), (n, width).into()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let SmmContext { threads, rows, sink } = &self.0;
        let dims = up_dims(&self.0, w.dims(), x.dims())?;
        let dy = dy.contiguous()?;
        let mut dx = x.track_op().then(|| vec![0.0; x.elem_count()]);
        let to_w = weight_gradient(w, sink.as_ref(), |dw| {
            let (storage, layout) = w.storage_and_layout();
            let w = matrix(cpu(&storage, "w_up")?, layout, "w_up")?;
            let w = experts(w, rows.num_experts(), dims)?;
            let grads = ScatterGrads { dx: dx.as_deref_mut(), d_w_up: dw };
            with_f32(x, "x", |x| {
                with_f32(&dy, "the gradient", |dy| {
                    scatter_bwd(threads, rows, dims, x, &w, dy, grads).map_err(core)
                })
            })
        })?;
        Ok((dx.map(|dx| gradient(dx, x.shape(), x.dtype())).transpose()?, to_w))
    }
}

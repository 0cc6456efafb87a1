//! The experts on several parts of the tokens, in one op, so that exchanges of one part run while another is computed:
//! in the forward pass and in the backward pass.
//!
//! | | started first, for every part | part after part | at the end |
//! |---|---|---|---|
//! | forward | dispatch | wait for rows; expert products; start combine | wait for combine |
//! | backward | gradients of combine | wait; gradients of the products; start gradients of dispatch | gradients of the up weights; wait |
//!
//! Gradients of weights wait for nobody: those of the up weights, two thirds of them, are computed while the last rows are
//! on their way.
//!
//! An op takes at most three tensors, so rows and routing weights are one, `[T, D + K]`. Kept for backward: received rows,
//! pre-activations and row weights.

use std::ops::Range;
use std::sync::{Arc, Mutex};

use candle_core::{CpuStorage, CustomOp3, Device, Layout, Shape, Tensor};
use occult_comm::{CommError, Communicator};
use occult_kernels::ops::GradSink;
use occult_kernels::smm::{
    ExpertDims, GateUp, MergeGrads, MergeInputs, ScatterGrads, merge, merge_bwd, scatter, scatter_bwd,
};
use occult_kernels::{KernelError, Matrix, SparseRows, Threads};
use occult_plan::ExpertRows;

use crate::autograd::Parts;
use crate::error::{MoeError, Result};
use crate::exchange::Path;
use crate::layer::{ExpertParallelLayer, ExpertTensors};
use crate::ops::{by_pair, expanded_weights, take};
use crate::tensor::with_f32;
use crate::timers::Phase;

/// One part, as backward needs it.
struct Part {
    path: Arc<Path>,
    tokens: Range<usize>,
    sparse: SparseRows,
    expanded: ExpertRows,
    /// `[R, D]`
    x: Vec<f32>,
    /// `[N, 2F]`
    pre: Vec<f32>,
    /// `[N]`
    row_weights: Vec<f32>,
}

struct InParts {
    threads: Threads,
    comm: Arc<dyn Communicator>,
    dims: ExpertDims,
    top_k: usize,
    parts: Vec<Part>,
    sinks: Option<[GradSink; 2]>,
    y: Mutex<Option<Vec<f32>>>,
}

fn kernel(error: KernelError) -> MoeError {
    MoeError::argument("experts", "matrices that fit the layer", error)
}

/// The experts' matrices of stacked weights.
fn up_matrices(values: &[f32], dims: ExpertDims) -> Vec<GateUp<'_>> {
    let size = 2 * dims.intermediate * dims.hidden;
    values.chunks_exact(size.max(1)).filter_map(|w| GateUp::from_fused(Matrix::F32(w), dims)).collect()
}

fn down_matrices(values: &[f32], dims: ExpertDims) -> Vec<Matrix<'_>> {
    values.chunks_exact((dims.hidden * dims.intermediate).max(1)).map(Matrix::F32).collect()
}

impl ExpertParallelLayer {
    /// All parts in one op.
    pub(crate) fn in_parts(
        &self,
        x: &Tensor,
        weights: &Tensor,
        experts: ExpertTensors<'_>,
        parts: Parts<'_>,
    ) -> Result<Tensor> {
        let dims = ExpertDims { hidden: x.dim(1)?, intermediate: experts.w_down.dim(2)? };
        let (w_up, w_down) = (experts.w_up.contiguous()?, experts.w_down.contiguous()?);
        let mut kept = Vec::with_capacity(parts.len());
        let mut combines = Vec::with_capacity(parts.len());
        for (tokens, dispatch) in parts {
            let (x, handle) = dispatch.finish()?;
            let (expanded, sparse) = self.timers.time(Phase::Plan, || self.expand(&handle))?;
            let row_weights = expanded_weights(&expanded, handle.row_experts().weights());
            let mut pre = vec![0.0; sparse.num_expanded() * 2 * dims.intermediate];
            let mut y = vec![0.0; x.len()];
            self.timers.time(Phase::Compute, || -> Result<()> {
                with_f32(&w_up, |w| {
                    Ok(scatter(&self.threads, &sparse, dims, &x, &up_matrices(w, dims), &mut pre))
                })?
                .map_err(kernel)?;
                with_f32(&w_down, |w| {
                    let w_down = &down_matrices(w, dims);
                    let inputs = MergeInputs { pre: &pre, row_weights: &row_weights, w_down };
                    Ok(merge(&self.threads, &sparse, dims, inputs, &mut y))
                })?
                .map_err(kernel)
            })?;
            kept.push(Part { path: handle.path(), tokens, sparse, expanded, x, pre, row_weights });
            combines.push(handle.start_combine(&y)?);
        }
        let mut y = Vec::with_capacity(x.elem_count());
        for combine in combines {
            y.extend_from_slice(&combine.finish()?);
        }
        let op = InParts {
            threads: self.threads.clone(),
            comm: Arc::clone(&self.comm),
            dims,
            top_k: weights.dim(1)?,
            parts: kept,
            sinks: experts.sinks.map(|sinks| sinks.map(GradSink::clone)),
            y: Mutex::new(Some(y)),
        };
        Ok(Tensor::cat(&[x, weights], 1)?.apply_op3(&w_up, &w_down, op)?)
    }
}

impl InParts {
    /// Gradients: of rows and weights together `[T, D + K]`, and added to those of the experts' weights.
    fn backward(
        &self,
        dy: &[f32],
        w_up: &[f32],
        w_down: &[f32],
        d_up: Option<&mut [f32]>,
        mut d_down: Option<&mut [f32]>,
    ) -> Result<Vec<f32>> {
        let (dims, d, k) = (self.dims, self.dims.hidden, self.top_k);
        let (w_up, w_down) = (up_matrices(w_up, dims), down_matrices(w_down, dims));
        let mut arriving = Vec::with_capacity(self.parts.len());
        for part in &self.parts {
            arriving.push(part.path.start_combine_backward(&dy[part.tokens.start * d..part.tokens.end * d])?);
        }
        let mut leaving = Vec::with_capacity(self.parts.len());
        let mut all_d_pre = Vec::with_capacity(self.parts.len());
        for (part, arriving) in self.parts.iter().zip(arriving) {
            let Part { path, sparse, expanded, x, pre, row_weights, .. } = part;
            let dy = path.finish_combine_backward(arriving)?;
            let (mut d_pre, mut d_row_weights) = (vec![0.0; pre.len()], vec![0.0; row_weights.len()]);
            let mut dx = vec![0.0; x.len()];
            path.timers().time(Phase::Compute, || -> Result<()> {
                let inputs = MergeInputs { pre, row_weights, w_down: &w_down };
                let grads = MergeGrads {
                    d_pre: &mut d_pre,
                    d_row_weights: &mut d_row_weights,
                    d_w_down: d_down.as_deref_mut(),
                };
                merge_bwd(&self.threads, sparse, dims, inputs, &dy, grads).map_err(kernel)?;
                let grads = ScatterGrads { dx: Some(&mut dx), d_w_up: None };
                scatter_bwd(&self.threads, sparse, dims, x, &w_up, &d_pre, grads).map_err(kernel)
            })?;
            leaving.push(path.start_dispatch_backward(&dx, &by_pair(expanded, &d_row_weights))?);
            all_d_pre.push(d_pre);
        }
        if let Some(d_up) = d_up {
            for (part, d_pre) in self.parts.iter().zip(all_d_pre) {
                part.path.timers().time(Phase::Compute, || {
                    let grads = ScatterGrads { dx: None, d_w_up: Some(&mut *d_up) };
                    scatter_bwd(&self.threads, &part.sparse, dims, &part.x, &w_up, &d_pre, grads)
                        .map_err(kernel)
                })?;
            }
        }
        let tokens = dy.len().checked_div(d).unwrap_or(0);
        let mut out = Vec::with_capacity(tokens * (d + k));
        for (part, leaving) in self.parts.iter().zip(leaving) {
            let (dx, dw) = part.path.finish_dispatch_backward(leaving)?;
            for (dx, dw) in dx.chunks_exact(d).zip(dw.chunks_exact(k)) {
                out.extend_from_slice(dx);
                out.extend_from_slice(dw);
            }
        }
        Ok(out)
    }
}

impl CustomOp3 for InParts {
    fn name(&self) -> &'static str {
        "moe-experts-in-parts"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        packed: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(take(&self.y)?), (packed.dims()[0], self.dims.hidden).into()))
    }

    fn bwd(
        &self,
        packed: &Tensor,
        w_up: &Tensor,
        w_down: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let wanted = |w: &Tensor| (self.sinks.is_none() && w.track_op()).then(|| vec![0.0; w.elem_count()]);
        let (mut d_up, mut d_down) = (wanted(w_up), wanted(w_down));
        let run = |d_up: Option<&mut [f32]>, d_down: Option<&mut [f32]>| {
            with_f32(&grad, |dy| {
                with_f32(w_up, |up| with_f32(w_down, |down| Ok(self.backward(dy, up, down, d_up, d_down))))
            })
        };
        let result = match &self.sinks {
            None => run(d_up.as_deref_mut(), d_down.as_deref_mut()),
            Some([up, down]) => up
                .add(w_up.elem_count(), |up| down.add(w_down.elem_count(), |down| run(Some(up), Some(down)))),
        }?;
        let d_packed = result.map_err(|error| {
            if !matches!(error, MoeError::Comm(CommError::Peer { .. })) {
                self.comm.abort(&error.to_string());
            }
            error.into_candle()
        })?;
        let tensor = |values: Vec<f32>, like: &Tensor| Tensor::from_vec(values, like.shape(), &Device::Cpu);
        let d_packed = tensor(d_packed, packed)?;
        let d_up = d_up.map(|d_up| tensor(d_up, w_up)).transpose()?;
        let d_down = d_down.map(|d_down| tensor(d_down, w_down)).transpose()?;
        Ok((Some(d_packed), d_up, d_down))
    }
}

//! The experts on the tokens in one part or several, in one op, so that exchanges of one part run while another is
//! computed: in the forward pass and in the backward pass.
//!
//! | | started first, for every part | part after part | at the end |
//! |---|---|---|---|
//! | forward | dispatch | wait for rows; expert products; start combine | wait for combine |
//! | backward | gradients of combine | wait; gradients of the products' inputs; start gradients of dispatch | gradients of the weights; wait |
//!
//! Gradients of weights wait for nobody and nobody waits for them: half of the backward products, computed while the last
//! rows are on their way. They are one product per expert over the rows of all parts, added in the order part, source
//! rank, token, so that each gradient is written once.
//!
//! An op takes at most three tensors, so rows and routing weights are one, `[T, D + K]`. Kept for backward: received rows,
//! pre-activations and row weights. Pre-activations become their gradients in place, so a second backward pass over the same
//! graph computes them again from the rows.

use std::ops::Range;
use std::sync::{Arc, Mutex};

use candle_core::{CpuStorage, CustomOp3, Device, Layout, Shape, Tensor};
use occult_comm::{CommError, Communicator};
use occult_kernels::ops::GradSink;
use occult_kernels::smm::{
    ExpertDims, GateUp, MergeGrads, MergeInputs, ScatterGrads, WeightGrads, WeightInputs, merge,
    merge_bwd_in_place, scatter, scatter_bwd, weights_bwd,
};
use occult_kernels::{KernelError, Matrix, SparseRows, Threads};
use occult_plan::ExpertRows;

use crate::autograd::Parts;
use crate::error::{MoeError, Result};
use crate::exchange::{Path, Returning};
use crate::layer::{ExpertParallelLayer, ExpertTensors};
use crate::ops::{by_pair, expanded_weights, take};
use crate::room;
use crate::tensor::with_f32;
use crate::timers::Phase;

/// One part, as backward needs it.
struct Part {
    path: Arc<Path>,
    tokens: Range<usize>,
    sparse: SparseRows,
    expanded: ExpertRows,
    /// Its rows among those received by all parts.
    rows: Range<usize>,
    /// Its expanded rows among those of all parts.
    of_expanded: Range<usize>,
    /// `[N]`
    row_weights: Vec<f32>,
}

struct InParts {
    threads: Threads,
    comm: Arc<dyn Communicator>,
    dims: ExpertDims,
    top_k: usize,
    parts: Vec<Part>,
    /// `[R, D]`: received rows of all parts.
    x: Vec<f32>,
    /// `[N, 2F]`: pre-activations of all parts, perhaps more values than that; none after a backward pass.
    pre: Mutex<Option<Vec<f32>>>,
    sinks: Option<[GradSink; 2]>,
    y: Mutex<Option<Vec<f32>>>,
}

impl Drop for InParts {
    fn drop(&mut self) {
        room::give(std::mem::take(&mut self.x));
        if let Ok(pre) = take(&self.pre) {
            room::give(pre);
        }
    }
}

/// The gradient of a weight, as far as it is wanted.
enum Wanted<'a> {
    No,
    /// Zeros, to be overwritten.
    Here(&'a mut [f32]),
    Sink(&'a GradSink, usize),
}

impl Wanted<'_> {
    /// Calls `make` with the values, and whether it adds to what is there.
    fn make(self, make: impl FnOnce(&mut [f32], bool) -> Result<()>) -> Result<()> {
        match self {
            Wanted::No => Ok(()),
            Wanted::Here(values) => make(values, false),
            Wanted::Sink(sink, len) => sink.update(len, |values, first| make(values, !first)),
        }
    }
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
        let mut combines = Returning::default();
        let mut rows = room::empty("rows received", x.elem_count())?;
        let (mut rows_before, mut expanded_before) = (0, 0);
        let (num_parts, width) = (parts.len(), 2 * dims.intermediate);
        let mut pre = Vec::new();
        for (tokens, dispatch) in parts {
            let start = rows.len();
            let handle = dispatch.finish_into(&mut rows)?;
            combines.pass_on()?;
            let received = &rows[start..];
            let (expanded, sparse) = self.timers.time(Phase::Plan, || self.expand(&handle))?;
            let row_weights = expanded_weights(&expanded, handle.row_experts().weights());
            let of_expanded = expanded_before..expanded_before + sparse.num_expanded();
            expanded_before = of_expanded.end;
            if kept.is_empty() {
                // The other parts have about as many rows as the first.
                pre = room::any("pre-activations", sparse.num_expanded() * width * num_parts)?;
            }
            room::lengthen("pre-activations", &mut pre, of_expanded.end * width)?;
            let pre = &mut pre[of_expanded.start * width..of_expanded.end * width];
            let mut y = room::any("outputs of the experts", received.len())?;
            self.timers.time(Phase::Compute, || -> Result<()> {
                with_f32(&w_up, |w| {
                    Ok(scatter(&self.threads, &sparse, dims, received, &up_matrices(w, dims), pre))
                })?
                .map_err(kernel)?;
                with_f32(&w_down, |w| {
                    let w_down = &down_matrices(w, dims);
                    let inputs = MergeInputs { pre, row_weights: &row_weights, w_down };
                    Ok(merge(&self.threads, &sparse, dims, inputs, &mut y))
                })?
                .map_err(kernel)
            })?;
            let (path, of) = (handle.path(), rows_before..rows_before + sparse.num_rows());
            rows_before = of.end;
            kept.push(Part { path, tokens, sparse, expanded, rows: of, of_expanded, row_weights });
            combines.push_combine(handle.start_combine(&y)?);
            room::give(y);
        }
        combines.pass_on()?;
        let mut y = Vec::new();
        room::reserve("outputs of the tokens", &mut y, x.elem_count())?;
        for combine in combines {
            combine.finish_into(&mut y)?;
        }
        let op = InParts {
            threads: self.threads.clone(),
            comm: Arc::clone(&self.comm),
            dims,
            top_k: weights.dim(1)?,
            parts: kept,
            x: rows,
            pre: Mutex::new(Some(pre)),
            sinks: experts.sinks.map(|sinks| sinks.map(GradSink::clone)),
            y: Mutex::new(Some(y)),
        };
        Ok(Tensor::cat(&[x, weights], 1)?.apply_op3(&w_up, &w_down, op)?)
    }
}

impl InParts {
    /// Gradients: of rows and weights together `[T, D + K]`, and those of the experts' weights.
    fn backward(
        &self,
        dy: &[f32],
        w_up: &[f32],
        w_down: &[f32],
        [d_up, d_down]: [Wanted<'_>; 2],
    ) -> Result<Vec<f32>> {
        let (dims, d, k) = (self.dims, self.dims.hidden, self.top_k);
        let f = dims.intermediate;
        let (w_up, w_down) = (up_matrices(w_up, dims), down_matrices(w_down, dims));
        let mut arriving = Vec::with_capacity(self.parts.len());
        for part in &self.parts {
            arriving.push(part.path.start_combine_backward(&dy[part.tokens.start * d..part.tokens.end * d])?);
        }
        let tokens = dy.len().checked_div(d).unwrap_or(0);
        let num_expanded = self.parts.last().map_or(0, |part| part.of_expanded.end);
        let mut dy = room::empty("gradients of the outputs", self.x.len())?;
        let frozen = matches!((&d_up, &d_down), (Wanted::No, Wanted::No));
        let mut act = room::any("activations", if frozen { 0 } else { num_expanded * f })?;
        let mut pre = self.pre_activations(&w_up, num_expanded)?;
        let mut leaving = Returning::default();
        for (part, arriving) in self.parts.iter().zip(arriving) {
            let Part { path, sparse, expanded, rows, of_expanded: of, row_weights, .. } = part;
            path.finish_combine_backward(arriving, &mut dy)?;
            leaving.pass_on()?;
            let (x, dy) = (&self.x[rows.start * d..rows.end * d], &dy[rows.start * d..]);
            let pre = &mut pre[of.start * 2 * f..of.end * 2 * f];
            let mut d_row_weights = vec![0.0; row_weights.len()];
            let mut dx = room::any("gradients of the rows", x.len())?;
            path.timers().time(Phase::Compute, || -> Result<()> {
                let grads = MergeGrads {
                    d_pre: pre,
                    d_row_weights: &mut d_row_weights,
                    d_w_down: None,
                    act: (!frozen).then(|| &mut act[of.start * f..of.end * f]),
                };
                merge_bwd_in_place(&self.threads, sparse, dims, row_weights, &w_down, dy, grads)
                    .map_err(kernel)?;
                let grads = ScatterGrads { dx: Some(&mut dx), d_w_up: None };
                scatter_bwd(&self.threads, sparse, dims, x, &w_up, pre, grads).map_err(kernel)
            })?;
            leaving.push(path.start_dispatch_backward(&dx, &by_pair(expanded, &d_row_weights))?);
            room::give(dx);
        }
        if let Some(first) = self.parts.first().filter(|_| !frozen) {
            let (rows, stored) = self.joined()?;
            let d_pre = &pre[..num_expanded * 2 * f];
            let inputs = WeightInputs { x: &self.x, dy: &dy, act: &act, d_pre, stored: &stored };
            let weights = |grads: WeightGrads<'_>| {
                weights_bwd(&self.threads, &rows, dims, inputs, grads).map_err(kernel)
            };
            let timers = first.path.timers();
            timers.time(Phase::Weights, || {
                d_down.make(|to, add| weights(WeightGrads { d_w_up: None, d_w_down: Some(to), add }))
            })?;
            // By now slower ranks of the node have sent theirs, too; two thirds of the products are left to hide the way on.
            leaving.pass_on()?;
            timers.time(Phase::Weights, || {
                d_up.make(|to, add| weights(WeightGrads { d_w_up: Some(to), d_w_down: None, add }))
            })?;
        } else {
            leaving.pass_on()?;
        }
        for values in [dy, act, pre] {
            room::give(values);
        }
        let mut out = Vec::new();
        room::reserve("gradients of the tokens", &mut out, tokens * (d + k))?;
        for leaving in leaving {
            let mut dx = Vec::new();
            let dw = leaving.finish_into(&mut dx)?;
            for (dx, dw) in dx.chunks_exact(d).zip(dw.chunks_exact(k)) {
                out.extend_from_slice(dx);
                out.extend_from_slice(dw);
            }
        }
        Ok(out)
    }

    /// Pre-activations of all parts, at least `num_expanded` rows `[2F]`: as the forward pass left them, or computed again
    /// where a backward pass made gradients of them.
    fn pre_activations(&self, w_up: &[GateUp<'_>], num_expanded: usize) -> Result<Vec<f32>> {
        if let Ok(pre) = take(&self.pre) {
            return Ok(pre);
        }
        let (d, width) = (self.dims.hidden, 2 * self.dims.intermediate);
        let mut pre = room::any("pre-activations", num_expanded * width)?;
        for Part { path, sparse, rows, of_expanded: of, .. } in &self.parts {
            let x = &self.x[rows.start * d..rows.end * d];
            let pre = &mut pre[of.start * width..of.end * width];
            path.timers()
                .time(Phase::Compute, || scatter(&self.threads, sparse, self.dims, x, w_up, pre))
                .map_err(kernel)?;
        }
        Ok(pre)
    }

    /// The rows of all parts one after the other, and where each of their expanded rows stands when those of a part stay
    /// together.
    fn joined(&self) -> Result<(SparseRows, Vec<u32>)> {
        let experts = self.parts.first().map_or(0, |part| part.sparse.num_experts());
        let (mut offsets, mut idx, mut stored) = (vec![0], Vec::new(), Vec::new());
        for expert in 0..experts {
            let mut expanded_before = 0;
            for Part { sparse, rows, .. } in &self.parts {
                idx.extend(sparse.rows_of(expert).iter().map(|&row| row + rows.start as u32));
                stored.extend(sparse.expanded_of(expert).map(|n| (expanded_before + n) as u32));
                expanded_before += sparse.num_expanded();
            }
            offsets.push(idx.len() as u32);
        }
        let num_rows = self.parts.last().map_or(0, |part| part.rows.end);
        Ok((SparseRows::new(num_rows, offsets, idx).map_err(kernel)?, stored))
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
        let grads = match &self.sinks {
            None => [&mut d_up, &mut d_down].map(|grad| grad.as_deref_mut().map_or(Wanted::No, Wanted::Here)),
            Some([up, down]) => {
                [Wanted::Sink(up, w_up.elem_count()), Wanted::Sink(down, w_down.elem_count())]
            }
        };
        let result = with_f32(&grad, |dy| {
            with_f32(w_up, |up| with_f32(w_down, |down| Ok(self.backward(dy, up, down, grads))))
        })?;
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

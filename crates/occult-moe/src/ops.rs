//! Dispatch and combine as differentiable operations, and the routing weights between them.
//!
//! ```text
//! x [T,D] ---dispatch--> [R,D] --scattering SMM--> [N,2F] --merging SMM--> [R,D] --combine--> y [T,D]
//! w [T,K] --/               \--row weights--> [N] --------/
//! ```
//! Row weights have travelled with the rows, so `row_weights` hangs on dispatch's output in the graph though it takes no
//! value from it: in the backward pass it runs first and leaves the gradients of the weights for dispatch, which sends
//! them back in the same messages as those of the rows.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp1, CustomOp2, Device, Layout, Result, Shape, Tensor};
use occult_plan::ExpertRows;

use crate::error::MoeError;
use crate::exchange::Path;
use crate::tensor::with_f32;

/// What dispatch and row weights share.
#[derive(Debug, Clone)]
pub(crate) struct Link {
    path: Arc<Path>,
    hidden: usize,
    /// Gradients of the received pairs' weights, on their way from row weights to dispatch.
    weight_grads: Arc<Mutex<Option<Vec<f32>>>>,
}

impl Link {
    pub(crate) fn new(path: Arc<Path>, hidden: usize) -> Self {
        Self { path, hidden, weight_grads: Arc::default() }
    }

    /// The received rows `[R, D]` as the result of dispatching `x` `[T, D]` with routing weights `w` `[T, K]`.
    pub(crate) fn dispatch(&self, x: &Tensor, w: &Tensor, rows: Vec<f32>) -> Result<Tensor> {
        x.apply_op2(w, Dispatch { link: self.clone(), rows: Mutex::new(Some(rows)) })
    }

    /// The weights `[N]` of the expanded rows.
    pub(crate) fn row_weights(&self, rows: &Tensor, experts: &Arc<ExpertRows>) -> Result<Tensor> {
        rows.apply_op1(RowWeights { link: self.clone(), experts: Arc::clone(experts) })
    }

    /// `y` `[T, D]` as the result of combining the experts' outputs `[R, D]`.
    pub(crate) fn combine(&self, outputs: &Tensor, y: Vec<f32>) -> Result<Tensor> {
        outputs.apply_op1(Combine { link: self.clone(), y: Mutex::new(Some(y)) })
    }
}

/// An op's result was computed before the op was applied, and can be taken once.
fn take<T>(slot: &Mutex<Option<T>>) -> Result<T> {
    let value = slot.lock().unwrap_or_else(PoisonError::into_inner).take();
    value.ok_or_else(|| candle_core::Error::msg("an exchange can be applied once"))
}

struct Dispatch {
    link: Link,
    rows: Mutex<Option<Vec<f32>>>,
}

impl CustomOp2 for Dispatch {
    fn name(&self) -> &'static str {
        "moe-dispatch"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        let rows = take(&self.rows)?;
        let shape = (self.link.path.row_experts().num_rows(), self.link.hidden).into();
        Ok((CpuStorage::F32(rows), shape))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let path = &self.link.path;
        path.timers().end_backward();
        let pairs = path.row_experts().num_pairs();
        let dw = self.link.weight_grads.lock().unwrap_or_else(PoisonError::into_inner).take();
        let dw = dw.unwrap_or_else(|| vec![0.0; pairs]);
        let grad = grad.contiguous()?;
        let (dx, dw) =
            with_f32(&grad, |grad| path.dispatch_backward(grad, &dw).map_err(MoeError::into_candle))?;
        let tensor = |values, like: &Tensor| Tensor::from_vec(values, like.shape(), &Device::Cpu).map(Some);
        Ok((tensor(dx, x)?, tensor(dw, w)?))
    }
}

struct RowWeights {
    link: Link,
    experts: Arc<ExpertRows>,
}

impl CustomOp1 for RowWeights {
    fn name(&self) -> &'static str {
        "moe-row-weights"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        let weights = expanded_weights(&self.experts, self.link.path.row_experts().weights());
        let len = weights.len();
        Ok((CpuStorage::F32(weights), len.into()))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let mut by_pair = vec![0.0; self.experts.pair_idx().len()];
        let grad = grad.contiguous()?;
        with_f32(&grad, |grad| {
            for (&pair, &grad) in self.experts.pair_idx().iter().zip(grad) {
                by_pair[pair as usize] = grad;
            }
            Ok(())
        })?;
        *self.link.weight_grads.lock().unwrap_or_else(PoisonError::into_inner) = Some(by_pair);
        Ok(None)
    }
}

/// Weights in the order of the expanded rows, from those of the received pairs.
pub(crate) fn expanded_weights(experts: &ExpertRows, by_pair: &[f32]) -> Vec<f32> {
    experts.pair_idx().iter().map(|&pair| by_pair[pair as usize]).collect()
}

struct Combine {
    link: Link,
    y: Mutex<Option<Vec<f32>>>,
}

impl CustomOp1 for Combine {
    fn name(&self) -> &'static str {
        "moe-combine"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        let y = take(&self.y)?;
        Ok((CpuStorage::F32(y), (self.link.path.num_tokens(), self.link.hidden).into()))
    }

    fn bwd(&self, outputs: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let grad = grad.contiguous()?;
        let path = &self.link.path;
        let rows = with_f32(&grad, |grad| path.combine_backward(grad).map_err(MoeError::into_candle))?;
        path.timers().begin_backward();
        Ok(Some(Tensor::from_vec(rows, outputs.shape(), &Device::Cpu)?))
    }
}

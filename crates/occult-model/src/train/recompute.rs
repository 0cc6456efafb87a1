//! A layer whose insides are not kept for the backward pass but computed again there (Chen et al., "Training Deep Nets
//! with Sublinear Memory Cost", 2016).

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp1, Layout, Shape, Tensor, Var, bail};

use crate::error::Result;
use crate::layer::{Layer, Routed};
use crate::layers::{Rotation, View};
use crate::parameters::ModelParameters;

/// [`Layer::forward`] as one operation. Gradients of the layer's parameters are added to `parameters` during backward.
pub(super) fn forward(
    layer: &Arc<Layer>,
    x: &Tensor,
    rotation: &Rotation,
    view: &View,
    parameters: Option<&ModelParameters>,
) -> Result<(Tensor, Option<Routed>)> {
    let (b, t, d) = x.dims3()?;
    let again = Again {
        layer: layer.clone(),
        rotation: rotation.clone(),
        view: view.clone(),
        parameters: parameters.cloned(),
        ready: Mutex::new(None),
    };
    let (packed, routing) = again.run(&x.detach())?;
    let values = packed.detach().flatten_all()?.to_vec1::<f32>()?;
    *again.ready.lock().unwrap_or_else(PoisonError::into_inner) = Some((values, packed.shape().clone()));
    drop(packed);
    // An input that leads to no variable (a frozen embedding) would leave the operation out of the backward pass.
    let x = if x.track_op() { x.clone() } else { Var::from_tensor(x)?.as_tensor().clone() };
    let packed = x.contiguous()?.apply_op1(again)?;
    let y = packed.narrow(1, 0, d)?.contiguous()?.reshape((b, t, d))?;
    let Some(routing) = routing else { return Ok((y, None)) };
    let logits = packed.narrow(1, d, packed.dim(1)? - d)?.contiguous()?;
    Ok((y, Some(Routed { logits, routing })))
}

/// The operation: `[B, T, D]` to `[B * T, D + E]`, output and router logits side by side since there can be one result.
struct Again {
    layer: Arc<Layer>,
    rotation: Rotation,
    view: View,
    parameters: Option<ModelParameters>,
    /// What the forward pass has computed before the operation was applied.
    ready: Mutex<Option<(Vec<f32>, Shape)>>,
}

impl Again {
    fn run(&self, x: &Tensor) -> Result<(Tensor, Option<occult_plan::RoutingBuf>)> {
        let (y, routed) = self.layer.forward(x, &self.rotation, &self.view, None)?;
        let y = y.flatten_to(1)?;
        Ok(match routed {
            Some(routed) => (Tensor::cat(&[&y, &routed.logits], 1)?, Some(routed.routing)),
            None => (y, None),
        })
    }
}

impl CustomOp1 for Again {
    fn name(&self) -> &'static str {
        "layer-computed-again"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        match self.ready.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some((values, shape)) => Ok((CpuStorage::F32(values), shape)),
            None => bail!("a layer was applied twice"),
        }
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let x = Var::from_tensor(&x.detach())?;
        let (packed, _) = self.run(x.as_tensor()).map_err(candle_core::Error::wrap)?;
        let grads = (packed * grad.detach())?.sum_all()?.backward()?;
        if let Some(parameters) = &self.parameters {
            parameters.accumulate(&grads).map_err(candle_core::Error::wrap)?;
        }
        Ok(grads.get(&x).cloned())
    }
}

use candle_core::{Result, Tensor};

/// The definition of [`swiglu`](super::swiglu()) in candle's own operations.
///
/// # Errors
/// Those of candle.
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    gate / (gate.neg()?.exp()? + 1.0)? * up
}

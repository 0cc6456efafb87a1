use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{Device, Result, Shape, Tensor};

/// A weight gradient that several backward passes add into, in f32, outside of candle's `GradStore`.
///
/// An operation given one gives candle no gradient for that weight. That saves memory (candle makes each gradient twice
/// over while it adds) and precision (candle's gradient has the dtype of the weight). Clones share the values.
///
/// candle only walks to operations with an input that leads to a variable, so the weight should itself be one.
#[derive(Debug, Clone, Default)]
pub struct GradSink(Arc<Mutex<Vec<f32>>>);

impl GradSink {
    /// No gradient yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes what was added so far, leaving nothing; `None` when no backward pass came by.
    ///
    /// # Errors
    /// A `shape` of another size.
    pub fn take(&self, shape: impl Into<Shape>) -> Result<Option<Tensor>> {
        let values = std::mem::take(&mut *self.lock());
        if values.is_empty() { Ok(None) } else { Tensor::from_vec(values, shape, &Device::Cpu).map(Some) }
    }

    /// Calls `f` with the values, zeros at first.
    pub(crate) fn add<R>(&self, len: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
        let mut values = self.lock();
        values.resize(len, 0.0);
        f(&mut values)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<f32>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where the gradient of a weight goes, if anywhere.
pub(crate) fn weight_gradient(
    weight: &Tensor,
    sink: Option<&GradSink>,
    add: impl FnOnce(Option<&mut [f32]>) -> Result<()>,
) -> Result<Option<Tensor>> {
    let len = weight.elem_count();
    if let Some(sink) = sink {
        return sink.add(len, |values| add(Some(values))).map(|()| None);
    }
    if !weight.track_op() {
        return add(None).map(|()| None);
    }
    let mut values = vec![0.0; len];
    add(Some(&mut values))?;
    super::tensor::gradient(values, weight.shape(), weight.dtype()).map(Some)
}

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{Device, Result, Shape, Tensor};

/// A weight gradient that several backward passes add into, in f32, outside of candle's `GradStore`.
///
/// An operation given one gives candle no gradient for that weight. That saves memory (candle makes each gradient twice
/// over while it adds) and precision (candle's gradient has the dtype of the weight). Clones share the values.
///
/// candle only walks to operations with an input that leads to a variable, so the weight should itself be one.
#[derive(Debug, Clone, Default)]
pub struct GradSink(Arc<Mutex<Sum>>);

#[derive(Debug, Default)]
struct Sum {
    values: Vec<f32>,
    /// `values` are memory only: what they hold does not count.
    forgotten: bool,
}

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
        let Sum { values, forgotten } = std::mem::take(&mut *self.lock());
        if forgotten || values.is_empty() {
            return Ok(None);
        }
        Tensor::from_vec(values, shape, &Device::Cpu).map(Some)
    }

    /// Forgets what was added so far and keeps the memory for what comes next.
    pub fn forget(&self) {
        self.lock().forgotten = true;
    }

    /// Calls `f` with the values, zeros at first.
    pub fn add<R>(&self, len: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
        self.update(len, |values, first| {
            if first {
                values.fill(0.0);
            }
            f(values)
        })
    }

    /// Calls `f` with the values and whether it is the first since they were taken or forgotten: it must then overwrite all
    /// of them, which saves filling and reading them.
    pub fn update<R>(&self, len: usize, f: impl FnOnce(&mut [f32], bool) -> R) -> R {
        let mut sum = self.lock();
        let first = sum.forgotten || sum.values.len() != len;
        if sum.values.len() != len {
            sum.values = vec![0.0; len];
        }
        sum.forgotten = false;
        f(&mut sum.values, first)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Sum> {
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

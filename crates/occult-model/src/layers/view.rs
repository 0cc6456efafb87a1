//! What the queries of a batch see.

use std::sync::Arc;

use occult_kernels::ops::AttentionShape;

/// Causal, after `past` positions, with padding at the start of sequences, in one layer.
#[derive(Debug, Clone)]
pub(crate) struct View {
    /// Positions before the batch.
    pub(crate) past: usize,
    /// `[B]`: padding positions at the start of each sequence; `None` when there are none.
    pub(crate) padding: Option<Arc<[usize]>>,
    /// Positions a query sees, itself included; all when `None`.
    pub(crate) window: Option<usize>,
    /// `[B, T]`, without a past: where the text of each position begins in a packed sequence.
    pub(crate) starts: Option<Arc<[u32]>>,
}

impl View {
    /// The same with another window.
    pub(crate) fn with_window(&self, window: Option<usize>) -> Self {
        Self { window, ..self.clone() }
    }

    /// As the attention kernel wants it.
    pub(crate) fn shape(&self, scale: f64) -> AttentionShape {
        AttentionShape {
            scale: scale as f32,
            causal: true,
            past: self.past,
            padding: self.padding.clone(),
            window: self.window,
            starts: self.starts.clone(),
        }
    }
}

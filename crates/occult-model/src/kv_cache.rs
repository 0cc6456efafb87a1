//! Keys and values of the positions that were already computed.

use candle_core::Tensor;
use candle_nn::kv_cache::KvCache as Growing;

use crate::error::Result;

/// Positions by which a cache grows.
const STEP: usize = 256;

/// One layer: two tensors `[B, h, S, d]` that grow along `S` (keys and values, or latents and rotary keys).
#[derive(Debug, Clone)]
pub(crate) struct LayerCache(Growing);

impl LayerCache {
    /// Appends `[B, h, T, d]` each and returns everything so far.
    pub(crate) fn append(&mut self, a: &Tensor, b: &Tensor) -> Result<(Tensor, Tensor)> {
        Ok(self.0.append(&a.contiguous()?, &b.contiguous()?)?)
    }
}

/// The cache of a batch of sequences, filled by [`Decoder::forward`](crate::Decoder::forward).
#[derive(Debug, Clone)]
pub struct KvCache {
    pub(crate) layers: Vec<LayerCache>,
    /// Positions so far, padding included.
    pub(crate) len: usize,
    /// Padding positions at the start of each sequence; set by the first batch.
    pub(crate) padding: Vec<usize>,
}

impl KvCache {
    /// An empty cache for a model with this many layers.
    pub(crate) fn new(num_layers: usize) -> Self {
        let layer = LayerCache(Growing::new(2, STEP));
        Self { layers: vec![layer; num_layers], len: 0, padding: Vec::new() }
    }

    /// Positions so far, padding included.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True before the first batch.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

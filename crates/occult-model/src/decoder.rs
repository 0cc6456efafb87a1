//! The decoder: embedding, layers, output. One for all families.

use std::sync::Arc;

use candle_core::Tensor;
use occult_kernels::Threads;

use crate::batch::Batch;
use crate::error::{ModelError, Result};
use crate::kv_cache::KvCache;
use crate::layer::Layer;
use crate::layers::{Linear, MatrixParameter, RmsNorm, Rope, View};
use crate::moe::{RoutingObserver, RoutingRecord};
use crate::parameters::ModelParameters;
use crate::ranks::Ranks;
use crate::spec::ModelSpec;

/// A model with its weights, as stored or as variables, and the threads it may use.
#[derive(Debug)]
pub struct Decoder {
    pub(crate) spec: ModelSpec,
    pub(crate) threads: Threads,
    pub(crate) embedding: MatrixParameter,
    pub(crate) layers: Vec<Arc<Layer>>,
    pub(crate) norm: RmsNorm,
    pub(crate) output: Linear,
    pub(crate) rope: Rope,
    /// The variables it was made from, when it is for training.
    pub(crate) parameters: Option<ModelParameters>,
    /// Those that share its experts, when they are spread.
    pub(crate) ranks: Option<Arc<Ranks>>,
}

/// Which logits are computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Logits {
    /// Of every position, `[B, T, V]`.
    All,
    /// Of the last position, `[B, 1, V]`.
    Last,
}

impl Decoder {
    /// What it is.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// The threads it may use.
    pub fn threads(&self) -> &Threads {
        &self.threads
    }

    /// An empty cache for [`forward`](Self::forward).
    pub fn new_cache(&self) -> KvCache {
        KvCache::new(self.spec.layers.len())
    }

    /// Runs a batch, f32 logits out.
    ///
    /// With a cache, the batch continues the sequences in it: feeding a sequence in chunks, or token by token, gives the
    /// logits of one pass (up to the rounding of sums). Padding can only stand at the start of the first batch.
    /// `observer` is shown the routing of every MoE layer. After an error the cache must be thrown away. Collective when
    /// the model has [`ranks`](Self::ranks).
    pub fn forward(
        &self,
        batch: &Batch,
        mut cache: Option<&mut KvCache>,
        logits: Logits,
        mut observer: Option<&mut dyn RoutingObserver>,
    ) -> Result<Tensor> {
        let (b, t) = (batch.batch_size(), batch.len());
        let (past, padding) = self.place(batch, cache.as_deref_mut())?;
        if let Some(ranks) = &self.ranks {
            ranks.begin(b * t)?;
        }
        let positions: Vec<usize> =
            padding.iter().flat_map(|p| (past..past + t).map(move |i| i.saturating_sub(*p))).collect();
        let rotation = self.rope.at(&positions, b)?;
        let padded = padding.iter().any(|&p| p > 0);
        let view =
            View { past, padding: padded.then(|| padding.as_slice().into()), window: None, starts: None };
        let is_token: Option<Vec<bool>> = padding
            .iter()
            .any(|&p| p > past)
            .then(|| padding.iter().flat_map(|p| (past..past + t).map(move |i| i >= *p)).collect());

        let mut x = self.embedding.rows(batch.ids())?.reshape((b, t, self.spec.hidden_size))?;
        let mut moe_layer = 0;
        for (i, layer) in self.layers.iter().enumerate() {
            let layer_cache = cache.as_deref_mut().and_then(|c| c.layers.get_mut(i));
            let (y, routed) = layer.forward(&x, &rotation, &view, layer_cache)?;
            x = y;
            let Some(routed) = routed else { continue };
            if let Some(observer) = observer.as_deref_mut() {
                let is_token = is_token.as_deref();
                let routing = &routed.routing;
                observer.record(&RoutingRecord { layer: i, moe_layer, routing, is_token })?;
            }
            moe_layer += 1;
        }
        if logits == Logits::Last {
            x = x.narrow(1, t - 1, 1)?;
        }
        self.output.forward(&self.norm.forward(&x)?)
    }

    /// Checks a batch against the model and the cache, advances the cache, and returns how many positions came before
    /// and the padding of each sequence.
    fn place(&self, batch: &Batch, cache: Option<&mut KvCache>) -> Result<(usize, Vec<usize>)> {
        let (t, vocab) = (batch.len(), self.spec.vocab_size);
        if let Some(id) = batch.ids().iter().find(|&&id| id as usize >= vocab) {
            return Err(ModelError::request(format!("token id {id} is outside the vocabulary of {vocab}")));
        }
        let past = cache.as_ref().map_or(0, |c| c.len);
        let padding = match &cache {
            Some(c) if past > 0 => {
                if c.padding.len() != batch.batch_size() {
                    let message = format!(
                        "the cache holds {} sequences, the batch {}",
                        c.padding.len(),
                        batch.batch_size()
                    );
                    return Err(ModelError::request(message));
                }
                if batch.padding().iter().any(|&p| p > 0) {
                    return Err(ModelError::request(
                        "padding inside a sequence: only the first batch can be padded",
                    ));
                }
                c.padding.clone()
            }
            _ => batch.padding().to_vec(),
        };
        let longest = past + t - padding.iter().min().copied().unwrap_or(0);
        if longest > self.spec.context_len {
            let message =
                format!("{longest} tokens are more than the model's context of {}", self.spec.context_len);
            return Err(ModelError::request(message));
        }
        if let Some(cache) = cache {
            cache.len += t;
            cache.padding.clone_from(&padding);
        }
        Ok((past, padding))
    }
}

//! The decoder: embedding, layers, output. One for all families.

use candle_core::{DType, Device, Tensor};

use crate::batch::Batch;
use crate::error::{ModelError, Result};
use crate::kv_cache::{KvCache, LayerCache};
use crate::layers::{GroupedAttention, LatentAttention, Linear, Mlp, RmsNorm, Rope, Rotation};
use crate::mask::masks;
use crate::moe::{MoeLayer, RoutingObserver, RoutingRecord};
use crate::spec::ModelSpec;

/// A model with its weights.
#[derive(Debug)]
pub struct Decoder {
    pub(crate) spec: ModelSpec,
    pub(crate) embedding: Tensor,
    pub(crate) layers: Vec<Layer>,
    pub(crate) norm: RmsNorm,
    pub(crate) output: Linear,
    pub(crate) rope: Rope,
}

#[derive(Debug)]
pub(crate) struct Layer {
    pub(crate) attention_norm: RmsNorm,
    pub(crate) attention: Attention,
    pub(crate) ffn_norm: RmsNorm,
    pub(crate) ffn: Ffn,
}

#[derive(Debug)]
pub(crate) enum Attention {
    Grouped(GroupedAttention),
    Latent(LatentAttention),
}

impl Attention {
    fn forward(
        &self,
        x: &Tensor,
        rotation: &Rotation,
        mask: Option<&Tensor>,
        cache: Option<&mut LayerCache>,
    ) -> Result<Tensor> {
        match self {
            Attention::Grouped(a) => a.forward(x, rotation, mask, cache),
            Attention::Latent(a) => a.forward(x, rotation, mask, cache),
        }
    }
}

#[derive(Debug)]
pub(crate) enum Ffn {
    Dense(Mlp),
    Moe { routed: Box<dyn MoeLayer>, shared: Option<SharedExpert> },
}

/// The expert that every token visits; with a gate, its output is multiplied by `sigmoid(gate(x))`.
#[derive(Debug)]
pub(crate) struct SharedExpert {
    pub(crate) mlp: Mlp,
    pub(crate) gate: Option<Linear>,
}

impl SharedExpert {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = self.mlp.forward(x)?;
        Ok(match &self.gate {
            Some(gate) => y.broadcast_mul(&candle_nn::ops::sigmoid(&gate.forward(x)?)?)?,
            None => y,
        })
    }
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

    /// An empty cache for [`forward`](Self::forward).
    pub fn new_cache(&self) -> KvCache {
        KvCache::new(self.spec.layers.len())
    }

    /// Runs a batch, f32 logits out.
    ///
    /// With a cache, the batch continues the sequences in it: feeding a sequence in chunks, or token by token, gives the
    /// logits of one pass (up to the rounding of sums). Padding can only stand at the start of the first batch.
    /// `observer` is shown the routing of every MoE layer. After an error the cache must be thrown away.
    pub fn forward(
        &self,
        batch: &Batch,
        mut cache: Option<&mut KvCache>,
        logits: Logits,
        mut observer: Option<&mut dyn RoutingObserver>,
    ) -> Result<Tensor> {
        let (b, t) = (batch.batch_size(), batch.len());
        let (past, padding) = self.place(batch, cache.as_deref_mut())?;
        let positions: Vec<usize> =
            padding.iter().flat_map(|p| (past..past + t).map(move |i| i.saturating_sub(*p))).collect();
        let rotation = self.rope.at(&positions, b)?;
        let masks = masks(&self.spec, past, t, &padding)?;
        let is_token: Option<Vec<bool>> = padding
            .iter()
            .any(|&p| p > past)
            .then(|| padding.iter().flat_map(|p| (past..past + t).map(move |i| i >= *p)).collect());

        let ids = Tensor::from_slice(batch.ids(), b * t, &Device::Cpu)?;
        let embedded = self.embedding.index_select(&ids, 0)?.to_dtype(DType::F32)?;
        let mut x = embedded.reshape((b, t, self.spec.hidden_size))?;
        let mut moe_layer = 0;
        for (i, layer) in self.layers.iter().enumerate() {
            let layer_cache = cache.as_deref_mut().and_then(|c| c.layers.get_mut(i));
            let mask = masks.get(self.spec.layers[i].sliding_window);
            let normed = layer.attention_norm.forward(&x)?;
            x = (x + layer.attention.forward(&normed, &rotation, mask, layer_cache)?)?;
            let normed = layer.ffn_norm.forward(&x)?;
            let y = match &layer.ffn {
                Ffn::Dense(mlp) => mlp.forward(&normed)?,
                Ffn::Moe { routed, shared } => {
                    let rows = normed.reshape((b * t, self.spec.hidden_size))?;
                    let (mut y, routing) = routed.forward(&rows)?;
                    if let Some(observer) = observer.as_deref_mut() {
                        let is_token = is_token.as_deref();
                        observer.record(&RoutingRecord {
                            layer: i,
                            moe_layer,
                            routing: &routing,
                            is_token,
                        })?;
                    }
                    moe_layer += 1;
                    if let Some(shared) = shared {
                        y = (y + shared.forward(&rows)?)?;
                    }
                    y.reshape((b, t, self.spec.hidden_size))?
                }
            };
            x = (x + y)?;
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

//! Generating text, token by token.

use std::ops::ControlFlow;

use candle_core::Tensor;

use crate::batch::Batch;
use crate::decoder::{Decoder, Logits};
use crate::error::{ModelError, Result};
use crate::kv_cache::KvCache;
use crate::moe::RoutingObserver;
use crate::sample::{Sampler, Sampling};
use crate::spec::ModelSpec;

/// Positions of a prompt that are computed at a time: bounds the attention scores in memory.
pub const PREFILL_CHUNK: usize = 512;

/// What [`generate`] needs beside a prompt.
#[derive(Debug, Clone, Default)]
pub struct GenerateOptions {
    /// Most tokens to generate; up to the model's context when `None`.
    pub max_new_tokens: Option<usize>,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Tokens that end the text; they are part of the result.
    pub stop_ids: Vec<u32>,
}

/// Why generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// One of the stop ids came.
    StopId(u32),
    /// `max_new_tokens` were generated.
    MaxTokens,
    /// The model's context is full.
    Context,
    /// The caller said so.
    Caller,
}

/// New tokens and why there are no more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Generated {
    /// The new tokens.
    pub ids: Vec<u32>,
    /// Why there are no more.
    pub stop: Stop,
}

/// Errors unless a prompt has tokens, all of them in the vocabulary, and leaves room in the context for one more.
pub fn check_prompt(spec: &ModelSpec, prompt: &[u32]) -> Result<()> {
    let (vocab, context) = (spec.vocab_size, spec.context_len);
    if prompt.is_empty() {
        return Err(ModelError::request("the prompt has no tokens"));
    }
    if let Some(id) = prompt.iter().find(|&&id| id as usize >= vocab) {
        let message = format!("the prompt has token id {id}, the model's vocabulary has {vocab}");
        return Err(ModelError::request(message));
    }
    if prompt.len() >= context {
        let message = format!("the prompt has {} tokens, the model's context is {context}", prompt.len());
        return Err(ModelError::request(message));
    }
    Ok(())
}

/// Continues a prompt. `on_token` is called with every new token as it comes, and can end the text.
pub fn generate(
    model: &Decoder,
    prompt: &[u32],
    options: &GenerateOptions,
    on_token: &mut dyn FnMut(u32) -> Result<ControlFlow<()>>,
) -> Result<Generated> {
    check_prompt(model.spec(), prompt)?;
    let room = model.spec().context_len - prompt.len();
    let limit = options.max_new_tokens.unwrap_or(room).min(room);
    let mut sampler = Sampler::new(options.sampling)?;
    let mut ids = Vec::new();
    let done = |ids, stop| Ok(Generated { ids, stop });
    if limit == 0 {
        return done(ids, Stop::MaxTokens);
    }
    let mut cache = model.new_cache();
    let mut logits = prefill(model, prompt, &mut cache, None)?;
    loop {
        let id = sampler.next(&logits.flatten_all()?.to_vec1::<f32>()?)?;
        ids.push(id);
        if on_token(id)?.is_break() {
            return done(ids, Stop::Caller);
        }
        if options.stop_ids.contains(&id) {
            return done(ids, Stop::StopId(id));
        }
        if ids.len() == limit {
            let asked = options.max_new_tokens.is_some_and(|n| n == limit);
            return done(ids, if asked { Stop::MaxTokens } else { Stop::Context });
        }
        logits = model.forward(&Batch::single(&[id])?, Some(&mut cache), Logits::Last, None)?;
    }
}

/// Feeds a sequence in chunks of [`PREFILL_CHUNK`] and returns the last position's logits `[1, 1, V]`.
pub fn prefill(
    model: &Decoder,
    ids: &[u32],
    cache: &mut KvCache,
    mut observer: Option<&mut dyn RoutingObserver>,
) -> Result<Tensor> {
    let mut last = None;
    for chunk in ids.chunks(PREFILL_CHUNK) {
        let observer: Option<&mut dyn RoutingObserver> = match &mut observer {
            Some(o) => Some(&mut **o),
            None => None,
        };
        last = Some(model.forward(&Batch::single(chunk)?, Some(cache), Logits::Last, observer)?);
    }
    last.ok_or_else(|| ModelError::request("no tokens to feed"))
}

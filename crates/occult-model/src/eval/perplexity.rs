//! Perplexity of a text in windows.

use crate::decoder::{Decoder, Logits};
use crate::error::{ModelError, Result};
use crate::eval::log_prob;
use crate::generate::PREFILL_CHUNK;
use crate::passes::{PassObserver, for_each_pass};

/// Sums over the scored tokens; texts add up.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Perplexity {
    /// Sum of `-ln p(token | tokens before it in its window)`.
    pub nll: f64,
    /// Scored tokens.
    pub tokens: u64,
    /// Tokens that went through the model: the last window repeats some.
    pub inputs: u64,
}

impl Perplexity {
    /// `exp(nll / tokens)`; NaN without tokens.
    pub fn value(&self) -> f64 {
        (self.nll / self.tokens as f64).exp()
    }

    /// Adds another text.
    pub fn add(&mut self, other: &Perplexity) {
        self.nll += other.nll;
        self.tokens += other.tokens;
        self.inputs += other.inputs;
    }
}

/// Scores every token of a text once, in windows of `window` inputs that do not overlap: the "rolling" rule of
/// lm-evaluation-harness, which encodes with the tokenizer's special tokens. The first token is conditioned on `prefix` (a begin-of-text id)
/// and is not scored without one (collective when the model has ranks, with the same result on all); the last window is filled up with the tokens before it.
pub fn perplexity(
    model: &Decoder,
    ids: &[u32],
    prefix: Option<u32>,
    window: usize,
    observe: Option<&mut PassObserver<'_>>,
) -> Result<Perplexity> {
    if window == 0 || window > model.spec().context_len {
        let message =
            format!("window is {window}, expected 1 to {} (the model's context)", model.spec().context_len);
        return Err(ModelError::request(message));
    }
    let text: Vec<u32> = prefix.into_iter().chain(ids.iter().copied()).collect();
    let vocab = model.spec().vocab_size;
    // Window `from..to`: `text[from + 1 ..= to]` is predicted from inputs that end at `text[to - 1]`.
    let mut windows = Vec::new();
    let mut from = 0;
    while from + 1 < text.len() {
        let to = (from + window).min(text.len() - 1);
        windows.push((from, to.saturating_sub(window), to));
        from = to;
    }
    let inputs: Vec<&[u32]> = windows.iter().map(|&(_, start, to)| &text[start..to]).collect();
    let mut result =
        Perplexity { inputs: inputs.iter().map(|w| w.len() as u64).sum(), ..Perplexity::default() };
    for_each_pass(model, &inputs, PREFILL_CHUNK, Logits::All, observe, &mut |pass, logits| {
        for (i, rows) in pass.sequences.clone().zip(logits.chunks_exact(pass.positions.len() * vocab)) {
            let (from, start, to) = windows[i];
            // Only the first window can be shorter than others, and then it is the only one: nothing is padded.
            for (at, row) in (start + pass.positions.start..to).zip(rows.chunks_exact(vocab)) {
                // The inputs before `from` only fill the window.
                if at >= from {
                    result.nll -= log_prob(row, text[at + 1]);
                    result.tokens += 1;
                }
            }
        }
        Ok(())
    })?;
    if let Some(ranks) = model.ranks() {
        // Rank 0 has seen everything; token counts are exact in f64 up to 2^53.
        let mut sums = [result.nll, result.tokens as f64];
        ranks.comm().all_reduce_sum_f64("perplexity", &mut sums)?;
        (result.nll, result.tokens) = (sums[0], sums[1] as u64);
    }
    Ok(result)
}

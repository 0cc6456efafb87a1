//! Perplexity of a text in windows.

use crate::decoder::Decoder;
use crate::error::{ModelError, Result};
use crate::eval::log_prob;
use crate::generate::all_logits;
use crate::moe::RoutingObserver;

/// Sums over the scored tokens; texts add up.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Perplexity {
    /// Sum of `-ln p(token | tokens before it in its window)`.
    pub nll: f64,
    /// Scored tokens.
    pub tokens: u64,
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
    }
}

/// Scores every token of a text once, in windows of `window` inputs that do not overlap: the "rolling" rule of
/// lm-evaluation-harness, which encodes with the tokenizer's special tokens. The first token is conditioned on `prefix` (a begin-of-text id) and is not scored without one;
/// the last window is filled up with the tokens before it.
pub fn perplexity(
    model: &Decoder,
    ids: &[u32],
    prefix: Option<u32>,
    window: usize,
    mut observer: Option<&mut dyn RoutingObserver>,
) -> Result<Perplexity> {
    if window == 0 || window > model.spec().context_len {
        let message =
            format!("window is {window}, expected 1 to {} (the model's context)", model.spec().context_len);
        return Err(ModelError::request(message));
    }
    let text: Vec<u32> = prefix.into_iter().chain(ids.iter().copied()).collect();
    let vocab = model.spec().vocab_size;
    let mut result = Perplexity::default();
    // `text[from + 1 ..= to]` is predicted from inputs that end at `text[to - 1]`.
    let mut from = 0;
    while from + 1 < text.len() {
        let to = (from + window).min(text.len() - 1);
        let start = to.saturating_sub(window);
        let observer: Option<&mut dyn RoutingObserver> = match &mut observer {
            Some(o) => Some(&mut **o),
            None => None,
        };
        let targets = &text[start + 1..=to];
        all_logits(model, &text[start..to], observer, &mut |first, logits| {
            for (i, row) in logits.chunks_exact(vocab).enumerate() {
                // The inputs before `from` only fill the window.
                if first + i >= from - start {
                    result.nll -= log_prob(row, targets[first + i]);
                    result.tokens += 1;
                }
            }
            Ok(())
        })?;
        from = to;
    }
    Ok(result)
}

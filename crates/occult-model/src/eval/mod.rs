//! Evaluation: perplexity of text, and multiple-choice tasks by log-likelihood, with the rules of lm-evaluation-harness.

mod choice;
mod perplexity;

pub use choice::{ChoiceItem, ChoiceScores, ItemScore, read_items, score_item};
pub use perplexity::{Perplexity, perplexity};

/// Natural logarithm of the softmax probability of `id` under logits `[V]`, summed in f64.
pub(crate) fn log_prob(logits: &[f32], id: u32) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&l| f64::from(l - max).exp()).sum();
    logits.get(id as usize).map_or(f64::NEG_INFINITY, |&l| f64::from(l - max) - sum.ln())
}

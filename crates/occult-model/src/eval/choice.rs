//! Multiple-choice tasks: the choice with the highest log-likelihood after the context.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use serde::Deserialize;

use crate::batch::Batch;
use crate::decoder::{Decoder, Logits};
use crate::error::{ModelError, Result};
use crate::eval::log_prob;

/// One question, one line of a JSONL file.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct ChoiceItem {
    /// The text before the choice.
    #[serde(alias = "query", alias = "ctx", alias = "question")]
    pub context: String,
    /// The choices, without the delimiter.
    pub choices: Vec<String>,
    /// Index of the right one.
    #[serde(alias = "gold", alias = "label")]
    pub answer: usize,
    /// Between context and choice.
    #[serde(default = "space")]
    pub delimiter: String,
}

fn space() -> String {
    " ".into()
}

/// Log-likelihoods of one question's choices and what follows from them.
#[derive(Debug, Clone, PartialEq)]
pub struct ItemScore {
    /// Sum of `ln p` over the tokens of each choice.
    pub log_likelihoods: Vec<f64>,
    /// The right one has the highest sum.
    pub acc: bool,
    /// The right one has the highest sum per character of the choice (without the delimiter).
    pub acc_norm: bool,
}

/// Means over questions.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ChoiceScores {
    /// Questions.
    pub items: u64,
    /// Right by sum.
    pub correct: u64,
    /// Right by sum per character.
    pub correct_norm: u64,
}

impl ChoiceScores {
    /// Adds a question.
    pub fn add(&mut self, item: &ItemScore) {
        self.items += 1;
        self.correct += u64::from(item.acc);
        self.correct_norm += u64::from(item.acc_norm);
    }

    /// Accuracy by sum.
    pub fn acc(&self) -> f64 {
        self.correct as f64 / self.items as f64
    }

    /// Accuracy by sum per character.
    pub fn acc_norm(&self) -> f64 {
        self.correct_norm as f64 / self.items as f64
    }
}

/// Longest line of a task file.
const MAX_LINE: usize = 16 << 20;

/// Reads a JSONL file of questions. Empty lines are skipped; errors name the line.
pub fn read_items(path: &Path) -> Result<Vec<ChoiceItem>> {
    let file = File::open(path).map_err(|e| ModelError::io("open", path, e))?;
    let mut items = Vec::new();
    for (i, line) in BufReader::new(file).lines().enumerate() {
        let line = line.map_err(|e| ModelError::io("read", path, e))?;
        let bad = |message: String| ModelError::bad(path, format!("line {}", i + 1), message);
        if line.len() > MAX_LINE {
            return Err(bad(format!("has {} bytes, at most {MAX_LINE} are read", line.len())));
        }
        if line.trim().is_empty() {
            continue;
        }
        let item: ChoiceItem = serde_json::from_str(&line).map_err(|e| bad(e.to_string()))?;
        if item.answer >= item.choices.len() {
            return Err(bad(format!("answer is {}, there are {} choices", item.answer, item.choices.len())));
        }
        if item.choices.iter().any(String::is_empty) {
            return Err(bad("a choice is empty".into()));
        }
        items.push(item);
    }
    if items.is_empty() {
        return Err(ModelError::bad(path, "", "has no questions"));
    }
    Ok(items)
}

/// Scores one question. `encode` turns text into ids, with or without the special tokens that the tokenizer puts around
/// every text; `prefix` stands for an empty context.
///
/// The rules of lm-evaluation-harness (0.4.13): contexts get the tokenizer's special tokens; spaces at the end of the context belong to the choice; a choice's tokens are those
/// of context and choice together beyond the number of the context's; too long an input loses its start.
pub fn score_item(
    model: &Decoder,
    encode: &dyn Fn(&str, bool) -> Result<Vec<u32>>,
    prefix: Option<u32>,
    item: &ChoiceItem,
) -> Result<ItemScore> {
    let trimmed = item.context.trim_end();
    let spaces = &item.context[trimmed.len()..];
    let mut inputs = Vec::with_capacity(item.choices.len());
    let mut targets = Vec::with_capacity(item.choices.len());
    for choice in &item.choices {
        let continuation = format!("{spaces}{}{choice}", item.delimiter);
        let (context, target) = if item.context.is_empty() {
            let start =
                prefix.ok_or_else(|| ModelError::request("an empty context needs a begin-of-text id"))?;
            (vec![start], encode(&continuation, false)?)
        } else {
            let whole = encode(&format!("{trimmed}{continuation}"), true)?;
            let context = encode(trimmed, true)?;
            let from = context.len().min(whole.len());
            (context, whole[from..].to_vec())
        };
        if target.is_empty() {
            return Err(ModelError::request(format!("choice {choice:?} adds no token to its context")));
        }
        let mut input = context;
        input.extend_from_slice(&target[..target.len() - 1]);
        let excess = input.len().saturating_sub(model.spec().context_len);
        if target.len() > input.len() - excess || input.len() == excess {
            return Err(ModelError::request(format!("choice {choice:?} is longer than the model's context")));
        }
        inputs.push(input.split_off(excess));
        targets.push(target);
    }
    let batch = Batch::new(&inputs)?;
    let logits = model.forward(&batch, None, Logits::All, None)?.flatten_all()?.to_vec1::<f32>()?;
    let (t, v) = (batch.len(), model.spec().vocab_size);
    let mut sums = Vec::with_capacity(targets.len());
    for (rows, target) in logits.chunks_exact(t * v).zip(&targets) {
        // Padding is on the left: the predictions of a choice are the last rows.
        let rows = rows.chunks_exact(v).skip(t - target.len());
        sums.push(rows.zip(target).map(|(row, &id)| log_prob(row, id)).sum::<f64>());
    }
    let lengths = item.choices.iter().map(|c| c.chars().count() as f64);
    let per_character: Vec<f64> = sums.iter().zip(lengths).map(|(s, n)| s / n).collect();
    let (acc, acc_norm) = (best(&sums) == Some(item.answer), best(&per_character) == Some(item.answer));
    Ok(ItemScore { log_likelihoods: sums, acc, acc_norm })
}

/// The first of the largest.
fn best(values: &[f64]) -> Option<usize> {
    let first = |best: Option<usize>, i: usize| match best {
        Some(b) if values[b] >= values[i] => Some(b),
        _ => Some(i),
    };
    (0..values.len()).fold(None, first)
}

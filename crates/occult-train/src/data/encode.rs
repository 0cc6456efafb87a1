//! A record becomes token ids, each marked as learned or not.

use crate::data::source::{Record, Turn};
use crate::error::{Result, TrainError};

/// What the data need of a tokenizer.
pub trait Tokenize {
    /// The ids of a text, without anything around it.
    fn encode(&self, text: &str) -> Result<Vec<u32>>;
    /// What begins every document, where the model has such a token.
    fn begin(&self) -> Option<u32> {
        None
    }
    /// What ends every document.
    fn end(&self) -> u32;
    /// The text of a chat by the model's template, special tokens as text; `None` where there is no template. With `prompt`
    /// it ends ready for the assistant's answer.
    fn chat(&self, turns: &[Turn], prompt: bool) -> Result<Option<String>> {
        let _ = (turns, prompt);
        Ok(None)
    }
}

/// The ids of one document.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Encoded {
    /// Token ids.
    pub ids: Vec<u32>,
    /// For each id whether predicting it is learned.
    pub learn: Vec<bool>,
}

impl Encoded {
    fn push(&mut self, ids: &[u32], learn: bool) {
        self.ids.extend_from_slice(ids);
        self.learn.resize(self.ids.len(), learn);
    }
}

/// The prompt of an instruction, in the wording of Stanford Alpaca.
pub fn instruction_prompt(instruction: &str, input: &str) -> String {
    if input.trim().is_empty() {
        format!(
            "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n\
             ### Instruction:\n{instruction}\n\n### Response:\n"
        )
    } else {
        format!(
            "Below is an instruction that describes a task, paired with an input that provides further context. Write a \
             response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n\
             ### Response:\n"
        )
    }
}

/// Encodes a record. Prompt and answer are encoded apart, so that the answer's tokens do not depend on where a tokenizer
/// would merge across the seam. Errors when a template rewrites earlier turns, so that answers cannot be told apart.
pub fn encode(record: &Record, tokenizer: &dyn Tokenize) -> Result<Encoded> {
    let mut out = Encoded::default();
    match record {
        Record::Text(text) => {
            out.push(tokenizer.begin().as_slice(), false);
            out.push(&tokenizer.encode(text)?, true);
            out.push(&[tokenizer.end()], true);
        }
        Record::Instruction { instruction, input, output } => {
            out.push(tokenizer.begin().as_slice(), false);
            out.push(&tokenizer.encode(&instruction_prompt(instruction, input))?, false);
            out.push(&tokenizer.encode(output)?, true);
            out.push(&[tokenizer.end()], true);
        }
        Record::Chat(turns) => encode_chat(turns, tokenizer, &mut out)?,
    }
    if let Some(id) = out.ids.iter().find(|id| **id >= 1 << 31) {
        return Err(TrainError::request(format!("token id {id} is above 2^31 - 1")));
    }
    Ok(out)
}

/// Renders the conversation up to before and after each answer; what is between is learned.
fn encode_chat(turns: &[Turn], tokenizer: &dyn Tokenize, out: &mut Encoded) -> Result<()> {
    let mut done = String::new();
    let mut ended = false;
    for (i, _) in turns.iter().enumerate().filter(|(_, t)| t.role == "assistant") {
        let no_template = || TrainError::request("a chat, but the model has no chat template");
        let before = tokenizer.chat(&turns[..i], true)?.ok_or_else(no_template)?;
        let after = tokenizer.chat(&turns[..=i], false)?.ok_or_else(no_template)?;
        let (Some(prompt), Some(answer)) = (before.strip_prefix(&done), after.strip_prefix(&before)) else {
            let message = format!(
                "the chat template renders message {} differently as part of a longer chat; its answers cannot be told \
                 from prompts",
                i + 1
            );
            return Err(TrainError::request(message));
        };
        out.push(&tokenizer.encode(prompt)?, false);
        let answer = tokenizer.encode(answer)?;
        ended = answer.contains(&tokenizer.end());
        out.push(&answer, true);
        done = after;
    }
    // Templates mostly end an answer with the token that ends texts; the document ends all the same where they do not.
    if !ended {
        out.push(&[tokenizer.end()], true);
    }
    Ok(())
}

/// The tokenizer of a model directory.
#[cfg(feature = "tokenizer")]
#[derive(Debug)]
pub struct ModelTokenizer<'a> {
    /// Ids and template.
    pub text: &'a occult_model::TextTokenizer,
    /// What begins every document.
    pub begin: Option<u32>,
    /// What ends every document.
    pub end: u32,
}

#[cfg(feature = "tokenizer")]
impl Tokenize for ModelTokenizer<'_> {
    fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.text.encode(text, false).map_err(|e| TrainError::model("encoding text", e))
    }

    fn begin(&self) -> Option<u32> {
        self.begin
    }

    fn end(&self) -> u32 {
        self.end
    }

    fn chat(&self, turns: &[Turn], prompt: bool) -> Result<Option<String>> {
        if !self.text.has_chat_template() {
            return Ok(None);
        }
        let message = |t: &Turn| occult_model::Message { role: t.role.clone(), content: t.content.clone() };
        let messages: Vec<_> = turns.iter().map(message).collect();
        let text = self.text.render_chat(&messages, prompt);
        text.map(Some).map_err(|e| TrainError::model("rendering a chat", e))
    }
}

//! Text to ids and back, and chat templates.

use std::path::{Path, PathBuf};

use minijinja::{Environment, ErrorKind, context};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokenizers::Tokenizer;

use crate::error::{ModelError, Result};
use crate::hf::{GenerationDefaults, read_json};
use crate::spec::ModelSpec;

/// The tokenizer of a model directory.
#[derive(Debug)]
pub struct TextTokenizer {
    file: PathBuf,
    tokenizer: Tokenizer,
    /// Jinja template and the texts of special tokens, where the model is made for chats.
    chat: Option<(String, Value)>,
}

/// One turn of a chat.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// "system", "user" or "assistant".
    pub role: String,
    /// What is said.
    pub content: String,
}

impl TextTokenizer {
    /// Reads `tokenizer.json` and, where it exists, the chat template. The tokenizer must fit the model: none of its ids
    /// outside the model's vocabulary, and a text for every id that ends a text.
    pub fn open(dir: &Path, spec: &ModelSpec) -> Result<Self> {
        let file = dir.join("tokenizer.json");
        if !file.is_file() {
            return Err(ModelError::bad(&file, "", "is missing; text needs a tokenizer"));
        }
        let tokenizer = Tokenizer::from_file(&file).map_err(|e| ModelError::bad(&file, "", e.to_string()))?;
        let vocab = tokenizer.get_vocab(true);
        if let Some((token, id)) =
            vocab.iter().filter(|(_, id)| **id as usize >= spec.vocab_size).max_by_key(|(_, id)| **id)
        {
            let message = format!("has id {id}, the model's vocabulary has {}", spec.vocab_size);
            return Err(ModelError::bad(&file, format!("token {token:?}"), message));
        }
        if let Some(id) =
            GenerationDefaults::read(dir)?.eos_ids.into_iter().find(|&id| tokenizer.id_to_token(id).is_none())
        {
            let message = format!("has no token for id {id}, which ends a text of this model");
            return Err(ModelError::bad(&file, "", message));
        }
        let chat = chat_template(dir)?;
        Ok(Self { file, tokenizer, chat })
    }

    /// The ids of a text. `special` adds what the tokenizer puts around every text (often a begin-of-text id).
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        let encoding = self.tokenizer.encode(text, special);
        let encoding = encoding.map_err(|e| ModelError::bad(&self.file, "encoding text", e.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of ids, special tokens left out.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.tokenizer
            .decode(ids, true)
            .map_err(|e| ModelError::bad(&self.file, "decoding ids", e.to_string()))
    }

    /// Turns ids into text one by one: each call gives the text that has become certain.
    pub fn stream(&self) -> impl FnMut(u32) -> Result<String> + '_ {
        let mut stream = self.tokenizer.decode_stream(true);
        move |id| match stream.step(id) {
            Ok(text) => Ok(text.unwrap_or_default()),
            Err(e) => Err(ModelError::bad(&self.file, "decoding ids", e.to_string())),
        }
    }

    /// Whether the directory has a chat template.
    pub fn has_chat_template(&self) -> bool {
        self.chat.is_some()
    }

    /// The prompt of a chat, by the model's own template, ready for the assistant's answer. Encode it without special
    /// tokens: the template writes them.
    pub fn chat(&self, messages: &[Message]) -> Result<String> {
        let Some((template, tokens)) = &self.chat else {
            return Err(ModelError::bad(&self.file, "", "the model directory has no chat template"));
        };
        let mut env = Environment::new();
        env.set_trim_blocks(true);
        env.set_lstrip_blocks(true);
        env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        env.add_function(
            "raise_exception",
            |message: String| -> std::result::Result<String, minijinja::Error> {
                Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
            },
        );
        let values = context! {
            messages => messages,
            add_generation_prompt => true,
            tools => (),
            documents => (),
            bos_token => &tokens["bos_token"],
            eos_token => &tokens["eos_token"],
        };
        let rendered = env.render_str(template, values);
        rendered.map_err(|e| ModelError::bad(&self.file, "chat template", format!("{e:#}")))
    }
}

/// The template of `chat_template.jinja` or `tokenizer_config.json`, with the special tokens' texts.
fn chat_template(dir: &Path) -> Result<Option<(String, Value)>> {
    let path = dir.join("tokenizer_config.json");
    let config: Value = if path.is_file() { read_json(&path)? } else { Value::Null };
    let token = |key: &str| match &config[key] {
        Value::Object(o) => o.get("content").cloned().unwrap_or_default(),
        other => other.clone(),
    };
    let tokens = serde_json::json!({ "bos_token": token("bos_token"), "eos_token": token("eos_token") });
    let own = dir.join("chat_template.jinja");
    if own.is_file() {
        let text = std::fs::read_to_string(&own).map_err(|e| ModelError::io("read", &own, e))?;
        return Ok(Some((text, tokens)));
    }
    let template = match &config["chat_template"] {
        Value::String(text) => Some(text.clone()),
        // Several named templates: the one for plain chats.
        Value::Array(list) => {
            let default = list.iter().find(|t| t["name"] == "default");
            default.and_then(|t| t["template"].as_str()).map(str::to_owned)
        }
        _ => None,
    };
    Ok(template.map(|t| (t, tokens)))
}

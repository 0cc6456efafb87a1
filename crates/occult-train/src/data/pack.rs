//! Documents become sequences of `length` inputs.
//!
//! A document of n tokens has n - 1 inputs (its last token is only a target). Documents are walked in the store's order and
//! fill sequences first to last; what does not fit is cut (text) or begins a new sequence (where an answer needs its prompt).
//! Each part of a sequence is a segment of its own: **positions restart at 0 and attention stays inside the segment**, so
//! a packed sequence gives the same loss as its parts alone. The tail is padding: segment [`PADDING`], target ignored.

use crate::data::store::TokenStore;
use crate::error::{Result, TrainError};

/// The segment of padding.
pub const PADDING: u32 = u32::MAX;

/// What to do with a document of more than `length` inputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LongDocument {
    /// Cut it; the parts are learned as texts of their own. Also fills the rest of a sequence with the beginning of the
    /// next document.
    Split,
    /// Keep the first `length` inputs.
    Truncate,
    /// As each document asks: answers with their prompt are kept whole or truncated, texts are split.
    ByDocument,
    /// Refuse it, with its number.
    Refuse,
}

/// How to pack.
#[derive(Debug, Clone)]
pub struct PackOptions {
    /// L, inputs of a sequence.
    pub length: usize,
    /// For documents that are longer.
    pub long: LongDocument,
    /// Share of the documents that is kept for validation.
    pub validation: f64,
    /// Whether the sequences are those of validation.
    pub validation_part: bool,
    /// Only this source's documents, where given.
    pub source: Option<u32>,
}

/// Inputs of one document in a sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// Its first input's place in the store.
    pub start: u64,
    /// Number of inputs; their targets are one token further.
    pub len: u32,
}

/// Where the tokens of each sequence lie.
#[derive(Debug, Clone)]
pub struct Packed {
    length: usize,
    parts: Vec<Part>,
    /// [sequences + 1] into `parts`.
    offsets: Vec<usize>,
    truncated: u64,
}

impl Packed {
    /// Packs the chosen documents of a store. Errors when there are none, or for a document that is refused.
    pub fn new(store: &TokenStore, options: &PackOptions) -> Result<Self> {
        let PackOptions { length, long, validation, validation_part, source } = *options;
        if length == 0 || length > u32::MAX as usize {
            return Err(TrainError::request(format!("sequence length is {length}, expected at least 1")));
        }
        if !(0.0..=1.0).contains(&validation) {
            return Err(TrainError::request(format!("validation share is {validation}, expected 0 to 1")));
        }
        let mut packed = Self { length, parts: vec![], offsets: vec![0], truncated: 0 };
        let mut room = length;
        for index in 0..store.num_documents() {
            let Some(document) = store.document(index) else { break };
            if document.is_validation(validation) != validation_part
                || source.is_some_and(|s| s != document.source)
            {
                continue;
            }
            let long = match long {
                LongDocument::ByDocument if document.prompted => LongDocument::Truncate,
                LongDocument::ByDocument => LongDocument::Split,
                same => same,
            };
            let (mut start, mut inputs) = (document.start, document.len.saturating_sub(1));
            if inputs > length as u64 {
                match long {
                    LongDocument::Split | LongDocument::ByDocument => {}
                    LongDocument::Truncate => {
                        inputs = length as u64;
                        packed.truncated += 1;
                    }
                    LongDocument::Refuse => {
                        let message = format!(
                            "document {} (source {}) has {inputs} inputs, the sequence length is {length}",
                            index + 1,
                            document.source
                        );
                        return Err(TrainError::request(message));
                    }
                }
            }
            if long != LongDocument::Split && inputs > room as u64 {
                packed.close(&mut room);
            }
            while inputs > 0 {
                let len = inputs.min(room as u64);
                packed.parts.push(Part { start, len: len as u32 });
                (start, inputs, room) = (start + len, inputs - len, room - len as usize);
                if room == 0 {
                    packed.close(&mut room);
                }
            }
        }
        if room < length {
            packed.close(&mut room);
        }
        if packed.num_sequences() == 0 {
            let part = if validation_part { "validation" } else { "training" };
            return Err(TrainError::request(format!("no document is left for {part}")));
        }
        Ok(packed)
    }

    fn close(&mut self, room: &mut usize) {
        self.offsets.push(self.parts.len());
        *room = self.length;
    }

    /// L.
    pub fn length(&self) -> usize {
        self.length
    }

    /// Number of sequences.
    pub fn num_sequences(&self) -> usize {
        self.offsets.len() - 1
    }

    /// Number of documents that lost their end.
    pub fn num_truncated(&self) -> u64 {
        self.truncated
    }

    /// Number of inputs in all sequences, padding not counted.
    pub fn num_inputs(&self) -> u64 {
        self.parts.iter().map(|p| u64::from(p.len)).sum()
    }

    /// The parts of a sequence; empty past the last.
    pub fn sequence(&self, index: usize) -> &[Part] {
        match (self.offsets.get(index), self.offsets.get(index + 1)) {
            (Some(&from), Some(&to)) => &self.parts[from..to],
            _ => &[],
        }
    }
}

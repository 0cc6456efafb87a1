//! A rectangle of token ids.

use crate::error::{ModelError, Result};

/// `B` sequences of `T` ids each, padded on the left where they are shorter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    ids: Vec<u32>,
    len: usize,
    padding: Vec<usize>,
}

impl Batch {
    /// Sequences of any length of at least one; shorter ones are padded on the left, with id 0.
    pub fn new<S: AsRef<[u32]>>(sequences: &[S]) -> Result<Self> {
        let len = sequences.iter().map(|s| s.as_ref().len()).max().unwrap_or(0);
        if sequences.iter().any(|s| s.as_ref().is_empty()) || len == 0 {
            return Err(ModelError::request("a sequence without tokens"));
        }
        let mut ids = Vec::with_capacity(len * sequences.len());
        let mut padding = Vec::with_capacity(sequences.len());
        for s in sequences {
            let s = s.as_ref();
            padding.push(len - s.len());
            ids.resize(ids.len() + len - s.len(), 0);
            ids.extend_from_slice(s);
        }
        Ok(Self { ids, len, padding })
    }

    /// One sequence.
    pub fn single(ids: &[u32]) -> Result<Self> {
        Self::new(&[ids])
    }

    /// `B`.
    pub fn batch_size(&self) -> usize {
        self.padding.len()
    }

    /// `T`.
    #[expect(clippy::len_without_is_empty, reason = "never empty")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// `[B, T]`.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// Padding positions of each sequence.
    pub fn padding(&self) -> &[usize] {
        &self.padding
    }
}

//! safetensors with `expert_ids` `[tokens, layers, top_k]` (or `[tokens, top_k]` for one layer), optional `weights` of the
//! same shape, `router_logits` `[tokens, layers, experts]`, `domains` `[tokens]`.
//!
//! Metadata: `num_experts`; optional `model`, `num_hidden_layers`, `layer_ids` and `domains` (names), the last two as JSON
//! lists.

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

use super::arrays::{About, TokenArrays};
use super::{ImportOptions, Sink, arrays};
use crate::array::ArrayStream;
use crate::error::{FormatError, Result};
use crate::io::read_exact_at;
use crate::tensors::TensorFile;

pub(crate) fn read(inputs: &[PathBuf], options: &ImportOptions, sink: &mut Sink<'_>) -> Result<()> {
    arrays::read(inputs, options, sink, &open, false)
}

fn open(path: &Path) -> Result<TokenArrays> {
    let file = TensorFile::open(path)?;
    let expert_ids = tensor(&file, "expert_ids")?.ok_or_else(|| {
        let names: Vec<&str> = file.tensors.keys().map(String::as_str).take(5).collect();
        FormatError::bad(path, "", format!("has no tensor expert_ids (it has {})", names.join(", ")))
    })?;
    Ok(TokenArrays {
        expert_ids,
        weights: tensor(&file, "weights")?,
        router_logits: tensor(&file, "router_logits")?,
        domains: tensor(&file, "domains")?,
        about: about(&file)?,
    })
}

fn about(file: &TensorFile) -> Result<About> {
    Ok(About {
        num_experts: metadata(file, "num_experts")?,
        layer_ids: metadata(file, "layer_ids")?,
        num_hidden_layers: metadata(file, "num_hidden_layers")?,
        model: file.metadata.get("model").cloned(),
        domain_names: metadata(file, "domains")?.unwrap_or_default(),
    })
}

/// A metadata value, which is a string, read as JSON.
fn metadata<T: DeserializeOwned>(file: &TensorFile, key: &str) -> Result<Option<T>> {
    let Some(text) = file.metadata.get(key) else {
        return Ok(None);
    };
    serde_json::from_str(text)
        .map(Some)
        .map_err(|e| FormatError::bad(&file.path, format!("metadata `{key}`"), format!("{text:?}: {e}")))
}

/// One tensor as a stream.
pub(crate) fn tensor(file: &TensorFile, name: &str) -> Result<Option<ArrayStream>> {
    let Some(span) = file.tensors.get(name) else {
        return Ok(None);
    };
    let handle = file.file.try_clone().map_err(|e| FormatError::io("open", &file.path, e))?;
    let section = Section { file: handle, offset: span.offset, left: span.bytes };
    Ok(Some(ArrayStream {
        file: file.path.clone(),
        name: name.to_owned(),
        dtype: span.dtype,
        shape: span.shape.clone(),
        big_endian: false,
        reader: Box::new(BufReader::with_capacity(1 << 16, section)),
        rows_read: 0,
    }))
}

/// Part of a file, read by position, so that several parts can be read side by side.
struct Section {
    file: File,
    offset: u64,
    left: u64,
}

impl Read for Section {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.left.min(buf.len() as u64) as usize;
        let Some(part) = buf.get_mut(..n) else {
            return Ok(0);
        };
        read_exact_at(&self.file, part, self.offset)?;
        self.offset += n as u64;
        self.left -= n as u64;
        Ok(n)
    }
}

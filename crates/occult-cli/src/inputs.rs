//! What models are fed: texts and token ids from files.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, bail};
use occult_model::TextTokenizer;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

/// Largest input file, which is read whole.
const MAX_BYTES: u64 = 1 << 30;

/// Tokens before a cut through a text that are not used.
const CUT_MARGIN: usize = 64;

fn read(path: &Path) -> Result<Vec<u8>> {
    let what = || format!("cannot read {}", path.display());
    let mut bytes = Vec::new();
    File::open(path).and_then(|file| file.take(MAX_BYTES + 1).read_to_end(&mut bytes)).with_context(what)?;
    if bytes.len() as u64 > MAX_BYTES {
        bail!("{}: has more than {MAX_BYTES} bytes", path.display());
    }
    Ok(bytes)
}

/// The ids of a text with the tokenizer's special tokens, at most `max` of them.
pub(crate) fn text(path: &Path, tokenizer: &TextTokenizer, max: Option<usize>) -> Result<Vec<u32>> {
    let text =
        String::from_utf8(read(path)?).with_context(|| format!("{}: is not UTF-8 text", path.display()))?;
    if text.is_empty() {
        bail!("{}: has no text", path.display());
    }
    let start = max.and_then(|max| beginning(&text, max));
    let mut ids = match start {
        Some(start) => tokenizer.encode(start, true)?,
        None => Vec::new(),
    };
    // Tokens near a cut may be others than in the whole text.
    if start.is_none() || max.is_some_and(|max| ids.len() < max.saturating_add(CUT_MARGIN)) {
        ids = tokenizer.encode(&text, true)?;
    }
    if ids.is_empty() {
        bail!("{}: has no tokens", path.display());
    }
    ids.truncate(max.unwrap_or(usize::MAX));
    Ok(ids)
}

/// The first part of a long text that has surely enough tokens in ordinary language.
fn beginning(text: &str, max: usize) -> Option<&str> {
    let bytes = max.checked_add(CUT_MARGIN)?.checked_mul(16)?;
    let end = (bytes..text.len()).take(4).find(|&i| text.is_char_boundary(i))?;
    text.get(..end)
}

/// Sequences of token ids: a JSON list of lists, or safetensors with `input_ids` `[batch, len]` and optionally
/// `attention_mask` of the same shape, which is 0 at the start of shorter sequences.
pub(crate) fn ids(path: &Path) -> Result<Vec<Vec<u32>>> {
    sequences(path, &read(path)?)
}

/// Prompts of token ids: one JSON list, or what [`ids`] reads.
pub(crate) fn prompts(path: &Path) -> Result<Vec<Vec<u32>>> {
    let bytes = read(path)?;
    match serde_json::from_slice::<Vec<u32>>(&bytes) {
        Ok(one) if !one.is_empty() => Ok(vec![one]),
        _ => sequences(path, &bytes),
    }
}

fn sequences(path: &Path, bytes: &[u8]) -> Result<Vec<Vec<u32>>> {
    let json = bytes.iter().find(|b| !b.is_ascii_whitespace()) == Some(&b'[');
    let sequences = if json {
        serde_json::from_slice(bytes).context("expected a JSON list of lists of token ids")
    } else {
        tensor_ids(bytes)
    };
    let sequences: Vec<Vec<u32>> = sequences.with_context(|| path.display().to_string())?;
    if sequences.is_empty() {
        bail!("{}: has no sequences", path.display());
    }
    if let Some(i) = sequences.iter().position(Vec::is_empty) {
        bail!("{}: sequence {i} has no tokens", path.display());
    }
    Ok(sequences)
}

fn tensor_ids(bytes: &[u8]) -> Result<Vec<Vec<u32>>> {
    let file =
        SafeTensors::deserialize(bytes).context("is neither a JSON list of lists nor a safetensors file")?;
    let tensor = file.tensor("input_ids").context("expected a tensor input_ids [batch, len]")?;
    let &[_, len] = tensor.shape() else {
        bail!("input_ids has shape {:?}, expected [batch, len]", tensor.shape());
    };
    if len == 0 {
        bail!("input_ids has shape {:?}: no tokens", tensor.shape());
    }
    let values = integers(&tensor, "input_ids")?;
    let mask = match file.tensor("attention_mask") {
        Ok(mask) if mask.shape() == tensor.shape() => Some(integers(&mask, "attention_mask")?),
        Ok(mask) => bail!("attention_mask has shape {:?}, input_ids {:?}", mask.shape(), tensor.shape()),
        Err(_) => None,
    };
    let mut sequences = Vec::new();
    for (i, row) in values.chunks_exact(len).enumerate() {
        let padding = match &mask {
            Some(mask) => {
                let row = &mask[i * len..(i + 1) * len];
                let padding = row.iter().take_while(|&&m| m == 0).count();
                if row[padding..].contains(&0) {
                    bail!(
                        "attention_mask of sequence {i} has a 0 after a 1: only padding at the start is supported"
                    );
                }
                padding
            }
            None => 0,
        };
        let id = |&v: &i64| u32::try_from(v).with_context(|| format!("sequence {i} has token id {v}"));
        sequences.push(row[padding..].iter().map(id).collect::<Result<_>>()?);
    }
    Ok(sequences)
}

fn integers(tensor: &TensorView<'_>, name: &str) -> Result<Vec<i64>> {
    fn each<const N: usize>(data: &[u8], value: impl Fn([u8; N]) -> i64) -> Vec<i64> {
        data.as_chunks::<N>().0.iter().map(|&c| value(c)).collect()
    }
    Ok(match tensor.dtype() {
        Dtype::I64 => each(tensor.data(), i64::from_le_bytes),
        Dtype::I32 => each(tensor.data(), |c| i32::from_le_bytes(c).into()),
        Dtype::U32 => each(tensor.data(), |c| u32::from_le_bytes(c).into()),
        Dtype::U16 => each(tensor.data(), |c| u16::from_le_bytes(c).into()),
        Dtype::U8 | Dtype::BOOL => each(tensor.data(), |[b]: [u8; 1]| b.into()),
        other => bail!("{name} has dtype {other:?}, expected I64, I32, U32, U16, U8 or BOOL"),
    })
}

//! SGLang over HTTP: responses to requests with `return_routed_experts`, as JSON.
//!
//! `meta_info.routed_experts` is base64 of little-endian int32 `[tokens, layers, top_k]`. Layers are the model's hidden
//! layers; what a dense layer holds is zeros. The response says neither the number of layers nor top_k nor the number of
//! experts, so all three are options. A file is one response, a list of them, or one per line; it is read as a stream.

use std::fmt;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::{DeserializeSeed, MapAccess, SeqAccess, Visitor, value::MapAccessDeserializer};

use super::{At, ImportOptions, Layout, RowBlock, Sink};
use crate::error::{FormatError, Result};
use crate::{MAX_LAYERS, io};

/// Reads responses; several files are concatenated.
pub(crate) fn read(inputs: &[PathBuf], options: &ImportOptions, sink: &mut Sink<'_>) -> Result<()> {
    let first = inputs.first().map_or(Path::new(""), PathBuf::as_path);
    let hidden = options.num_hidden_layers.map(|n| n as usize);
    let layers = hidden.or(options.layer_ids.as_ref().map(Vec::len));
    let (Some(layers), Some(top_k), Some(num_experts)) = (layers, options.top_k, options.num_experts) else {
        let missing: Vec<&str> = [
            ("the number of hidden layers", layers.is_none()),
            ("top_k", options.top_k.is_none()),
            ("the number of experts", options.num_experts.is_none()),
        ]
        .iter()
        .filter_map(|&(name, missing)| missing.then_some(name))
        .collect();
        let message = format!(
            "routed_experts over HTTP does not say its shape [tokens, layers, top_k]: give {}",
            missing.join(", ")
        );
        return Err(FormatError::bad(first, "", message));
    };
    if layers == 0 || layers > MAX_LAYERS || top_k == 0 || top_k > num_experts {
        let message =
            format!("{layers} layers, top {top_k} of {num_experts} experts is not the shape of a model");
        return Err(FormatError::bad(first, "", message));
    }

    // First pass: sizes, and which layers have anything but zeros.
    let mut used = vec![false; layers];
    let (mut tokens, mut silent) = (0_u64, 0_u64);
    let total: u64 = inputs.iter().filter_map(|p| std::fs::metadata(p).ok()).map(|m| m.len()).sum();
    let mut done = 0;
    for path in inputs {
        each_response(path, &mut |number, response| {
            let mut found = false;
            response.each(&mut |text| {
                found = true;
                let ids = ids(path, number, text, layers * top_k)?;
                tokens += (ids.len() / (layers * top_k)) as u64;
                for (i, row) in ids.chunks_exact(top_k).enumerate() {
                    if let Some(used) = used.get_mut(i % layers) {
                        *used |= row.iter().any(|&id| id != 0);
                    }
                }
                Ok(())
            })?;
            silent += u64::from(!found);
            Ok(())
        })?;
        done += std::fs::metadata(path).map_or(0, |m| m.len());
        sink.progress(done / 2, total);
    }
    if tokens == 0 {
        return Err(FormatError::bad(first, "", "no response holds `routed_experts`"));
    }
    let ids_of_layers = moe_layers(first, options, hidden, &used, top_k)?;
    sink.begin(Layout {
        num_experts,
        top_k: Some(top_k),
        layer_ids: ids_of_layers.iter().map(|&(_, id)| id).collect(),
        ..Layout::default()
    })?;

    // Second pass: the rows.
    let mut next = 0;
    for path in inputs {
        let mut first_row = 0;
        each_response(path, &mut |number, response| {
            response.each(&mut |text| {
                let ids = ids(path, number, text, layers * top_k)?;
                let rows = ids.len() / (layers * top_k);
                let mut out = Vec::with_capacity(rows * top_k);
                for (layer, &(column, _)) in ids_of_layers.iter().enumerate() {
                    out.clear();
                    for (t, token) in ids.chunks_exact(layers * top_k).enumerate() {
                        let chosen = token.get(column * top_k..(column + 1) * top_k).unwrap_or_default();
                        for &id in chosen {
                            out.push(u16::try_from(id).map_err(|_| {
                                let source = occult_plan::PlanError::ExpertOutOfRange {
                                    row: t,
                                    id: i64::from(id),
                                    num_experts,
                                };
                                FormatError::plan(path, layer, first_row, source)
                            })?);
                        }
                    }
                    let at = At { file: path, layer, first_row };
                    sink.append(at, RowBlock { expert_ids: &out, ..RowBlock::default() })?;
                }
                first_row += rows;
                Ok(())
            })
        })?;
        next += std::fs::metadata(path).map_or(0, |m| m.len());
        sink.progress((done + next) / 2, total);
    }
    let dense = layers - ids_of_layers.len();
    if dense > 0 {
        sink.note(format!("{dense} of {layers} layers hold zeros only and were left out (dense layers)"));
    }
    if silent > 0 {
        sink.warn(format!("{silent} responses have no `routed_experts` and were left out"));
    }
    Ok(())
}

/// Columns that are MoE layers, with the model's number of each.
fn moe_layers(
    file: &Path,
    options: &ImportOptions,
    hidden: Option<usize>,
    used: &[bool],
    top_k: usize,
) -> Result<Vec<(usize, u32)>> {
    Ok(match (&options.layer_ids, hidden) {
        (Some(ids), Some(hidden)) => {
            if let Some(id) = ids.iter().find(|&&id| id as usize >= hidden) {
                let message = format!("there is no layer {id}, the model has {hidden}");
                return Err(FormatError::bad(file, "", message));
            }
            ids.iter().map(|&id| (id as usize, id)).collect()
        }
        (Some(ids), None) => ids.iter().copied().enumerate().collect(),
        // With top_k 1 zeros may be a choice; with more, two zeros in a row cannot.
        (None, _) => {
            (0_u32..).zip(used).filter(|&(_, &u)| u || top_k == 1).map(|(id, _)| (id as usize, id)).collect()
        }
    })
}

fn ids(path: &Path, number: usize, text: &str, row: usize) -> Result<Vec<i32>> {
    let bad = |message: String| FormatError::bad(path, format!("response {number}"), message);
    let bytes = base64(text).ok_or_else(|| bad("`routed_experts` is not base64".into()))?;
    if !bytes.len().is_multiple_of(4 * row) {
        return Err(bad(format!(
            "`routed_experts` has {} bytes, expected a multiple of {} (4 x layers x top_k)",
            bytes.len(),
            4 * row
        )));
    }
    Ok(bytes.as_chunks::<4>().0.iter().map(|b| i32::from_le_bytes(*b)).collect())
}

/// The parts of a response that matter; the rest is skipped.
#[derive(Deserialize, Default)]
struct Response {
    #[serde(default)]
    routed_experts: Option<String>,
    #[serde(default)]
    meta_info: Option<Holder>,
    #[serde(default)]
    sglext: Option<Holder>,
    #[serde(default)]
    choices: Option<Vec<Choice>>,
}

#[derive(Deserialize, Default)]
struct Choice {
    #[serde(default)]
    meta_info: Option<Holder>,
    #[serde(default)]
    sglext: Option<Holder>,
}

#[derive(Deserialize, Default)]
struct Holder {
    #[serde(default)]
    routed_experts: Option<String>,
}

impl Response {
    /// All texts of one response: one, or one for each choice.
    fn each(&self, f: &mut dyn FnMut(&str) -> Result<()>) -> Result<()> {
        let choices = self.choices.iter().flatten().flat_map(|c| [&c.meta_info, &c.sglext]);
        let holders = [&self.meta_info, &self.sglext].into_iter().chain(choices).flatten();
        let texts = holders.map(|h| &h.routed_experts).chain([&self.routed_experts]);
        texts.flatten().try_for_each(|text| f(text))
    }
}

type OnResponse<'f> = &'f mut dyn FnMut(usize, Response) -> Result<()>;

/// Calls `f` for every response of a file, in order, holding one at a time.
fn each_response(path: &Path, f: OnResponse<'_>) -> Result<()> {
    let (file, _) = io::open(path)?;
    let mut json =
        serde_json::Deserializer::from_reader(BufReader::with_capacity(1 << 16, file.take(u64::MAX)));
    let mut each = Each { f, number: 0, error: None };
    while json.end().is_err() {
        let result = (&mut each).deserialize(&mut json);
        if let Some(error) = each.error.take() {
            return Err(error);
        }
        result.map_err(|e| FormatError::bad(path, "", format!("broken JSON: {e}")))?;
    }
    Ok(())
}

struct Each<'f> {
    f: OnResponse<'f>,
    number: usize,
    /// An error of `f`, which serde's error type cannot carry.
    error: Option<FormatError>,
}

impl Each<'_> {
    fn call<E: serde::de::Error>(&mut self, response: Response) -> std::result::Result<(), E> {
        self.number += 1;
        (self.f)(self.number - 1, response).map_err(|e| {
            let message = E::custom(&e);
            self.error = Some(e);
            message
        })
    }
}

impl<'de> DeserializeSeed<'de> for &mut Each<'_> {
    type Value = ();
    fn deserialize<D: serde::Deserializer<'de>>(self, d: D) -> std::result::Result<(), D::Error> {
        d.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for &mut Each<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a response or a list of responses")
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> std::result::Result<(), A::Error> {
        let response = Response::deserialize(MapAccessDeserializer::new(map))?;
        self.call(response)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> std::result::Result<(), A::Error> {
        while let Some(response) = seq.next_element()? {
            self.call(response)?;
        }
        Ok(())
    }
}

/// Standard base64 with or without padding.
fn base64(text: &str) -> Option<Vec<u8>> {
    let text = text.trim_end_matches('=').as_bytes();
    let mut out = Vec::with_capacity(text.len() / 4 * 3 + 3);
    for group in text.chunks(4) {
        let mut bits = 0_u32;
        for &c in group {
            let digit = match c {
                b'A'..=b'Z' => c - b'A',
                b'a'..=b'z' => c - b'a' + 26,
                b'0'..=b'9' => c - b'0' + 52,
                b'+' => 62,
                b'/' => 63,
                _ => return None,
            };
            bits = (bits << 6) | u32::from(digit);
        }
        let [_, a, b, c] = (bits << (6 * (4 - group.len()))).to_be_bytes();
        let n = match group.len() {
            1 => return None,
            n => n - 1,
        };
        out.extend([a, b, c].into_iter().take(n));
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_of_the_rfc() {
        for (text, bytes) in [
            ("", ""),
            ("Zg==", "f"),
            ("Zm8=", "fo"),
            ("Zm9v", "foo"),
            ("Zm9vYg==", "foob"),
            ("Zm9vYmE", "fooba"),
        ] {
            assert_eq!(base64(text).unwrap(), bytes.as_bytes());
        }
        assert_eq!(base64("//79"), Some(vec![0xff, 0xfe, 0xfd]));
        assert_eq!(base64("Z"), None);
        assert_eq!(base64("Zm9*"), None);
    }
}

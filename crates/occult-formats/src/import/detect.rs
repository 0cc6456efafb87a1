//! Finds out what a file is from what is in it. Names count only where contents have no signature (`routes_u8.bin`, files
//! in a folder).

use std::io::Read;
use std::path::Path;

use super::{
    ImportFormat, count_csv, gpt_oss_trace, mbolt, megatron_counts, megatron_trace, set_csv, tensorrt_llm,
};
use crate::error::{FormatError, Result};
use crate::npy::{self, Npz};
use crate::tensors::{TensorFile, looks_like_safetensors};

/// Bytes of a file that are looked at.
const PREFIX: u64 = 64 << 10;
/// The number that starts a `torch.save` of the days before zip, as its pickle holds it.
const OLD_TORCH: &[u8] = &[0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19];

/// The format of a file or folder, by content; `None` if it is none that is known. An error if the file cannot be read, or
/// is a broken file of a container that is recognised.
pub fn detect(path: &Path) -> Result<Option<ImportFormat>> {
    if path.is_dir() {
        return detect_folder(path);
    }
    let (prefix, len) = crate::io::read_prefix(path, PREFIX)?;
    if len == 0 {
        return Err(FormatError::bad(path, "", "is empty"));
    }
    if crate::io::file_name(path) == gpt_oss_trace::ROUTES {
        return Ok(Some(ImportFormat::GptOssTrace));
    }
    if prefix.starts_with(b"PK\x03\x04") {
        let members = Npz::open(path)?.members();
        return Ok(if members.iter().any(|m| m.ends_with("data.pkl")) {
            Some(ImportFormat::SglangRecorder)
        } else {
            members.iter().any(|m| m.ends_with(".npy")).then_some(ImportFormat::Npz)
        });
    }
    if prefix.starts_with(npy::MAGIC) {
        // Loads are a table [layers, experts]; routed experts have tokens as well.
        let rank = npy::open_npy(path)?.shape.len();
        return Ok(Some(if rank == 2 { ImportFormat::EplbLoad } else { ImportFormat::VllmRouted }));
    }
    if prefix.starts_with(mbolt::MAGIC) {
        return Ok(Some(ImportFormat::Mbolt));
    }
    if looks_like_safetensors(&prefix, len) {
        return detect_safetensors(path);
    }
    if let Some([0x80, version]) = prefix.first_chunk::<2>()
        && (1..=5).contains(version)
    {
        let torch = prefix.get(..64).unwrap_or(&prefix).windows(OLD_TORCH.len()).any(|w| w == OLD_TORCH);
        return Ok(Some(if torch { ImportFormat::SglangRecorder } else { ImportFormat::C2rPickle }));
    }
    match prefix.trim_ascii_start().first() {
        Some(b'{' | b'[') => detect_json(path, prefix.trim_ascii_start()),
        _ => Ok(detect_text(&prefix)),
    }
}

fn detect_folder(path: &Path) -> Result<Option<ImportFormat>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(path).map_err(|e| FormatError::io("list", path, e))? {
        let entry = entry.map_err(|e| FormatError::io("list", path, e))?;
        names.push(entry.file_name().to_string_lossy().into_owned());
    }
    let any = |wanted: &dyn Fn(&str) -> bool| names.iter().any(|n| wanted(n));
    Ok(if any(&|n| n == gpt_oss_trace::ROUTES) {
        Some(ImportFormat::GptOssTrace)
    } else if any(&megatron_trace::is_trace_name) {
        Some(ImportFormat::MegatronTrace)
    } else if any(&|n| n == "meta_info.json") {
        Some(ImportFormat::TensorrtLlm)
    } else if any(&megatron_counts::is_log_name) {
        Some(ImportFormat::MegatronCounts)
    } else {
        any(&|n| n.starts_with("expert_distribution_recorder") && n.ends_with(".pt"))
            .then_some(ImportFormat::SglangRecorder)
    })
}

fn detect_safetensors(path: &Path) -> Result<Option<ImportFormat>> {
    let file = TensorFile::open(path)?;
    if file.metadata.get("format").is_some_and(|f| f == crate::profile::FORMAT) {
        return Err(FormatError::bad(path, "", "is a routing profile already, there is nothing to import"));
    }
    let is_key = |name: &String| tensorrt_llm::parse_key(name).is_some();
    Ok(if file.tensors.contains_key("expert_ids") {
        Some(ImportFormat::Safetensors)
    } else if !file.tensors.is_empty() && file.tensors.keys().all(is_key) {
        Some(ImportFormat::TensorrtLlm)
    } else {
        file.tensors.values().any(|t| matches!(t.shape.len(), 2 | 3)).then_some(ImportFormat::EplbLoad)
    })
}

/// What the first keys and the first brackets of a JSON text say.
fn detect_json(path: &Path, text: &[u8]) -> Result<Option<ImportFormat>> {
    let (keys, brackets) = skeleton(text);
    let first_line = text.split(|&b| b == b'\n').next().unwrap_or_default();
    let has = |line: &[u8], key: &str| {
        let quoted = format!("\"{key}\"");
        line.windows(quoted.len()).any(|w| w == quoted.as_bytes())
    };
    let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
    if has(first_line, "layer") && has(first_line, "top_indices") {
        return Ok(Some(ImportFormat::MegatronTrace));
    }
    if has(first_line, "layer") && has(first_line, "tpe") {
        return Ok(Some(ImportFormat::MegatronCounts));
    }
    if has(text, "routed_experts") || contains(path, b"\"routed_experts\"")? {
        return Ok(Some(ImportFormat::SglangHttp));
    }
    Ok(match (&keys[..], brackets) {
        ([], 2 | 3) => Some(ImportFormat::EplbLoad),
        (["logical_count" | "load" | "loads" | "weight" | "counts"], _) => Some(ImportFormat::EplbLoad),
        (["rank" | "layers" | "experts"], 0 | 3) => Some(ImportFormat::C2rJson),
        ([_], 3) => Some(ImportFormat::C2rJson),
        ([_, _, _], 1) => Some(ImportFormat::ExpertCountsJson),
        _ => None,
    })
}

/// The keys on the way to the first value that is no object, and the brackets it opens with.
fn skeleton(text: &[u8]) -> (Vec<String>, usize) {
    let (mut keys, mut brackets) = (Vec::new(), 0);
    let mut i = 0;
    while let Some(&byte) = text.get(i) {
        match byte {
            b'{' if brackets == 0 => {}
            b'[' => brackets += 1,
            b'"' if brackets == 0 => {
                let start = i + 1;
                let rest = text.get(start..).unwrap_or_default();
                let Some(end) = rest.iter().position(|&b| b == b'"') else {
                    break;
                };
                keys.push(String::from_utf8_lossy(&rest[..end]).into_owned());
                i = start + end;
            }
            b':' | b' ' | b'\n' | b'\r' | b'\t' => {}
            _ => break,
        }
        i += 1;
    }
    (keys, brackets)
}

/// Whether a file contains a text; reads it in blocks.
fn contains(path: &Path, text: &[u8]) -> Result<bool> {
    let (mut file, _) = crate::io::open(path)?;
    let mut block = vec![0; 1 << 20];
    let mut kept = 0;
    loop {
        let rest = block.get_mut(kept..).unwrap_or_default();
        let n = file.read(rest).map_err(|e| FormatError::io("read", path, e))?;
        let filled = kept + n;
        if block[..filled].windows(text.len()).any(|w| w == text) {
            return Ok(true);
        }
        if n == 0 {
            return Ok(false);
        }
        // The end of this block may be the start of the text.
        kept = filled.min(text.len() - 1);
        block.copy_within(filled - kept..filled, 0);
    }
}

fn detect_text(prefix: &[u8]) -> Option<ImportFormat> {
    let mut lines = prefix.split(|&b| b == b'\n').map(<[u8]>::trim_ascii);
    let first = lines.find(|line| !line.is_empty() && !line.starts_with(b"#"))?;
    let text = std::str::from_utf8(first).ok()?;
    if text == count_csv::HEADER {
        return Some(ImportFormat::SglangCsv);
    }
    match set_csv::top_k_of(text) {
        Some(2) => return Some(ImportFormat::MixtralTrace),
        Some(_) => return Some(ImportFormat::OlmoeTrace),
        None => {}
    }
    let mut fields = text.split([',', ';', ' ', '\t']).filter(|f| !f.is_empty()).peekable();
    fields.peek()?;
    fields.all(|f| f.parse::<f64>().is_ok()).then_some(ImportFormat::EplbLoad)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn skeletons() {
        let of = |t: &str| skeleton(t.as_bytes());
        assert_eq!(of("{\"a\": {\"b\": {\"0\": [1, 2]}}}"), (vec!["a".into(), "b".into(), "0".into()], 1));
        assert_eq!(of("[[1,2],[3]]"), (vec![], 2));
        assert_eq!(of("{\"layers\":24,\"rank\":[]}"), (vec!["layers".into()], 0));
        assert_eq!(of("{\"broken"), (vec![], 0));
    }
}

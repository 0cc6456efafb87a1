//! mbolt's stream of routing records: little-endian 32-bit integers, header `MBLT`, version 1, number of experts; then
//! records of layer, k, n_tokens and the ids `[n_tokens, k]`. Read twice: for the layers, then for the rows.

use std::collections::BTreeSet;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use super::{At, ImportOptions, Layout, RowBlock, Sink};
use crate::array::{DType, ints_from_bytes, to_expert_ids};
use crate::error::{FormatError, Result};
use crate::{MAX_EXPERTS, MAX_LAYERS};

/// First bytes: 0x544C424D, little-endian.
pub(super) const MAGIC: &[u8] = b"MBLT";
const BLOCK_BYTES: u64 = 1 << 20;

struct Stream<'a> {
    path: &'a Path,
    reader: BufReader<std::fs::File>,
    position: u64,
    len: u64,
}

/// One record's head; its ids follow.
struct Head {
    layer: u32,
    top_k: usize,
    tokens: usize,
}

impl<'a> Stream<'a> {
    /// Opens a file; returns the number of experts too.
    fn open(path: &'a Path) -> Result<(Self, usize)> {
        let (file, len) = crate::io::open(path)?;
        let mut stream = Stream { path, reader: BufReader::with_capacity(1 << 18, file), position: 0, len };
        let header = stream.take(12)?;
        let mut words = Vec::new();
        ints_from_bytes(DType::I32, &header, &mut words);
        match words[..] {
            [_, 1, experts] if header.starts_with(MAGIC) && (1..=MAX_EXPERTS as i64).contains(&experts) => {
                Ok((stream, experts as usize))
            }
            _ => {
                Err(stream.bad(0, format!("header {words:?} is not that of mbolt version 1 and its experts")))
            }
        }
    }

    fn bad(&self, at: u64, message: String) -> FormatError {
        FormatError::bad(self.path, format!("byte {at}"), message)
    }

    /// The next bytes; the caller bounds their number.
    fn take(&mut self, n: u64) -> Result<Vec<u8>> {
        if n > self.len - self.position {
            let left = self.len - self.position;
            return Err(self.bad(self.position, format!("is truncated: {n} bytes expected, {left} left")));
        }
        let mut buf = vec![0; n as usize];
        self.reader.read_exact(&mut buf).map_err(|e| FormatError::io("read", self.path, e))?;
        self.position += n;
        Ok(buf)
    }

    fn next_head(&mut self) -> Result<Option<Head>> {
        if self.position == self.len {
            return Ok(None);
        }
        let at = self.position;
        let mut words = Vec::new();
        ints_from_bytes(DType::I32, &self.take(12)?, &mut words);
        match words[..] {
            [layer, k, n] if layer >= 0 && (1..=MAX_EXPERTS as i64).contains(&k) && n >= 0 => {
                let bytes = 4 * k as u64 * n as u64;
                if bytes > self.len - self.position {
                    return Err(
                        self.bad(at, format!("says {n} tokens x {k}, which is more than the file holds"))
                    );
                }
                Ok(Some(Head { layer: layer as u32, top_k: k as usize, tokens: n as usize }))
            }
            _ => Err(self.bad(at, format!("record {words:?}, expected layer, k, n_tokens"))),
        }
    }

    fn skip(&mut self, n: u64) -> Result<()> {
        self.reader.seek_relative(n as i64).map_err(|e| FormatError::io("read", self.path, e))?;
        self.position += n;
        Ok(())
    }
}

pub(crate) fn read(inputs: &[PathBuf], _: &ImportOptions, sink: &mut Sink<'_>) -> Result<()> {
    let (mut experts, mut top_k, mut layers) = (None, None, BTreeSet::new());
    let mut total = 0;
    for path in inputs {
        let (mut stream, e) = Stream::open(path)?;
        total += stream.len;
        while let Some(head) = stream.next_head()? {
            let at = stream.position;
            if *top_k.get_or_insert(head.top_k) != head.top_k || *experts.get_or_insert(e) != e {
                let message = format!("top {} of {e}, it was another before", head.top_k);
                return Err(stream.bad(at, message));
            }
            layers.insert(head.layer);
            if layers.len() > MAX_LAYERS {
                return Err(stream.bad(at, format!("there are more than {MAX_LAYERS} layers")));
            }
            stream.skip(4 * (head.top_k * head.tokens) as u64)?;
        }
    }
    let (Some(num_experts), Some(top_k)) = (experts, top_k) else {
        let first = inputs.first().map(PathBuf::as_path).unwrap_or(Path::new(""));
        return Err(FormatError::bad(first, "", "holds no records"));
    };
    let layer_ids: Vec<u32> = layers.into_iter().collect();
    sink.begin(Layout {
        num_experts,
        top_k: Some(top_k),
        layer_ids: layer_ids.clone(),
        ..Layout::default()
    })?;
    let mut before = 0;
    for path in inputs {
        let (mut stream, _) = Stream::open(path)?;
        let mut rows = vec![0_usize; layer_ids.len()];
        while let Some(head) = stream.next_head()? {
            let layer = layer_ids.binary_search(&head.layer).ok();
            let Some((layer, first_row)) = layer.and_then(|l| Some((l, rows.get_mut(l)?))) else {
                return Err(stream.bad(stream.position, "the file changed while it was read".to_owned()));
            };
            append(&mut stream, &head, num_experts, (layer, first_row), sink)?;
            sink.progress(before + stream.position, total);
        }
        before += stream.len;
    }
    Ok(())
}

fn append(
    stream: &mut Stream<'_>,
    head: &Head,
    num_experts: usize,
    (layer, first_row): (usize, &mut usize),
    sink: &mut Sink<'_>,
) -> Result<()> {
    let row_bytes = 4 * head.top_k as u64;
    let (mut raw, mut ids) = (Vec::new(), Vec::new());
    let mut left = head.tokens as u64;
    while left > 0 {
        let n = left.min((BLOCK_BYTES / row_bytes).max(1));
        raw.clear();
        ints_from_bytes(DType::I32, &stream.take(n * row_bytes)?, &mut raw);
        let at = At { file: stream.path, layer, first_row: *first_row };
        to_expert_ids(raw.iter().copied(), head.top_k, num_experts, (at.file, layer, *first_row), &mut ids)?;
        sink.append(at, RowBlock { expert_ids: &ids, ..RowBlock::default() })?;
        *first_row += n as usize;
        left -= n;
    }
    Ok(())
}

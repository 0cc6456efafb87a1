//! SGLang's expert distribution recorder: `expert_distribution_recorder_*.pt`, written with `torch.save`.
//!
//! Three kinds of dump (`--expert-distribution-recorder-mode`):
//! - `stat`, `stat_approx`: `logical_count` `[buffer, L, E]`, all ranks summed. Counts only.
//! - `per_pass`: one record per forward pass and rank with `global_physical_count` `[L, R]`. Counts only.
//! - `per_token`: records that also hold `topk_ids_of_layer` `[L, T, 8]`, filled up with -1.
//!
//! `L` counts the model's hidden layers; dense ones have no tokens. Ids and counts of the last two kinds are those of
//! *physical* experts (slots `0..R`): they are mapped back to logical experts before anything else is looked at.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::{At, ImportOptions, Layout, RowBlock, Sink, lines};
use crate::error::{FormatError, Result};
use crate::pickle::{Item, Pickle, Tensor, TorchFile};
use crate::{MAX_EXPERTS, MAX_LAYERS};

type Torch = TorchFile<std::io::BufReader<std::fs::File>>;

/// Reads dumps of one kind; the files of several ranks are concatenated (per_token) or summed.
pub(crate) fn read(inputs: &[PathBuf], _options: &ImportOptions, sink: &mut Sink<'_>) -> Result<()> {
    let dump = |name: &str| name.starts_with("expert_distribution_recorder") && name.ends_with(".pt");
    let inputs = &lines::expand(inputs, &dump, "expert_distribution_recorder_*.pt")?;
    let mut kind = None;
    for path in inputs {
        let (_, found) = open(path)?;
        match kind {
            None => kind = Some(found),
            Some(first) if first == found => {}
            Some(first) => {
                let other = inputs.first().map_or(Path::new(""), PathBuf::as_path).display();
                let message =
                    format!("is a {found:?} dump, {other} is a {first:?} dump: import them one by one");
                return Err(FormatError::bad(path, "", message));
            }
        }
    }
    match kind {
        Some(Kind::PerToken) => read_tokens(inputs, sink),
        Some(kind) => read_counts(kind, inputs, sink),
        None => Err(FormatError::Request("there is nothing to import".to_owned())),
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Stat,
    PerPass,
    PerToken,
}

fn open(path: &Path) -> Result<(Torch, Kind)> {
    let file = TorchFile::open(path).map_err(|message| FormatError::bad(path, "", message))?;
    let pickle = file.pickle();
    let root = pickle.root();
    let kind = if root.get("logical_count").is_some() {
        Kind::Stat
    } else {
        let Some(mut records) = root.get("records").and_then(Item::items) else {
            let message = "is not a dump of SGLang's recorder: expected `logical_count` or `records`";
            return Err(FormatError::bad(path, "", message));
        };
        match records.next() {
            None => return Err(FormatError::bad(path, "records", "there are none: nothing was recorded")),
            Some(first) if first.get("topk_ids_of_layer").is_some() => Kind::PerToken,
            Some(_) => Kind::PerPass,
        }
    };
    Ok((file, kind))
}

/// The tensor called `key`, with the number of dimensions it must have.
fn tensor<'a>(path: &Path, place: &str, owner: Item<'a>, key: &str, dims: usize) -> Result<&'a Tensor> {
    let bad = |message: String| FormatError::bad(path, place, message);
    let item = owner.get(key).ok_or_else(|| bad(format!("`{key}` is missing")))?;
    let tensor =
        item.tensor().ok_or_else(|| bad(format!("`{key}` is {}, expected a tensor", item.kind())))?;
    if tensor.shape().len() != dims || !tensor.element().is_integer() {
        let (shape, element) = (tensor.shape(), tensor.element().name());
        return Err(bad(format!(
            "`{key}` has shape {shape:?} and type {element}, expected {dims} dimensions of integers"
        )));
    }
    if tensor.shape().iter().product::<usize>() == 0 && dims != 3 {
        return Err(bad(format!("`{key}` is empty")));
    }
    Ok(tensor)
}

/// `last_physical_to_logical_map`: logical id of every slot of every layer.
struct SlotMap {
    layers: usize,
    slots: usize,
    num_experts: usize,
    logical: Vec<u16>,
}

impl SlotMap {
    fn read(path: &Path, file: &mut Torch, pickle: &Pickle) -> Result<Self> {
        const KEY: &str = "last_physical_to_logical_map";
        let map = tensor(path, "", pickle.root(), KEY, 2)?;
        let (layers, slots) = (map.shape()[0], map.shape()[1]);
        let bad = |message: String| FormatError::bad(path, KEY, message);
        if layers > MAX_LAYERS || slots > usize::from(u16::MAX) {
            return Err(bad(format!("shape {:?} is too large", map.shape())));
        }
        let values = file.read_i64(map).map_err(bad)?;
        let mut logical = Vec::with_capacity(values.len());
        for (i, &v) in values.iter().enumerate() {
            let id = u16::try_from(v).ok().filter(|&id| usize::from(id) < MAX_EXPERTS);
            let id = id.ok_or_else(|| {
                bad(format!("layer {}, slot {}: {v} is not an expert id", i / slots, i % slots))
            })?;
            logical.push(id);
        }
        let num_experts = logical.iter().max().map_or(0, |&m| usize::from(m) + 1);
        Ok(Self { layers, slots, num_experts, logical })
    }

    fn logical(&self, layer: usize, slot: i64) -> Option<u16> {
        let slot = usize::try_from(slot).ok().filter(|&s| s < self.slots)?;
        self.logical.get(layer * self.slots + slot).copied()
    }

    fn is_identity(&self) -> bool {
        self.logical.iter().enumerate().all(|(i, &l)| i % self.slots == usize::from(l))
    }

    /// All files must be of one model.
    fn agree(&self, path: &Path, first: &mut Option<(usize, usize)>) -> Result<()> {
        let own = (self.layers, self.num_experts);
        let (layers, experts) = *first.get_or_insert(own);
        if own != (layers, experts) {
            let message = format!(
                "has {} layers of {} experts, the first file has {layers} of {experts}",
                own.0, own.1
            );
            return Err(FormatError::bad(path, "", message));
        }
        Ok(())
    }
}

fn note_mapping(map: &SlotMap, sink: &mut Sink<'_>) {
    if map.is_identity() {
        sink.note("physical expert ids are the logical ones (identity map)");
    } else {
        sink.note(
            "physical expert ids were mapped back to logical ones with last_physical_to_logical_map; if the engine \
             rebalanced while it recorded, records from before have another map",
        );
    }
}

fn records<'a>(pickle: &'a Pickle) -> impl Iterator<Item = (String, Item<'a>)> {
    pickle
        .root()
        .get("records")
        .and_then(Item::items)
        .into_iter()
        .flatten()
        .enumerate()
        .map(|(i, r)| (format!("record {i}"), r))
}

/// Finds records that two ranks share: without data-parallel attention every rank records the same tokens.
#[derive(Default)]
struct Repeats {
    seen: BTreeSet<(i64, u64)>,
    of_this_file: Vec<(i64, u64)>,
    repeated: u64,
}

impl Repeats {
    fn add(&mut self, record: Item<'_>, values: &[i64]) {
        let pass = record.get("forward_pass_id").and_then(Item::as_i64).unwrap_or(-1);
        // FNV-1a: only to find equal records, nothing depends on its quality.
        let hash = values
            .iter()
            .fold(0xcbf2_9ce4_8422_2325_u64, |h, &v| (h ^ v as u64).wrapping_mul(0x100_0000_01b3));
        self.repeated += u64::from(self.seen.contains(&(pass, hash)));
        self.of_this_file.push((pass, hash));
    }

    fn end_of_file(&mut self) {
        self.seen.extend(self.of_this_file.drain(..));
    }

    fn warn(&self, sink: &mut Sink<'_>) {
        if self.repeated > 0 {
            sink.warn(format!(
                "{} records are equal in several files: the ranks recorded the same tokens, which are counted as often; \
                 import the file of one rank",
                self.repeated
            ));
        }
    }
}

fn read_tokens(inputs: &[PathBuf], sink: &mut Sink<'_>) -> Result<()> {
    // First pass: how many columns are used, and which layers have experts at all.
    let mut shape = None;
    let mut top_k = 0;
    let mut used: Vec<bool> = Vec::new();
    let total = inputs.len() as u64 * 2;
    for (i, path) in inputs.iter().enumerate() {
        let (mut file, _) = open(path)?;
        let pickle = file.pickle();
        let map = SlotMap::read(path, &mut file, &pickle)?;
        map.agree(path, &mut shape)?;
        used.resize(map.layers, false);
        for (place, record) in records(&pickle) {
            let (ids, [layers, tokens, width]) = token_ids(path, &place, &mut file, record, &map)?;
            for (row, chosen) in ids.chunks_exact(width.max(1)).enumerate() {
                let k = chosen.iter().filter(|&&id| id != -1).count();
                top_k = top_k.max(k);
                if let Some(used) = used.get_mut(row / tokens.max(1)).filter(|_| row < layers * tokens) {
                    *used |= k > 0;
                }
            }
        }
        sink.progress(i as u64 + 1, total);
    }
    let layer_ids: Vec<u32> = (0..).zip(&used).filter(|(_, used)| **used).map(|(id, _)| id).collect();
    let Some((hidden, num_experts)) = shape.filter(|_| !layer_ids.is_empty()) else {
        let first = inputs.first().map_or(Path::new(""), PathBuf::as_path);
        return Err(FormatError::bad(first, "records", "hold no tokens"));
    };
    sink.begin(Layout {
        num_experts,
        top_k: Some(top_k),
        layer_ids: layer_ids.clone(),
        num_hidden_layers: Some(hidden as u32),
        ..Layout::default()
    })?;

    // Second pass: the rows.
    let mut dropped = 0_u64;
    let mut repeats = Repeats::default();
    for (i, path) in inputs.iter().enumerate() {
        let (mut file, _) = open(path)?;
        let pickle = file.pickle();
        let map = SlotMap::read(path, &mut file, &pickle)?;
        if i == 0 {
            note_mapping(&map, sink);
        }
        let mut next_row = vec![0_usize; layer_ids.len()];
        for (place, record) in records(&pickle) {
            let (ids, [_, tokens, width]) = token_ids(path, &place, &mut file, record, &map)?;
            if tokens == 0 || width == 0 {
                continue;
            }
            repeats.add(record, &ids);
            for (layer, &id) in layer_ids.iter().enumerate() {
                let start = id as usize * tokens * width;
                let rows = ids.get(start..start + tokens * width).unwrap_or_default();
                let mut out = Vec::with_capacity(tokens * top_k);
                for (t, chosen) in rows.chunks_exact(width).enumerate() {
                    let row = next_row[layer] + t;
                    let n = chosen.iter().filter(|&&slot| slot != -1).count();
                    if n == 0 {
                        dropped += 1;
                        continue;
                    }
                    if n != top_k {
                        let message =
                            format!("row {row} ({place}, token {t}) has {n} experts, others have {top_k}");
                        return Err(FormatError::bad(path, format!("layer {layer}"), message));
                    }
                    for &slot in chosen.iter().filter(|&&slot| slot != -1) {
                        let logical = map.logical(id as usize, slot).ok_or_else(|| {
                            let slots = map.slots;
                            let message = format!("row {row}: physical expert {slot}, there are {slots}");
                            FormatError::bad(path, format!("layer {layer}"), message)
                        })?;
                        out.push(logical);
                    }
                }
                let at = At { file: path, layer, first_row: next_row[layer] };
                sink.append(at, RowBlock { expert_ids: &out, ..RowBlock::default() })?;
                next_row[layer] += tokens;
            }
        }
        repeats.end_of_file();
        sink.progress((inputs.len() + i + 1) as u64, total);
    }
    if dropped > 0 {
        sink.note(format!("{dropped} rows of padding tokens (no expert at all) were dropped"));
    }
    note_dense(hidden, &layer_ids, sink);
    repeats.warn(sink);
    Ok(())
}

/// `topk_ids_of_layer` of one record, `[L, T, width]`.
fn token_ids(
    path: &Path,
    place: &str,
    file: &mut Torch,
    record: Item<'_>,
    map: &SlotMap,
) -> Result<(Vec<i64>, [usize; 3])> {
    let ids = tensor(path, place, record, "topk_ids_of_layer", 3)?;
    let shape = [ids.shape()[0], ids.shape()[1], ids.shape()[2]];
    if shape[0] != map.layers {
        let message = format!("{} layers, last_physical_to_logical_map has {}", shape[0], map.layers);
        return Err(FormatError::bad(path, place, message));
    }
    let values = file.read_i64(ids).map_err(|message| FormatError::bad(path, place, message))?;
    Ok((values, shape))
}

fn note_dense(hidden: usize, layer_ids: &[u32], sink: &mut Sink<'_>) {
    if layer_ids.len() < hidden {
        let without = hidden - layer_ids.len();
        sink.note(format!(
            "{without} of {hidden} layers have no routed tokens and were left out (dense layers)"
        ));
    }
}

fn read_counts(kind: Kind, inputs: &[PathBuf], sink: &mut Sink<'_>) -> Result<()> {
    let mut shape = None;
    let mut totals: Vec<Vec<u64>> = Vec::new();
    let mut repeats = Repeats::default();
    for (i, path) in inputs.iter().enumerate() {
        let (mut file, _) = open(path)?;
        let pickle = file.pickle();
        if kind == Kind::Stat {
            let counts = tensor(path, "", pickle.root(), "logical_count", 3)?;
            let [_, layers, experts] = [counts.shape()[0], counts.shape()[1], counts.shape()[2]];
            check_shape(path, layers, experts, &mut shape)?;
            let values = file.read_i64(counts).map_err(|m| FormatError::bad(path, "logical_count", m))?;
            add(path, "logical_count", &values, experts, &mut totals, layers, |_, e| u16::try_from(e).ok())?;
        } else {
            let map = SlotMap::read(path, &mut file, &pickle)?;
            check_shape(path, map.layers, map.num_experts, &mut shape)?;
            if i == 0 {
                note_mapping(&map, sink);
            }
            for (place, record) in records(&pickle) {
                let counts = tensor(path, &place, record, "global_physical_count", 2)?;
                if *counts.shape() != [map.layers, map.slots] {
                    let message = format!(
                        "`global_physical_count` has shape {:?}, last_physical_to_logical_map [{}, {}]",
                        counts.shape(),
                        map.layers,
                        map.slots
                    );
                    return Err(FormatError::bad(path, &*place, message));
                }
                let values = file.read_i64(counts).map_err(|m| FormatError::bad(path, &*place, m))?;
                if values.iter().any(|&v| v != 0) {
                    repeats.add(record, &values);
                }
                totals.resize(map.layers, vec![0; map.num_experts]);
                add(path, &place, &values, map.slots, &mut totals, map.layers, |layer, slot| {
                    map.logical(layer, slot as i64)
                })?;
            }
            repeats.end_of_file();
        }
        sink.progress(i as u64 + 1, inputs.len() as u64);
    }
    let first = inputs.first().map_or(Path::new(""), PathBuf::as_path);
    let (hidden, num_experts) = shape.unwrap_or_default();
    let used = |counts: &Vec<u64>| counts.iter().any(|&c| c > 0);
    let layer_ids: Vec<u32> = (0..).zip(&totals).filter(|(_, c)| used(c)).map(|(id, _)| id).collect();
    if layer_ids.is_empty() {
        return Err(FormatError::bad(first, "", "all counts are zero: nothing was recorded"));
    }
    sink.begin(Layout {
        num_experts,
        layer_ids: layer_ids.clone(),
        num_hidden_layers: Some(hidden as u32),
        ..Layout::default()
    })?;
    for (layer, counts) in totals.into_iter().filter(used).enumerate() {
        sink.set_counts(first, layer, counts, None)?;
    }
    note_dense(hidden, &layer_ids, sink);
    repeats.warn(sink);
    Ok(())
}

fn check_shape(path: &Path, layers: usize, experts: usize, first: &mut Option<(usize, usize)>) -> Result<()> {
    if layers == 0 || layers > MAX_LAYERS || experts == 0 || experts > MAX_EXPERTS {
        let message =
            format!("{layers} layers of {experts} experts, expected 1 to {MAX_LAYERS} of 1 to {MAX_EXPERTS}");
        return Err(FormatError::bad(path, "", message));
    }
    let own = (layers, experts);
    let (l, e) = *first.get_or_insert(own);
    if own != (l, e) {
        let message = format!("has {layers} layers of {experts} experts, the first file has {l} of {e}");
        return Err(FormatError::bad(path, "", message));
    }
    Ok(())
}

/// Adds counts `[.., layers, width]` to `totals` `[layers, E]`; `expert` says whose count a column is.
fn add(
    path: &Path,
    place: &str,
    values: &[i64],
    width: usize,
    totals: &mut Vec<Vec<u64>>,
    layers: usize,
    expert: impl Fn(usize, usize) -> Option<u16>,
) -> Result<()> {
    if totals.is_empty() {
        totals.resize(layers, vec![0; width]);
    }
    for (i, row) in values.chunks_exact(width.max(1)).enumerate() {
        let layer = i % layers;
        for (column, &value) in row.iter().enumerate() {
            let bad = |message: String| FormatError::bad(path, place, message);
            let value = u64::try_from(value)
                .map_err(|_| bad(format!("layer {layer}: the count of expert {column} is {value}")))?;
            let slot = expert(layer, column)
                .and_then(|e| totals.get_mut(layer)?.get_mut(usize::from(e)))
                .ok_or_else(|| bad(format!("layer {layer}: there is no expert {column}")))?;
            *slot = slot
                .checked_add(value)
                .ok_or_else(|| bad(format!("layer {layer}: the counts of expert {column} overflow")))?;
        }
    }
    Ok(())
}

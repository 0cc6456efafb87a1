//! What is this file? One answer for every format that Occult reads or writes, from the contents.

use std::fmt;
use std::path::Path;

use serde::ser::{Serialize, SerializeMap, Serializer};
use serde_json::{Value, json};

use crate::error::Result;
use crate::export::{ExportFormat, MapOptions, detect_map, import_placement};
use crate::import::{ImportFormat, detect};
use crate::pickle::{Item, Pickle, TorchFile};
use crate::placement_file::PLACEMENT_FORMAT;
use crate::profile::FORMAT as PROFILE_FORMAT;
use crate::tensors::{TensorFile, looks_like_safetensors};
use crate::{PlacementFile, Profile, io, npy};

/// What kind of file it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileKind {
    /// A routing profile of this project.
    Profile,
    /// A placement of this project.
    Placement,
    /// Routing records or expert statistics that can be imported into a profile.
    Importable(ImportFormat),
    /// An expert map of another engine (or a permutation), as `export` writes them.
    ExpertMap(ExportFormat),
    /// A safetensors file that is none of these.
    Safetensors,
    /// Nothing that is known.
    Unknown,
}

impl FileKind {
    /// One word.
    pub fn name(self) -> &'static str {
        match self {
            FileKind::Profile => "profile",
            FileKind::Placement => "placement",
            FileKind::Importable(_) => "importable",
            FileKind::ExpertMap(_) => "expert-map",
            FileKind::Safetensors => "safetensors",
            FileKind::Unknown => "unknown",
        }
    }

    /// The format's name, where the kind has several.
    pub fn format(self) -> Option<&'static str> {
        match self {
            FileKind::Importable(format) => Some(format.name()),
            FileKind::ExpertMap(format) => Some(format.name()),
            _ => None,
        }
    }
}

/// A file in a few facts. As JSON: `file`, `kind`, `format` (or null), and each fact under its own name.
#[derive(Debug, Clone, PartialEq)]
pub struct Description {
    /// Name of the file, without its folder.
    pub file: String,
    /// What it is.
    pub kind: FileKind,
    /// Facts in the order in which they are shown.
    pub facts: Vec<(&'static str, Value)>,
}

impl Description {
    /// A fact by name.
    pub fn fact(&self, name: &str) -> Option<&Value> {
        self.facts.iter().find(|(n, _)| *n == name).map(|(_, value)| value)
    }

    fn say(&mut self, name: &'static str, value: impl Into<Value>) {
        let value = value.into();
        if !value.is_null() {
            self.facts.push((name, value));
        }
    }
}

impl Serialize for Description {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("file", &self.file)?;
        map.serialize_entry("kind", self.kind.name())?;
        map.serialize_entry("format", &self.kind.format())?;
        for (name, value) in &self.facts {
            map.serialize_entry(name, value)?;
        }
        map.end()
    }
}

impl fmt::Display for Description {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self.kind {
            FileKind::Profile => "routing profile".to_owned(),
            FileKind::Placement => "placement".to_owned(),
            FileKind::Importable(format) => format!("{format}, can be imported"),
            FileKind::ExpertMap(ExportFormat::Permutation) => {
                "permutation of a checkpoint's experts".to_owned()
            }
            FileKind::ExpertMap(format) => format!("expert map for {format}"),
            FileKind::Safetensors => "safetensors, no routing".to_owned(),
            FileKind::Unknown => "not a file that is known here".to_owned(),
        };
        writeln!(f, "{}: {what}", self.file)?;
        let width = self.facts.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
        for (name, value) in &self.facts {
            let name = name.replace('_', " ");
            match value {
                Value::String(text) => writeln!(f, "  {name:width$}  {text}")?,
                Value::Array(items) if items.iter().all(Value::is_string) => {
                    for (i, text) in items.iter().filter_map(Value::as_str).enumerate() {
                        writeln!(f, "  {:width$}  {text}", if i == 0 { name.as_str() } else { "" })?;
                    }
                }
                other => writeln!(f, "  {name:width$}  {other}")?,
            }
        }
        Ok(())
    }
}

/// Looks at a file (or a folder of recordings). An error if it cannot be read, or if it is one of this project's files
/// and broken; a file that is merely unknown is described as such.
pub fn describe(path: &Path) -> Result<Description> {
    let mut out = Description { file: io::file_name(path), kind: FileKind::Unknown, facts: Vec::new() };
    if path.is_dir() {
        if let Some(format) = detect(path)? {
            out.kind = FileKind::Importable(format);
        }
        return Ok(out);
    }
    let (prefix, bytes) = io::read_prefix(path, 4096)?;
    out.say("bytes", bytes);
    if bytes == 0 {
        return Ok(out);
    }
    if looks_like_safetensors(&prefix, bytes) {
        safetensors(path, &mut out)?;
        return Ok(out);
    }
    if is_placement(path, &prefix, bytes)? {
        placement(&PlacementFile::read(path)?, &mut out);
        return Ok(out);
    }
    // A file too large to be a map may still be one of the formats that are read as a stream.
    if let Some(format) = detect_map(path).ok().flatten() {
        map(path, format, &mut out);
        return Ok(out);
    }
    if let Some(format) = detect(path)? {
        out.kind = FileKind::Importable(format);
        importable(path, format, &mut out);
    }
    Ok(out)
}

fn is_placement(path: &Path, prefix: &[u8], bytes: u64) -> Result<bool> {
    if prefix.trim_ascii_start().first() != Some(&b'{') || bytes > io::MAX_WHOLE_FILE {
        return Ok(false);
    }
    let name = format!("\"{PLACEMENT_FORMAT}\"");
    if prefix.windows(name.len()).any(|w| w == name.as_bytes()) {
        return Ok(true);
    }
    let json = serde_json::from_slice::<Value>(&io::read_whole(path)?).unwrap_or_default();
    Ok(json.get("format").and_then(Value::as_str) == Some(PLACEMENT_FORMAT))
}

fn safetensors(path: &Path, out: &mut Description) -> Result<()> {
    let file = TensorFile::open(path)?;
    if file.metadata.get("format").is_some_and(|f| f == PROFILE_FORMAT) {
        profile(&Profile::open(path)?, out);
        return Ok(());
    }
    out.kind = detect(path)?.map_or(FileKind::Safetensors, FileKind::Importable);
    out.say("tensors", file.tensors.len());
    let lines = file.tensors.iter().take(12).map(|(name, t)| format!("{name} {:?} {:?}", t.dtype, t.shape));
    out.say("first_tensors", lines.collect::<Vec<_>>());
    for (key, value) in file.metadata.iter().filter(|(_, v)| v.len() <= 80).take(8) {
        out.say("metadata", format!("{key} = {value}"));
    }
    Ok(())
}

fn profile(profile: &Profile, out: &mut Description) {
    let meta = profile.meta();
    out.kind = FileKind::Profile;
    let layers = profile.num_layers();
    out.say("layers", layers);
    out.say("experts", meta.num_experts);
    out.say("top_k", json!(meta.top_k));
    let rows: Vec<Option<usize>> = (0..layers).map(|l| profile.num_rows(l)).collect();
    out.say(
        "rows",
        match (rows.iter().min(), rows.iter().max()) {
            (Some(Some(min)), Some(Some(max))) if min == max => json!(min),
            (_, Some(Some(_))) => json!(rows),
            _ => json!("none: only counts are known"),
        },
    );
    let all = |has: &dyn Fn(usize) -> bool| (0..layers).all(has);
    let columns = [
        ("expert_ids", all(&|l| profile.num_rows(l).is_some())),
        ("weights", all(&|l| profile.has_weights(l))),
        ("router_logits", all(&|l| profile.has_scores(l))),
        ("occurrences", all(&|l| profile.has_occurrences(l))),
        ("domains", all(&|l| profile.has_domains(l))),
        ("counts", all(&|l| profile.has_counts(l))),
        ("coactivation", all(&|l| profile.has_coactivation(l))),
    ];
    let columns: Vec<&str> = columns.iter().filter(|(_, has)| *has).map(|(name, _)| *name).collect();
    out.say("columns", columns.join(", "));
    out.say("model", json!(meta.model));
    out.say("layer_ids", json!(meta.layer_ids).to_string());
    out.say("num_hidden_layers", json!(meta.num_hidden_layers));
    if let Some(router) = &meta.router {
        out.say("router", serde_json::to_value(router).unwrap_or_default());
    }
    if !meta.domains.is_empty() {
        out.say("domains", meta.domains.join(", "));
    }
    out.say("source", format!("{} ({})", meta.source.format, meta.source.files.join(", ")));
    if !meta.source.notes.is_empty() {
        out.say("notes", meta.source.notes.clone());
    }
}

fn placement(file: &PlacementFile, out: &mut Description) {
    out.kind = FileKind::Placement;
    table(file, out);
    let meta = &file.meta;
    out.say("method", meta.method.clone());
    out.say("seed", json!(meta.seed));
    out.say("load_cap", json!(meta.load_cap));
    out.say("model", json!(meta.model));
    out.say("layer_ids", json!(meta.layer_ids).to_string());
    out.say("num_hidden_layers", json!(meta.num_hidden_layers));
    out.say("profile", json!(meta.profile));
    out.say("figures", json!(meta.figures));
    if !meta.notes.is_empty() {
        out.say("notes", meta.notes.clone());
    }
}

/// Size of a placement.
fn table(file: &PlacementFile, out: &mut Description) {
    let placement = &file.placement;
    let topology = placement.topology();
    out.say("layers", placement.layers().len());
    out.say("experts", placement.num_experts());
    out.say("ranks", topology.num_ranks());
    out.say("nodes", topology.num_nodes());
    let sizes = placement
        .layers()
        .iter()
        .flat_map(|l| (0..topology.num_ranks()).map(move |r| l.experts_of(r as u16).len()));
    let (min, max) = sizes.fold((usize::MAX, 0), |(min, max), n| (min.min(n), max.max(n)));
    out.say("experts_per_rank", if min == max { json!(min) } else { json!(format!("{min} to {max}")) });
    let replicas = placement.layers().iter().map(|l| l.num_slots() - l.num_experts()).max();
    out.say("replicas_per_layer", replicas.unwrap_or(0));
}

fn map(path: &Path, format: ExportFormat, out: &mut Description) {
    out.kind = FileKind::ExpertMap(format);
    if format == ExportFormat::Permutation {
        return permutation(path, out);
    }
    match import_placement(path, Some(format), &MapOptions::default()) {
        Ok(file) => table(&file, out),
        Err(_) => {
            // Most maps do not say how many ranks there are: as if there was one.
            let one = MapOptions { num_ranks: Some(1), ..MapOptions::default() };
            match import_placement(path, Some(format), &one) {
                Ok(file) => {
                    out.say("layers", file.placement.layers().len());
                    out.say("experts", file.placement.num_experts());
                    out.say("ranks", "not said by the file");
                }
                Err(error) => out.say("problem", error.to_string()),
            }
        }
    }
}

fn permutation(path: &Path, out: &mut Description) {
    let json = io::read_whole(path).ok().and_then(|b| serde_json::from_slice::<Value>(&b).ok());
    let json = json.unwrap_or_default();
    out.say("layers", json!(json.get("layers").and_then(Value::as_array).map(Vec::len)));
    out.say("experts", json!(json.get("num_experts").and_then(Value::as_u64)));
    out.say("ranks", json!(json.get("num_ranks").and_then(Value::as_u64)));
}

/// A look at what can be seen without importing. A file that turns out to be broken is said to be so.
fn importable(path: &Path, format: ImportFormat, out: &mut Description) {
    match format {
        ImportFormat::SglangRecorder => match TorchFile::open(path) {
            Ok(file) => recorder(file.pickle().root(), out),
            Err(problem) => out.say("problem", problem),
        },
        ImportFormat::C2rPickle => {
            let pickle = io::read_whole(path).map(|bytes| Pickle::parse(&bytes));
            match pickle {
                Ok(Ok(pickle)) => match pickle.root().array() {
                    Some(array) => {
                        out.say("array", format!("{} {:?}", array.element().name(), array.shape()));
                    }
                    None => out.say("holds", pickle.root().kind()),
                },
                Ok(Err(error)) => out.say("problem", error.to_string()),
                Err(error) => out.say("problem", error.to_string()),
            }
        }
        ImportFormat::Npz => {
            if let Ok(npz) = npy::Npz::open(path) {
                out.say("arrays", npz.members());
            }
        }
        ImportFormat::VllmRouted => {
            if let Ok(array) = npy::open_npy(path) {
                out.say("array", format!("{:?} {:?}", array.dtype, array.shape));
            }
        }
        _ => {}
    }
}

fn recorder(root: Item<'_>, out: &mut Description) {
    let shape =
        |item: Option<Item<'_>>| item.and_then(Item::tensor).map(|t| json!(format!("{:?}", t.shape())));
    if let Some(shape) = shape(root.get("logical_count")) {
        out.say("mode", "stat");
        out.say("logical_count", shape);
        return;
    }
    let Some(mut records) = root.get("records").and_then(Item::items) else {
        out.say("holds", root.kind());
        return;
    };
    out.say("records", records.len());
    let first = records.next();
    let ids = shape(first.and_then(|r| r.get("topk_ids_of_layer")));
    out.say("mode", if ids.is_some() { "per_token" } else { "per_pass" });
    out.say("first_topk_ids_of_layer", json!(ids));
    out.say("physical_to_logical_map", json!(shape(root.get("last_physical_to_logical_map"))));
}

//! The placement file: which rank holds which expert, for every MoE layer of a model, as JSON.
//!
//! ```json
//! {
//!   "format": "occult.placement.v1",
//!   "num_experts": 4, "num_ranks": 2, "num_nodes": 1, "layer_ids": [1, 2], "num_hidden_layers": 3,
//!   "model": "a name", "method": "search", "seed": 7, "load_cap": 1.25, "profile": "a.safetensors",
//!   "layers": [
//!     {"layer": 1, "ranks": [[0, 2], [1, 3]]},
//!     {"layer": 2, "ranks": [[0, 1], [2, 3]]}
//!   ]
//! }
//! ```
//! Everything is said twice where it can be (counts, layer numbers) and must agree: a damaged file is noticed. A layer can
//! have `"rank_weights": [1, 0.8]`, what routing mass on each rank counts for when pruning chooses a token's ranks.

use std::io::Write as _;
use std::path::Path;

use occult_plan::{LayerPlacement, Placement, Topology};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::{FormatError, Result};
use crate::{MAX_EXPERTS, MAX_LAYERS, ProfileMeta, io};

/// The value of `format` in a placement file.
pub const PLACEMENT_FORMAT: &str = "occult.placement.v1";

/// What a placement says about itself beside the table.
#[derive(Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
pub struct PlacementMeta {
    /// The model's number of every MoE layer, ascending; one per layer of the table.
    pub layer_ids: Vec<u32>,
    /// Hidden layers of the model, dense ones included.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub num_hidden_layers: Option<u32>,
    /// Name of the model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// How the placement was made: a method's name, or `import of ...`.
    pub method: String,
    /// Seed of the method.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// Cap on max/mean load that the method had to keep.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub load_cap: Option<f64>,
    /// File name of the profile it was made from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub profile: Option<String>,
    /// Figures measured when it was made, for people to read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub figures: Option<Map<String, Value>>,
    /// What was done on the way (replicas merged, rows chosen ...).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

/// A placement with its description: what `place` writes and `export`, `traffic` and `prune` read.
#[derive(Clone, Debug, PartialEq)]
pub struct PlacementFile {
    /// The description.
    pub meta: PlacementMeta,
    /// The table.
    pub placement: Placement,
}

#[derive(Serialize, Deserialize)]
struct Header {
    format: String,
    num_experts: usize,
    num_ranks: usize,
    num_nodes: usize,
    #[serde(flatten)]
    meta: PlacementMeta,
}

#[derive(Deserialize)]
struct File {
    #[serde(flatten)]
    header: Header,
    layers: Vec<Layer>,
}

#[derive(Serialize, Deserialize)]
struct Layer {
    layer: u32,
    ranks: Vec<Vec<i64>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    rank_weights: Option<Vec<f32>>,
}

impl PlacementFile {
    /// Puts a table and its description together; they must speak of the same layers.
    pub fn new(meta: PlacementMeta, placement: Placement) -> Result<Self> {
        match problem(&meta, placement.layers().len()) {
            Some(problem) => Err(FormatError::Request(format!("placement: {problem}"))),
            None => Ok(Self { meta, placement }),
        }
    }

    /// Reads and checks a placement file.
    pub fn read(path: &Path) -> Result<Self> {
        Self::parse(path, &io::read_whole(path)?)
    }

    /// Checks the text of a placement file; `path` is for errors.
    pub fn parse(path: &Path, bytes: &[u8]) -> Result<Self> {
        let bad = |place: String, message: String| FormatError::bad(path, place, message);
        let file: File = match serde_json::from_slice::<Value>(bytes) {
            Err(e) => return Err(bad(String::new(), format!("broken JSON: {e}"))),
            Ok(value) => {
                let format = value.get("format").and_then(Value::as_str);
                if format != Some(PLACEMENT_FORMAT) {
                    let found = format.map_or("none".to_owned(), |f| format!("{f:?}"));
                    let message = format!("its format is {found}, expected {PLACEMENT_FORMAT:?}");
                    return Err(bad(String::new(), message));
                }
                serde_json::from_value(value).map_err(|e| bad(String::new(), e.to_string()))?
            }
        };
        let File { header, layers } = file;
        let experts = header.num_experts;
        if experts == 0 || experts > MAX_EXPERTS {
            let message = format!("num_experts is {experts}, expected 1 to {MAX_EXPERTS}");
            return Err(bad(String::new(), message));
        }
        if let Some(problem) = problem(&header.meta, layers.len()) {
            return Err(bad(String::new(), problem));
        }
        let plan = |layer: usize, e| FormatError::plan(path, layer, 0, e);
        let topology = Topology::new(header.num_ranks, header.num_nodes)
            .map_err(|e| bad(String::new(), e.to_string()))?;
        let mut tables = Vec::with_capacity(layers.len());
        for (i, (layer, &id)) in layers.iter().zip(&header.meta.layer_ids).enumerate() {
            let place = || format!("layer {i}");
            if layer.layer != id {
                return Err(bad(place(), format!("says it is layer {}, layer_ids says {id}", layer.layer)));
            }
            if layer.ranks.len() != header.num_ranks {
                let (found, expected) = (layer.ranks.len(), header.num_ranks);
                return Err(bad(place(), format!("has {found} ranks, num_ranks is {expected}")));
            }
            let ids = |(rank, list): (usize, &Vec<i64>)| {
                let id = |&e: &i64| {
                    u16::try_from(e)
                        .map_err(|_| bad(place(), format!("rank {rank}: {e} is not an expert id")))
                };
                list.iter().map(id).collect::<Result<Vec<u16>>>()
            };
            let ranks = layer.ranks.iter().enumerate().map(ids).collect::<Result<Vec<_>>>()?;
            let table = LayerPlacement::from_rank_experts(experts, &ranks);
            let table = table.and_then(|table| match &layer.rank_weights {
                Some(weights) => table.with_rank_weights(weights.clone()),
                None => Ok(table),
            });
            tables.push(table.map_err(|e| plan(i, e))?);
        }
        let placement = Placement::new(topology, tables).map_err(|e| bad(String::new(), e.to_string()))?;
        Ok(Self { meta: header.meta, placement })
    }

    /// The text of the file, one layer per line.
    pub fn to_json(&self) -> Result<String> {
        let placement = &self.placement;
        let header = Header {
            format: PLACEMENT_FORMAT.to_owned(),
            num_experts: placement.num_experts(),
            num_ranks: placement.topology().num_ranks(),
            num_nodes: placement.topology().num_nodes(),
            meta: self.meta.clone(),
        };
        let json = |e: serde_json::Error| FormatError::Request(format!("placement: {e}"));
        let header = serde_json::to_value(&header).map_err(json)?;
        // The format comes first, where people and programs look for it.
        let mut text = format!("{{\n  \"format\": \"{PLACEMENT_FORMAT}\",\n");
        for (key, value) in header.as_object().into_iter().flatten().filter(|(key, _)| *key != "format") {
            text.push_str(&format!("  {}: {value},\n", Value::from(key.as_str())));
        }
        text.push_str("  \"layers\": [\n");
        for (i, (layer, &id)) in placement.layers().iter().zip(&self.meta.layer_ids).enumerate() {
            let ranks = (0..layer.num_ranks())
                .map(|r| layer.experts_of(r as u16).iter().map(|&e| i64::from(e)).collect());
            let rank_weights = layer.rank_weights().map(<[f32]>::to_vec);
            let line = Layer { layer: id, ranks: ranks.collect(), rank_weights };
            let line = serde_json::to_string(&line).map_err(json)?;
            let comma = if i + 1 < placement.layers().len() { "," } else { "" };
            text.push_str(&format!("    {line}{comma}\n"));
        }
        text.push_str("  ]\n}\n");
        Ok(text)
    }

    /// Writes the file: it appears under its name only when it is complete.
    pub fn write(&self, path: &Path) -> Result<()> {
        write_atomic(path, self.to_json()?.as_bytes())
    }

    /// Whether this is a placement of the model that a profile was recorded on.
    pub fn check_against(&self, profile: &ProfileMeta) -> Result<()> {
        let wrong = |message: String| {
            Err(FormatError::Request(format!("the placement is for another model: {message}")))
        };
        let experts = self.placement.num_experts();
        if experts != profile.num_experts {
            return wrong(format!("it places {experts} experts, the profile has {}", profile.num_experts));
        }
        let layers = self.placement.layers().len();
        if layers != profile.num_layers() {
            return wrong(format!("it has {layers} layers, the profile has {}", profile.num_layers()));
        }
        let ids = self.meta.layer_ids.iter().zip(&profile.layer_ids);
        if let Some((i, (own, other))) = ids.enumerate().find(|(_, (own, other))| own != other) {
            return wrong(format!(
                "layer {i} is the model's layer {own}, in the profile it is layer {other}"
            ));
        }
        match (self.meta.num_hidden_layers, profile.num_hidden_layers) {
            (Some(own), Some(other)) if own != other => {
                wrong(format!("it is for {own} hidden layers, the profile has {other}"))
            }
            _ => Ok(()),
        }
    }
}

/// What is impossible in a description of `layers` layers.
fn problem(meta: &PlacementMeta, layers: usize) -> Option<String> {
    if layers == 0 || layers > MAX_LAYERS {
        return Some(format!("there are {layers} layers, expected 1 to {MAX_LAYERS}"));
    }
    if meta.layer_ids.len() != layers {
        return Some(format!("layer_ids has {} entries, there are {layers} layers", meta.layer_ids.len()));
    }
    if !meta.layer_ids.is_sorted_by(|a, b| a < b) {
        return Some(format!("layer_ids {:?} do not ascend", meta.layer_ids));
    }
    match (meta.num_hidden_layers, meta.layer_ids.last()) {
        (Some(hidden), Some(&last)) if last >= hidden => {
            Some(format!("there is a layer {last}, but num_hidden_layers is {hidden}"))
        }
        (Some(hidden), _) if hidden > 4 * MAX_LAYERS as u32 => {
            Some(format!("num_hidden_layers is {hidden}, expected at most {}", 4 * MAX_LAYERS))
        }
        _ => None,
    }
}

/// Writes a file under a temporary name in the same folder and renames it: nobody ever sees half of it. A link keeps being
/// one: what it points to is replaced. A device or a pipe is written to as it is.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    write_atomic_with(path, |file| file.write_all(bytes).map_err(|e| FormatError::io("write", path, e)))
}

/// As [`write_atomic`], piece by piece: the file appears under its name, synced, when `write` is done, and not at all after
/// an error.
pub fn write_atomic_with<E: From<FormatError>>(
    path: &Path,
    write: impl FnOnce(&mut std::fs::File) -> Result<(), E>,
) -> Result<(), E> {
    let failed = |e| FormatError::io("write", path, e);
    if path.is_dir() {
        let message = "is a directory, expected the name of a file to write";
        return Err(FormatError::bad(path, "", message).into());
    }
    if path.exists() && !path.is_file() {
        let mut file = std::fs::OpenOptions::new().write(true).open(path).map_err(failed)?;
        return write(&mut file);
    }
    let target = io::link_target(path)?;
    let path = target.as_path();
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut builder = tempfile::Builder::new();
    builder.prefix(".occult-");
    #[cfg(unix)]
    {
        // As an ordinary file would be: what the umask leaves of rw-rw-rw-.
        use std::os::unix::fs::PermissionsExt as _;
        builder.permissions(std::fs::Permissions::from_mode(0o666));
    }
    let mut temp = builder.tempfile_in(folder).map_err(failed)?;
    write(temp.as_file_mut())?;
    temp.as_file().sync_all().map_err(failed)?;
    temp.persist(path).map_err(|e| FormatError::io("rename a temporary file to", path, e.error))?;
    Ok(())
}

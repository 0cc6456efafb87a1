//! Reading checkpoints, also with another number of ranks or another placement of the experts.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

use crate::checkpoint::shard::{Kind, SUFFIXES, Shard};
use crate::checkpoint::{Manifest, State, VERSION};
use crate::error::{Result, TrainError};

pub(crate) const MANIFEST: &str = "checkpoint.json";
pub(crate) const LATEST: &str = "latest";

pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let bytes = std::fs::read(path).map_err(|e| TrainError::io("read", path, e))?;
    serde_json::from_slice(&bytes).map_err(|e| TrainError::damaged(path, e.to_string()))
}

/// The checkpoint that `latest` names; `None` where a run has none yet. Errors when it names something that is not there.
pub fn latest(dir: &Path) -> Result<Option<PathBuf>> {
    let file = dir.join(LATEST);
    let name = match std::fs::read_to_string(&file) {
        Ok(name) => name,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(TrainError::io("read", &file, e)),
    };
    let name = name.trim();
    let is_name = name.strip_prefix("step-").is_some_and(|n| n.parse::<u64>().is_ok());
    if !is_name || !dir.join(name).is_dir() {
        return Err(TrainError::damaged(&file, format!("names {name:?}, which is no checkpoint here")));
    }
    Ok(Some(dir.join(name)))
}

/// An open checkpoint.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    state: State,
    shards: Vec<Shard>,
}

impl Checkpoint {
    /// Opens a checkpoint directory and checks version, lengths and sums of all its files.
    pub fn open(path: &Path) -> Result<Self> {
        let file = path.join(MANIFEST);
        // The version first: the rest of another version may look different.
        let value: serde_json::Value = read_json(&file)?;
        let found = value["version"].as_u64();
        let found = found.ok_or_else(|| TrainError::damaged(&file, "has no format version"))?;
        if found != VERSION {
            return Err(TrainError::Version { path: path.into(), found, expected: VERSION });
        }
        let manifest: Manifest =
            serde_json::from_value(value).map_err(|e| TrainError::damaged(&file, e.to_string()))?;
        let mut shards = vec![];
        for note in &manifest.shards {
            if note.file.contains(['/', '\\']) {
                return Err(TrainError::damaged(&file, format!("a shard called {:?}", note.file)));
            }
            let file = path.join(&note.file);
            let found = std::fs::metadata(&file).map_err(|e| TrainError::io("inspect", &file, e))?.len();
            if found != note.bytes {
                return Err(TrainError::Truncated { file, expected: note.bytes, found });
            }
            if sum(&file)? != note.crc32 {
                return Err(TrainError::damaged(&file, "its CRC-32 is not that of when it was written"));
            }
            shards.push(Shard::open(&file)?);
        }
        Ok(Self { path: path.into(), state: manifest.state, shards })
    }

    /// Where the run stood.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// With how many ranks it was written.
    pub fn world_size(&self) -> usize {
        self.shards.len()
    }

    /// Errors unless it belongs to this model and configuration; names the options that differ, with both values.
    pub fn check(&self, model: &str, config: &BTreeMap<String, String>) -> Result<()> {
        if self.state.model != model {
            return Err(TrainError::other(&self.path, "model", self.state.model.clone(), model.into()));
        }
        let saved = &self.state.config;
        let names: BTreeSet<&String> = saved.keys().chain(config.keys()).collect();
        let differ = || names.iter().filter(|n| saved.get(**n) != config.get(**n));
        let words = |of: &BTreeMap<String, String>| {
            let word = |n: &&String| format!("{n} {}", of.get(*n).map_or("not given", String::as_str));
            differ().map(word).collect::<Vec<_>>().join(", ")
        };
        match differ().next() {
            None => Ok(()),
            Some(_) => Err(TrainError::other(&self.path, "configuration", words(saved), words(config))),
        }
    }

    /// Weights, first and second moment of a parameter: all of a replicated one, the slices of the given experts (in their
    /// order, from whichever rank had them) of an expert one. `shape` is what this rank wants.
    pub fn parameter(&mut self, name: &str, shape: &[usize], kind: &Kind) -> Result<[Vec<f32>; 3]> {
        let len: usize = shape.iter().product();
        let mut out = [vec![0.0; len], vec![0.0; len], vec![0.0; len]];
        let missing =
            |what: String, path: &Path| TrainError::other(path, "model", format!("no {what}"), what);
        let wrong = |path: &Path, found: &[usize]| {
            TrainError::other(path, format!("shape of {name}"), format!("{found:?}"), format!("{shape:?}"))
        };
        let ids = match kind {
            Kind::Replicated => {
                let shard = self.shards.first_mut();
                let shard = shard.ok_or_else(|| TrainError::damaged(&self.path, "has no shards"))?;
                match shard.shape(name) {
                    None => return Err(missing(format!("parameter {name}"), &self.path)),
                    Some(found) if found != shape => return Err(wrong(&self.path, found)),
                    Some(_) => {}
                }
                for (suffix, values) in SUFFIXES.iter().zip(&mut out) {
                    shard.read(&format!("{name}{suffix}"), 0, values)?;
                }
                return Ok(out);
            }
            Kind::Experts(ids) => ids,
        };
        let each = shape.iter().skip(1).product::<usize>();
        for (i, id) in ids.iter().enumerate() {
            // Lowest rank first: where an expert has copies they are equal.
            let place = |s: &Shard| s.experts.get(name)?.iter().position(|e| e == id);
            let found = self.shards.iter_mut().find_map(|s| place(s).map(|at| (s, at)));
            let (shard, at) = found.ok_or_else(|| missing(format!("expert {id} of {name}"), &self.path))?;
            match shard.shape(name) {
                Some(found) if found.get(1..) == shape.get(1..) => {}
                found => return Err(wrong(&self.path, found.unwrap_or_default())),
            }
            for (suffix, values) in SUFFIXES.iter().zip(&mut out) {
                shard.read(&format!("{name}{suffix}"), at * each, &mut values[i * each..(i + 1) * each])?;
            }
        }
        Ok(out)
    }
}

fn sum(path: &Path) -> Result<u32> {
    let failed = |e| TrainError::io("read", path, e);
    let mut file = File::open(path).map_err(failed)?;
    let mut crc = crc32fast::Hasher::new();
    let mut buffer = vec![0u8; 1 << 20];
    loop {
        match file.read(&mut buffer).map_err(failed)? {
            0 => return Ok(crc.finalize()),
            n => crc.update(&buffer[..n]),
        }
    }
}

//! Writing checkpoints; see the module above for the order.

use std::path::{Path, PathBuf};

use crate::checkpoint::files::Files;
use crate::checkpoint::read::{LATEST, MANIFEST, latest, read_json};
use crate::checkpoint::shard::{Saved, layout};
use crate::checkpoint::{Manifest, ShardNote, State, VERSION};
use crate::error::{Result, TrainError};

/// Writes the checkpoints of a run under one directory that all ranks see.
pub struct Writer<'a> {
    dir: PathBuf,
    keep: usize,
    files: &'a dyn Files,
}

impl std::fmt::Debug for Writer<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Writer({}, keep {})", self.dir.display(), self.keep)
    }
}

fn name(step: u64) -> String {
    format!("step-{step:08}")
}

/// Removes what an interrupted run left half-written. Rank 0 calls it before a run starts, while nobody writes.
pub fn remove_partial(dir: &Path, files: &dyn Files) -> Result<()> {
    let Ok(entries) = std::fs::read_dir(dir) else { return Ok(()) };
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with("step-") && (name.ends_with(".partial") || name.ends_with(".old")) {
            files.remove_dir(&entry.path()).map_err(|e| TrainError::io("remove", &entry.path(), e))?;
        }
    }
    Ok(())
}

impl<'a> Writer<'a> {
    /// Keeps the newest `keep` checkpoints (at least one).
    pub fn new(dir: &Path, keep: usize, files: &'a dyn Files) -> Self {
        Self { dir: dir.to_owned(), keep: keep.max(1), files }
    }

    fn write(&self, path: &Path, pieces: &mut dyn Iterator<Item = &[u8]>) -> Result<()> {
        self.files.write(path, pieces).map_err(|e| TrainError::io("write", path, e))
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<()> {
        self.files.rename(from, to).map_err(|e| TrainError::io("rename", from, e))
    }

    fn sync(&self, dir: &Path) -> Result<()> {
        self.files.sync_dir(dir).map_err(|e| TrainError::io("flush", dir, e))
    }

    /// Every rank: writes its shard of the checkpoint of step `step`. Nothing counts until [`Writer::commit`].
    pub fn write_shard(&self, step: u64, rank: usize, saved: &[Saved<'_>]) -> Result<()> {
        let dir = self.dir.join(name(step) + ".partial");
        self.files.create_dir(&dir).map_err(|e| TrainError::io("create", &dir, e))?;
        let (head, pieces) = layout(rank, saved)?;
        let all = || std::iter::once(head.as_slice()).chain(pieces.iter().copied());
        let mut crc = crc32fast::Hasher::new();
        all().for_each(|piece| crc.update(piece));
        let file = format!("rank-{rank:04}.safetensors");
        let bytes = all().map(|p| p.len() as u64).sum();
        self.write(&dir.join(&file), &mut all())?;
        let note = serde_json::to_vec(&ShardNote { file, bytes, crc32: crc.finalize() });
        let note = note.map_err(|e| TrainError::request(e.to_string()))?;
        self.write(&dir.join(format!("rank-{rank:04}.json")), &mut std::iter::once(note.as_slice()))
    }

    /// Rank 0, after every rank has written: completes the checkpoint and makes it the one to go on from. Returns its path.
    pub fn commit(&self, world: usize, state: &State) -> Result<PathBuf> {
        let partial = self.dir.join(name(state.step) + ".partial");
        let mut shards = vec![];
        for rank in 0..world {
            let note: ShardNote = read_json(&partial.join(format!("rank-{rank:04}.json")))?;
            let file = partial.join(&note.file);
            let found = std::fs::metadata(&file).map_err(|e| TrainError::io("inspect", &file, e))?.len();
            if found != note.bytes {
                return Err(TrainError::Truncated { file, expected: note.bytes, found });
            }
            shards.push(note);
        }
        let manifest = Manifest { version: VERSION, shards, state: state.clone() };
        let text = serde_json::to_vec_pretty(&manifest).map_err(|e| TrainError::request(e.to_string()))?;
        self.write(&partial.join(MANIFEST), &mut std::iter::once(text.as_slice()))?;
        self.sync(&partial)?;
        let last = self.dir.join(name(state.step));
        if last.exists() {
            // The same step again. A run that took another way back to it replaces it; where `latest` names it already,
            // it stays as it is: there must be no moment without it.
            if latest(&self.dir)?.as_deref() == Some(&last) {
                self.files.remove_dir(&partial).map_err(|e| TrainError::io("remove", &partial, e))?;
                return Ok(last);
            }
            let old = self.dir.join(name(state.step) + ".old");
            self.files.remove_dir(&old).map_err(|e| TrainError::io("remove", &old, e))?;
            self.rename(&last, &old)?;
            self.rename(&partial, &last)?;
            self.files.remove_dir(&old).map_err(|e| TrainError::io("remove", &old, e))?;
        } else {
            self.rename(&partial, &last)?;
        }
        self.sync(&self.dir)?;
        let new = self.dir.join("latest.new");
        self.write(&new, &mut std::iter::once(name(state.step).as_bytes()))?;
        self.rename(&new, &self.dir.join(LATEST))?;
        self.sync(&self.dir)?;
        self.remove_old(state.step)?;
        Ok(last)
    }

    /// Removes checkpoints before step `newest` beyond the number to keep.
    fn remove_old(&self, newest: u64) -> Result<()> {
        let entries = std::fs::read_dir(&self.dir).map_err(|e| TrainError::io("list", &self.dir, e))?;
        let mut steps: Vec<u64> = entries
            .flatten()
            .filter_map(|e| e.file_name().to_str()?.strip_prefix("step-")?.parse().ok())
            .filter(|step| *step < newest)
            .collect();
        steps.sort_unstable_by(|a, b| b.cmp(a));
        for &step in steps.iter().skip(self.keep - 1) {
            // Renamed first: a checkpoint that is half removed must not look like one.
            let old = self.dir.join(name(step) + ".old");
            self.rename(&self.dir.join(name(step)), &old)?;
            self.files.remove_dir(&old).map_err(|e| TrainError::io("remove", &old, e))?;
        }
        Ok(())
    }
}

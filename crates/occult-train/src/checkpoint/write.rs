//! Writing checkpoints; see the module above for the order.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use crate::checkpoint::files::{Files, STRETCH_BYTES};
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

/// Most bytes that are written at once.
const PIECE_BYTES: usize = 8 << 20;

pub(crate) fn name(step: u64) -> String {
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

    fn write(&self, path: &Path, bytes: &[u8]) -> Result<()> {
        let written = self.files.write(path, &mut |file| file.write_all(bytes));
        written.map_err(|e| TrainError::io("write", path, e))
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<()> {
        self.files.rename(from, to).map_err(|e| TrainError::io("rename", from, e))
    }

    fn sync(&self, dir: &Path) -> Result<()> {
        self.files.sync_dir(dir).map_err(|e| TrainError::io("flush", dir, e))
    }

    /// Every rank: writes its shard of the checkpoint of step `step`; `weights` gives the master weights of the parameter
    /// with this place in `saved`. Nothing counts until [`Writer::commit`].
    ///
    /// Shards can be large and of different lengths, and nobody waits for ever: `meet` is called equally often on all ranks,
    /// between stretches of writing, also after a failure. `most` makes the greatest number of the ranks' out of one's own.
    pub fn write_shard<'w>(
        &self,
        step: u64,
        rank: usize,
        saved: &[Saved<'_>],
        weights: &dyn Fn(usize) -> Result<Cow<'w, [f32]>>,
        most: &dyn Fn(u64) -> Result<u64>,
        meet: &mut dyn FnMut() -> Result<()>,
    ) -> Result<()> {
        let laid_out = layout(rank, saved);
        let bytes = laid_out.as_ref().map_or(0, |(_, _, bytes)| *bytes);
        let mut left = most(bytes / STRETCH_BYTES)?;
        let mut met = Ok(());
        let written = laid_out.and_then(|(head, parameters, bytes)| {
            let mut until = STRETCH_BYTES;
            let mut wrote = |so_far: u64| {
                while so_far >= until && left > 0 && met.is_ok() {
                    met = meet();
                    (until, left) = (until + STRETCH_BYTES, left - 1);
                }
            };
            self.write_files(step, rank, saved, (&head, &parameters, bytes), weights, &mut wrote)
        });
        while left > 0 && met.is_ok() {
            met = meet();
            left -= 1;
        }
        met.and(written)
    }

    fn write_files<'w>(
        &self,
        step: u64,
        rank: usize,
        saved: &[Saved<'_>],
        (head, parameters, bytes): (&[u8], &[usize], u64),
        weights: &dyn Fn(usize) -> Result<Cow<'w, [f32]>>,
        wrote: &mut dyn FnMut(u64),
    ) -> Result<()> {
        let dir = self.dir.join(name(step) + ".partial");
        self.files.create_dir(&dir).map_err(|e| TrainError::io("create", &dir, e))?;
        let file = format!("rank-{rank:04}.safetensors");
        let path = dir.join(&file);
        let mut crc = crc32fast::Hasher::new();
        let mut wrong = None;
        let mut so_far = 0;
        let filled = self.files.write(&path, &mut |out| {
            (crc, so_far) = (crc32fast::Hasher::new(), 0);
            let mut put = |bytes: &[u8]| {
                for piece in bytes.chunks(PIECE_BYTES) {
                    crc.update(piece);
                    out.write_all(piece)?;
                    so_far += piece.len() as u64;
                    wrote(so_far);
                }
                Ok::<(), std::io::Error>(())
            };
            put(head)?;
            for &i in parameters {
                let values = weights(i).and_then(|w| match w.len() == saved[i].mean.len() {
                    true => Ok(w),
                    false => Err(TrainError::request(format!("{}: {} weights", saved[i].name, w.len()))),
                });
                let values = values.map_err(|e| {
                    wrong = Some(e);
                    std::io::Error::other("no weights")
                })?;
                for values in [&*values, saved[i].mean, saved[i].square] {
                    put(bytemuck::cast_slice(values))?;
                }
            }
            Ok(())
        });
        if let Some(wrong) = wrong {
            return Err(wrong);
        }
        filled.map_err(|e| TrainError::io("write", &path, e))?;
        let note = serde_json::to_vec(&ShardNote { file, bytes, crc32: crc.finalize() });
        let note = note.map_err(|e| TrainError::request(e.to_string()))?;
        self.write(&dir.join(format!("rank-{rank:04}.json")), &note)
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
        self.write(&partial.join(MANIFEST), &text)?;
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
        self.write(&new, name(state.step).as_bytes())?;
        self.rename(&new, &self.dir.join(LATEST))?;
        self.sync(&self.dir)?;
        self.remove_old(state.step, state.good)?;
        Ok(last)
    }

    /// Removes checkpoints before step `newest` beyond the number to keep, but not the one of step `good`.
    fn remove_old(&self, newest: u64, good: Option<u64>) -> Result<()> {
        let entries = std::fs::read_dir(&self.dir).map_err(|e| TrainError::io("list", &self.dir, e))?;
        let mut steps: Vec<u64> = entries
            .flatten()
            .filter_map(|e| e.file_name().to_str()?.strip_prefix("step-")?.parse().ok())
            .filter(|step| *step < newest)
            .collect();
        steps.sort_unstable_by(|a, b| b.cmp(a));
        for &step in steps.iter().skip(self.keep - 1).filter(|step| Some(**step) != good) {
            // Renamed first: a checkpoint that is half removed must not look like one.
            let old = self.dir.join(name(step) + ".old");
            self.rename(&self.dir.join(name(step)), &old)?;
            self.files.remove_dir(&old).map_err(|e| TrainError::io("remove", &old, e))?;
        }
        Ok(())
    }
}

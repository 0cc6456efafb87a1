//! A checkpoint is complete or absent, whatever fails.

mod common;

use std::io;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};

use common::*;
use occult_train::TrainError;
use occult_train::checkpoint::{Checkpoint, DiskFiles, Files, Fill, Kind, latest};

/// Fails at one operation (leaving half a file), as a full disk does; or there and ever after, as a lost machine does.
struct Failing {
    count: AtomicUsize,
    at: usize,
    for_ever: bool,
}

impl Failing {
    fn step(&self) -> io::Result<()> {
        let n = self.count.fetch_add(1, Ordering::Relaxed);
        let fails = if self.for_ever { n >= self.at } else { n == self.at };
        if fails {
            Err(io::Error::new(io::ErrorKind::StorageFull, "no space left on device"))
        } else {
            Ok(())
        }
    }
}

/// A file of which each piece may fail, half written.
struct Piecewise<'a> {
    file: std::fs::File,
    files: &'a Failing,
}

impl io::Write for Piecewise<'_> {
    fn write(&mut self, piece: &[u8]) -> io::Result<usize> {
        if let Err(e) = self.files.step() {
            self.file.write_all(&piece[..piece.len() / 2])?;
            return Err(e);
        }
        self.file.write_all(piece)?;
        Ok(piece.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Files for Failing {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        self.step()?;
        DiskFiles.create_dir(path)
    }
    fn write(&self, path: &Path, fill: &mut Fill<'_>) -> io::Result<()> {
        fill(&mut Piecewise { file: std::fs::File::create(path)?, files: self })?;
        self.step()
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.step()?;
        DiskFiles.rename(from, to)
    }
    fn sync_dir(&self, _: &Path) -> io::Result<()> {
        self.step()
    }
    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        // Removing can stop half way: one file is gone.
        if let Err(e) = self.step() {
            if let Some(Ok(entry)) = std::fs::read_dir(path).ok().and_then(|mut d| d.next()) {
                std::fs::remove_file(entry.path())?;
            }
            return Err(e);
        }
        DiskFiles.remove_dir(path)
    }
}

#[test]
fn a_failure_at_any_operation_leaves_a_good_checkpoint() {
    let (whole, _) = on_disk(tempfile::tempdir().unwrap().path(), 14, u64::MAX, false).unwrap();
    let mut operations = 0;
    for for_ever in [false, true] {
        for at in 0.. {
            let dir = tempfile::tempdir().unwrap();
            let files = Failing { count: AtomicUsize::new(0), at, for_ever };
            let error = match train(dir.path(), &files, 14, u64::MAX, false) {
                // Past the last operation.
                Ok(_) => {
                    operations = at;
                    break;
                }
                Err(error) => error,
            };
            assert!(error.to_string().contains("no space left on device"), "{error}");
            let saved = latest(dir.path()).unwrap();
            match &error {
                TrainError::Io { .. } => assert_eq!(saved, None, "{error}"),
                TrainError::NotSaved { last_good, .. } => assert_eq!(*last_good, saved, "{error}"),
                other => panic!("{other}"),
            }
            if let Some(path) = &saved {
                let step = Checkpoint::open(path).unwrap().state().step;
                assert!(path.ends_with(format!("step-{step:08}")));
            }
            let (end, _) = on_disk(dir.path(), 14, u64::MAX, saved.is_some()).unwrap();
            assert_eq!(end, whole, "failure at operation {at}");
            let names = std::fs::read_dir(dir.path()).unwrap();
            let partial = names.flatten().filter(|e| e.file_name().to_string_lossy().contains('.'));
            let left = partial.filter(|e| e.file_name() != "log.jsonl").count();
            assert_eq!(left, 0, "something half-written is left");
        }
    }
    assert!(operations > 60, "{operations}");
}

/// Not a test: the process that the next one kills.
#[test]
#[ignore = "runs inside killed_at_any_moment_it_resumes_to_the_bit"]
fn child() {
    let Ok(dir) = std::env::var("OCCULT_TRAIN_CHILD") else { return };
    let dir = Path::new(&dir);
    let resume = latest(dir).unwrap().is_some();
    let (bits, _) = on_disk(dir, KILL_STEPS, u64::MAX, resume).unwrap();
    let bytes: Vec<u8> = bits.iter().flat_map(|b| b.to_le_bytes()).collect();
    std::fs::write(dir.join("result.new"), bytes).unwrap();
    std::fs::rename(dir.join("result.new"), dir.join("result")).unwrap();
}

const KILL_STEPS: u64 = 400;

#[test]
fn killed_at_any_moment_it_resumes_to_the_bit() {
    let (whole, _) = on_disk(tempfile::tempdir().unwrap().path(), KILL_STEPS, u64::MAX, false).unwrap();
    let expected: Vec<u8> = whole.iter().flat_map(|b| b.to_le_bytes()).collect();
    let spawn = |dir: &Path| {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "child", "--ignored"]).env("OCCULT_TRAIN_CHILD", dir);
        command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
    };
    let mut kills = 0;
    for round in 0u64.. {
        let dir = tempfile::tempdir().unwrap();
        // Several kills in a row on the same run, at moments given by how much of its log is written: no clock.
        for kill in 0..4 {
            let mut child = spawn(dir.path());
            let written = || std::fs::metadata(dir.path().join("log.jsonl")).map_or(0, |m| m.len());
            let until = written() + 1 + occult_train::random::key(&[round, kill]) % 15_000;
            while written() < until && child.try_wait().unwrap().is_none() {
                std::thread::yield_now();
            }
            let ended = child.try_wait().unwrap().is_some();
            // SIGKILL on unix.
            let _ = child.kill();
            child.wait().unwrap();
            if ended {
                break;
            }
            kills += 1;
            if let Some(path) = latest(dir.path()).unwrap() {
                Checkpoint::open(&path).unwrap();
            }
        }
        assert!(spawn(dir.path()).wait().unwrap().success(), "round {round} does not resume");
        assert_eq!(std::fs::read(dir.path().join("result")).unwrap(), expected, "round {round}");
        if kills >= 20 {
            break;
        }
        assert!(round < 40, "only {kills} kills hit a running child");
    }
}

#[test]
fn damaged_and_foreign_checkpoints_are_named() {
    let dir = tempfile::tempdir().unwrap();
    on_disk(dir.path(), 14, 3, false).unwrap();
    let path = latest(dir.path()).unwrap().unwrap();
    let (shard, manifest) = (path.join("rank-0000.safetensors"), path.join("checkpoint.json"));
    let (bytes, text) = (std::fs::read(&shard).unwrap(), std::fs::read_to_string(&manifest).unwrap());
    let open = || Checkpoint::open(&path).map(|_| ()).unwrap_err();

    std::fs::write(&shard, &bytes[..bytes.len() - 1]).unwrap();
    assert!(matches!(open(), TrainError::Truncated { .. }));
    let mut flipped = bytes.clone();
    flipped[bytes.len() - 5] ^= 1;
    std::fs::write(&shard, &flipped).unwrap();
    assert!(matches!(open(), TrainError::Damaged { .. }));
    std::fs::remove_file(&shard).unwrap();
    assert!(matches!(open(), TrainError::Io { .. }));
    std::fs::write(&shard, &bytes).unwrap();

    std::fs::write(&manifest, text.replace("\"version\": 2", "\"version\": 1")).unwrap();
    assert!(matches!(open(), TrainError::Version { found: 1, expected: 2, .. }));
    std::fs::write(&manifest, text.replace("rank-0000.safetensors", "../x")).unwrap();
    assert!(open().to_string().contains("a shard called"));
    std::fs::write(&manifest, &text[..text.len() / 2]).unwrap();
    assert!(matches!(open(), TrainError::Damaged { .. }));
    std::fs::write(&manifest, text.replace("bigram of", "trigram of")).unwrap();
    let error = on_disk(dir.path(), 14, 14, true).unwrap_err();
    assert!(matches!(&error, TrainError::Other { what, .. } if what == "model"), "{error}");
    std::fs::write(&manifest, &text).unwrap();

    let mut checkpoint = Checkpoint::open(&path).unwrap();
    let experts = |ids: &[u32]| Kind::Experts(ids.to_vec());
    let swapped = checkpoint.parameter("experts", &[2, V], &experts(&[4, 1])).unwrap();
    let all = checkpoint.parameter("experts", &[E, V], &experts(&[0, 1, 2, 3, 4, 5])).unwrap();
    for (part, whole) in swapped.iter().zip(&all) {
        assert_eq!(part[..V], whole[4 * V..5 * V]);
        assert_eq!(part[V..], whole[V..2 * V]);
    }
    for (result, expected) in [
        (checkpoint.parameter("experts", &[1, V], &experts(&[6])), "no expert 6 of experts"),
        (checkpoint.parameter("experts", &[1, 3], &experts(&[1])), "shape of experts"),
        (checkpoint.parameter("table", &[V, 3], &Kind::Replicated), "shape of table"),
        (checkpoint.parameter("chair", &[V, 3], &Kind::Replicated), "no parameter chair"),
    ] {
        let message = result.unwrap_err().to_string();
        assert!(message.contains(expected), "{message:?} lacks {expected:?}");
    }
    std::fs::write(dir.path().join("latest"), "step-9").unwrap();
    assert!(latest(dir.path()).unwrap_err().to_string().contains("no checkpoint here"));
}

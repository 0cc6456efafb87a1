//! The training log: one JSON object per line and step.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Result, TrainError};

/// What is known after a step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// Steps taken, this one counted.
    pub step: u64,
    /// Mean cross-entropy per learned target, in nats, over all ranks; absent when it was no number.
    pub loss: Option<f64>,
    /// Learning rate.
    pub lr: f64,
    /// Norm of all gradients before clipping; absent when it was no number.
    pub grad_norm: Option<f64>,
    /// Whether the weights stayed as they were because the gradients were not finite.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub skipped: bool,
    /// Inputs of this step, all ranks, padding not counted.
    pub tokens: u64,
    /// Those per second of this step.
    pub tokens_per_s: f64,
    /// Most ranks of a token in this step, where there is a limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<usize>,
    /// What the model reports, means over the tokens of all micro-batches and ranks: "C_T" (ranks a token visits),
    /// "C_T_unlimited" (those it would visit without the limit), "C_T_drift" (the latter over what the placement had at the
    /// first step, or promised), "rank_load", "balancedness", "aux_loss", "router_z_loss"; "val_loss" and "val_loss/NAME"
    /// where held-out data were measured; "C_T_held_out", "C_T_searched" and "replaced" (1 or 0) where another placement was
    /// looked for.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub figures: BTreeMap<String, f64>,
    /// What did not work in this step, though the run goes on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warning: Option<String>,
}

/// Appends to a log.
#[derive(Debug)]
pub struct Log {
    path: PathBuf,
    file: File,
}

impl Log {
    /// Opens the log of a run that has taken `step` steps: entries of later steps, and a last line that was not finished, are
    /// cut off. Creates the file where there is none.
    pub fn open(path: &Path, step: u64) -> Result<Self> {
        let failed = |e| TrainError::io("open", path, e);
        let file = OpenOptions::new().create(true).read(true).append(true).open(path).map_err(failed)?;
        let mut reader = BufReader::new(&file);
        let (mut line, mut keep) = (Vec::new(), 0u64);
        loop {
            line.clear();
            let n = reader.read_until(b'\n', &mut line).map_err(|e| TrainError::io("read", path, e))?;
            let entry = serde_json::from_slice::<Entry>(&line);
            if n == 0 || line.last() != Some(&b'\n') || !entry.is_ok_and(|e| e.step <= step) {
                break;
            }
            keep += n as u64;
        }
        file.set_len(keep).map_err(|e| TrainError::io("cut", path, e))?;
        Ok(Self { path: path.into(), file })
    }

    /// Adds a line.
    pub fn push(&mut self, entry: &Entry) -> Result<()> {
        let mut line = serde_json::to_vec(entry).map_err(|e| TrainError::request(e.to_string()))?;
        line.push(b'\n');
        self.file.write_all(&line).map_err(|e| TrainError::io("write", &self.path, e))
    }
}

/// All entries of a log. A last line that was not finished is left out; any other broken line is an error.
pub fn read(path: &Path) -> Result<Vec<Entry>> {
    let text = std::fs::read_to_string(path).map_err(|e| TrainError::io("read", path, e))?;
    let whole = text.rfind('\n').map_or(0, |at| at + 1);
    let parse = |(i, line): (usize, &str)| {
        serde_json::from_str(line)
            .map_err(|e| TrainError::data(path, i + 1, format!("broken log entry: {e}")))
    };
    text[..whole].lines().enumerate().map(parse).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(step: u64) -> Entry {
        let figures = BTreeMap::from([("C_T".to_owned(), 1.5)]);
        let (loss, grad_norm) = ((step != 2).then_some(3.25), Some(1.0));
        Entry {
            step,
            loss,
            lr: 1e-3,
            grad_norm,
            skipped: step == 2,
            tokens: 7,
            tokens_per_s: 9.0,
            limit: None,
            figures,
            warning: None,
        }
    }

    #[test]
    fn a_resumed_log_has_each_step_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log.jsonl");
        let mut log = Log::open(&path, 0).unwrap();
        (1..=5).for_each(|s| log.push(&entry(s)).unwrap());
        drop(log);
        // Killed while writing.
        OpenOptions::new().append(true).open(&path).unwrap().write_all(b"{\"step\":6,").unwrap();
        assert_eq!(read(&path).unwrap().len(), 5);
        let mut log = Log::open(&path, 3).unwrap();
        log.push(&entry(4)).unwrap();
        assert_eq!(read(&path).unwrap(), (1..=4).map(entry).collect::<Vec<_>>());
        let mut log = Log::open(&path, 9).unwrap();
        log.push(&entry(5)).unwrap();
        assert_eq!(read(&path).unwrap().len(), 5);
        std::fs::write(&path, "{}\n").unwrap();
        assert!(read(&path).unwrap_err().to_string().contains("line 1: broken log entry"));
    }
}

//! Runs the program on the tiny checkpoints of occult-model.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Directory of the checkpoints.
pub(crate) fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../occult-model/tests/fixtures")
}

/// One of them.
pub(crate) fn model(case: &str) -> String {
    fixtures().join(case).to_str().expect("UTF-8").to_owned()
}

pub(crate) fn occult(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_occult")).args(args).output().expect("occult runs")
}

/// Standard output of a command that must succeed.
pub(crate) fn done(args: &[&str]) -> String {
    let out = occult(args);
    assert!(out.status.success(), "occult {args:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).expect("UTF-8")
}

/// The message of a command that must fail with this exit code.
pub(crate) fn fails(args: &[&str], code: i32) -> String {
    let out = occult(args);
    assert_eq!(out.status.code(), Some(code), "occult {args:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stderr).expect("UTF-8")
}

/// A temporary folder.
pub(crate) struct Dir(tempfile::TempDir);

impl Dir {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().expect("a directory"))
    }

    pub(crate) fn path(&self, name: &str) -> String {
        self.0.path().join(name).to_str().expect("UTF-8").to_owned()
    }

    pub(crate) fn write(&self, name: &str, text: &str) -> String {
        std::fs::write(self.path(name), text).expect("written");
        self.path(name)
    }

    /// What is in it, sorted.
    pub(crate) fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.0.path()).expect("a directory");
        let mut names: Vec<String> =
            entries.map(|e| e.expect("entry").file_name().into_string().expect("UTF-8")).collect();
        names.sort();
        names
    }
}

//! Runs the program in a folder of its own, as a user would, on inputs that are built here.
//!
//! Nothing in these tests uses the project's own libraries: what must come out is computed in [`measure`] from the
//! definitions, or read from the files that the program wrote.
#![allow(dead_code, unused_imports, reason = "each test binary uses some of these")]

pub(crate) mod files;
pub(crate) mod measure;
pub(crate) mod models;
pub(crate) mod room;
pub(crate) mod rows;

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

pub(crate) use files::{Array, npz, safetensors};
pub(crate) use measure::{Table, close};
pub(crate) use rows::Rows;

/// Real routing that comes with the program.
pub(crate) fn bundled() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("data/gpt-oss-20b")
}

/// A temporary folder in which commands run.
pub(crate) struct Lab {
    dir: tempfile::TempDir,
    /// Where the program would put temporary files of its own.
    temporary: tempfile::TempDir,
}

impl Lab {
    pub(crate) fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap(), temporary: tempfile::tempdir().unwrap() }
    }

    /// With `profile.safetensors`, imported from these rows.
    pub(crate) fn with(rows: &Rows) -> Self {
        let lab = Self::new();
        lab.write("rows.safetensors", rows.safetensors());
        lab.ok("import rows.safetensors -o profile.safetensors");
        lab
    }

    /// With `profile.safetensors`, the bundled routing.
    pub(crate) fn with_bundled() -> Self {
        let lab = Self::new();
        lab.ok(&format!("import {} -o profile.safetensors", bundled().display()));
        lab
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn write(&self, name: &str, bytes: impl AsRef<[u8]>) {
        let path = self.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    }

    pub(crate) fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path().join(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    pub(crate) fn text(&self, name: &str) -> String {
        String::from_utf8(self.read(name)).unwrap()
    }

    pub(crate) fn json(&self, name: &str) -> Value {
        serde_json::from_slice(&self.read(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    /// Everything in the folder, hidden files too, sorted.
    pub(crate) fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.path()).unwrap();
        let mut names: Vec<String> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// Runs `occult` with arguments separated by spaces.
    pub(crate) fn run(&self, arguments: &str) -> Outcome {
        let output = Command::new(env!("CARGO_BIN_EXE_occult"))
            .args(arguments.split_whitespace())
            .current_dir(self.path())
            .env("TMPDIR", self.temporary.path())
            .output()
            .unwrap();
        let left = std::fs::read_dir(self.temporary.path()).unwrap().count();
        assert_eq!(left, 0, "occult {arguments} left temporary files");
        Outcome {
            command: format!("occult {arguments}"),
            code: output.status.code().unwrap_or_else(|| panic!("occult {arguments}: {}", output.status)),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }

    /// Runs a command that must succeed.
    #[track_caller]
    pub(crate) fn ok(&self, arguments: &str) -> Outcome {
        let outcome = self.run(arguments);
        assert_eq!(outcome.code, 0, "{outcome:?}");
        outcome
    }

    /// Runs a command with `--json` that must succeed; its standard output is one JSON value.
    #[track_caller]
    pub(crate) fn figures(&self, arguments: &str) -> Value {
        let outcome = self.ok(&format!("{arguments} --json"));
        serde_json::from_str(&outcome.stdout).unwrap_or_else(|e| panic!("{e}: {outcome:?}"))
    }

    /// Runs a command that must fail with this code, in one line on standard error, leaving every file as it was.
    #[track_caller]
    pub(crate) fn refused(&self, code: i32, arguments: &str) -> String {
        let before = self.contents();
        let outcome = self.run(arguments);
        assert_eq!(outcome.code, code, "{outcome:?}");
        assert_eq!(outcome.stdout, "", "{outcome:?}");
        assert!(before == self.contents(), "files changed: {:?} after {outcome:?}", self.names());
        if code != 2 {
            assert_eq!(outcome.stderr.lines().count(), 1, "{outcome:?}");
            assert!(outcome.stderr.starts_with("occult: "), "{outcome:?}");
        }
        assert!(!outcome.stderr.contains("panicked"), "{outcome:?}");
        outcome.stderr
    }

    fn contents(&self) -> Vec<(String, Option<Vec<u8>>)> {
        let read = |name: String| (name.clone(), std::fs::read(self.path().join(name)).ok());
        self.names().into_iter().map(read).collect()
    }
}

/// How a command ended.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) command: String,
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// Checks that a message has all these parts.
#[track_caller]
pub(crate) fn says(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "{message:?} does not say {part:?}");
    }
}

/// A number of a JSON object.
#[track_caller]
pub(crate) fn number(object: &Value, key: &str) -> f64 {
    object[key].as_f64().unwrap_or_else(|| panic!("{key} is no number in {object}"))
}

/// A JSON list.
#[track_caller]
pub(crate) fn list<'a>(object: &'a Value, key: &str) -> &'a [Value] {
    object[key].as_array().unwrap_or_else(|| panic!("{key} is no list in {object}"))
}

/// A JSON list of whole numbers.
#[track_caller]
pub(crate) fn ints(value: &Value) -> Vec<usize> {
    let items = value.as_array().unwrap_or_else(|| panic!("{value} is no list"));
    items.iter().map(|v| v.as_u64().unwrap_or_else(|| panic!("{v} is no number")) as usize).collect()
}

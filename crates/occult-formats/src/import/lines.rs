//! Text inputs line by line, with the line number for errors.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

use crate::error::{FormatError, Result};

/// Longest line that is read.
const MAX_LINE: u64 = 256 << 20;

/// A text file, read one line at a time.
pub(super) struct Lines<'a> {
    path: &'a Path,
    reader: BufReader<File>,
    line: Vec<u8>,
    number: u64,
    bytes: u64,
    len: u64,
}

impl<'a> Lines<'a> {
    pub(super) fn open(path: &'a Path) -> Result<Self> {
        let (file, len) = crate::io::open(path)?;
        let reader = BufReader::with_capacity(1 << 18, file);
        Ok(Self { path, reader, line: Vec::new(), number: 0, bytes: 0, len })
    }

    /// The next line that is not blank; `None` at the end.
    pub(super) fn next_line(&mut self) -> Result<Option<&[u8]>> {
        loop {
            self.line.clear();
            self.number += 1;
            let n = (&mut self.reader)
                .take(MAX_LINE)
                .read_until(b'\n', &mut self.line)
                .map_err(|e| FormatError::io("read", self.path, e))?;
            if n == 0 {
                return Ok(None);
            }
            if n as u64 == MAX_LINE {
                return Err(self.bad(format!("is longer than {MAX_LINE} bytes")));
            }
            self.bytes += n as u64;
            if !self.line.trim_ascii().is_empty() {
                return Ok(Some(self.line.trim_ascii()));
            }
        }
    }

    /// The next line as JSON.
    pub(super) fn next_json<T: DeserializeOwned>(&mut self) -> Result<Option<T>> {
        let parsed = match self.next_line()? {
            None => return Ok(None),
            Some(line) => serde_json::from_slice(line),
        };
        // serde_json counts lines inside the text it was given, which is one line: only its column means something.
        parsed.map(Some).map_err(|e| {
            let text = e.to_string();
            let text = text.split(" at line ").next().unwrap_or_default();
            self.bad(format!("broken JSON at column {}: {text}", e.column()))
        })
    }

    /// An error at the line read last.
    pub(super) fn bad(&self, message: impl Into<String>) -> FormatError {
        FormatError::bad(self.path, format!("line {}", self.number), message)
    }

    /// Bytes read so far.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Bytes of the file.
    pub(super) fn len(&self) -> u64 {
        self.len
    }
}

/// Replaces folders by those of their files that `wanted` accepts, sorted by the number in their name, then by name.
pub(super) fn expand(inputs: &[PathBuf], wanted: &dyn Fn(&str) -> bool, what: &str) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for input in inputs {
        if !input.is_dir() {
            files.push(input.clone());
            continue;
        }
        let mut found = Vec::new();
        for entry in std::fs::read_dir(input).map_err(|e| FormatError::io("list", input, e))? {
            let path = entry.map_err(|e| FormatError::io("list", input, e))?.path();
            let name = crate::io::file_name(&path);
            if wanted(&name) {
                found.push((first_number(&name), name, path));
            }
        }
        if found.is_empty() {
            return Err(FormatError::bad(input, "", format!("holds no {what}")));
        }
        found.sort();
        files.extend(found.into_iter().map(|(_, _, path)| path));
    }
    Ok(files)
}

/// The first number in a name: the rank of `rank12.safetensors`.
pub(super) fn first_number(name: &str) -> Option<u64> {
    let digits: String =
        name.chars().skip_while(|c| !c.is_ascii_digit()).take_while(char::is_ascii_digit).collect();
    digits.parse().ok()
}

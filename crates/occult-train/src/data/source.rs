//! Files of training data, read record by record.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use serde::de::{DeserializeSeed, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{Result, TrainError};
use crate::random::hash_bytes;

/// A line that ends a document of a text file.
pub const DOCUMENT_END: &str = "<|endoftext|>";
/// A text document longer than this is cut at the next empty line (or, at four times this, at the next line), so that a
/// file of any size can be read in bounded memory.
pub const TEXT_PIECE_BYTES: usize = 1 << 20;

/// What a file holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// UTF-8 text; documents end at a line `<|endoftext|>` or at the end of the file.
    Text,
    /// JSON lines with a field `text`.
    TextLines,
    /// Alpaca style: a JSON list or JSON lines of `instruction`, `input` (may be absent or empty) and `output`.
    Instructions,
    /// JSON lines (or a list) with `messages`: `role` and `content`.
    Chats,
}

/// One turn of a chat.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Turn {
    /// "system", "user" or "assistant".
    pub role: String,
    /// What is said.
    pub content: String,
}

/// One document as a file gives it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Record {
    /// Text, learned from the first token on.
    Text(String),
    /// A task and its answer; only the answer is learned.
    Instruction {
        /// What to do.
        instruction: String,
        /// To what; may be empty.
        input: String,
        /// The answer.
        output: String,
    },
    /// A conversation; only what the assistant says is learned.
    Chat(Vec<Turn>),
}

impl Record {
    /// A hash of the content: the same document falls on the same side of a split wherever it stands.
    pub fn hash(&self) -> u64 {
        let fields: Vec<&str> = match self {
            Record::Text(text) => vec![text],
            Record::Instruction { instruction, input, output } => vec![instruction, input, output],
            Record::Chat(turns) => turns.iter().flat_map(|t| [t.role.as_str(), t.content.as_str()]).collect(),
        };
        crate::random::key(&fields.iter().map(|f| hash_bytes(f.as_bytes())).collect::<Vec<_>>())
    }
}

impl Format {
    /// Judges a file by its extension and, for JSON, by the fields of its first record. A file that is called JSON and is not
    /// is an error: taken as text, its mistake would be trained on.
    pub fn detect(path: &Path) -> Result<Self> {
        let mut reader = open(path)?;
        let (first, line) = first_byte(&mut reader, path)?;
        let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
        if !matches!(extension.to_ascii_lowercase().as_str(), "json" | "jsonl" | "ndjson") {
            return Ok(Format::Text);
        }
        if !matches!(first, b'{' | b'[') {
            let message = format!(
                "begins with {:?}; a .{extension} file is expected to hold JSON objects, one per line or in a list",
                char::from(first)
            );
            return Err(TrainError::data(path, line, message));
        }
        let mut first_record = None;
        // Stops after the first record; the error that stops it is dropped, any other is reported when it is read.
        let read = for_each_value(path, &mut |value, _| {
            first_record = Some(value);
            Err(TrainError::request("enough"))
        });
        let Some(record) = first_record else {
            return Err(read.err().unwrap_or_else(|| TrainError::data(path, None, "no record in it")));
        };
        let has = |key: &str| record.get(key).is_some();
        if has("messages") {
            Ok(Format::Chats)
        } else if has("instruction") || has("output") {
            Ok(Format::Instructions)
        } else if has("text") {
            Ok(Format::TextLines)
        } else {
            let keys = record.as_object().map(|o| o.keys().cloned().collect::<Vec<_>>().join(", "));
            let message = format!(
                "its first record has the fields [{}]; expected text, or instruction and output, or messages",
                keys.unwrap_or_default()
            );
            Err(TrainError::data(path, None, message))
        }
    }
}

/// Calls `each` with every record and its line where that is known. Stops at the first error.
pub fn for_each_record(
    path: &Path,
    format: Format,
    each: &mut dyn FnMut(Record, Option<usize>) -> Result<()>,
) -> Result<()> {
    let mut count = 0u64;
    let mut counted = |record, line| {
        count += 1;
        each(record, line)
    };
    match format {
        Format::Text => for_each_text(path, &mut counted)?,
        _ => for_each_value(path, &mut |value, line| {
            let record = parse(format, value).map_err(|message| TrainError::data(path, line, message))?;
            counted(record, line)
        })?,
    }
    if count == 0 {
        return Err(TrainError::data(path, None, "the file is empty: no document in it"));
    }
    Ok(())
}

fn open(path: &Path) -> Result<BufReader<File>> {
    if path.is_dir() {
        return Err(TrainError::data(path, None, "is a directory, expected a file"));
    }
    Ok(BufReader::new(File::open(path).map_err(|e| TrainError::io("open", path, e))?))
}

/// Skips a byte order mark and white space; the first byte that is left, unread, and its line. Errors for an empty file.
fn first_byte(reader: &mut BufReader<File>, path: &Path) -> Result<(u8, usize)> {
    let mut line = 1;
    loop {
        let buffer = reader.fill_buf().map_err(|e| TrainError::io("read", path, e))?;
        if buffer.is_empty() {
            return Err(TrainError::data(path, None, "the file is empty"));
        }
        if buffer.starts_with(&[0xef, 0xbb, 0xbf]) {
            reader.consume(3);
            continue;
        }
        let blank = buffer.iter().take_while(|b| b.is_ascii_whitespace()).count();
        line += buffer[..blank].iter().filter(|b| **b == b'\n').count();
        if let Some(&byte) = buffer.get(blank) {
            return Ok((byte, line));
        }
        reader.consume(blank);
    }
}

/// The lines of a file, checked to be text. `None` at the end.
struct Lines<'a> {
    path: &'a Path,
    reader: BufReader<File>,
    number: usize,
}

impl Lines<'_> {
    /// Appends the next line, with its end, to `line`.
    fn next(&mut self, line: &mut String) -> Result<bool> {
        self.number += 1;
        let mut bytes = Vec::new();
        self.reader.read_until(b'\n', &mut bytes).map_err(|e| TrainError::io("read", self.path, e))?;
        if bytes.is_empty() {
            return Ok(false);
        }
        if let Some(at) = bytes.iter().position(|&b| b == 0) {
            let message = format!("not a text file: byte {at} of the line is zero");
            return Err(TrainError::data(self.path, self.number, message));
        }
        let text = std::str::from_utf8(&bytes).map_err(|e| {
            let message = format!("not a UTF-8 text file: byte {} of the line", e.valid_up_to());
            TrainError::data(self.path, self.number, message)
        })?;
        line.push_str(if self.number == 1 { text.trim_start_matches('\u{feff}') } else { text });
        Ok(true)
    }
}

fn for_each_text(path: &Path, each: &mut dyn FnMut(Record, Option<usize>) -> Result<()>) -> Result<()> {
    let mut lines = Lines { path, reader: open(path)?, number: 0 };
    let (mut text, mut line, mut start) = (String::new(), String::new(), 1);
    loop {
        line.clear();
        let more = lines.next(&mut line)?;
        let ends = line.trim_end() == DOCUMENT_END;
        if more && !ends {
            text.push_str(&line);
        }
        let blank = line.trim().is_empty();
        let cut = text.len() >= TEXT_PIECE_BYTES && blank || text.len() >= 4 * TEXT_PIECE_BYTES;
        if !more || ends || cut {
            let piece = std::mem::take(&mut text);
            if !piece.trim().is_empty() {
                each(Record::Text(piece), Some(start))?;
            }
            start = lines.number + 1;
        }
        if !more {
            return Ok(());
        }
    }
}

/// Every JSON value of a list or of lines.
fn for_each_value(path: &Path, each: &mut dyn FnMut(Value, Option<usize>) -> Result<()>) -> Result<()> {
    let mut reader = open(path)?;
    if first_byte(&mut reader, path)?.0 == b'[' {
        return for_each_of_list(path, reader, each);
    }
    let mut lines = Lines { path, reader: open(path)?, number: 0 };
    let mut line = String::new();
    loop {
        line.clear();
        if !lines.next(&mut line)? {
            return Ok(());
        }
        if line.trim().is_empty() {
            continue;
        }
        let value = serde_json::from_str(&line)
            .map_err(|e| TrainError::data(path, lines.number, format!("broken JSON: {e}")))?;
        each(value, Some(lines.number))?;
    }
}

/// The elements of one JSON list, one at a time.
fn for_each_of_list(
    path: &Path,
    reader: impl Read,
    each: &mut dyn FnMut(Value, Option<usize>) -> Result<()>,
) -> Result<()> {
    struct List<'a> {
        each: &'a mut dyn FnMut(Value, Option<usize>) -> Result<()>,
        failed: &'a mut Option<TrainError>,
    }
    impl<'de> DeserializeSeed<'de> for List<'_> {
        type Value = ();
        fn deserialize<D: serde::Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
            deserializer.deserialize_seq(self)
        }
    }
    impl<'de> Visitor<'de> for List<'_> {
        type Value = ();
        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("a list of records")
        }
        fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
            while let Some(value) = list.next_element::<Value>()? {
                if let Err(e) = (self.each)(value, None) {
                    *self.failed = Some(e);
                    return Err(serde::de::Error::custom("stopped"));
                }
            }
            Ok(())
        }
    }
    let mut failed = None;
    let mut count = 0usize;
    let mut numbered = |value, _| {
        count += 1;
        each(value, None).map_err(|e| match e {
            TrainError::Data { file, line: None, message } => {
                TrainError::data(&file, None, format!("record {count}: {message}"))
            }
            other => other,
        })
    };
    let mut json = serde_json::Deserializer::from_reader(reader);
    let read =
        List { each: &mut numbered, failed: &mut failed }.deserialize(&mut json).and_then(|()| json.end());
    if let Some(e) = failed {
        return Err(e);
    }
    read.map_err(|e| TrainError::data(path, (e.line() > 0).then(|| e.line()), format!("broken JSON: {e}")))
}

fn parse(format: Format, value: Value) -> Result<Record, String> {
    let Value::Object(mut fields) = value else {
        return Err("expected an object".into());
    };
    let mut text = |key: &str| match fields.remove(key) {
        Some(Value::String(s)) => Ok(s),
        Some(_) => Err(format!("field `{key}` is not a text")),
        None => Err(format!("missing field `{key}`")),
    };
    match format {
        Format::Text | Format::TextLines => Ok(Record::Text(text("text")?)),
        Format::Instructions => {
            let (instruction, output) = (text("instruction")?, text("output")?);
            let input = if fields.get("input").is_none_or(Value::is_null) {
                String::new()
            } else {
                let Some(Value::String(input)) = fields.remove("input") else {
                    return Err("field `input` is not a text".into());
                };
                input
            };
            Ok(Record::Instruction { instruction, input, output })
        }
        Format::Chats => {
            let messages = fields.remove("messages").ok_or("missing field `messages`")?;
            let turns: Vec<Turn> =
                serde_json::from_value(messages).map_err(|e| format!("field `messages`: {e}"))?;
            if !turns.iter().any(|t| t.role == "assistant") {
                return Err("no message of the assistant: nothing to learn".into());
            }
            Ok(Record::Chat(turns))
        }
    }
}

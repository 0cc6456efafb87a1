//! The token ids of all documents, one after another, in files that are read by position: a store of any size costs 16 bytes
//! of memory per document.
//!
//! A store is a directory: `tokens.bin` (u32 little endian; the top bit means *not learned*), `documents.bin` (16 bytes per
//! document: end offset u64 in tokens, source u32 with the top bit for *answers a prompt*, upper half of the content hash
//! u32), `store.json` (version, counts, what made it). It is written beside its final name and renamed when complete.

use std::fs::File;
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use serde::{Deserialize, Serialize};

use crate::data::encode::Encoded;
use crate::error::{Result, TrainError};

/// The bit of a stored token that says: not learned.
pub(crate) const NOT_LEARNED: u32 = 1 << 31;
/// The bit of a stored source that says: the document's answers need its prompt.
const PROMPTED: u32 = 1 << 31;
const VERSION: u32 = 1;

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Head {
    version: u32,
    tokens: u64,
    documents: u64,
    description: String,
}

/// One document of a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Document {
    /// First token.
    pub start: u64,
    /// Number of tokens.
    pub len: u64,
    /// Which input file it came from.
    pub source: u32,
    /// Upper half of the hash of its content.
    pub hash: u32,
    /// Whether something in it is learned as the answer to what is not: a part of it alone would be an answer to nothing.
    pub prompted: bool,
}

impl Document {
    /// Whether it belongs to the validation part when that is to hold `fraction` of all documents. Depends on the
    /// document's content alone: adding files never moves a document across.
    pub fn is_validation(&self, fraction: f64) -> bool {
        f64::from(self.hash) < fraction * 2f64.powi(32)
    }
}

/// A document's source with what its tokens say: a prompt is more than the token that begins a text.
fn stored_source(encoded: &Encoded, source: u32) -> u32 {
    let prompted = encoded.learn.iter().skip(1).any(|learned| !learned);
    source & !PROMPTED | if prompted { PROMPTED } else { 0 }
}

/// Removes the unfinished stores in a folder: what killed encodings have left. Only while nobody encodes there.
pub fn remove_unfinished(folder: &Path) -> Result<()> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Ok(()) };
    for path in entries.flatten().map(|e| e.path()) {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name.contains(".store.") && name.ends_with(".partial") && path.is_dir() {
            std::fs::remove_dir_all(&path).map_err(|e| TrainError::io("remove", &path, e))?;
        }
    }
    Ok(())
}

/// Writes a store document by document.
#[derive(Debug)]
pub struct StoreWriter {
    dir: PathBuf,
    temporary: PathBuf,
    tokens: BufWriter<File>,
    documents: BufWriter<File>,
    head: Head,
}

impl StoreWriter {
    /// Begins the store `dir`, which must not exist. `description` should name tokenizer and files: a store is only used
    /// again by a run that describes it in the same words.
    pub fn create(dir: &Path, description: &str) -> Result<Self> {
        if dir.exists() {
            return Err(TrainError::request(format!("{} exists already", dir.display())));
        }
        let mut name = dir.file_name().unwrap_or_default().to_owned();
        name.push(format!(".{}.partial", std::process::id()));
        let temporary = dir.with_file_name(name);
        std::fs::create_dir_all(&temporary).map_err(|e| TrainError::io("create", &temporary, e))?;
        let create = |name: &str| {
            let path = temporary.join(name);
            File::create(&path).map(BufWriter::new).map_err(|e| TrainError::io("create", &path, e))
        };
        let (tokens, documents) = (create("tokens.bin")?, create("documents.bin")?);
        let head = Head { version: VERSION, tokens: 0, documents: 0, description: description.into() };
        Ok(Self { dir: dir.to_owned(), temporary, tokens, documents, head })
    }

    /// Adds a document.
    pub fn push(&mut self, encoded: &Encoded, source: u32, hash: u64) -> Result<()> {
        let failed = |e| TrainError::io("write", &self.temporary, e);
        for (&id, &learn) in encoded.ids.iter().zip(&encoded.learn) {
            let stored = if learn { id } else { id | NOT_LEARNED };
            self.tokens.write_all(&stored.to_le_bytes()).map_err(failed)?;
        }
        self.head.tokens += encoded.ids.len() as u64;
        self.head.documents += 1;
        let mut record = [0u8; 16];
        record[..8].copy_from_slice(&self.head.tokens.to_le_bytes());
        record[8..12].copy_from_slice(&stored_source(encoded, source).to_le_bytes());
        record[12..].copy_from_slice(&((hash >> 32) as u32).to_le_bytes());
        self.documents.write_all(&record).map_err(failed)
    }

    /// Completes the store under its name and opens it.
    pub fn finish(mut self) -> Result<TokenStore> {
        let temporary = self.temporary.clone();
        let failed = |e| TrainError::io("write", &temporary, e);
        for file in [&mut self.tokens, &mut self.documents] {
            file.flush().map_err(failed)?;
            file.get_ref().sync_all().map_err(failed)?;
        }
        let head = serde_json::to_vec_pretty(&self.head).map_err(|e| failed(e.into()))?;
        let mut file = File::create(temporary.join("store.json")).map_err(failed)?;
        file.write_all(&head).and_then(|()| file.sync_all()).map_err(failed)?;
        std::fs::rename(&temporary, &self.dir).map_err(|e| TrainError::io("rename", &self.dir, e))?;
        TokenStore::open(&self.dir)
    }
}

impl Drop for StoreWriter {
    fn drop(&mut self) {
        // After `finish` the temporary name is gone; nothing to be done where removing fails.
        let _ = std::fs::remove_dir_all(&self.temporary);
    }
}

#[derive(Debug)]
enum Tokens {
    Memory(Vec<u32>),
    File { path: PathBuf, file: Mutex<File> },
}

/// The documents of a store.
#[derive(Debug)]
pub struct TokenStore {
    tokens: Tokens,
    ends: Vec<u64>,
    sources: Vec<u32>,
    hashes: Vec<u32>,
    description: String,
}

impl TokenStore {
    /// A store in memory.
    pub fn in_memory(documents: impl IntoIterator<Item = (Encoded, u32, u64)>) -> Self {
        let (mut ends, mut sources, mut hashes, mut tokens) = (vec![], vec![], vec![], vec![]);
        for (encoded, source, hash) in documents {
            let stored = |(id, learn): (&u32, &bool)| if *learn { *id } else { *id | NOT_LEARNED };
            tokens.extend(encoded.ids.iter().zip(&encoded.learn).map(stored));
            ends.push(tokens.len() as u64);
            sources.push(stored_source(&encoded, source));
            hashes.push((hash >> 32) as u32);
        }
        Self { tokens: Tokens::Memory(tokens), ends, sources, hashes, description: String::new() }
    }

    /// Opens a store; its files are checked against each other first.
    pub fn open(dir: &Path) -> Result<Self> {
        let read = |name: &str| {
            let path = dir.join(name);
            std::fs::read(&path).map_err(|e| TrainError::io("read", &path, e))
        };
        let head_file = dir.join("store.json");
        let head: Head = serde_json::from_slice(&read("store.json")?)
            .map_err(|e| TrainError::damaged(&head_file, e.to_string()))?;
        if head.version != VERSION {
            let (found, expected) = (u64::from(head.version), u64::from(VERSION));
            return Err(TrainError::Version { path: head_file, found, expected });
        }
        let path = dir.join("tokens.bin");
        let file = File::open(&path).map_err(|e| TrainError::io("open", &path, e))?;
        let bytes = file.metadata().map_err(|e| TrainError::io("inspect", &path, e))?.len();
        if Some(bytes) != head.tokens.checked_mul(4) {
            let expected = head.tokens.saturating_mul(4);
            return Err(TrainError::Truncated { file: path, expected, found: bytes });
        }
        let records = read("documents.bin")?;
        let documents = dir.join("documents.bin");
        if Some(records.len() as u64) != head.documents.checked_mul(16) {
            let expected = head.documents.saturating_mul(16);
            return Err(TrainError::Truncated { file: documents, expected, found: records.len() as u64 });
        }
        let (mut ends, mut sources, mut hashes) = (vec![], vec![], vec![]);
        for record in records.chunks_exact(16) {
            let word =
                |at: usize| u32::from_le_bytes([record[at], record[at + 1], record[at + 2], record[at + 3]]);
            ends.push(u64::from(word(0)) | u64::from(word(4)) << 32);
            sources.push(word(8));
            hashes.push(word(12));
        }
        if !ends.is_sorted() || ends.last().copied().unwrap_or(0) != head.tokens {
            return Err(TrainError::damaged(&documents, "document offsets do not ascend to the token count"));
        }
        let tokens = Tokens::File { path, file: Mutex::new(file) };
        Ok(Self { tokens, ends, sources, hashes, description: head.description })
    }

    /// Number of documents.
    pub fn num_documents(&self) -> usize {
        self.ends.len()
    }

    /// Number of tokens.
    pub fn num_tokens(&self) -> u64 {
        self.ends.last().copied().unwrap_or(0)
    }

    /// What its writer said about it.
    pub fn description(&self) -> &str {
        &self.description
    }

    /// One document; `None` past the last.
    pub fn document(&self, index: usize) -> Option<Document> {
        let end = *self.ends.get(index)?;
        let start = if index == 0 { 0 } else { self.ends[index - 1] };
        let (source, hash) = (self.sources[index], self.hashes[index]);
        let (source, prompted) = (source & !PROMPTED, source & PROMPTED != 0);
        Some(Document { start, len: end - start, source, hash, prompted })
    }

    /// Tokens `start..start + len` as they are stored: the top bit marks those that are not learned.
    pub(crate) fn read(&self, start: u64, len: usize) -> Result<Vec<u32>> {
        match &self.tokens {
            Tokens::Memory(tokens) => {
                let range = start as usize..start as usize + len;
                let found = tokens.get(range).map(<[u32]>::to_vec);
                found.ok_or_else(|| TrainError::request(format!("no tokens at {start}, length {len}")))
            }
            Tokens::File { path, file } => {
                let mut bytes = vec![0u8; len * 4];
                let mut file = file.lock().unwrap_or_else(|e| e.into_inner());
                let read = file.seek(SeekFrom::Start(start * 4)).and_then(|_| file.read_exact(&mut bytes));
                read.map_err(|e| TrainError::io("read", path, e))?;
                let word = |b: &[u8]| u32::from_le_bytes([b[0], b[1], b[2], b[3]]);
                Ok(bytes.chunks_exact(4).map(word).collect())
            }
        }
    }
}

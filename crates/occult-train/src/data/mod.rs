//! From files to batches.
//!
//! 1. [`source`]: files are read record by record (text, instructions, chats); nothing is loaded whole.
//! 2. [`mod@encode`]: a record becomes token ids, each marked as *learned* or not (prompts are not).
//! 3. [`store`]: the ids of all documents in one file of 4 bytes per token, read by position.
//! 4. [`pack`]: documents become sequences of L inputs; a document never sees another one's tokens.
//! 5. [`loader`]: which sequences belong to which step and rank: a function of (seed, epoch, position).
//!
//! Letters: L sequence length, B sequences of a batch, n documents.

pub mod encode;
pub mod loader;
pub mod pack;
pub mod source;
pub mod store;

pub use encode::{Encoded, Tokenize, encode};
pub use loader::{Batch, Loader, share};
pub use pack::{LongDocument, PADDING, PackOptions, Packed, Part};
pub use source::{Format, Record, Turn, for_each_record};
pub use store::{StoreWriter, TokenStore, remove_unfinished};

use crate::error::{Result, TrainError};
use std::io::Read;
use std::path::Path;

/// The target of a position from which nothing is learned.
pub const IGNORE: u32 = u32::MAX;

/// A hash of a file's content and length.
pub fn fingerprint(path: &Path) -> Result<u64> {
    let failed = |e| TrainError::io("read", path, e);
    let mut file = std::fs::File::open(path).map_err(|e| TrainError::io("open", path, e))?;
    if path.is_dir() {
        return Err(TrainError::data(path, None, "is a directory, expected a file"));
    }
    let (mut crc, mut len, mut buffer) = (crc32fast::Hasher::new(), 0u64, vec![0u8; 1 << 20]);
    loop {
        match file.read(&mut buffer).map_err(failed)? {
            0 => return Ok(crate::random::key(&[len, u64::from(crc.finalize())])),
            n => {
                crc.update(&buffer[..n]);
                len += n as u64;
            }
        }
    }
}

/// Reads, encodes and stores files; the k-th file is source k of the store. Errors name the file and, where known, the
/// line; a file without a document is an error.
pub fn build_store(
    files: &[(impl AsRef<Path>, Option<Format>)],
    tokenizer: &dyn Tokenize,
    writer: &mut StoreWriter,
) -> Result<()> {
    for (source, (file, format)) in files.iter().enumerate() {
        let file = file.as_ref();
        let format = match format {
            Some(format) => *format,
            None => Format::detect(file)?,
        };
        let mut documents = 0u64;
        for_each_record(file, format, &mut |record, line| {
            let encoded = encode(&record, tokenizer).map_err(|e| match e {
                TrainError::Request(message) => TrainError::data(file, line, message),
                other => other,
            })?;
            if encoded.ids.len() > 1 {
                documents += 1;
                writer.push(&encoded, source as u32, record.hash())?;
            }
            Ok(())
        })?;
        if documents == 0 {
            return Err(TrainError::data(file, None, "no document in it (every one is empty)"));
        }
    }
    Ok(())
}

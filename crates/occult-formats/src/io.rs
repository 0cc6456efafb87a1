//! Small pieces of file handling that every format needs.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use crate::error::{FormatError, Result};

/// Largest JSON or text file that is read as a whole.
pub(crate) const MAX_WHOLE_FILE: u64 = 256 << 20;

/// Opens a file for reading and returns its length with it. Directories are refused here rather than at the first read.
pub(crate) fn open(path: &Path) -> Result<(File, u64)> {
    let file = File::open(path).map_err(|e| FormatError::io("open", path, e))?;
    let meta = file.metadata().map_err(|e| FormatError::io("inspect", path, e))?;
    if meta.is_dir() {
        return Err(FormatError::bad(path, "", "is a directory, expected a file"));
    }
    Ok((file, meta.len()))
}

/// Fills `buf` from `offset` without moving a shared file position.
pub(crate) fn read_exact_at(file: &File, buf: &mut [u8], offset: u64) -> io::Result<()> {
    #[cfg(unix)]
    {
        std::os::unix::fs::FileExt::read_exact_at(file, buf, offset)
    }
    #[cfg(windows)]
    {
        let mut done = 0;
        while done < buf.len() {
            let n = std::os::windows::fs::FileExt::seek_read(file, &mut buf[done..], offset + done as u64)?;
            if n == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            done += n;
        }
        Ok(())
    }
}

/// The file that `path` names, through links: a rename would replace the link itself. A file that does not exist yet is
/// named by `path`.
pub(crate) fn link_target(path: &Path) -> Result<PathBuf> {
    match path.canonicalize() {
        Ok(target) => Ok(target),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(path.to_path_buf()),
        Err(e) => Err(FormatError::io("inspect", path, e)),
    }
}

/// The first bytes of a file, at most `limit`.
pub(crate) fn read_prefix(path: &Path, limit: u64) -> Result<(Vec<u8>, u64)> {
    let (file, len) = open(path)?;
    let mut prefix = Vec::new();
    file.take(limit).read_to_end(&mut prefix).map_err(|e| FormatError::io("read", path, e))?;
    Ok((prefix, len))
}

/// The whole of a file of at most [`MAX_WHOLE_FILE`] bytes.
pub(crate) fn read_whole(path: &Path) -> Result<Vec<u8>> {
    let (file, len) = open(path)?;
    let mut bytes = Vec::new();
    file.take(MAX_WHOLE_FILE + 1).read_to_end(&mut bytes).map_err(|e| FormatError::io("read", path, e))?;
    if bytes.len() as u64 > MAX_WHOLE_FILE {
        let message =
            format!("has {len} bytes; a file of this format is read whole, up to {MAX_WHOLE_FILE} bytes");
        return Err(FormatError::bad(path, "", message));
    }
    Ok(bytes)
}

/// Parses a whole JSON file into a typed value; the error has the line and column.
pub(crate) fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T> {
    let bytes = read_whole(path)?;
    serde_json::from_slice(&bytes).map_err(|e| FormatError::bad(path, "", format!("broken JSON: {e}")))
}

/// The last part of a path, as stored in a profile: where a file lay on somebody's machine is nobody's business.
pub(crate) fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}

macro_rules! le_bytes {
    ($($to:ident, $from:ident, $type:ty);+ $(;)?) => {$(
        #[doc = concat!("Appends values as little-endian `", stringify!($type), "`.")]
        pub(crate) fn $to(values: &[$type], out: &mut Vec<u8>) {
            out.reserve(size_of_val(values));
            out.extend(values.iter().flat_map(|v| v.to_le_bytes()));
        }

        #[doc = concat!("Little-endian `", stringify!($type), "` values; a rest too short for a value is ignored.")]
        pub(crate) fn $from(bytes: &[u8]) -> Vec<$type> {
            bytes.as_chunks::<{ size_of::<$type>() }>().0.iter().map(|c| <$type>::from_le_bytes(*c)).collect()
        }
    )+};
}
le_bytes! {
    put_u16, get_u16, u16;
    put_u32, get_u32, u32;
    put_u64, get_u64, u64;
    put_f32, get_f32, f32;
}

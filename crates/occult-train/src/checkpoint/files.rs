//! The file operations of a checkpoint, so that tests can make each of them fail.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

/// Puts the content of a file into it.
pub type Fill<'a> = dyn FnMut(&mut dyn Write) -> io::Result<()> + 'a;

/// What writing a checkpoint needs of a file system.
pub trait Files: Send + Sync {
    /// Creates a directory with its parents; no error where it exists.
    fn create_dir(&self, path: &Path) -> io::Result<()>;
    /// Writes a file with what `fill` puts into it, piece by piece, and flushes it to the disk.
    fn write(&self, path: &Path, fill: &mut Fill<'_>) -> io::Result<()>;
    /// Renames a file or directory; replaces a file of that name in one step.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Flushes a directory's entries to the disk.
    fn sync_dir(&self, path: &Path) -> io::Result<()>;
    /// Removes a directory with everything in it; no error where there is none.
    fn remove_dir(&self, path: &Path) -> io::Result<()>;
}

/// The real ones.
#[derive(Debug, Clone, Copy, Default)]
pub struct DiskFiles;

impl Files for DiskFiles {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        fs::create_dir_all(path)
    }

    fn write(&self, path: &Path, fill: &mut Fill<'_>) -> io::Result<()> {
        let mut file = Flushed { file: File::create(path)?, pending: 0 };
        fill(&mut file)?;
        file.file.sync_all()
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        // Only unix can open a directory; elsewhere the rename itself is all there is.
        if cfg!(unix) { File::open(path)?.sync_all() } else { Ok(()) }
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        match fs::remove_dir_all(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }
}

/// Bytes that are written between two moments at which ranks meet, or the disk is waited for: a wait for more could outlast
/// the patience of the others.
pub(crate) const STRETCH_BYTES: u64 = 256 << 20;

/// A file that is flushed to the disk now and then, so that the end of a large one is not one long wait.
struct Flushed {
    file: File,
    pending: u64,
}

impl Write for Flushed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.file.write(bytes)?;
        self.pending += n as u64;
        if self.pending >= STRETCH_BYTES {
            self.pending = 0;
            self.file.sync_data()?;
        }
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

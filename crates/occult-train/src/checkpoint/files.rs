//! The file operations of a checkpoint, so that tests can make each of them fail.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

/// What writing a checkpoint needs of a file system.
pub trait Files: Send + Sync {
    /// Creates a directory with its parents; no error where it exists.
    fn create_dir(&self, path: &Path) -> io::Result<()>;
    /// Writes a file from pieces and flushes it to the disk.
    fn write(&self, path: &Path, pieces: &mut dyn Iterator<Item = &[u8]>) -> io::Result<()>;
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

    fn write(&self, path: &Path, pieces: &mut dyn Iterator<Item = &[u8]>) -> io::Result<()> {
        let mut file = File::create(path)?;
        for piece in pieces {
            file.write_all(piece)?;
        }
        file.sync_all()
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

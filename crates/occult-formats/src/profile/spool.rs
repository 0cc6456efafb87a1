//! One unnamed temporary file for all growing tensors: each keeps a small buffer and the list of its pieces in the file,
//! so memory is bounded and the number of open files does not grow with the number of layers.

use std::fs::File;
use std::io::{self, Write};

use crate::io::read_exact_at;

/// Bytes a tensor collects before they go to the file.
const BUFFER: usize = 32 << 10;

/// A tensor that grows.
#[derive(Debug, Default)]
pub(super) struct Track {
    buffer: Vec<u8>,
    /// (offset in the spool, bytes), in order.
    pieces: Vec<(u64, u64)>,
    bytes: u64,
}

impl Track {
    /// Bytes appended so far.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }
}

/// The temporary file.
#[derive(Debug)]
pub(super) struct Spool {
    file: File,
    end: u64,
}

impl Spool {
    pub(super) fn new(file: File) -> Self {
        Self { file, end: 0 }
    }

    /// Appends to one tensor.
    pub(super) fn append(&mut self, track: &mut Track, put: impl FnOnce(&mut Vec<u8>)) -> io::Result<()> {
        let before = track.buffer.len();
        put(&mut track.buffer);
        track.bytes += (track.buffer.len() - before) as u64;
        if track.buffer.len() >= BUFFER {
            self.file.write_all(&track.buffer)?;
            let written = track.buffer.len() as u64;
            match track.pieces.last_mut() {
                Some((start, bytes)) if *start + *bytes == self.end => *bytes += written,
                _ => track.pieces.push((self.end, written)),
            }
            self.end += written;
            track.buffer.clear();
        }
        Ok(())
    }

    /// Copies a whole tensor.
    pub(super) fn copy(&self, track: &Track, out: &mut dyn Write) -> io::Result<()> {
        let mut block = vec![0; 1 << 20];
        for &(start, bytes) in &track.pieces {
            let mut done = 0;
            while done < bytes {
                let n = (bytes - done).min(block.len() as u64) as usize;
                read_exact_at(&self.file, &mut block[..n], start + done)?;
                out.write_all(&block[..n])?;
                done += n as u64;
            }
        }
        out.write_all(&track.buffer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interleaved_tracks_come_back_whole() {
        let mut spool = Spool::new(tempfile::tempfile().unwrap());
        let mut tracks = [Track::default(), Track::default()];
        let mut expected: [Vec<u8>; 2] = [Vec::new(), Vec::new()];
        for i in 0..300_u32 {
            let t = (i % 3 == 0) as usize;
            let piece = vec![i as u8; 1 + (i as usize * 37) % 2000];
            spool.append(&mut tracks[t], |out| out.extend(&piece)).unwrap();
            expected[t].extend(&piece);
        }
        for (track, expected) in tracks.iter().zip(&expected) {
            let mut copy = Vec::new();
            spool.copy(track, &mut copy).unwrap();
            assert_eq!(track.bytes(), expected.len() as u64);
            assert_eq!(&copy, expected);
        }
        assert!(tracks[0].pieces.len() > 1);
    }
}

//! NumPy's `.npy` header and the `.npz` archive of such files, read as streams.

use std::fs::File;
use std::io::{self, BufReader, ErrorKind, Read, Seek, SeekFrom};
use std::path::Path;

use crate::array::{ArrayStream, DType};
use crate::error::{FormatError, Result};

/// First bytes of a `.npy` file.
pub(crate) const MAGIC: &[u8] = b"\x93NUMPY";
/// Longest header that is read; NumPy's own for plain arrays have about a hundred bytes.
const MAX_HEADER: u32 = 1 << 20;

/// Opens a plain `.npy` file.
pub(crate) fn open_npy(path: &Path) -> Result<ArrayStream> {
    let (file, len) = crate::io::open(path)?;
    start(path, "", Box::new(BufReader::with_capacity(1 << 18, file)), len)
}

/// An open `.npz` file.
pub(crate) struct Npz<'a> {
    path: &'a Path,
    archive: zip::ZipArchive<BufReader<File>>,
}

impl<'a> Npz<'a> {
    pub(crate) fn open(path: &'a Path) -> Result<Self> {
        let (file, _) = crate::io::open(path)?;
        let archive = zip::ZipArchive::new(BufReader::new(file))
            .map_err(|e| FormatError::bad(path, "zip directory", e.to_string()))?;
        Ok(Self { path, archive })
    }

    /// Names of all members.
    pub(crate) fn members(&self) -> Vec<String> {
        self.archive.file_names().filter_map(|n| n.ok().map(|n| n.into_owned())).collect()
    }

    /// Opens one array with a file handle of its own, so that several can be read side by side.
    pub(crate) fn array(&mut self, name: &str) -> Result<Option<ArrayStream>> {
        let member = format!("{name}.npy");
        let place = format!("array {name}");
        let bad = |message: String| FormatError::bad(self.path, &place, message);
        let Some(index) = self.archive.index_for_name(&member) else {
            return Ok(None);
        };
        let entry = self.archive.by_index_raw(index).map_err(|e| bad(e.to_string()))?;
        let (method, size, packed, crc) =
            (entry.compression(), entry.size(), entry.compressed_size(), entry.crc32());
        let offset = entry.data_start().ok_or_else(|| bad("has no data in the archive".to_owned()))?;
        if entry.encrypted() {
            return Err(bad("is encrypted".to_owned()));
        }
        drop(entry);
        let (mut file, _) = crate::io::open(self.path)?;
        file.seek(SeekFrom::Start(offset)).map_err(|e| FormatError::io("seek in", self.path, e))?;
        let raw = BufReader::with_capacity(1 << 18, file).take(packed);
        let unpacked: Box<dyn Read> = match method {
            zip::CompressionMethod::Stored => Box::new(raw),
            zip::CompressionMethod::Deflated => Box::new(flate2::bufread::DeflateDecoder::new(raw)),
            other => return Err(bad(format!("is compressed with {other}, expected none or deflate"))),
        };
        let checked = CrcReader { inner: unpacked, crc: flate2::Crc::new(), expected: crc };
        start(self.path, name, Box::new(checked), size).map(Some)
    }
}

/// Compares the checksum at the end of the data.
struct CrcReader {
    inner: Box<dyn Read>,
    crc: flate2::Crc,
    expected: u32,
}

impl Read for CrcReader {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buf)?;
        self.crc.update(buf.get(..n).unwrap_or_default());
        if n == 0 && !buf.is_empty() && self.crc.sum() != self.expected {
            let message = format!("checksum is {:08x}, expected {:08x}", self.crc.sum(), self.expected);
            return Err(io::Error::new(ErrorKind::InvalidData, message));
        }
        Ok(n)
    }
}

/// Reads the header; `len` is the size that the container gives header and data together.
fn start(path: &Path, name: &str, mut reader: Box<dyn Read>, len: u64) -> Result<ArrayStream> {
    let place = if name.is_empty() { String::new() } else { format!("array {name}") };
    let bad = |message: String| FormatError::bad(path, &place, message);
    let mut fill = |buf: &mut [u8]| {
        reader.read_exact(buf).map_err(|e| match e.kind() {
            ErrorKind::UnexpectedEof => bad("is truncated in its .npy header".to_owned()),
            ErrorKind::InvalidData | ErrorKind::InvalidInput => bad(format!("broken data: {e}")),
            _ => FormatError::io("read", path, e),
        })
    };
    let mut fixed = [0; 8];
    fill(&mut fixed)?;
    if fixed.get(..6) != Some(MAGIC) {
        return Err(bad("does not start with the .npy magic".to_owned()));
    }
    let (size, prefix) = match fixed[6] {
        1 => {
            let mut n = [0; 2];
            fill(&mut n)?;
            (u32::from(u16::from_le_bytes(n)), 10)
        }
        2 | 3 => {
            let mut n = [0; 4];
            fill(&mut n)?;
            (u32::from_le_bytes(n), 12)
        }
        version => return Err(bad(format!("is .npy version {version}, expected 1 to 3"))),
    };
    if size > MAX_HEADER {
        return Err(bad(format!("says its .npy header has {size} bytes")));
    }
    let mut text = vec![0; size as usize];
    fill(&mut text)?;
    let text = String::from_utf8_lossy(&text);
    let (dtype, big_endian, shape) =
        parse_header(&text).map_err(|m| bad(format!("{m} in the .npy header {:?}", text.trim_end())))?;
    let stream = ArrayStream {
        file: path.to_path_buf(),
        name: name.to_owned(),
        dtype,
        shape,
        big_endian,
        reader,
        rows_read: 0,
    };
    let data = stream.shape.iter().try_fold(dtype.size() as u64, |n, &d| n.checked_mul(d as u64));
    let held = len.saturating_sub(prefix + u64::from(size));
    if dtype != DType::Other && data != Some(held) {
        let needs = data.map_or("more bytes than can be".to_owned(), |n| format!("{n} bytes of data"));
        return Err(bad(format!("shape {:?} needs {needs}, there are {held}", stream.shape)));
    }
    Ok(stream)
}

/// `{'descr': '<i4', 'fortran_order': False, 'shape': (3, 4), }`
fn parse_header(text: &str) -> std::result::Result<(DType, bool, Vec<usize>), String> {
    let value = |key: &str| {
        let at = [format!("'{key}':"), format!("\"{key}\":")]
            .iter()
            .find_map(|quoted| text.find(quoted).map(|i| i + quoted.len()));
        at.and_then(|i| text.get(i..)).map(str::trim_start).ok_or_else(|| format!("no {key:?}"))
    };
    let descr = value("descr")?;
    let descr = descr
        .strip_prefix(['\'', '"'])
        .and_then(|d| d.split(['\'', '"']).next())
        .ok_or("a structured element type")?;
    let (order, kind) = match descr.as_bytes().first() {
        Some(b'<' | b'|' | b'=') => (false, &descr[1..]),
        Some(b'>') => (true, &descr[1..]),
        _ => (false, descr),
    };
    let dtype = match kind {
        "u1" => DType::U8,
        "i1" => DType::I8,
        "u2" => DType::U16,
        "i2" => DType::I16,
        "u4" => DType::U32,
        "i4" => DType::I32,
        "u8" => DType::U64,
        "i8" => DType::I64,
        "f2" => DType::F16,
        "f4" => DType::F32,
        "f8" => DType::F64,
        // What NumPy writes for ml_dtypes' bfloat16.
        "V2" => DType::BF16,
        _ => DType::Other,
    };
    let shape_text = value("shape")?;
    let inner =
        shape_text.strip_prefix('(').and_then(|s| s.split(')').next()).ok_or("no shape in parentheses")?;
    let shape = inner
        .split(',')
        .map(str::trim)
        .filter(|d| !d.is_empty())
        .map(|d| d.trim_end_matches('L').parse::<usize>().map_err(|_| format!("dimension {d:?}")))
        .collect::<std::result::Result<Vec<_>, _>>()?;
    if value("fortran_order")?.starts_with("True") && shape.len() > 1 {
        return Err("Fortran order (save numpy.ascontiguousarray(x) instead)".to_owned());
    }
    Ok((dtype, order, shape))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers() {
        let parse = |t: &str| parse_header(t);
        let header = "{'descr': '<i4', 'fortran_order': False, 'shape': (3, 4, 2), }";
        assert_eq!(parse(header), Ok((DType::I32, false, vec![3, 4, 2])));
        let header = "{\"descr\": \">f2\", \"fortran_order\": False, \"shape\": (7,)}";
        assert_eq!(parse(header), Ok((DType::F16, true, vec![7])));
        let scalar = "{'descr': '|u1', 'fortran_order': False, 'shape': (), }";
        assert_eq!(parse(scalar), Ok((DType::U8, false, vec![])));
        assert!(
            parse("{'descr': '<i4', 'fortran_order': True, 'shape': (3, 4), }")
                .unwrap_err()
                .contains("Fortran")
        );
        assert!(parse("{'descr': '<i4', 'fortran_order': False, 'shape': (-3, 4), }").is_err());
        assert!(parse("{'descr': [('a', '<i4')], 'fortran_order': False, 'shape': (3,)}").is_err());
    }
}

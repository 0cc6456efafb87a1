//! Arrays of any numeric type as a stream of rows: the common form of safetensors, npz and npy inputs.

use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

use crate::error::{FormatError, Result};

/// Element type of an array in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub(crate) enum DType {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    U64,
    I64,
    F16,
    BF16,
    F32,
    F64,
    /// Anything else: known to exist, not readable as numbers.
    Other,
}

impl DType {
    /// Bytes of one element; 0 for [`DType::Other`].
    pub(crate) fn size(self) -> usize {
        match self {
            DType::U8 | DType::I8 => 1,
            DType::U16 | DType::I16 | DType::F16 | DType::BF16 => 2,
            DType::U32 | DType::I32 | DType::F32 => 4,
            DType::U64 | DType::I64 | DType::F64 => 8,
            DType::Other => 0,
        }
    }

    pub(crate) fn is_integer(self) -> bool {
        !self.is_float() && self != DType::Other
    }

    pub(crate) fn is_float(self) -> bool {
        matches!(self, DType::F16 | DType::BF16 | DType::F32 | DType::F64)
    }

    pub(crate) fn from_safetensors(dtype: safetensors::Dtype) -> Self {
        use safetensors::Dtype as S;
        match dtype {
            S::U8 => DType::U8,
            S::I8 => DType::I8,
            S::U16 => DType::U16,
            S::I16 => DType::I16,
            S::U32 => DType::U32,
            S::I32 => DType::I32,
            S::U64 => DType::U64,
            S::I64 => DType::I64,
            S::F16 => DType::F16,
            S::BF16 => DType::BF16,
            S::F32 => DType::F32,
            S::F64 => DType::F64,
            _ => DType::Other,
        }
    }
}

/// One array, read front to back.
pub(crate) struct ArrayStream {
    pub(crate) file: PathBuf,
    /// Name of the tensor or member, for errors; empty for a plain .npy file.
    pub(crate) name: String,
    pub(crate) dtype: DType,
    pub(crate) shape: Vec<usize>,
    pub(crate) big_endian: bool,
    pub(crate) reader: Box<dyn Read>,
    pub(crate) rows_read: usize,
}

impl ArrayStream {
    pub(crate) fn bad(&self, message: impl Into<String>) -> FormatError {
        let place = if self.name.is_empty() { String::new() } else { format!("array {}", self.name) };
        FormatError::bad(&self.file, place, message)
    }

    /// Elements of one row (everything but the first dimension); `None` if the shape overflows.
    pub(crate) fn row_len(&self) -> Option<usize> {
        self.shape.iter().skip(1).try_fold(1_usize, |n, &d| n.checked_mul(d))
    }

    /// The bytes of the next `rows` rows. The caller has bounded `rows * row_len`.
    fn read_bytes(&mut self, rows: usize) -> Result<Vec<u8>> {
        let row_bytes = self.row_len().and_then(|n| n.checked_mul(self.dtype.size()));
        let bytes = row_bytes
            .and_then(|n| n.checked_mul(rows))
            .ok_or_else(|| self.bad(format!("shape {:?} is too large", self.shape)))?;
        let mut buf = vec![0; bytes];
        if let Err(e) = self.reader.read_exact(&mut buf) {
            return Err(if e.kind() == ErrorKind::UnexpectedEof {
                let (from, to) = (self.rows_read, self.rows_read + rows);
                self.bad(format!("is truncated: the data end before rows {from}..{to} of {:?}", self.shape))
            } else if e.kind() == ErrorKind::InvalidData || e.kind() == ErrorKind::InvalidInput {
                self.bad(format!("broken data after row {}: {e}", self.rows_read))
            } else {
                FormatError::io("read", &self.file, e)
            });
        }
        self.rows_read += rows;
        if self.big_endian {
            buf.chunks_exact_mut(self.dtype.size().max(1)).for_each(<[u8]>::reverse);
        }
        Ok(buf)
    }

    /// The next rows as integers. An unsigned value beyond `i64` becomes `i64::MAX`: out of any range that is checked.
    pub(crate) fn read_ints(&mut self, rows: usize, out: &mut Vec<i64>) -> Result<()> {
        if !self.dtype.is_integer() {
            return Err(self.bad(format!("has element type {:?}, expected an integer type", self.dtype)));
        }
        let bytes = self.read_bytes(rows)?;
        out.clear();
        ints_from_bytes(self.dtype, &bytes, out);
        Ok(())
    }

    /// The next rows as `f32`; an `f64` too large for it becomes infinite, which the routing checks refuse.
    pub(crate) fn read_floats(&mut self, rows: usize, out: &mut Vec<f32>) -> Result<()> {
        if !self.dtype.is_float() {
            return Err(
                self.bad(format!("has element type {:?}, expected f16, bf16, f32 or f64", self.dtype))
            );
        }
        let bytes = self.read_bytes(rows)?;
        out.clear();
        floats_from_bytes(self.dtype, &bytes, out);
        Ok(())
    }

    /// The next rows as `f64`, whatever the numeric type.
    pub(crate) fn read_numbers(&mut self, rows: usize) -> Result<Vec<f64>> {
        if self.dtype == DType::Other {
            return Err(self.bad("has an element type that is not a number"));
        }
        let bytes = self.read_bytes(rows)?;
        if self.dtype == DType::F64 {
            return Ok(bytes.as_chunks::<8>().0.iter().map(|c| f64::from_le_bytes(*c)).collect());
        }
        if self.dtype.is_float() {
            let mut out = Vec::new();
            floats_from_bytes(self.dtype, &bytes, &mut out);
            return Ok(out.into_iter().map(f64::from).collect());
        }
        let mut out = Vec::new();
        ints_from_bytes(self.dtype, &bytes, &mut out);
        Ok(out.into_iter().map(|v| v as f64).collect())
    }

    /// Reads to the end: a checksum that does not fit shows up here.
    pub(crate) fn finish(mut self) -> Result<()> {
        let mut rest = [0; 64];
        match self.reader.read(&mut rest) {
            Ok(0) => Ok(()),
            Ok(_) => Err(self.bad(format!("holds more data than its shape {:?} says", self.shape))),
            Err(e) => Err(self.bad(format!("broken data at the end: {e}"))),
        }
    }
}

pub(crate) fn ints_from_bytes(dtype: DType, bytes: &[u8], out: &mut Vec<i64>) {
    macro_rules! widen {
        ($type:ty) => {
            out.extend(bytes.as_chunks::<{ size_of::<$type>() }>().0.iter().map(|c| {
                // Only u64 can fail to fit.
                i64::try_from(<$type>::from_le_bytes(*c)).unwrap_or(i64::MAX)
            }))
        };
    }
    match dtype {
        DType::U8 => widen!(u8),
        DType::I8 => widen!(i8),
        DType::U16 => widen!(u16),
        DType::I16 => widen!(i16),
        DType::U32 => widen!(u32),
        DType::I32 => widen!(i32),
        DType::U64 => widen!(u64),
        DType::I64 => widen!(i64),
        DType::F16 | DType::BF16 | DType::F32 | DType::F64 | DType::Other => {}
    }
}

pub(crate) fn floats_from_bytes(dtype: DType, bytes: &[u8], out: &mut Vec<f32>) {
    match dtype {
        DType::F16 => out.extend(bytes.as_chunks().0.iter().map(|c| half::f16::from_le_bytes(*c).to_f32())),
        DType::BF16 => out.extend(bytes.as_chunks().0.iter().map(|c| half::bf16::from_le_bytes(*c).to_f32())),
        DType::F32 => out.extend(bytes.as_chunks().0.iter().map(|c| f32::from_le_bytes(*c))),
        DType::F64 => out.extend(bytes.as_chunks().0.iter().map(|c| f64::from_le_bytes(*c) as f32)),
        _ => {}
    }
}

/// Turns integers into expert ids of `[rows, top_k]`, or says which row of `layer` holds which id out of range.
pub(crate) fn to_expert_ids(
    raw: impl Iterator<Item = i64>,
    top_k: usize,
    num_experts: usize,
    at: (&Path, usize, usize),
    out: &mut Vec<u16>,
) -> Result<()> {
    let (file, layer, first_row) = at;
    out.clear();
    for (i, id) in raw.enumerate() {
        match u16::try_from(id) {
            Ok(small) if usize::from(small) < num_experts => out.push(small),
            _ => {
                let error =
                    occult_plan::PlanError::ExpertOutOfRange { row: i / top_k.max(1), id, num_experts };
                return Err(FormatError::plan(file, layer, first_row, error));
            }
        }
    }
    Ok(())
}

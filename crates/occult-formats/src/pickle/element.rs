//! Element types of tensors and arrays, and their bytes.

/// Type of one element.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are the usual ones")]
pub enum Element {
    Bool,
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
}

impl Element {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Element::Bool | Element::U8 | Element::I8 => 1,
            Element::U16 | Element::I16 | Element::F16 | Element::BF16 => 2,
            Element::U32 | Element::I32 | Element::F32 => 4,
            Element::U64 | Element::I64 | Element::F64 => 8,
        }
    }

    /// Whether elements are whole numbers.
    pub fn is_integer(self) -> bool {
        !matches!(self, Element::F16 | Element::BF16 | Element::F32 | Element::F64)
    }

    /// The usual name.
    pub fn name(self) -> &'static str {
        match self {
            Element::Bool => "bool",
            Element::U8 => "uint8",
            Element::I8 => "int8",
            Element::U16 => "uint16",
            Element::I16 => "int16",
            Element::U32 => "uint32",
            Element::I32 => "int32",
            Element::U64 => "uint64",
            Element::I64 => "int64",
            Element::F16 => "float16",
            Element::BF16 => "bfloat16",
            Element::F32 => "float32",
            Element::F64 => "float64",
        }
    }

    /// From the type string of numpy without its byte order (`i4`, `u1`, `b1`, `f8`).
    pub(crate) fn from_numpy(code: &str) -> Option<Self> {
        Some(match code {
            "b1" | "?" => Element::Bool,
            "u1" | "B" => Element::U8,
            "i1" | "b" => Element::I8,
            "u2" => Element::U16,
            "i2" => Element::I16,
            "u4" => Element::U32,
            "i4" => Element::I32,
            "u8" => Element::U64,
            "i8" => Element::I64,
            "f2" => Element::F16,
            "f4" => Element::F32,
            "f8" => Element::F64,
            _ => return None,
        })
    }

    /// A whole number from the bytes of one element; `None` for floats, for a wrong length and above `i64::MAX`.
    pub(crate) fn to_i64(self, bytes: &[u8], big_endian: bool) -> Option<i64> {
        let raw = raw_bits(bytes, self.size(), big_endian)?;
        Some(match self {
            Element::Bool => i64::from(raw != 0),
            Element::U8 | Element::U16 | Element::U32 => raw as i64,
            Element::I8 => i64::from(raw as u8 as i8),
            Element::I16 => i64::from(raw as u16 as i16),
            Element::I32 => i64::from(raw as u32 as i32),
            Element::I64 => raw as i64,
            Element::U64 => i64::try_from(raw).ok()?,
            Element::F16 | Element::BF16 | Element::F32 | Element::F64 => return None,
        })
    }

    /// The value as a double: exact for floats and for whole numbers below 2^53.
    pub(crate) fn to_f64(self, bytes: &[u8], big_endian: bool) -> Option<f64> {
        let raw = raw_bits(bytes, self.size(), big_endian)?;
        Some(match self {
            Element::F16 => half::f16::from_bits(raw as u16).to_f64(),
            Element::BF16 => half::bf16::from_bits(raw as u16).to_f64(),
            Element::F32 => f64::from(f32::from_bits(raw as u32)),
            Element::F64 => f64::from_bits(raw),
            Element::U64 => raw as f64,
            _ => self.to_i64(bytes, big_endian)? as f64,
        })
    }
}

fn raw_bits(bytes: &[u8], size: usize, big_endian: bool) -> Option<u64> {
    if bytes.len() != size {
        return None;
    }
    let add = |acc: u64, &b: &u8| (acc << 8) | u64::from(b);
    Some(if big_endian { bytes.iter().fold(0, add) } else { bytes.iter().rev().fold(0, add) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_become_numbers() {
        assert_eq!(Element::I16.to_i64(&[0xfe, 0xff], false), Some(-2));
        assert_eq!(Element::I16.to_i64(&[0xff, 0xfe], true), Some(-2));
        assert_eq!(Element::U16.to_i64(&[0xfe, 0xff], false), Some(65534));
        assert_eq!(Element::U64.to_i64(&[0xff; 8], false), None);
        assert_eq!(Element::I64.to_i64(&[0xff; 8], false), Some(-1));
        assert_eq!(Element::I64.to_i64(&[0xff; 7], false), None);
        assert_eq!(Element::F32.to_f64(&1.5f32.to_le_bytes(), false), Some(1.5));
        assert_eq!(Element::F32.to_i64(&1.5f32.to_le_bytes(), false), None);
        assert_eq!(Element::F16.to_f64(&[0x00, 0x3e], false), Some(1.5));
        assert_eq!(Element::BF16.to_f64(&[0xc0, 0x3f], false), Some(1.5));
    }
}

//! A tensor as it is stored: bytes of a mapped file, or of memory, with dtype and shape.

use std::path::PathBuf;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use memmap2::Mmap;
use occult_kernels::Matrix;
use occult_kernels::quant::{Layout, Quantised, reference};

use crate::error::{ModelError, Result};

/// Number formats that weights may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoredDtype {
    /// 32 bits.
    F32,
    /// 16 bits with the exponent of f32.
    Bf16,
    /// IEEE half precision.
    F16,
}

impl StoredDtype {
    /// Bytes of one value.
    pub fn bytes(self) -> usize {
        if self == StoredDtype::F32 { 4 } else { 2 }
    }

    /// The name in a safetensors header.
    pub fn name(self) -> &'static str {
        match self {
            StoredDtype::F32 => "F32",
            StoredDtype::Bf16 => "BF16",
            StoredDtype::F16 => "F16",
        }
    }

    pub(crate) fn safetensors(self) -> safetensors::Dtype {
        match self {
            StoredDtype::F32 => safetensors::Dtype::F32,
            StoredDtype::Bf16 => safetensors::Dtype::BF16,
            StoredDtype::F16 => safetensors::Dtype::F16,
        }
    }

    pub(crate) fn from_safetensors(dtype: safetensors::Dtype) -> Option<Self> {
        match dtype {
            safetensors::Dtype::F32 => Some(StoredDtype::F32),
            safetensors::Dtype::BF16 => Some(StoredDtype::Bf16),
            safetensors::Dtype::F16 => Some(StoredDtype::F16),
            _ => None,
        }
    }
}

#[derive(Debug)]
enum Bytes {
    Mapped { map: Arc<Mmap>, from: usize, to: usize },
    // u64 elements: aligned for every dtype.
    Owned { words: Vec<u64>, len: usize },
}

impl Bytes {
    fn owned(bytes: &[u8]) -> Self {
        let mut words = vec![0u64; bytes.len().div_ceil(8)];
        bytemuck::cast_slice_mut::<u64, u8>(&mut words)[..bytes.len()].copy_from_slice(bytes);
        Bytes::Owned { words, len: bytes.len() }
    }

    fn get(&self) -> &[u8] {
        match self {
            Bytes::Mapped { map, from, to } => &map[*from..*to],
            Bytes::Owned { words, len } => &bytemuck::cast_slice(words)[..*len],
        }
    }
}

/// What a quantised matrix has beside its levels.
#[derive(Debug, Clone)]
struct Scales {
    layout: Layout,
    bytes: Arc<Bytes>,
}

/// A stored tensor of any rank. Cloning shares the bytes.
#[derive(Debug, Clone)]
pub struct Weight {
    /// The values; of a quantised matrix the levels.
    bytes: Arc<Bytes>,
    scales: Option<Scales>,
    /// First byte within `bytes`, for a slice of a stacked tensor.
    start: usize,
    dtype: StoredDtype,
    shape: Vec<usize>,
    name: Arc<str>,
    file: Arc<PathBuf>,
}

/// The values of a [`Weight`], as stored.
#[derive(Debug, Clone, Copy)]
pub enum Values<'a> {
    /// f32
    F32(&'a [f32]),
    /// bf16
    Bf16(&'a [bf16]),
    /// f16
    F16(&'a [f16]),
    /// 8 or 4 bits in groups
    Quantised(Quantised<'a>),
}

impl Values<'_> {
    /// Writes the values `[from, from + out.len())` as f32; all conversions are exact (of quantised weights: level times
    /// scale, rounded once).
    pub fn widen(&self, from: usize, out: &mut [f32]) {
        let to = from + out.len();
        match self {
            Values::F32(v) => out.copy_from_slice(&v[from..to]),
            Values::Bf16(v) => {
                for (o, x) in out.iter_mut().zip(&v[from..to]) {
                    *o = f32::from_bits(u32::from(x.to_bits()) << 16);
                }
            }
            Values::F16(v) => {
                use half::slice::HalfFloatSliceExt;
                v[from..to].convert_to_f32_slice(out);
            }
            Values::Quantised(q) => {
                let cols = q.layout().cols();
                for (i, o) in (from..to).zip(out) {
                    *o = reference::weight(q, i / cols, i % cols);
                }
            }
        }
    }

    /// Position of the first NaN or infinity; of quantised weights, of the first such scale.
    pub fn first_not_finite(&self) -> Option<usize> {
        // The exponent bits all set: one pass without branches, the position only when there is one.
        match self {
            Values::F32(v) => {
                let bad = |x: &f32| !x.is_finite();
                v.chunks(4096)
                    .any(|c| c.iter().fold(false, |a, x| a | bad(x)))
                    .then(|| v.iter().position(bad))?
            }
            Values::Bf16(v) => {
                let bad = |x: &bf16| x.to_bits() & 0x7f80 == 0x7f80;
                v.chunks(4096)
                    .any(|c| c.iter().fold(false, |a, x| a | bad(x)))
                    .then(|| v.iter().position(bad))?
            }
            Values::F16(v) => {
                let bad = |x: &f16| x.to_bits() & 0x7c00 == 0x7c00;
                v.chunks(4096)
                    .any(|c| c.iter().fold(false, |a, x| a | bad(x)))
                    .then(|| v.iter().position(bad))?
            }
            Values::Quantised(q) => q.scales().iter().position(|s| !s.is_finite()),
        }
    }
}

impl Weight {
    /// A tensor inside a mapped file. `from..to` must lie in the file and hold the shape (the reader has checked it).
    pub(crate) fn mapped(
        map: &Arc<Mmap>,
        range: (usize, usize),
        dtype: StoredDtype,
        shape: Vec<usize>,
        name: &str,
        file: Arc<PathBuf>,
    ) -> Self {
        let (from, to) = range;
        // A header of odd length makes unaligned data: those are copied.
        let aligned = map[from..to].as_ptr().align_offset(dtype.bytes()) == 0;
        let bytes = if aligned || from == to {
            Bytes::Mapped { map: map.clone(), from, to }
        } else {
            Bytes::owned(&map[from..to])
        };
        Self { bytes: Arc::new(bytes), scales: None, start: 0, dtype, shape, name: name.into(), file }
    }

    /// A quantised matrix: `self` holds its scales, bf16, and `data` lies in the same file. The lengths must be the layout's.
    pub(crate) fn quantised(self, map: &Arc<Mmap>, data: (usize, usize), layout: Layout, name: &str) -> Self {
        let scales = Some(Scales { layout, bytes: self.bytes });
        let bytes = Arc::new(Bytes::Mapped { map: map.clone(), from: data.0, to: data.1 });
        let shape = vec![layout.rows(), layout.cols()];
        Self { bytes, scales, start: 0, dtype: StoredDtype::F32, shape, name: name.into(), file: self.file }
    }

    /// Format and shape of a quantised matrix.
    pub fn quant_layout(&self) -> Option<&Layout> {
        self.scales.as_ref().map(|s| &s.layout)
    }

    /// From f32 values, rounded to `dtype` (to nearest, ties to even). The length must be the shape's.
    pub fn from_f32(name: &str, values: &[f32], shape: Vec<usize>, dtype: StoredDtype) -> Result<Self> {
        if values.len() != shape.iter().product::<usize>() {
            return Err(ModelError::request(format!("{name}: {} values for {shape:?}", values.len())));
        }
        let bytes = match dtype {
            StoredDtype::F32 => Bytes::owned(bytemuck::cast_slice(values)),
            StoredDtype::Bf16 => {
                let v: Vec<bf16> = values.iter().map(|&x| bf16::from_f32(x)).collect();
                Bytes::owned(bytemuck::cast_slice(&v))
            }
            StoredDtype::F16 => {
                let v: Vec<f16> = values.iter().map(|&x| f16::from_f32(x)).collect();
                Bytes::owned(bytemuck::cast_slice(&v))
            }
        };
        let file = Arc::new(PathBuf::new());
        Ok(Self { bytes: Arc::new(bytes), scales: None, start: 0, dtype, shape, name: name.into(), file })
    }

    /// The same values in another format; shares the bytes when it is the same. A number beyond the range of that format
    /// is an error that names file and tensor.
    pub fn cast(&self, dtype: StoredDtype) -> Result<Self> {
        if dtype == self.dtype && self.scales.is_none() {
            return Ok(self.clone());
        }
        let values = self.to_f32();
        let cast = Self::from_f32(&self.name, &values, self.shape.clone(), dtype)?;
        if let Some(from) = cast.values().first_not_finite() {
            let mut rounded = vec![0.0; values.len() - from];
            cast.values().widen(from, &mut rounded);
            let lost = rounded.iter().zip(&values[from..]).position(|(r, v)| v.is_finite() && !r.is_finite());
            if let Some(i) = lost {
                let (at, value) = (from + i, values[from + i]);
                let message = format!("value {at} is {value}, beyond the range of {}", dtype.name());
                return Err(ModelError::bad(&*self.file, format!("tensor {}", self.name), message));
            }
        }
        Ok(Self { file: self.file.clone(), ..cast })
    }

    /// Rows `from..to` of the first dimension of the `index`-th slab: `[A, B, ...]` gives `[to - from, ...]` of slab
    /// `index`. This is how one expert's gate or up rows are taken from a stacked tensor.
    pub(crate) fn slab_rows(&self, index: usize, from: usize, to: usize) -> Option<Self> {
        let [slabs, rows, cols] = self.shape[..] else { return None };
        if self.scales.is_some() || index >= slabs || from > to || to > rows {
            return None;
        }
        let start = self.start + (index * rows + from) * cols * self.dtype.bytes();
        Some(Self { start, shape: vec![to - from, cols], ..self.clone() })
    }

    /// Rows `from..to` of a matrix.
    pub(crate) fn rows(&self, from: usize, to: usize) -> Option<Self> {
        let [rows, cols] = self.shape[..] else { return None };
        if self.scales.is_some() || from > to || to > rows {
            return None;
        }
        let start = self.start + from * cols * self.dtype.bytes();
        Some(Self { start, shape: vec![to - from, cols], ..self.clone() })
    }

    /// Name in the file.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Shape.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Format of the values; of a quantised matrix what they are widened to.
    pub fn dtype(&self) -> StoredDtype {
        self.dtype
    }

    /// Number of values.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// True if there are no values.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The bytes, little-endian; of a quantised matrix its levels.
    pub fn bytes(&self) -> &[u8] {
        if self.scales.is_some() {
            return self.bytes.get();
        }
        &self.bytes.get()[self.start..self.start + self.len() * self.dtype.bytes()]
    }

    /// The values.
    pub fn values(&self) -> Values<'_> {
        if let Some(quantised) = self.quantised_view() {
            return Values::Quantised(quantised);
        }
        match self.dtype {
            StoredDtype::F32 => Values::F32(bytemuck::cast_slice(self.bytes())),
            StoredDtype::Bf16 => Values::Bf16(bytemuck::cast_slice(self.bytes())),
            StoredDtype::F16 => Values::F16(bytemuck::cast_slice(self.bytes())),
        }
    }

    fn quantised_view(&self) -> Option<Quantised<'_>> {
        let scales = self.scales.as_ref()?;
        Quantised::new(scales.layout, self.bytes.get(), bytemuck::cast_slice(scales.bytes.get())).ok()
    }

    /// The values as the kernels read them.
    pub fn matrix(&self) -> Matrix<'_> {
        match self.values() {
            Values::F32(v) => Matrix::F32(v),
            Values::Bf16(v) => Matrix::Bf16(v),
            Values::F16(v) => Matrix::F16(v),
            Values::Quantised(q) => Matrix::Quantised(q),
        }
    }

    /// All values as f32.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.len()];
        self.values().widen(0, &mut out);
        out
    }

    /// A tensor of the tensor library with a copy of the values, in the stored format.
    pub fn tensor(&self) -> Result<Tensor> {
        let shape = &self.shape[..];
        let made = match self.values() {
            Values::F32(v) => Tensor::from_slice(v, shape, &Device::Cpu),
            Values::Bf16(v) => Tensor::from_slice(v, shape, &Device::Cpu),
            Values::F16(v) => Tensor::from_slice(v, shape, &Device::Cpu),
            Values::Quantised(_) => Tensor::from_vec(self.to_f32(), shape, &Device::Cpu),
        };
        made.map_err(|source| ModelError::Tensor { what: self.name.to_string(), source })
    }

    /// The same, widened to f32.
    pub fn tensor_f32(&self) -> Result<Tensor> {
        Ok(self.tensor()?.to_dtype(DType::F32)?)
    }

    /// Errors, with file and tensor, when a value is NaN or infinite.
    pub fn check_finite(&self) -> Result<()> {
        match self.values().first_not_finite() {
            None => Ok(()),
            Some(at) => {
                let place = format!("tensor {}", self.name);
                if let Values::Quantised(q) = self.values() {
                    let message = format!("scale {at} is {}", q.scales()[at]);
                    return Err(ModelError::bad(&*self.file, place, message));
                }
                let mut value = [0.0];
                self.values().widen(at, &mut value);
                Err(ModelError::bad(&*self.file, place, format!("value {at} is {}", value[0])))
            }
        }
    }
}

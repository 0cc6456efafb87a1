//! The names that a pickle may use, and what each stands for. Names are compared, never looked up or called.

use super::Element;

/// A name of the allow-list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Global {
    /// `collections.OrderedDict`: a dict.
    OrderedDict,
    /// `_codecs.encode`: how protocols 0 to 2 write bytes.
    Encode,
    /// `builtins.bytearray`.
    ByteArray,
    /// `builtins.bytes`: how protocols 0 to 2 write no bytes.
    Bytes,
    /// `builtins.set` and `builtins.frozenset`: read as lists.
    Set,
    /// `torch._utils._rebuild_tensor_v2`.
    RebuildTensorV2,
    /// `torch._utils._rebuild_tensor_v3`: storages of bytes, with the dtype as an argument.
    RebuildTensorV3,
    /// `torch.IntStorage` and the like: a storage of one element type.
    Storage(Element),
    /// `torch.storage.UntypedStorage`: a storage of bytes.
    UntypedStorage,
    /// `torch.int32` and the like.
    TorchDtype(Element),
    /// `torch.Size`: a tuple.
    TorchSize,
    /// `numpy.core.multiarray._reconstruct`.
    NumpyReconstruct,
    /// `numpy.core.numeric._frombuffer` (protocol 5).
    NumpyFrombuffer,
    /// `numpy.core.multiarray.scalar`.
    NumpyScalar,
    /// `numpy.ndarray`.
    NumpyArray,
    /// `numpy.dtype`.
    NumpyDtype,
}

impl Global {
    /// The meaning of `module.name`, or `None` when it is not on the list.
    pub(crate) fn named(module: &str, name: &str) -> Option<Self> {
        Some(match (module, name) {
            ("collections", "OrderedDict") => Global::OrderedDict,
            ("_codecs", "encode") => Global::Encode,
            ("builtins" | "__builtin__", "bytearray") => Global::ByteArray,
            ("builtins" | "__builtin__", "bytes") => Global::Bytes,
            ("builtins" | "__builtin__", "set" | "frozenset") => Global::Set,
            ("torch._utils", "_rebuild_tensor_v2") => Global::RebuildTensorV2,
            ("torch._utils", "_rebuild_tensor_v3") => Global::RebuildTensorV3,
            ("torch.storage", "UntypedStorage") => Global::UntypedStorage,
            ("torch", "Size") => Global::TorchSize,
            ("torch", _) => return torch_type(name),
            ("numpy.core.multiarray" | "numpy._core.multiarray", "_reconstruct") => Global::NumpyReconstruct,
            ("numpy.core.multiarray" | "numpy._core.multiarray", "scalar") => Global::NumpyScalar,
            ("numpy.core.numeric" | "numpy._core.numeric", "_frombuffer") => Global::NumpyFrombuffer,
            ("numpy", "ndarray") => Global::NumpyArray,
            ("numpy", "dtype") => Global::NumpyDtype,
            _ => return None,
        })
    }
}

fn torch_type(name: &str) -> Option<Global> {
    Some(match name {
        "BoolStorage" => Global::Storage(Element::Bool),
        "ByteStorage" => Global::Storage(Element::U8),
        "CharStorage" => Global::Storage(Element::I8),
        "ShortStorage" => Global::Storage(Element::I16),
        "IntStorage" => Global::Storage(Element::I32),
        "LongStorage" => Global::Storage(Element::I64),
        "HalfStorage" => Global::Storage(Element::F16),
        "BFloat16Storage" => Global::Storage(Element::BF16),
        "FloatStorage" => Global::Storage(Element::F32),
        "DoubleStorage" => Global::Storage(Element::F64),
        "bool" => Global::TorchDtype(Element::Bool),
        "uint8" => Global::TorchDtype(Element::U8),
        "int8" => Global::TorchDtype(Element::I8),
        "uint16" => Global::TorchDtype(Element::U16),
        "int16" => Global::TorchDtype(Element::I16),
        "uint32" => Global::TorchDtype(Element::U32),
        "int32" => Global::TorchDtype(Element::I32),
        "uint64" => Global::TorchDtype(Element::U64),
        "int64" => Global::TorchDtype(Element::I64),
        "float16" => Global::TorchDtype(Element::F16),
        "bfloat16" => Global::TorchDtype(Element::BF16),
        "float32" => Global::TorchDtype(Element::F32),
        "float64" => Global::TorchDtype(Element::F64),
        _ => return None,
    })
}

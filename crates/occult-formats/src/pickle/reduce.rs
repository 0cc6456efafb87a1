//! What calls in a pickle stand for: bytes, arrays, tensors. Nothing is called; arguments are checked and stored.

use super::globals::Global;
use super::machine::{Machine, Reduced};
use super::value::{Object, Storage, Value};
use super::{Array, Element, Tensor};

impl Machine<'_> {
    /// `function(*args)`, for a function of the allow-list.
    pub(crate) fn reduce(&mut self, function: Value, args: Value) -> Result<Reduced, String> {
        let Some(Object::Global(global)) = self.get(function) else {
            return Err("wants to call something that is not a name of data, refused".into());
        };
        let global = *global;
        let Some(Object::Tuple(args)) = self.get(args) else {
            return Err("the arguments of a call are not a tuple".into());
        };
        // No call of the list takes more; a copy, because making the result needs the machine.
        let args: Vec<Value> = args.iter().take(9).copied().collect();
        let object = match (global, args.as_slice()) {
            (Global::OrderedDict, []) => Object::Dict(Vec::new()),
            (Global::OrderedDict, [items]) => Object::Dict(self.entries(*items)?),
            (Global::Set, []) => Object::List(Vec::new()),
            (Global::Set, [items]) => Object::List(self.copy_sequence(*items)?),
            (Global::TorchSize, [items]) => Object::Tuple(self.copy_sequence(*items)?),
            (Global::Bytes | Global::ByteArray, []) => Object::Bytes(Vec::new()),
            (Global::Bytes | Global::ByteArray, [data]) => Object::Bytes(self.copy_data(*data)?),
            (Global::Encode, [text, ..]) | (Global::ByteArray, [text, _]) => {
                let length = self.text(*text)?.len();
                self.spend(length)?;
                Object::Bytes(latin1(self.text(*text)?)?)
            }
            (Global::NumpyReconstruct, [_, _, _]) => Object::Array(Box::new(Array::empty())),
            (Global::NumpyFrombuffer, [data, dtype, shape, order]) => {
                let fortran = self.name(*order)? == "F";
                let (dtype, shape) = (self.dtype(*dtype)?, self.sizes(*shape)?);
                Object::Array(Box::new(Array::new(dtype, shape, fortran, self.copy_data(*data)?)?))
            }
            (Global::NumpyDtype, [code, ..]) => {
                let (element, big_endian) = numpy_type(self.name(*code)?)?;
                Object::Dtype(element, big_endian)
            }
            (Global::NumpyScalar, [dtype, data]) => {
                let (element, big_endian) = self.dtype(*dtype)?;
                return scalar(element, big_endian, self.data(*data)?).map(Reduced::Value);
            }
            (Global::RebuildTensorV2, [storage, offset, size, stride, ..]) => {
                Object::Tensor(Box::new(self.tensor(*storage, *offset, *size, *stride, None)?))
            }
            (Global::RebuildTensorV3, [storage, offset, size, stride, _, _, dtype, ..]) => {
                let Some(Object::Global(Global::TorchDtype(element))) = self.get(*dtype) else {
                    return Err("a tensor without an element type".into());
                };
                Object::Tensor(Box::new(self.tensor(*storage, *offset, *size, *stride, Some(*element))?))
            }
            (global, args) => {
                return Err(format!("{global:?} with {} arguments stands for no data", args.len()));
            }
        };
        Ok(Reduced::Object(object))
    }

    /// `target.__setstate__(state)`, for arrays and numpy types; the attributes of an ordered dict are dropped.
    pub(crate) fn build(&mut self, target: Value, state: Value) -> Result<(), String> {
        let new = match self.get(target) {
            Some(Object::Array(_)) => {
                let args = self.sequence(state)?;
                let &[_, shape, dtype, fortran, data] = args else {
                    return Err(format!("the state of a numpy array has {} parts, expected 5", args.len()));
                };
                let fortran = matches!(fortran, Value::Bool(true)) || matches!(fortran, Value::Int(1));
                let (dtype, shape) = (self.dtype(dtype)?, self.sizes(shape)?);
                Object::Array(Box::new(Array::new(dtype, shape, fortran, self.copy_data(data)?)?))
            }
            Some(Object::Dtype(element, _)) => {
                let element = *element;
                let args = self.sequence(state)?;
                let order = args.get(1).ok_or("the state of a numpy type has no byte order")?;
                let big_endian = match self.name(*order)? {
                    "<" | "|" | "=" => false,
                    ">" => true,
                    other => return Err(format!("{other:?} is not a byte order")),
                };
                Object::Dtype(element, big_endian)
            }
            Some(Object::Dict(_)) => return Ok(()),
            _ => return Err("wants to set the state of an object, refused: only data is read".into()),
        };
        if let Some(object) = self.get_mut(target) {
            *object = new;
        }
        Ok(())
    }

    /// The storage that a persistent id of `torch.save` names: `("storage", type, key, location, length)`.
    pub(crate) fn persistent(&self, id: Value) -> Result<Object, String> {
        let parts = self.sequence(id)?;
        let &[tag, kind, key, _, length] = parts else {
            return Err(format!("a persistent id has {} parts, expected 5", parts.len()));
        };
        if self.name(tag)? != "storage" {
            return Err("a persistent id is not a storage".into());
        }
        let element = match self.get(kind) {
            Some(Object::Global(Global::Storage(element))) => Some(*element),
            Some(Object::Global(Global::UntypedStorage)) => None,
            _ => return Err("a storage without an element type".into()),
        };
        let key = self.name(key)?.to_owned();
        let length = self.size(length)? as u64;
        Ok(Object::Storage(Box::new(Storage { element, key, length })))
    }

    fn tensor(
        &self,
        storage: Value,
        offset: Value,
        size: Value,
        stride: Value,
        element: Option<Element>,
    ) -> Result<Tensor, String> {
        let Some(Object::Storage(storage)) = self.get(storage) else {
            return Err("a tensor without a storage".into());
        };
        let Some(element) = element.or(storage.element) else {
            return Err("a tensor without an element type".into());
        };
        let bytes = match storage.element {
            Some(own) => storage.length.checked_mul(own.size() as u64),
            None => Some(storage.length),
        };
        let bytes = bytes.ok_or("a storage is too large")?;
        let offset = self.size(offset)? as u64;
        Tensor::new(element, storage.key.clone(), bytes, offset, self.sizes(size)?, self.sizes(stride)?)
    }

    /// A short string: a name, a code.
    pub(crate) fn name(&self, value: Value) -> Result<&str, String> {
        let text = self.text(value)?;
        if text.len() > 200 { Err("a name is longer than 200 bytes".into()) } else { Ok(text) }
    }

    /// A string.
    pub(crate) fn text(&self, value: Value) -> Result<&str, String> {
        match self.get(value) {
            Some(Object::Text(text)) => Ok(text),
            _ => Err("expected a string".into()),
        }
    }

    fn data(&self, value: Value) -> Result<&[u8], String> {
        match self.get(value) {
            Some(Object::Bytes(bytes)) => Ok(bytes),
            // A Python 2 string that happens to be UTF-8.
            Some(Object::Text(text)) => Ok(text.as_bytes()),
            Some(Object::List(_)) => Err("arrays of Python objects are not read".into()),
            _ => Err("expected bytes".into()),
        }
    }

    fn sequence(&self, value: Value) -> Result<&[Value], String> {
        match self.get(value) {
            Some(Object::Tuple(items) | Object::List(items)) => Ok(items),
            _ => Err("expected a tuple".into()),
        }
    }

    fn copy_sequence(&mut self, value: Value) -> Result<Vec<Value>, String> {
        let length = self.sequence(value)?.len();
        self.spend(length.saturating_mul(size_of::<Value>()))?;
        Ok(self.sequence(value)?.to_vec())
    }

    fn copy_data(&mut self, value: Value) -> Result<Vec<u8>, String> {
        let length = self.data(value)?.len();
        self.spend(length)?;
        Ok(self.data(value)?.to_vec())
    }

    fn entries(&mut self, value: Value) -> Result<Vec<(Value, Value)>, String> {
        let length = self.sequence(value)?.len();
        self.spend(length.saturating_mul(2 * size_of::<Value>()))?;
        let items = self.sequence(value)?;
        let entry = |&item: &Value| match self.sequence(item)? {
            [key, value] => Ok((*key, *value)),
            _ => Err("expected pairs of key and value".to_string()),
        };
        items.iter().map(entry).collect()
    }

    fn size(&self, value: Value) -> Result<usize, String> {
        match value {
            Value::Int(i) => usize::try_from(i).map_err(|_| format!("{i} is not a size")),
            _ => Err("expected a size".into()),
        }
    }

    /// A shape: at most eight sizes.
    fn sizes(&self, value: Value) -> Result<Vec<usize>, String> {
        let items = self.sequence(value)?;
        if items.len() > 8 {
            return Err(format!("{} dimensions, at most 8 are read", items.len()));
        }
        items.iter().map(|&v| self.size(v)).collect()
    }

    fn dtype(&self, value: Value) -> Result<(Element, bool), String> {
        match self.get(value) {
            Some(Object::Dtype(element, big_endian)) => Ok((*element, *big_endian)),
            _ => Err("expected a numpy type".into()),
        }
    }
}

fn latin1(text: &str) -> Result<Vec<u8>, String> {
    let byte =
        |c: char| u8::try_from(c).map_err(|_| "bytes written as text hold a wide character".to_string());
    text.chars().map(byte).collect()
}

fn numpy_type(code: &str) -> Result<(Element, bool), String> {
    let (order, name) = match code.strip_prefix(['<', '>', '|', '=']) {
        Some(name) => (code.as_bytes().first().copied(), name),
        None => (None, code),
    };
    match Element::from_numpy(name) {
        Some(element) => Ok((element, order == Some(b'>'))),
        None if name.starts_with('O') => Err("arrays of Python objects are not read".into()),
        None => Err(format!("numpy type {code:?} is not read, expected numbers")),
    }
}

fn scalar(element: Element, big_endian: bool, data: &[u8]) -> Result<Value, String> {
    let value = match element {
        Element::Bool => element.to_i64(data, big_endian).map(|b| Value::Bool(b != 0)),
        e if e.is_integer() => e.to_i64(data, big_endian).map(Value::Int),
        e => e.to_f64(data, big_endian).map(Value::Float),
    };
    value.ok_or_else(|| format!("a numpy {} of {} bytes", element.name(), data.len()))
}

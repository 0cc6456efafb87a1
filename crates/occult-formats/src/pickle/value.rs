//! What a pickle holds: an arena of objects that refer to each other by index, and a view that walks it.

use super::globals::Global;
use super::{Array, Element, PickleError, Tensor, machine};

/// A scalar, or the index of an object in the arena.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Value {
    None,
    Bool(bool),
    Int(i64),
    Float(f64),
    Object(u32),
}

/// Storage of a tensor, as the pickle describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Storage {
    /// `None`: bytes, the tensor says its element type.
    pub(crate) element: Option<Element>,
    /// File name in the archive's `data` folder.
    pub(crate) key: String,
    /// Elements, or bytes where `element` is `None`.
    pub(crate) length: u64,
}

/// An object of the arena.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Object {
    Text(String),
    Bytes(Vec<u8>),
    /// An integer that 64 bits cannot hold: nothing here needs its value.
    LargeInt,
    List(Vec<Value>),
    Tuple(Vec<Value>),
    Dict(Vec<(Value, Value)>),
    Global(Global),
    Storage(Box<Storage>),
    Tensor(Box<Tensor>),
    /// A numpy element type and whether it is big-endian.
    Dtype(Element, bool),
    Array(Box<Array>),
}

/// A parsed pickle.
#[derive(Debug, Clone)]
pub struct Pickle {
    pub(crate) objects: Vec<Object>,
    pub(crate) root: Value,
}

impl Pickle {
    /// Reads one pickle (protocols 0 to 5) from the start of `bytes`. Errors name the byte and what was refused; nothing
    /// is ever executed.
    pub fn parse(bytes: &[u8]) -> Result<Self, PickleError> {
        machine::run(bytes)
    }

    /// The pickled object.
    pub fn root(&self) -> Item<'_> {
        Item { pickle: self, value: self.root }
    }
}

/// A value inside a pickle.
#[derive(Debug, Clone, Copy)]
pub struct Item<'a> {
    pickle: &'a Pickle,
    value: Value,
}

impl<'a> Item<'a> {
    fn object(self) -> Option<&'a Object> {
        match self.value {
            Value::Object(i) => self.pickle.objects.get(i as usize),
            _ => None,
        }
    }

    /// What it is, in words for an error.
    pub fn kind(self) -> &'static str {
        match (self.value, self.object()) {
            (Value::None, _) => "None",
            (Value::Bool(_), _) => "a bool",
            (Value::Int(_), _) | (_, Some(Object::LargeInt)) => "an integer",
            (Value::Float(_), _) => "a float",
            (_, Some(Object::Text(_))) => "a string",
            (_, Some(Object::Bytes(_))) => "bytes",
            (_, Some(Object::List(_))) => "a list",
            (_, Some(Object::Tuple(_))) => "a tuple",
            (_, Some(Object::Dict(_))) => "a dict",
            (_, Some(Object::Tensor(_))) => "a tensor",
            (_, Some(Object::Array(_))) => "a numpy array",
            _ => "an object without data",
        }
    }

    /// An integer (or bool).
    pub fn as_i64(self) -> Option<i64> {
        match self.value {
            Value::Int(i) => Some(i),
            Value::Bool(b) => Some(i64::from(b)),
            _ => None,
        }
    }

    /// A float or an integer.
    pub fn as_f64(self) -> Option<f64> {
        match self.value {
            Value::Float(f) => Some(f),
            Value::Int(i) => Some(i as f64),
            _ => None,
        }
    }

    /// A string.
    pub fn as_text(self) -> Option<&'a str> {
        match self.object()? {
            Object::Text(s) => Some(s),
            _ => None,
        }
    }

    /// A tensor of a `.pt` file.
    pub fn tensor(self) -> Option<&'a Tensor> {
        match self.object()? {
            Object::Tensor(t) => Some(t),
            _ => None,
        }
    }

    /// A numpy array.
    pub fn array(self) -> Option<&'a Array> {
        match self.object()? {
            Object::Array(a) => Some(a),
            _ => None,
        }
    }

    /// Whether it is a dict.
    pub fn is_dict(self) -> bool {
        matches!(self.object(), Some(Object::Dict(_)))
    }

    /// Elements of a list or tuple.
    pub fn items(self) -> Option<impl ExactSizeIterator<Item = Item<'a>>> {
        let values = match self.object()? {
            Object::List(values) | Object::Tuple(values) => values,
            _ => return None,
        };
        Some(values.iter().map(move |&value| Item { pickle: self.pickle, value }))
    }

    /// Value of a string key of a dict; the last one where the key is written twice.
    pub fn get(self, key: &str) -> Option<Item<'a>> {
        let Object::Dict(entries) = self.object()? else { return None };
        let found = entries.iter().rev().find(|(k, _)| {
            let k = Item { pickle: self.pickle, value: *k };
            k.as_text() == Some(key)
        })?;
        Some(Item { pickle: self.pickle, value: found.1 })
    }
}

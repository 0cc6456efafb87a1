//! The stack machine: opcodes in, an arena of objects out.

use std::collections::BTreeMap;

use super::globals::Global;
use super::opcodes::*;
use super::value::{Object, Pickle, Value};
use super::{MAX_OBJECTS, MAX_STREAM_BYTES, MAX_VALUES, PickleError};

/// Runs a whole stream, up to its STOP.
pub(crate) fn run(bytes: &[u8]) -> Result<Pickle, PickleError> {
    let mut machine = Machine {
        input: bytes,
        at: 0,
        objects: Vec::new(),
        stack: Vec::new(),
        marks: Vec::new(),
        memo: BTreeMap::new(),
        values: 0,
        // Every copy that a legal stream asks for is of bytes that are in it once (a value there: 1 byte or more).
        copies: bytes.len().saturating_mul(2 * size_of::<Value>()).saturating_add(4096),
    };
    let mut start = 0;
    let result = if bytes.len() as u64 > MAX_STREAM_BYTES {
        Err(format!("the stream has {} bytes, at most {MAX_STREAM_BYTES} are read", bytes.len()))
    } else {
        loop {
            start = machine.at;
            match machine.step() {
                Ok(None) => {}
                Ok(Some(root)) => break Ok(root),
                Err(message) => break Err(message),
            }
        }
    };
    match result {
        Ok(root) => Ok(Pickle { objects: machine.objects, root }),
        Err(message) => Err(PickleError { offset: start as u64, message }),
    }
}

pub(crate) struct Machine<'a> {
    input: &'a [u8],
    at: usize,
    pub(crate) objects: Vec<Object>,
    stack: Vec<Value>,
    marks: Vec<usize>,
    memo: BTreeMap<u32, Value>,
    /// Values ever pushed: bounds what the containers can hold together.
    values: usize,
    /// Bytes that calls may still copy: a stream that copies one object again and again ends here.
    copies: usize,
}

impl<'a> Machine<'a> {
    /// One instruction; the root at STOP.
    fn step(&mut self) -> Result<Option<Value>, String> {
        let op = self.u8()?;
        match op {
            PROTO => {
                let version = self.u8()?;
                if version > 5 {
                    return Err(format!("pickle protocol {version}, protocols 0 to 5 are read"));
                }
            }
            FRAME => {
                self.take(8)?;
            }
            STOP => return self.pop().map(Some),
            MARK => self.marks.push(self.stack.len()),
            POP => {
                // Python pops a mark when the stack above it is empty.
                if self.marks.last() == Some(&self.stack.len()) {
                    self.marks.pop();
                } else {
                    self.pop()?;
                }
            }
            POP_MARK => {
                self.pop_to_mark()?;
            }
            DUP => {
                let top = self.top()?;
                self.push(top)?;
            }
            NONE => self.push(Value::None)?,
            NEWTRUE => self.push(Value::Bool(true))?,
            NEWFALSE => self.push(Value::Bool(false))?,
            BININT => {
                let i = i32::from_le_bytes(self.bytes()?);
                self.push(Value::Int(i.into()))?;
            }
            BININT1 => {
                let i = self.u8()?;
                self.push(Value::Int(i.into()))?;
            }
            BININT2 => {
                let i = u16::from_le_bytes(self.bytes()?);
                self.push(Value::Int(i.into()))?;
            }
            BINFLOAT => {
                let f = f64::from_be_bytes(self.bytes()?);
                self.push(Value::Float(f))?;
            }
            LONG1 => {
                let n = self.u8()?;
                self.long(n.into())?;
            }
            LONG4 => {
                let n = self.u32()?;
                self.long(n.into())?;
            }
            INT => self.text_int()?,
            LONG => self.text_int()?,
            FLOAT => {
                let line = self.line()?;
                let f = line.trim().parse().map_err(|_| format!("expected a float, found {line:?}"))?;
                self.push(Value::Float(f))?;
            }
            STRING => {
                let line = self.line()?;
                let text = unquote(&line).ok_or("a quoted string was expected")?;
                self.object(Object::Text(text))?;
            }
            UNICODE => {
                // Latin-1, with escapes for everything beyond it.
                let line: String = self.line_bytes()?.iter().copied().map(char::from).collect();
                let text = raw_unicode(&line).ok_or("an escape in a string cannot be read")?;
                self.object(Object::Text(text))?;
            }
            SHORT_BINSTRING | BINSTRING | SHORT_BINUNICODE | BINUNICODE | BINUNICODE8 => {
                let n = self.length(op)?;
                let bytes = self.take(n)?;
                let text = match std::str::from_utf8(bytes) {
                    Ok(text) => Object::Text(text.to_owned()),
                    // Python 2 strings are bytes.
                    Err(_) if matches!(op, SHORT_BINSTRING | BINSTRING) => Object::Bytes(bytes.to_vec()),
                    Err(_) => return Err("a string is not UTF-8".into()),
                };
                self.object(text)?;
            }
            SHORT_BINBYTES | BINBYTES | BINBYTES8 | BYTEARRAY8 => {
                let n = self.length(op)?;
                let bytes = self.take(n)?.to_vec();
                self.object(Object::Bytes(bytes))?;
            }
            EMPTY_LIST | EMPTY_SET => self.object(Object::List(Vec::new()))?,
            EMPTY_TUPLE => self.object(Object::Tuple(Vec::new()))?,
            EMPTY_DICT => self.object(Object::Dict(Vec::new()))?,
            LIST | FROZENSET => {
                let items = self.pop_to_mark()?;
                self.object(Object::List(items))?;
            }
            TUPLE => {
                let items = self.pop_to_mark()?;
                self.object(Object::Tuple(items))?;
            }
            TUPLE1 | TUPLE2 | TUPLE3 => {
                let n = usize::from(op - TUPLE1) + 1;
                let from = self.stack.len().checked_sub(n).filter(|&f| f >= self.floor());
                let items = self.stack.split_off(from.ok_or("the stack is too short for a tuple")?);
                self.object(Object::Tuple(items))?;
            }
            DICT => {
                let items = self.pop_to_mark()?;
                let entries = pairs(&items)?;
                self.object(Object::Dict(entries))?;
            }
            APPEND => {
                let item = self.pop()?;
                self.extend_list(vec![item])?;
            }
            APPENDS | ADDITEMS => {
                let items = self.pop_to_mark()?;
                self.extend_list(items)?;
            }
            SETITEM => {
                let (value, key) = (self.pop()?, self.pop()?);
                self.extend_dict(vec![(key, value)])?;
            }
            SETITEMS => {
                let items = self.pop_to_mark()?;
                self.extend_dict(pairs(&items)?)?;
            }
            PUT | BINPUT | LONG_BINPUT => {
                let index = self.memo_index(op)?;
                let top = self.top()?;
                self.memo.insert(index, top);
            }
            MEMOIZE => {
                let top = self.top()?;
                self.memo.insert(self.memo.len() as u32, top);
            }
            GET | BINGET | LONG_BINGET => {
                let index = self.memo_index(op)?;
                let value = *self.memo.get(&index).ok_or_else(|| format!("memo {index} was never set"))?;
                self.push(value)?;
            }
            GLOBAL => {
                let (module, name) = (self.line()?, self.line()?);
                self.global(&module, &name)?;
            }
            STACK_GLOBAL => {
                let (name, module) = (self.pop()?, self.pop()?);
                let (module, name) = (self.name(module)?.to_owned(), self.name(name)?.to_owned());
                self.global(&module, &name)?;
            }
            INST => {
                let (module, name) = (self.line()?, self.line()?);
                return Err(refused(&module, &name));
            }
            OBJ | NEWOBJ | NEWOBJ_EX => {
                return Err("wants to create an object of a class, refused: only data is read".into());
            }
            EXT1 | EXT2 | EXT4 => return Err("wants to run a registered extension, refused".into()),
            NEXT_BUFFER | READONLY_BUFFER => return Err("out-of-band buffers are not in the file".into()),
            PERSID => return Err("text persistent ids are not read".into()),
            BINPERSID => {
                let id = self.pop()?;
                let storage = self.persistent(id)?;
                self.object(storage)?;
            }
            REDUCE => {
                let (args, function) = (self.pop()?, self.pop()?);
                let result = self.reduce(function, args)?;
                match result {
                    Reduced::Value(value) => self.push(value)?,
                    Reduced::Object(object) => self.object(object)?,
                }
            }
            BUILD => {
                let state = self.pop()?;
                let target = self.top()?;
                self.build(target, state)?;
            }
            other => return Err(format!("0x{other:02x} is not a pickle instruction")),
        }
        Ok(None)
    }

    fn global(&mut self, module: &str, name: &str) -> Result<(), String> {
        let global = Global::named(module, name).ok_or_else(|| refused(module, name))?;
        self.object(Object::Global(global))
    }

    fn take(&mut self, n: u64) -> Result<&'a [u8], String> {
        let rest = self.input.get(self.at..).unwrap_or_default();
        let bytes = usize::try_from(n).ok().and_then(|n| rest.get(..n));
        let bytes = bytes.ok_or_else(|| format!("expected {n} more bytes, found {}", rest.len()))?;
        self.at += bytes.len();
        Ok(bytes)
    }

    fn bytes<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N as u64)?);
        Ok(out)
    }

    fn u8(&mut self) -> Result<u8, String> {
        self.bytes::<1>().map(|[b]| b)
    }

    fn u32(&mut self) -> Result<u32, String> {
        self.bytes().map(u32::from_le_bytes)
    }

    fn length(&mut self, op: u8) -> Result<u64, String> {
        Ok(match op {
            SHORT_BINSTRING | SHORT_BINUNICODE | SHORT_BINBYTES => self.u8()?.into(),
            BINSTRING | BINUNICODE | BINBYTES => self.u32()?.into(),
            _ => u64::from_le_bytes(self.bytes()?),
        })
    }

    fn memo_index(&mut self, op: u8) -> Result<u32, String> {
        match op {
            BINPUT | BINGET => self.u8().map(u32::from),
            LONG_BINPUT | LONG_BINGET => self.u32(),
            _ => {
                let line = self.line()?;
                line.trim().parse().map_err(|_| format!("expected a memo number, found {line:?}"))
            }
        }
    }

    /// The text up to the next line feed, which is consumed.
    fn line(&mut self) -> Result<String, String> {
        let line = self.line_bytes()?;
        String::from_utf8(line.to_vec()).map_err(|_| "a line is not UTF-8".into())
    }

    fn line_bytes(&mut self) -> Result<&'a [u8], String> {
        let rest = self.input.get(self.at..).unwrap_or_default();
        let n = rest.iter().position(|&b| b == b'\n').ok_or("a line does not end")?;
        let line = self.take(n as u64)?;
        self.at += 1;
        Ok(line)
    }

    fn long(&mut self, n: u64) -> Result<(), String> {
        let bytes = self.take(n)?;
        match bytes {
            [] => self.push(Value::Int(0)),
            [rest @ .., last] => {
                // Two's complement, little-endian, as short as possible (but longer forms are legal).
                let fill = if last & 0x80 != 0 { 0xff } else { 0 };
                let mut raw = [fill; 8];
                if bytes.len() > 8 && (rest.iter().skip(8).any(|&b| b != fill) || *last != fill) {
                    return self.object(Object::LargeInt);
                }
                for (to, from) in raw.iter_mut().zip(bytes) {
                    *to = *from;
                }
                let value = i64::from_le_bytes(raw);
                if bytes.len() > 8 && (value < 0) != (fill == 0xff) {
                    return self.object(Object::LargeInt);
                }
                self.push(Value::Int(value))
            }
        }
    }

    fn text_int(&mut self) -> Result<(), String> {
        let line = self.line()?;
        match line.trim() {
            "00" => self.push(Value::Bool(false)),
            "01" => self.push(Value::Bool(true)),
            text => {
                let digits = text.strip_suffix('L').unwrap_or(text);
                let magnitude = digits.strip_prefix(['-', '+']).unwrap_or(digits);
                if magnitude.is_empty() || !magnitude.bytes().all(|b| b.is_ascii_digit()) {
                    return Err(format!("expected an integer, found {line:?}"));
                }
                match digits.parse() {
                    Ok(i) => self.push(Value::Int(i)),
                    Err(_) => self.object(Object::LargeInt),
                }
            }
        }
    }

    fn push(&mut self, value: Value) -> Result<(), String> {
        self.values += 1;
        if self.values > MAX_VALUES {
            return Err(format!("more than {MAX_VALUES} values"));
        }
        self.stack.push(value);
        Ok(())
    }

    /// Pushes a new object.
    fn object(&mut self, object: Object) -> Result<(), String> {
        if self.objects.len() >= MAX_OBJECTS {
            return Err(format!("more than {MAX_OBJECTS} objects"));
        }
        let index = self.objects.len() as u32;
        self.objects.push(object);
        self.push(Value::Object(index))
    }

    /// Lowest stack position that an instruction may pop: values under the last mark are out of reach.
    fn floor(&self) -> usize {
        self.marks.last().copied().unwrap_or(0)
    }

    fn pop(&mut self) -> Result<Value, String> {
        if self.stack.len() <= self.floor() {
            return Err("the stack is empty".into());
        }
        self.stack.pop().ok_or_else(|| "the stack is empty".into())
    }

    fn top(&self) -> Result<Value, String> {
        if self.stack.len() <= self.floor() {
            return Err("the stack is empty".into());
        }
        self.stack.last().copied().ok_or_else(|| "the stack is empty".into())
    }

    fn pop_to_mark(&mut self) -> Result<Vec<Value>, String> {
        let mark = self.marks.pop().ok_or("there is no mark")?;
        Ok(self.stack.split_off(mark.min(self.stack.len())))
    }

    fn extend_list(&mut self, items: Vec<Value>) -> Result<(), String> {
        match self.get_mut(self.top()?) {
            Some(Object::List(list)) => list.extend(items),
            _ => return Err("items are added to something that is not a list".into()),
        }
        Ok(())
    }

    fn extend_dict(&mut self, entries: Vec<(Value, Value)>) -> Result<(), String> {
        match self.get_mut(self.top()?) {
            Some(Object::Dict(dict)) => dict.extend(entries),
            _ => return Err("entries are set in something that is not a dict".into()),
        }
        Ok(())
    }

    pub(crate) fn spend(&mut self, bytes: usize) -> Result<(), String> {
        self.copies = self.copies.checked_sub(bytes).ok_or("it copies the same data again and again")?;
        Ok(())
    }

    pub(crate) fn get(&self, value: Value) -> Option<&Object> {
        match value {
            Value::Object(i) => self.objects.get(i as usize),
            _ => None,
        }
    }

    pub(crate) fn get_mut(&mut self, value: Value) -> Option<&mut Object> {
        match value {
            Value::Object(i) => self.objects.get_mut(i as usize),
            _ => None,
        }
    }
}

/// What a REDUCE of a name of the allow-list stands for.
pub(crate) enum Reduced {
    Value(Value),
    Object(Object),
}

fn refused(module: &str, name: &str) -> String {
    let clean = |s: &str| s.chars().take(80).flat_map(char::escape_default).collect::<String>();
    format!("wants to run {}.{}, refused: only data is read", clean(module), clean(name))
}

fn pairs(items: &[Value]) -> Result<Vec<(Value, Value)>, String> {
    if !items.len().is_multiple_of(2) {
        return Err("a dict key has no value".into());
    }
    Ok(items.chunks_exact(2).map(|kv| (kv[0], kv[1])).collect())
}

/// Protocol 0 `STRING`: a Python literal in quotes, with the escapes that `repr` writes.
fn unquote(line: &str) -> Option<String> {
    let line = line.trim();
    let quote = line.chars().next().filter(|c| matches!(c, '\'' | '"'))?;
    let inner = line.strip_prefix(quote)?.strip_suffix(quote)?;
    let mut out = String::new();
    let mut chars = inner.chars();
    while let Some(c) = chars.next() {
        if c != '\\' {
            out.push(c);
            continue;
        }
        out.push(match chars.next()? {
            'n' => '\n',
            't' => '\t',
            'r' => '\r',
            'x' => char::from(u8::try_from(hex(&mut chars, 2)?).ok()?),
            c @ ('\\' | '\'' | '"') => c,
            _ => return None,
        });
    }
    Some(out)
}

/// Protocol 0 `UNICODE`: raw-unicode-escape.
fn raw_unicode(line: &str) -> Option<String> {
    let mut out = String::new();
    let mut chars = line.chars();
    while let Some(c) = chars.next() {
        let digits = match (c, chars.as_str().chars().next()) {
            ('\\', Some('u')) => 4,
            ('\\', Some('U')) => 8,
            _ => {
                out.push(c);
                continue;
            }
        };
        chars.next();
        out.push(char::from_u32(hex(&mut chars, digits)?)?);
    }
    Some(out)
}

fn hex(chars: &mut std::str::Chars<'_>, digits: usize) -> Option<u32> {
    (0..digits).try_fold(0u32, |acc, _| Some((acc << 4) | chars.next()?.to_digit(16)?))
}

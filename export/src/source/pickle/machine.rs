//! The stack machine: pickle protocols 0 to 5 (PEP 3154, PEP 574) without calls.

use super::globals::{Global, classify};
use super::{MAX_INSTRUCTIONS, PickleError, PickleErrorKind, SourceDtype, TensorRecord};
use std::collections::HashMap;

/// Tensors have at most this many axes here.
const MAX_AXES: usize = 8;

/// A storage's name is a small number in text.
const MAX_KEY: usize = 64;
/// Elements that calls may copy in all: without a bound, copying one long list over and over would fill memory.
const MAX_COPIED: usize = 8 << 20;

/// An index into the machine's values.
type Id = u32;

/// A value. Containers hold ids, so a shared or cyclic structure costs what the pickle spent on it.
#[derive(Clone, Debug)]
enum Value {
    None,
    Int(i64),
    Text(Box<str>),
    Sequence(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    Global(Global),
    Storage {
        dtype: Option<SourceDtype>,
        key: Box<str>,
        count: u64,
    },
    Tensor(Box<TensorRecord>),
    /// Anything the reader has no use for: floats, bytes, booleans, sets, objects.
    Opaque,
}

pub(super) struct Machine<'a> {
    input: &'a [u8],
    at: usize,
    /// Where the current instruction began.
    started: usize,
    values: Vec<Value>,
    stack: Vec<Id>,
    /// Stack heights at the open marks.
    marks: Vec<usize>,
    memo: HashMap<u32, Id>,
    /// Elements copied so far, see [`MAX_COPIED`].
    copied: usize,
}

impl<'a> Machine<'a> {
    pub(super) fn new(input: &'a [u8]) -> Self {
        Self {
            input,
            at: 0,
            started: 0,
            values: Vec::new(),
            stack: Vec::new(),
            marks: Vec::new(),
            memo: HashMap::new(),
            copied: 0,
        }
    }

    pub(super) fn run(mut self) -> Result<Vec<(String, TensorRecord)>, PickleError> {
        for _ in 0..MAX_INSTRUCTIONS {
            self.started = self.at;
            let op = self.byte()?;
            if op == b'.' {
                let top = self.pop()?;
                if !self.stack.is_empty() || !self.marks.is_empty() {
                    return self.malformed("it ends with values left over");
                }
                return self.state_dict(top);
            }
            self.step(op)?;
        }
        self.malformed(format!("more than {MAX_INSTRUCTIONS} instructions"))
    }

    fn malformed<T>(&self, why: impl Into<String>) -> Result<T, PickleError> {
        Err(PickleError { offset: self.started, kind: PickleErrorKind::Malformed(why.into()) })
    }

    fn take(&mut self, n: usize) -> Result<&'a [u8], PickleError> {
        match self.input.get(self.at..).and_then(|rest| rest.get(..n)) {
            Some(bytes) => {
                self.at += n;
                Ok(bytes)
            }
            None => self.malformed("it ends in the middle of an instruction"),
        }
    }

    fn byte(&mut self) -> Result<u8, PickleError> {
        Ok(self.take(1)?[0])
    }

    /// An unsigned little-endian number of `n` bytes, at most eight.
    fn number(&mut self, n: usize) -> Result<u64, PickleError> {
        Ok(self.take(n)?.iter().rev().fold(0u64, |v, &b| v << 8 | u64::from(b)))
    }

    fn length(&mut self, n: usize) -> Result<usize, PickleError> {
        let len = self.number(n)?;
        // A length beyond the input fails in `take`, whatever it is clamped to.
        Ok(usize::try_from(len).unwrap_or(usize::MAX))
    }

    /// The bytes up to the next newline, which is skipped.
    fn line(&mut self) -> Result<&'a str, PickleError> {
        let rest = &self.input[self.at..];
        let Some(len) = rest.iter().position(|&b| b == b'\n') else {
            return self.malformed("a line has no end");
        };
        self.at += len + 1;
        match std::str::from_utf8(&rest[..len]) {
            Ok(text) => Ok(text),
            Err(_) => self.malformed("a line is not UTF-8"),
        }
    }

    fn push(&mut self, value: Value) -> Id {
        // One value an instruction at most, and those are bounded well below `u32::MAX`.
        let id = self.values.len() as Id;
        self.values.push(value);
        self.stack.push(id);
        id
    }

    fn push_text(&mut self, bytes: &[u8]) {
        let value = match std::str::from_utf8(bytes) {
            Ok(text) => Value::Text(text.into()),
            // Python's surrogates; no tensor is named so.
            Err(_) => Value::Opaque,
        };
        self.push(value);
    }

    fn pop(&mut self) -> Result<Id, PickleError> {
        let floor = self.marks.last().copied().unwrap_or(0);
        if self.stack.len() > floor
            && let Some(id) = self.stack.pop()
        {
            return Ok(id);
        }
        self.malformed("the stack is empty")
    }

    fn top(&self) -> Result<Id, PickleError> {
        match self.stack.last() {
            Some(&id) if self.stack.len() > self.marks.last().copied().unwrap_or(0) => Ok(id),
            _ => self.malformed("the stack is empty"),
        }
    }

    /// Everything above the last mark.
    fn pop_mark(&mut self) -> Result<Vec<Id>, PickleError> {
        match self.marks.pop() {
            Some(mark) => Ok(self.stack.split_off(mark)),
            None => self.malformed("no mark is open"),
        }
    }

    fn value(&self, id: Id) -> &Value {
        &self.values[id as usize]
    }

    fn step(&mut self, op: u8) -> Result<(), PickleError> {
        match op {
            // PROTO, FRAME
            0x80 => {
                let version = self.byte()?;
                if version > 5 {
                    return self.malformed(format!("pickle protocol {version}"));
                }
            }
            0x95 => {
                self.take(8)?;
            }
            // Marks and the stack.
            b'(' => self.marks.push(self.stack.len()),
            b'0' => {
                // POP also closes a mark that stands right at the top.
                if self.marks.last() == Some(&self.stack.len()) {
                    self.marks.pop();
                } else {
                    self.pop()?;
                }
            }
            b'1' => {
                self.pop_mark()?;
            }
            b'2' => {
                let id = self.top()?;
                self.stack.push(id);
            }
            // Constants.
            b'N' => {
                self.push(Value::None);
            }
            0x88 | 0x89 => {
                self.push(Value::Opaque);
            }
            b'K' => self.push_int(1)?,
            b'M' => self.push_int(2)?,
            b'J' => {
                let v = self.number(4)? as u32 as i32;
                self.push(Value::Int(i64::from(v)));
            }
            b'I' | b'L' => {
                let text = self.line()?.trim_end_matches('L');
                let value = text.parse().map_or(Value::Opaque, Value::Int);
                self.push(value);
            }
            0x8a | 0x8b => {
                let len = self.length(if op == 0x8a { 1 } else { 4 })?;
                let bytes = self.take(len)?;
                let value = small_int(bytes);
                self.push(value);
            }
            b'F' => {
                self.line()?;
                self.push(Value::Opaque);
            }
            b'G' => {
                self.take(8)?;
                self.push(Value::Opaque);
            }
            // Text.
            b'S' | b'V' => {
                let text = self.line()?.trim_matches(['\'', '"']);
                self.push_text(text.as_bytes());
            }
            b'U' | 0x8c => self.text(1)?,
            b'T' | b'X' => self.text(4)?,
            0x8d => self.text(8)?,
            // Bytes.
            b'C' => self.bytes(1)?,
            b'B' => self.bytes(4)?,
            0x8e | 0x96 => self.bytes(8)?,
            0x97 | 0x98 => return self.malformed("it refers to a buffer outside the file"),
            // Containers.
            b')' | b']' => {
                self.push(Value::Sequence(Vec::new()));
            }
            b't' | b'l' => {
                let items = self.pop_mark()?;
                self.push(Value::Sequence(items));
            }
            0x85..=0x87 => {
                let count = usize::from(op - 0x84);
                let mut items = Vec::with_capacity(count);
                for _ in 0..count {
                    items.push(self.pop()?);
                }
                items.reverse();
                self.push(Value::Sequence(items));
            }
            b'}' => {
                self.push(Value::Dict(Vec::new()));
            }
            b'd' => {
                let items = self.pop_mark()?;
                let pairs = self.pairs(&items)?;
                self.push(Value::Dict(pairs));
            }
            0x8f => {
                self.push(Value::Opaque);
            }
            0x91 => {
                self.pop_mark()?;
                self.push(Value::Opaque);
            }
            b'a' => {
                let item = self.pop()?;
                self.append(&[item])?;
            }
            b'e' | 0x90 => {
                let items = self.pop_mark()?;
                self.append(&items)?;
            }
            b's' => {
                let value = self.pop()?;
                let key = self.pop()?;
                self.set_items(&[key, value])?;
            }
            b'u' => {
                let items = self.pop_mark()?;
                self.set_items(&items)?;
            }
            // The memo.
            b'p' => {
                let index = self.line()?.parse();
                self.memoize(index.ok())?;
            }
            b'q' => {
                let index = self.number(1)? as u32;
                self.memoize(Some(index))?;
            }
            b'r' => {
                let index = self.number(4)? as u32;
                self.memoize(Some(index))?;
            }
            0x94 => {
                let index = self.memo.len() as u32;
                self.memoize(Some(index))?;
            }
            b'g' => {
                let index = self.line()?.parse();
                self.recall(index.ok())?;
            }
            b'h' => {
                let index = self.number(1)? as u32;
                self.recall(Some(index))?;
            }
            b'j' => {
                let index = self.number(4)? as u32;
                self.recall(Some(index))?;
            }
            // Globals, and what Python would call.
            b'c' => {
                let module = self.line()?;
                let name = self.line()?;
                self.global(module, name)?;
            }
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                match (self.value(module).clone(), self.value(name).clone()) {
                    (Value::Text(module), Value::Text(name)) => self.global(&module, &name)?,
                    _ => return self.malformed("a global's name is not text"),
                }
            }
            b'i' => {
                let module = self.line()?;
                let name = self.line()?;
                self.pop_mark()?;
                self.global(module, name)?;
                self.pop()?;
                self.push(Value::Opaque);
            }
            b'o' => {
                self.pop_mark()?;
                self.push(Value::Opaque);
            }
            b'R' => {
                let (args, callee) = (self.pop()?, self.pop()?);
                let value = self.reduce(callee, args)?;
                self.push(value);
            }
            0x81 => {
                let (args, class) = (self.pop()?, self.pop()?);
                let value = self.reduce(class, args)?;
                self.push(value);
            }
            0x92 => {
                for _ in 0..3 {
                    self.pop()?;
                }
                self.push(Value::Opaque);
            }
            // BUILD would set attributes; a dict's `_metadata` is the only one that honest files set.
            b'b' => {
                self.pop()?;
                self.top()?;
            }
            b'Q' => {
                let id = self.pop()?;
                let value = self.persistent(id)?;
                self.push(value);
            }
            b'P' => return self.malformed("a storage is named by a line of text"),
            0x82..=0x84 => return self.malformed("it uses Python's extension registry"),
            _ => return self.malformed(format!("unknown instruction 0x{op:02x}")),
        }
        Ok(())
    }

    fn push_int(&mut self, n: usize) -> Result<(), PickleError> {
        let v = self.number(n)?;
        self.push(Value::Int(v as i64));
        Ok(())
    }

    fn text(&mut self, n: usize) -> Result<(), PickleError> {
        let len = self.length(n)?;
        let bytes = self.take(len)?;
        self.push_text(bytes);
        Ok(())
    }

    fn bytes(&mut self, n: usize) -> Result<(), PickleError> {
        let len = self.length(n)?;
        self.take(len)?;
        self.push(Value::Opaque);
        Ok(())
    }

    fn pairs(&self, items: &[Id]) -> Result<Vec<(Id, Id)>, PickleError> {
        let (pairs, rest) = items.as_chunks::<2>();
        if !rest.is_empty() {
            return self.malformed("a key has no value");
        }
        Ok(pairs.iter().map(|p| (p[0], p[1])).collect())
    }

    fn append(&mut self, items: &[Id]) -> Result<(), PickleError> {
        let id = self.top()?;
        match &mut self.values[id as usize] {
            Value::Sequence(list) => list.extend_from_slice(items),
            Value::Opaque => {}
            _ => return self.malformed("it appends to something that is not a list"),
        }
        Ok(())
    }

    fn set_items(&mut self, items: &[Id]) -> Result<(), PickleError> {
        let new = self.pairs(items)?;
        let id = self.top()?;
        match &mut self.values[id as usize] {
            Value::Dict(pairs) => pairs.extend(new),
            Value::Opaque => {}
            _ => return self.malformed("it sets an item of something that is not a dict"),
        }
        Ok(())
    }

    fn memoize(&mut self, index: Option<u32>) -> Result<(), PickleError> {
        let Some(index) = index else {
            return self.malformed("a memo's index is not a number");
        };
        let id = self.top()?;
        self.memo.insert(index, id);
        Ok(())
    }

    fn recall(&mut self, index: Option<u32>) -> Result<(), PickleError> {
        match index.and_then(|i| self.memo.get(&i)) {
            Some(&id) => {
                self.stack.push(id);
                Ok(())
            }
            None => self.malformed("it recalls what it never memoized"),
        }
    }

    fn global(&mut self, module: &str, name: &str) -> Result<(), PickleError> {
        match classify(module, name) {
            Some(global) => {
                self.push(Value::Global(global));
                Ok(())
            }
            None => {
                // Names come from the file: bounded and escaped before they are shown.
                let shown: String = format!("{module}.{name}").chars().take(120).collect();
                let kind = PickleErrorKind::Global(shown.escape_debug().to_string());
                Err(PickleError { offset: self.started, kind })
            }
        }
    }

    fn sequence(&self, id: Id) -> Option<&[Id]> {
        match self.value(id) {
            Value::Sequence(items) => Some(items),
            _ => None,
        }
    }

    /// What calling `callee` with `args` stands for.
    fn reduce(&mut self, callee: Id, args: Id) -> Result<Value, PickleError> {
        let Value::Global(global) = self.value(callee) else {
            // A value that came out of something opaque: stays opaque, its arguments unused.
            return Ok(Value::Opaque);
        };
        let Some(args) = self.sequence(args) else {
            return self.malformed("a call's arguments are not a tuple");
        };
        let value = self.apply(global, args)?;
        self.copied += match &value {
            Value::Dict(pairs) => pairs.len(),
            Value::Sequence(items) => items.len(),
            _ => 0,
        };
        if self.copied > MAX_COPIED {
            return self.malformed("it copies the same containers over and over");
        }
        Ok(value)
    }

    fn apply(&self, global: &Global, args: &[Id]) -> Result<Value, PickleError> {
        Ok(match global {
            Global::Dict => match args.first().map(|&id| self.value(id)) {
                None => Value::Dict(Vec::new()),
                Some(Value::Dict(pairs)) => Value::Dict(pairs.clone()),
                Some(Value::Sequence(items)) => {
                    let pair = |&id: &Id| match self.sequence(id) {
                        Some(&[key, value]) => Ok((key, value)),
                        _ => self.malformed("a dict is made of something that is not pairs"),
                    };
                    Value::Dict(items.iter().map(pair).collect::<Result<_, _>>()?)
                }
                Some(_) => Value::Opaque,
            },
            Global::Size => match args.first().and_then(|&id| self.sequence(id)) {
                Some(items) => Value::Sequence(items.to_vec()),
                None => Value::Opaque,
            },
            Global::RebuildTensor => self.tensor(args, None)?,
            Global::RebuildTensorV3 => match args.get(6).map(|&id| self.value(id)) {
                Some(Value::Global(Global::Dtype(dtype))) => self.tensor(args, Some(dtype))?,
                _ => return self.malformed("a tensor has no element type"),
            },
            Global::RebuildParameter => match args.first().map(|&id| self.value(id)) {
                Some(inner @ Value::Tensor(_)) => inner.clone(),
                _ => Value::Opaque,
            },
            Global::RebuildFromType => match args {
                [inner, _, inner_args, ..] => {
                    match (self.value(*inner), self.sequence(*inner_args)) {
                        // One level only, so that the machine never recurses.
                        (Value::Global(inner), Some(inner_args))
                            if *inner != Global::RebuildFromType =>
                        {
                            self.apply(inner, inner_args)?
                        }
                        _ => Value::Opaque,
                    }
                }
                _ => Value::Opaque,
            },
            Global::Storage(_) | Global::UntypedStorage | Global::Dtype(_) | Global::Inert => {
                Value::Opaque
            }
        })
    }

    fn unsigned(&self, id: Id) -> Result<u64, PickleError> {
        match self.value(id) {
            Value::Int(v) => match u64::try_from(*v) {
                Ok(v) => Ok(v),
                Err(_) => self.malformed(format!("a tensor with the size {v}")),
            },
            _ => self.malformed("a tensor's size is not a number"),
        }
    }

    fn axes(&self, id: Id) -> Result<Vec<u64>, PickleError> {
        match self.sequence(id) {
            Some(items) if items.len() <= MAX_AXES => {
                items.iter().map(|&i| self.unsigned(i)).collect()
            }
            Some(items) => self.malformed(format!("a tensor with {} axes", items.len())),
            None => self.malformed("a tensor's shape is not a tuple"),
        }
    }

    fn tensor(&self, args: &[Id], retyped: Option<&SourceDtype>) -> Result<Value, PickleError> {
        let &[storage, offset, size, stride, ..] = args else {
            return self.malformed("a tensor is rebuilt from too few values");
        };
        let Value::Storage { dtype, key, count } = self.value(storage) else {
            return self.malformed("a tensor is rebuilt from something that is not a storage");
        };
        let (dtype, count) = match (dtype, retyped) {
            (Some(dtype), None) => (dtype.clone(), *count),
            // An untyped storage counts bytes.
            (_, Some(dtype)) => (dtype.clone(), *count / dtype.size().unwrap_or(1) as u64),
            (None, None) => return self.malformed("a storage has no element type"),
        };
        let shape = self.axes(size)?;
        let stride = self.axes(stride)?;
        if shape.len() != stride.len() {
            return self.malformed("a tensor's shape and strides differ in length");
        }
        Ok(Value::Tensor(Box::new(TensorRecord {
            storage: key.to_string(),
            dtype,
            storage_elements: count,
            offset: self.unsigned(offset)?,
            shape,
            stride,
        })))
    }

    /// torch's persistent ids: `('storage', type, key, location, count)`.
    fn persistent(&self, id: Id) -> Result<Value, PickleError> {
        let Some(&[kind, class, key, _, count, ..]) = self.sequence(id) else {
            return self.malformed("a persistent id is not torch's");
        };
        match (self.value(kind), self.value(class), self.value(key)) {
            (Value::Text(kind), Value::Global(class), Value::Text(key))
                if &**kind == "storage" && key.len() <= MAX_KEY =>
            {
                let dtype = match class {
                    Global::Storage(dtype) => Some(dtype.clone()),
                    Global::UntypedStorage => None,
                    _ => return self.malformed("a storage's type is not a storage type"),
                };
                Ok(Value::Storage { dtype, key: key.clone(), count: self.unsigned(count)? })
            }
            _ => self.malformed("a persistent id is not torch's"),
        }
    }

    fn entry(&self, pairs: &[(Id, Id)], name: &str) -> Option<Id> {
        // The last of equal keys wins, as in Python.
        pairs.iter().rev().find_map(|&(k, v)| match self.value(k) {
            Value::Text(text) if &**text == name => Some(v),
            _ => None,
        })
    }

    fn state_dict(&self, top: Id) -> Result<Vec<(String, TensorRecord)>, PickleError> {
        let Value::Dict(mut pairs) = self.value(top).clone() else {
            return self.malformed("its top-level value is not a dict of tensors");
        };
        if let Some(inner) = self.entry(&pairs, "state_dict")
            && let Value::Dict(inner) = self.value(inner)
        {
            pairs = inner.clone();
        }
        let mut at: HashMap<&str, usize> = HashMap::new();
        let mut out: Vec<(String, TensorRecord)> = Vec::new();
        for &(key, value) in &pairs {
            let (Value::Text(name), Value::Tensor(record)) = (self.value(key), self.value(value))
            else {
                continue;
            };
            match at.get(&**name) {
                Some(&i) => out[i].1 = (**record).clone(),
                None => {
                    at.insert(name, out.len());
                    out.push((name.to_string(), (**record).clone()));
                }
            }
        }
        if out.is_empty() {
            return self.malformed("its dict holds no tensors");
        }
        Ok(out)
    }
}

/// A two's complement little-endian integer where it fits, else opaque.
fn small_int(bytes: &[u8]) -> Value {
    if bytes.len() > 8 {
        return Value::Opaque;
    }
    let negative = bytes.last().is_some_and(|&b| b & 0x80 != 0);
    let mut wide = [if negative { 0xff } else { 0 }; 8];
    wide[..bytes.len()].copy_from_slice(bytes);
    Value::Int(i64::from_le_bytes(wide))
}

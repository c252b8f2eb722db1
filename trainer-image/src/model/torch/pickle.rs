//! The pickle in which torch says what tensors there are: a program for a small machine, which in Python may call anything.
//! This machine knows the few words that the tensors of a `state_dict` are written with. Whatever else is asked for is refused
//! by its name before anything is done.
//!
//! (The words are those of Python's `pickletools`, protocols 2 to 5.) All that is made stands in one list and refers to the
//! rest by its place, so neither depth nor circles can harm.

use safetensors::tensor::Dtype;
use std::collections::HashMap;

type Result<T> = std::result::Result<T, String>;

/// A tensor as the pickle describes it. Nothing of it is checked against the file yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Described {
    /// The name of the entry with its bytes.
    pub storage: String,
    pub dtype: Dtype,
    /// Numbers in the storage.
    pub numel: i64,
    /// The first of them that is the tensor's.
    pub offset: i64,
    pub shape: Vec<i64>,
    pub strides: Vec<i64>,
}

/// What may be called, or handed on by name.
#[derive(Clone, Copy)]
enum Named {
    OrderedDict,
    RebuildTensor,
    RebuildParameter,
    Storage(Dtype),
}

impl Named {
    fn find(module: &str, name: &str) -> Result<Self> {
        let storage = |dtype| Ok(Self::Storage(dtype));
        match (module, name) {
            ("collections", "OrderedDict") => Ok(Self::OrderedDict),
            ("torch._utils", "_rebuild_tensor_v2") => Ok(Self::RebuildTensor),
            ("torch._utils", "_rebuild_parameter" | "_rebuild_parameter_with_state") => Ok(Self::RebuildParameter),
            ("torch", "FloatStorage") => storage(Dtype::F32),
            ("torch", "HalfStorage") => storage(Dtype::F16),
            ("torch", "BFloat16Storage") => storage(Dtype::BF16),
            ("torch", "DoubleStorage") => storage(Dtype::F64),
            ("torch", "LongStorage") => storage(Dtype::I64),
            ("torch", "IntStorage") => storage(Dtype::I32),
            ("torch", "ShortStorage") => storage(Dtype::I16),
            ("torch", "CharStorage") => storage(Dtype::I8),
            ("torch", "ByteStorage") => storage(Dtype::U8),
            ("torch", "BoolStorage") => storage(Dtype::BOOL),
            _ => Err(format!(
                "its pickle asks for '{module}.{name}', which is no part of a tensor and could run anything; nothing of it was run: save the model as safetensors (save_pretrained of transformers does), on a machine that may run what is in the file"
            )),
        }
    }
}

#[derive(Clone, Copy)]
enum Value {
    None,
    Bool,
    Int(i64),
    Number,
    Named(Named),
    /// A place in the list of all that was made.
    Made(usize),
}

enum Made {
    Text(String),
    Tuple(Vec<Value>),
    /// Nobody asks what is in a list.
    List,
    Dict(Vec<(Value, Value)>),
    Storage {
        name: String,
        dtype: Dtype,
        numel: i64,
    },
    Tensor(Described),
}

struct Machine<'a> {
    input: &'a [u8],
    at: usize,
    stack: Vec<Value>,
    /// Where on the stack something begins that is of many parts.
    marks: Vec<usize>,
    memo: HashMap<u64, Value>,
    made: Vec<Made>,
}

/// The tensors of a pickled `state_dict`, by name.
///
/// # Errors
/// Says what it asks for that is no part of a tensor, or where it is damaged.
pub(super) fn tensors(input: &[u8]) -> Result<HashMap<String, Described>> {
    let mut machine = Machine { input, at: 0, stack: vec![], marks: vec![], memo: HashMap::new(), made: vec![] };
    while !machine.step()? {}
    let result = machine.pop()?;
    machine.state_dict(result)
}

impl Machine<'_> {
    /// Does one word; true once it was the last.
    fn step(&mut self) -> Result<bool> {
        let word = self.take::<1>()?[0];
        match word {
            b'.' => return Ok(true),
            0x80 => drop(self.take::<1>()?),
            0x95 => drop(self.take::<8>()?),
            b'(' => self.marks.push(self.stack.len()),
            b'N' => self.stack.push(Value::None),
            0x88 | 0x89 => self.stack.push(Value::Bool),
            b'J' => {
                let int = i32::from_le_bytes(self.take()?);
                self.stack.push(Value::Int(int.into()));
            }
            b'K' => {
                let int = u8::from_le_bytes(self.take()?);
                self.stack.push(Value::Int(int.into()));
            }
            b'M' => {
                let int = u16::from_le_bytes(self.take()?);
                self.stack.push(Value::Int(int.into()));
            }
            0x8a => self.long()?,
            b'G' => {
                self.take::<8>()?;
                self.stack.push(Value::Number);
            }
            b'X' | b'T' => self.text(|m| Ok(u64::from(u32::from_le_bytes(m.take()?))))?,
            0x8c | b'U' => self.text(|m| Ok(u64::from(u8::from_le_bytes(m.take()?))))?,
            0x8d => self.text(|m| Ok(u64::from_le_bytes(m.take()?)))?,
            b'q' => self.remember(|m| Ok(u64::from(u8::from_le_bytes(m.take()?))))?,
            b'r' => self.remember(|m| Ok(u64::from(u32::from_le_bytes(m.take()?))))?,
            0x94 => self.remember(|m| Ok(m.memo.len() as u64))?,
            b'h' => self.recall(|m| Ok(u64::from(u8::from_le_bytes(m.take()?))))?,
            b'j' => self.recall(|m| Ok(u64::from(u32::from_le_bytes(m.take()?))))?,
            b')' => self.make(Made::Tuple(vec![])),
            0x85..=0x87 => self.tuple(usize::from(word - 0x84))?,
            b't' => {
                let parts = self.pop_marked()?;
                self.make(Made::Tuple(parts));
            }
            b']' => self.make(Made::List),
            b'a' => drop(self.pop()?),
            b'e' => drop(self.pop_marked()?),
            b'}' => self.make(Made::Dict(vec![])),
            b's' => {
                let value = self.pop()?;
                let key = self.pop()?;
                self.set(&[key, value])?;
            }
            b'u' => {
                let items = self.pop_marked()?;
                self.set(&items)?;
            }
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.stack.push(Value::Named(Named::find(&module, &name)?));
            }
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                let named = Named::find(self.as_text(module)?, self.as_text(name)?)?;
                self.stack.push(Value::Named(named));
            }
            b'Q' => self.storage()?,
            b'R' => self.call()?,
            b'b' => self.build()?,
            other => {
                return Err(format!(
                    "its pickle has the word {other:#04x} at byte {}, with which no tensor is written; nothing of it was run: save the model as safetensors",
                    self.at - 1
                ));
            }
        }
        Ok(false)
    }

    fn take<const BYTES: usize>(&mut self) -> Result<[u8; BYTES]> {
        let mut bytes = [0; BYTES];
        bytes.copy_from_slice(self.slice(BYTES as u64)?);
        Ok(bytes)
    }

    fn slice(&mut self, len: u64) -> Result<&[u8]> {
        let end = usize::try_from(len).ok().and_then(|len| self.at.checked_add(len));
        let bytes = end.and_then(|end| self.input.get(self.at..end));
        let bytes = bytes.ok_or_else(|| format!("its pickle ends at byte {}, in the middle", self.input.len()))?;
        self.at += bytes.len();
        Ok(bytes)
    }

    fn line(&mut self) -> Result<String> {
        let rest = self.input.get(self.at..).unwrap_or_default();
        let len = rest.iter().position(|b| *b == b'\n').unwrap_or(rest.len());
        let line = String::from_utf8_lossy(self.slice(len as u64)?).into_owned();
        self.take::<1>()?;
        Ok(line)
    }

    fn pop(&mut self) -> Result<Value> {
        let least = self.marks.last().copied().unwrap_or_default();
        let value = if self.stack.len() > least { self.stack.pop() } else { None };
        value.ok_or_else(|| self.damaged("takes what is not there"))
    }

    fn pop_marked(&mut self) -> Result<Vec<Value>> {
        let mark = self.marks.pop().ok_or_else(|| self.damaged("ends what has not begun"))?;
        Ok(self.stack.split_off(mark))
    }

    fn damaged(&self, what: &str) -> String {
        format!("its pickle {what} at byte {}: it is damaged", self.at - 1)
    }

    fn make(&mut self, made: Made) {
        self.stack.push(Value::Made(self.made.len()));
        self.made.push(made);
    }

    /// An integer of up to 8 bytes.
    fn long(&mut self) -> Result<()> {
        let len = self.take::<1>()?[0];
        let bytes = self.slice(len.into())?;
        if bytes.len() > 8 {
            return Err("its pickle has an integer of more than 64 bits, with which no tensor is written".into());
        }
        let fill = if bytes.last().is_some_and(|b| *b >= 0x80) { 0xff } else { 0 };
        let mut all = [fill; 8];
        all[..bytes.len()].copy_from_slice(bytes);
        self.stack.push(Value::Int(i64::from_le_bytes(all)));
        Ok(())
    }

    fn text(&mut self, len: impl Fn(&mut Self) -> Result<u64>) -> Result<()> {
        let len = len(self)?;
        let text = String::from_utf8_lossy(self.slice(len)?).into_owned();
        self.make(Made::Text(text));
        Ok(())
    }

    fn remember(&mut self, place: impl Fn(&mut Self) -> Result<u64>) -> Result<()> {
        let place = place(self)?;
        let value = *self.stack.last().ok_or_else(|| self.damaged("remembers what is not there"))?;
        self.memo.insert(place, value);
        Ok(())
    }

    fn recall(&mut self, place: impl Fn(&mut Self) -> Result<u64>) -> Result<()> {
        let place = place(self)?;
        let value = *self.memo.get(&place).ok_or_else(|| self.damaged("recalls what it never remembered"))?;
        self.stack.push(value);
        Ok(())
    }

    fn tuple(&mut self, len: usize) -> Result<()> {
        let mut parts = (0..len).map(|_| self.pop()).collect::<Result<Vec<_>>>()?;
        parts.reverse();
        self.make(Made::Tuple(parts));
        Ok(())
    }

    /// Keys and values, in turns, for the dict on top of the stack.
    fn set(&mut self, items: &[Value]) -> Result<()> {
        let target = self.stack.last().copied();
        let Some(Made::Dict(pairs)) = target.and_then(|v| self.made.get_mut(v.place()?)) else {
            return Err(self.damaged("sets an item of what has none"));
        };
        pairs.extend(items.as_chunks::<2>().0.iter().map(|[key, value]| (*key, *value)));
        Ok(())
    }

    /// Bytes that lie in an entry of the file: `("storage", type, entry, device, numbers)`.
    fn storage(&mut self) -> Result<()> {
        let id = self.pop()?;
        let [kind, Value::Named(Named::Storage(dtype)), entry, _, Value::Int(numel)] = *self.as_tuple(id)? else {
            return Err(self.damaged("names bytes in a way that torch does not"));
        };
        if self.as_text(kind)? != "storage" {
            return Err(self.damaged("names bytes in a way that torch does not"));
        }
        let name = self.as_text(entry)?.to_string();
        self.make(Made::Storage { name, dtype, numel });
        Ok(())
    }

    fn call(&mut self) -> Result<()> {
        let (arguments, callee) = (self.pop()?, self.pop()?);
        let arguments = self.as_tuple(arguments)?;
        match (callee, arguments) {
            (Value::Named(Named::OrderedDict), []) => self.make(Made::Dict(vec![])),
            (Value::Named(Named::RebuildParameter), [tensor, ..]) => {
                let tensor = *tensor;
                if !matches!(self.made(tensor), Some(Made::Tensor(_))) {
                    return Err(self.damaged("makes a parameter of what is no tensor"));
                }
                self.stack.push(tensor);
            }
            (Value::Named(Named::RebuildTensor), [storage, Value::Int(offset), shape, strides, ..]) => {
                let tensor = self.tensor(*storage, *offset, *shape, *strides)?;
                self.make(Made::Tensor(tensor));
            }
            _ => return Err(self.damaged("calls something in a way that torch does not")),
        }
        Ok(())
    }

    fn tensor(&self, storage: Value, offset: i64, shape: Value, strides: Value) -> Result<Described> {
        let Some(Made::Storage { name, dtype, numel }) = self.made(storage) else {
            return Err(self.damaged("makes a tensor of what are no bytes"));
        };
        let ints = |value| {
            let int = |value: &Value| match value {
                Value::Int(int) => Ok(*int),
                _ => Err(self.damaged("gives a tensor a shape of what are no numbers")),
            };
            self.as_tuple(value)?.iter().map(int).collect::<Result<Vec<_>>>()
        };
        let (shape, strides) = (ints(shape)?, ints(strides)?);
        Ok(Described { storage: name.clone(), dtype: *dtype, numel: *numel, offset, shape, strides })
    }

    /// Attributes of a dict (the versions of modules) are of no use here. Nothing else has a state.
    fn build(&mut self) -> Result<()> {
        self.pop()?;
        let target = self.stack.last().copied();
        match target.and_then(|value| self.made(value)) {
            Some(Made::Dict(_)) => Ok(()),
            _ => Err(self.damaged("sets the state of what has none")),
        }
    }

    fn made(&self, value: Value) -> Option<&Made> {
        self.made.get(value.place()?)
    }

    fn as_tuple(&self, value: Value) -> Result<&[Value]> {
        match self.made(value) {
            Some(Made::Tuple(parts)) => Ok(parts),
            _ => Err(self.damaged("has something else where a tuple belongs")),
        }
    }

    fn as_text(&self, value: Value) -> Result<&str> {
        match self.made(value) {
            Some(Made::Text(text)) => Ok(text),
            _ => Err(self.damaged("has something else where a text belongs")),
        }
    }

    fn state_dict(&self, value: Value) -> Result<HashMap<String, Described>> {
        let Some(Made::Dict(pairs)) = self.made(value) else {
            return Err(format!("it holds {}, not the state_dict of a model", self.kind(value)));
        };
        let mut tensors = HashMap::new();
        for (key, value) in pairs {
            let name = self.as_text(*key)?;
            match self.made(*value) {
                Some(Made::Tensor(tensor)) => _ = tensors.insert(name.to_string(), tensor.clone()),
                _ => {
                    return Err(format!(
                        "'{name}' in it is {}, not a tensor: save the model's state_dict() alone",
                        self.kind(*value)
                    ));
                }
            }
        }
        Ok(tensors)
    }

    fn kind(&self, value: Value) -> &'static str {
        match (value, self.made(value)) {
            (_, Some(Made::Text(_))) => "a text",
            (_, Some(Made::Tuple(_))) => "a tuple",
            (_, Some(Made::List)) => "a list",
            (_, Some(Made::Dict(_))) => "a dict",
            (_, Some(Made::Storage { .. })) => "a storage",
            (_, Some(Made::Tensor(_))) => "a tensor",
            (Value::Int(_) | Value::Number, _) => "a number",
            (Value::Bool, _) => "a boolean",
            _ => "nothing",
        }
    }
}

impl Value {
    fn place(self) -> Option<usize> {
        match self {
            Value::Made(place) => Some(place),
            _ => None,
        }
    }
}

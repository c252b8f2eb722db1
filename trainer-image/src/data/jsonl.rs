//! JSON Lines: one object a line, read as a stream. A file may be packed by gzip or Zstandard, which its first bytes say.

use crate::error::{Error, Result};
use crate::files;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};
use std::cell::RefCell;
use std::fmt::Display;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A longer line is a mistake, such as a whole file without line breaks, and is not read into memory.
const MAX_LINE_BYTES: usize = 64 << 20;

/// What some editors put before a text in UTF-8.
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// Records that this process has read.
static READ: AtomicU64 = AtomicU64::new(0);

/// How many records this process has read so far: a sign of life while it reads a large file.
pub fn records_read() -> u64 {
    READ.load(Ordering::Relaxed)
}

/// One line's object, and where it stands.
pub(super) struct Record<'a> {
    path: &'a Path,
    expected: &'a str,
    /// The line's number, from 1; blank lines count.
    pub line: u64,
    fields: Map<String, Value>,
    bytes: &'a [u8],
}

/// A file whose bytes are hashed on their way. Clones are the same.
#[derive(Clone)]
struct Hashed(Rc<RefCell<(File, Sha256)>>);

impl Hashed {
    fn new(file: File) -> Self {
        Self(Rc::new(RefCell::new((file, Sha256::new()))))
    }

    /// The hash of all bytes: those that nobody has read yet, as what may follow a packed text, are read for it.
    fn digest(mut self) -> std::io::Result<[u8; 32]> {
        std::io::copy(&mut self, &mut std::io::sink())?;
        let hasher = self.0.borrow().1.clone();
        Ok(hasher.finalize().into())
    }
}

impl Read for Hashed {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let mut inner = self.0.borrow_mut();
        let (file, hasher) = &mut *inner;
        let count = file.read(buffer)?;
        hasher.update(&buffer[..count]);
        Ok(count)
    }
}

/// Hands each record of the file at `path` to `visit`. `expected` says what a record looks like, for error messages. Returns
/// the hash of the file's bytes.
pub(super) fn read(path: &Path, expected: &str, mut visit: impl FnMut(&Record<'_>) -> Result<()>) -> Result<[u8; 32]> {
    let file = Hashed::new(open(path)?);
    let (mut reader, packed) = unpacked(path, file.clone())?;
    let mut bytes = Vec::new();
    let mut first = true;
    for line in 1.. {
        bytes.clear();
        let limit = MAX_LINE_BYTES as u64 + 1;
        let failed = |e: std::io::Error| {
            if packed { at(path, line, format!("the file cannot be unpacked: {e}")) } else { Error::storage(path, e) }
        };
        if reader.by_ref().take(limit).read_until(b'\n', &mut bytes).map_err(failed)? == 0 {
            break;
        }
        let text = match bytes.strip_prefix(BYTE_ORDER_MARK) {
            Some(text) if line == 1 => text,
            _ => &bytes,
        };
        if text.trim_ascii().is_empty() {
            continue;
        }
        if std::mem::take(&mut first) && text.trim_ascii_start().starts_with(b"[") {
            return Err(at(
                path,
                line,
                format!(
                    "the file begins with an array, but a dataset is JSON Lines: write one object a line, as jq -c '.[]' makes of a file that is one array; expected {expected}"
                ),
            ));
        }
        let fields = parse(text).map_err(|what| at(path, line, format!("{what}; expected {expected}")))?;
        visit(&Record { path, expected, line, fields, bytes: text })?;
        READ.fetch_add(1, Ordering::Relaxed);
    }
    file.digest().map_err(|e| Error::storage(path, e))
}

fn open(path: &Path) -> Result<File> {
    let missing = |what: &dyn Display| {
        Error::input(format!("{}: {what}; a dataset is a JSON Lines file on the job's volume", path.display()))
    };
    files::open(path).map_err(|e| missing(&e))
}

/// What is in a file, and whether it was packed.
fn unpacked(path: &Path, file: Hashed) -> Result<(Box<dyn BufRead>, bool)> {
    let failed = |e| Error::storage(path, e);
    let mut file = BufReader::new(file);
    let start = file.fill_buf().map_err(failed)?;
    let packed_by = |magic: &[u8]| start.starts_with(magic);
    let (gzip, zstd, parquet) = (packed_by(b"\x1f\x8b"), packed_by(b"\x28\xb5\x2f\xfd"), packed_by(b"PAR1"));
    if parquet {
        return Err(Error::input(format!(
            "{}: this is a Parquet file, and a dataset is JSON Lines: write it by to_json(path, lines=True) of datasets",
            path.display()
        )));
    }
    let reader: Box<dyn BufRead> = if gzip {
        Box::new(BufReader::new(flate2::bufread::MultiGzDecoder::new(file)))
    } else if zstd {
        Box::new(BufReader::new(zstd::Decoder::with_buffer(file).map_err(failed)?))
    } else {
        Box::new(file)
    };
    Ok((reader, gzip || zstd))
}

fn parse(bytes: &[u8]) -> std::result::Result<Map<String, Value>, String> {
    if bytes.len() > MAX_LINE_BYTES {
        return Err(format!("the line is longer than {} MiB", MAX_LINE_BYTES >> 20));
    }
    match serde_json::from_slice(bytes) {
        Ok(Value::Object(fields)) => Ok(fields),
        Ok(other) => Err(format!("the line is {}, not a JSON object", kind(&other))),
        // serde_json counts lines too, and to it each of ours is line 1.
        Err(e) => Err(format!(
            "not JSON: {} at column {}",
            e.to_string().split(" at line ").next().unwrap_or_default(),
            e.column()
        )),
    }
}

fn at(path: &Path, line: u64, what: impl Display) -> Error {
    Error::input(format!("{}:{line}: {what}", path.display()))
}

/// What a value is, with its article.
pub(super) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

impl Record<'_> {
    /// An input error at this line.
    pub fn error(&self, what: impl Display) -> Error {
        at(self.path, self.line, what)
    }

    /// Puts file and line before an error's message.
    pub fn located<T>(&self, result: Result<T>) -> Result<T> {
        result.map_err(|e| Error::new(e.exit, format!("{}:{}: {}", self.path.display(), self.line, e.message)))
    }

    /// A field that is there and not null.
    pub fn get(&self, field: &str) -> Option<&Value> {
        self.fields.get(field).filter(|v| !v.is_null())
    }

    /// A field as a template gets it, its keys in the order in which they are written; `None` where it is not there or null.
    pub fn ordered(&self, field: &str) -> Result<Option<minijinja::Value>> {
        let all: minijinja::Value = serde_json::from_slice(self.bytes).map_err(|e| self.error(e))?;
        let value = all.get_attr(field).map_err(|e| self.error(e))?;
        Ok(Some(value).filter(|v| !v.is_undefined() && !v.is_none()))
    }

    /// A field that must be a string.
    pub fn text(&self, field: &str) -> Result<&str> {
        let value = self.required(field)?;
        value.as_str().ok_or_else(|| self.mistyped(field, value, "a string"))
    }

    /// A field that must be an array.
    pub fn list(&self, field: &str) -> Result<&[Value]> {
        let value = self.required(field)?;
        value.as_array().map(Vec::as_slice).ok_or_else(|| self.mistyped(field, value, "an array"))
    }

    /// An error about a field, or a part of one, of the wrong type.
    pub fn mistyped(&self, field: &str, value: &Value, wanted: &str) -> Error {
        self.error(format!("field '{field}' is {}, not {wanted}; expected {}", kind(value), self.expected))
    }

    /// An error about a field, or a part of one, that is not there.
    pub fn missing(&self, field: &str) -> Error {
        self.error(format!("field '{field}' is missing; expected {}", self.expected))
    }

    fn required(&self, field: &str) -> Result<&Value> {
        self.fields.get(field).ok_or_else(|| self.missing(field))
    }
}

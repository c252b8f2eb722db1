//! Records on their way from a file, whose first bytes say what it is: JSON Lines or Parquet.

use super::files::DataFile;
use super::{jsonl, parquet};
use crate::error::{Error, Result};
use crate::files;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};
use std::cell::RefCell;
use std::fmt::{self, Display, Formatter};
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Records that this process has read.
static READ: AtomicU64 = AtomicU64::new(0);
/// Parts of files that this process has read, or of what it made of them.
static PARTS: AtomicU64 = AtomicU64::new(0);

/// How many records this process has read so far.
pub fn records_read() -> u64 {
    READ.load(Ordering::Relaxed)
}

/// A number that grows while this process reads a large file, or writes what it has read.
pub fn signs_of_life() -> u64 {
    records_read().saturating_add(PARTS.load(Ordering::Relaxed))
}

/// Says that a part of a long work is done.
pub(super) fn alive() {
    PARTS.fetch_add(1, Ordering::Relaxed);
}

/// Counts a record that has been read.
pub(super) fn count_record() {
    READ.fetch_add(1, Ordering::Relaxed);
}

/// What a record has to have.
pub(super) struct Wanted {
    /// Every field that is looked at.
    pub fields: &'static [&'static str],
    /// What a record looks like, for error messages.
    pub expected: &'static str,
}

/// Where a record stands.
#[derive(Clone, Copy)]
pub(super) enum Place<'a> {
    /// In a line of a file, from 1; blank lines count.
    Line(&'a Path, u64),
    /// In a row of a table, from 1.
    Row(&'a Path, u64),
}

impl Place<'_> {
    /// The number of its line or row.
    pub fn number(self) -> u64 {
        match self {
            Place::Line(_, number) | Place::Row(_, number) => number,
        }
    }

    /// An input error there.
    pub fn error(self, what: impl Display) -> Error {
        Error::input(format!("{self}: {what}"))
    }
}

impl Display for Place<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Place::Line(path, line) => write!(f, "{}:{line}", path.display()),
            Place::Row(path, row) => write!(f, "{}: row {row}", path.display()),
        }
    }
}

/// A line's object or a table's row, and where it stands.
pub(super) struct Record<'a> {
    pub file: &'a DataFile,
    pub place: Place<'a>,
    pub expected: &'a str,
    pub fields: Map<String, Value>,
    /// The same as JSON, its keys in the order in which they are written.
    pub bytes: &'a [u8],
}

/// A file whose bytes are hashed on their way. Clones are the same.
#[derive(Clone)]
pub(super) struct Hashed(Rc<RefCell<(File, Sha256)>>);

impl Hashed {
    fn new(file: File) -> Self {
        Self(Rc::new(RefCell::new((file, Sha256::new()))))
    }

    /// The hash of all bytes: those that nobody has read yet, as what may follow a packed text, are read for it.
    fn digest(mut self) -> std::io::Result<[u8; 32]> {
        let mut part = vec![0; 1 << 20];
        while self.read(&mut part)? > 0 {}
        let hasher = self.0.borrow().1.clone();
        Ok(hasher.finalize().into())
    }
}

/// Each read is a sign of life: a table is read for its hash after its records, and a large one for minutes.
impl Read for Hashed {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let mut inner = self.0.borrow_mut();
        let (file, hasher) = &mut *inner;
        let count = file.read(buffer)?;
        hasher.update(&buffer[..count]);
        alive();
        Ok(count)
    }
}

/// What is done with a record's JSON and its place, or with what is wrong there.
pub(super) type Visit<'v> = &'v mut dyn FnMut(Place<'_>, Result<&[u8]>) -> Result<()>;

/// Hands each record's JSON to `visit`, unparsed. Returns the hash of the file's bytes.
pub(super) fn read(file: &DataFile, wanted: &Wanted, visit: Visit<'_>) -> Result<[u8; 32]> {
    let (data, path) = (file, file.path.as_path());
    data.check(wanted).map_err(|e| e.context(path.display()))?;
    let failed = |e| Error::storage(path, e);
    let file = open(path)?;
    let mut magic = [0; parquet::MAGIC.len()];
    let is_parquet = file.read_at(&mut magic, 0).map_err(failed)? == magic.len() && magic == *parquet::MAGIC;
    let hashed = if is_parquet {
        // It is read from its end on, and in parts.
        parquet::read(data, &file, wanted, visit)?;
        Hashed::new(open(path)?)
    } else {
        let hashed = Hashed::new(file);
        jsonl::read(data, hashed.clone(), wanted, visit)?;
        hashed
    };
    hashed.digest().map_err(failed)
}

/// Hands each record of a file to `visit`, one after the other.
pub(super) fn each(file: &DataFile, wanted: &Wanted, mut visit: impl FnMut(Record<'_>) -> Result<()>) -> Result<()> {
    let expected = file.expected(wanted);
    read(file, wanted, &mut |place, bytes| {
        visit(Record::parse(file, place, &expected, bytes?)?)?;
        count_record();
        Ok(())
    })
    .map(drop)
}

/// The hash of a file's bytes.
pub(super) fn hash(path: &Path) -> Result<[u8; 32]> {
    Hashed::new(open(path)?).digest().map_err(|e| Error::storage(path, e))
}

pub(super) fn open(path: &Path) -> Result<File> {
    files::open(path).map_err(|e| {
        Error::input(format!("{}: {e}; a dataset is a JSON Lines or Parquet file on the job's volume", path.display()))
    })
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

impl<'a> Record<'a> {
    /// What is written there.
    pub fn parse(file: &'a DataFile, place: Place<'a>, expected: &'a str, bytes: &'a [u8]) -> Result<Self> {
        let what = match serde_json::from_slice(bytes) {
            Ok(Value::Object(fields)) => return Ok(Self { file, place, expected, fields, bytes }),
            Ok(other) => format!("the line is {}, not a JSON object", kind(&other)),
            // serde_json counts lines too, and to it each of ours is line 1.
            Err(e) => format!(
                "not JSON: {} at column {}",
                e.to_string().split(" at line ").next().unwrap_or_default(),
                e.column()
            ),
        };
        Err(place.error(format!("{what}; expected {expected}")))
    }
}

impl Record<'_> {
    /// What tells it from the dataset's others: the number of its line or row, and after the first file the file's.
    pub fn key(&self) -> Vec<u8> {
        let file = self.file.index.to_le_bytes();
        let file = if self.file.index == 0 { &[][..] } else { &file };
        [&self.place.number().to_le_bytes()[..], file].concat()
    }

    /// An input error at this line or row.
    pub fn error(&self, what: impl Display) -> Error {
        self.place.error(what)
    }

    /// Puts file and line or row before an error's message.
    pub fn located<T>(&self, result: Result<T>) -> Result<T> {
        result.map_err(|e| Error::new(e.exit, format!("{}: {}", self.place, e.message)))
    }

    /// A field that is there and not null.
    pub fn get(&self, field: &str) -> Option<&Value> {
        self.fields.get(self.file.field(field)).filter(|v| !v.is_null())
    }

    /// A field as a template gets it, its keys in the order in which they are written; `None` where it is not there or null.
    pub fn ordered(&self, field: &str) -> Result<Option<minijinja::Value>> {
        let all: minijinja::Value = serde_json::from_slice(self.bytes).map_err(|e| self.error(e))?;
        let value = all.get_attr(self.file.field(field)).map_err(|e| self.error(e))?;
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
        self.fields.get(self.file.field(field)).ok_or_else(|| self.missing(field))
    }
}

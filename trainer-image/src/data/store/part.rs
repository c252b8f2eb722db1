//! The parts of a tokenised dataset: arrays of little-endian numbers, or bytes, each a file of its own or held in memory.

use crate::error::{Error, Result};
use memmap2::Mmap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What a dataset consists of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Name {
    /// Token ids, `u32` each, of all sequences one after the other.
    Tokens,
    /// Of each token whether it is to be learnt, a byte each; empty where the kind of record has no such thing.
    Targets,
    /// Where each sequence ends in the tokens, `u64` each.
    Sequences,
    /// Where each record ends in the sequences, `u64` each.
    Records,
    /// Texts of records, one after the other.
    Texts,
    /// Where each record's text ends in them, `u64` each; empty where the kind of record has none.
    TextEnds,
    /// The numbers of the records that an epoch has, `u32` each: one that is learnt twice stands there twice.
    Train,
    /// Of those held out.
    Eval,
    /// Where each row of [`Name::Train`] ends in it, `u64` each; empty where each record is a row.
    TrainRows,
    /// The same of [`Name::Eval`].
    EvalRows,
}

impl Name {
    pub const ALL: [Self; 10] = [
        Self::Tokens,
        Self::Targets,
        Self::Sequences,
        Self::Records,
        Self::Texts,
        Self::TextEnds,
        Self::Train,
        Self::Eval,
        Self::TrainRows,
        Self::EvalRows,
    ];

    /// The file's name.
    pub fn file(self) -> &'static str {
        match self {
            Self::Tokens => "tokens",
            Self::Targets => "targets",
            Self::Sequences => "sequences",
            Self::Records => "records",
            Self::Texts => "texts",
            Self::TextEnds => "text-ends",
            Self::Train => "train",
            Self::Eval => "eval",
            Self::TrainRows => "train-rows",
            Self::EvalRows => "eval-rows",
        }
    }
}

/// Bytes that lie in a mapped file, or in memory.
#[derive(Debug)]
pub(super) enum Part {
    Mapped(Arc<Mmap>),
    Held(Vec<u8>),
}

impl Part {
    /// Maps the file at `path`, which must have so many bytes.
    pub fn open(path: &Path, bytes: u64) -> Result<Self> {
        let failed = |e| Error::storage(path, e);
        let there = std::fs::metadata(path).map_err(failed)?.len();
        if there != bytes {
            return Err(damaged(path, &format!("it has {there} bytes and should have {bytes}")));
        }
        if bytes == 0 {
            return Ok(Self::Held(vec![]));
        }
        // It is never changed once it has its name, only made anew under another.
        Ok(Self::Mapped(c10d::map_file(path).map_err(failed)?))
    }

    fn bytes(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Held(bytes) => bytes,
        }
    }

    pub fn len(&self) -> usize {
        self.bytes().len()
    }

    /// Some of the bytes; `None` where they reach beyond the end.
    pub fn get(&self, range: Range<usize>) -> Option<&[u8]> {
        self.bytes().get(range)
    }

    /// The `index`-th number of eight bytes.
    pub fn u64(&self, index: usize) -> Option<u64> {
        let start = index.checked_mul(8)?;
        Some(u64::from_le_bytes(self.get(start..start.checked_add(8)?)?.try_into().ok()?))
    }

    /// The `index`-th number of four bytes.
    pub fn u32(&self, index: usize) -> Option<u32> {
        let start = index.checked_mul(4)?;
        Some(u32::from_le_bytes(self.get(start..start.checked_add(4)?)?.try_into().ok()?))
    }

    /// From where to where the `index`-th piece goes, where this says where each one ends.
    pub fn piece(&self, index: usize) -> Option<Range<usize>> {
        let start = if index == 0 { 0 } else { self.u64(index - 1)? };
        let range = usize::try_from(start).ok()?..usize::try_from(self.u64(index)?).ok()?;
        (range.start <= range.end).then_some(range)
    }

    /// Numbers of four bytes as token ids.
    pub fn ids(&self, range: Range<usize>) -> Option<Vec<i64>> {
        let bytes = self.get(range.start.checked_mul(4)?..range.end.checked_mul(4)?)?;
        let id = |bytes: &[u8]| bytes.iter().rev().fold(0, |id, byte| id << 8 | i64::from(*byte));
        Some(bytes.chunks_exact(4).map(id).collect())
    }
}

/// What is told of a file that is not as it was written.
pub(super) fn damaged(path: &Path, what: &str) -> Error {
    Error::input(format!(
        "{}: the tokenised dataset is damaged: {what}; delete its folder, and it is made anew",
        path.display()
    ))
}

/// A part that is being written.
pub(super) enum Sink {
    File(PathBuf, BufWriter<File>),
    Memory(Vec<u8>),
}

impl Sink {
    /// A file in this folder, or memory.
    pub fn new(dir: Option<&Path>, name: &str) -> Result<Self> {
        let Some(dir) = dir else { return Ok(Self::Memory(vec![])) };
        let path = dir.join(name);
        let file = File::create(&path).map_err(|e| Error::storage(&path, e))?;
        Ok(Self::File(path, BufWriter::with_capacity(1 << 18, file)))
    }

    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        match self {
            Self::File(path, file) => file.write_all(bytes).map_err(|e| Error::storage(path, e)),
            Self::Memory(all) => {
                all.extend_from_slice(bytes);
                Ok(())
            }
        }
    }

    /// What was written, to be read.
    pub fn done(self) -> Result<Part> {
        match self {
            Self::File(path, file) => {
                let failed = |e| Error::storage(&path, e);
                let file = file.into_inner().map_err(|e| failed(e.into_error()))?;
                let bytes = file.metadata().map_err(failed)?.len();
                Part::open(&path, bytes)
            }
            Self::Memory(all) => Ok(Part::Held(all)),
        }
    }
}

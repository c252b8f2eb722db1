//! A tokenised dataset: files that are written once and mapped by every rank and attempt, which read what a step needs.

mod header;
mod part;
mod write;

pub(super) use header::{Header, MadeFrom, Source, Stamp, VERSION};
pub(super) use write::{Plan, Writer, Written};

use super::split::Keys;
use super::summary::{About, Summary};
use crate::error::Result;
use part::{Name, Part};
use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A kind of record that can lie in such files.
pub trait Stored: Sized {
    /// Its sequences of tokens, at least one.
    fn sequences(&self) -> Vec<&[i64]>;

    /// Of each token whether it is to be learnt; empty where the kind knows no such thing.
    fn targets(&self) -> &[bool] {
        &[]
    }

    /// Its text, where the kind has one.
    fn text(&self) -> Option<&str> {
        None
    }

    /// It again.
    fn of(sequences: Vec<Vec<i64>>, targets: Vec<bool>, text: &str) -> Self;
}

/// A tokenised dataset.
#[derive(Debug)]
pub struct Store {
    dir: PathBuf,
    header: Header,
    /// Hash of the header.
    digest: [u8; 32],
    parts: BTreeMap<Name, Part>,
}

impl Store {
    /// Maps the dataset in a folder; `None` where there is none.
    ///
    /// # Errors
    /// It is not as it was written, or storage failed.
    pub(super) fn open(dir: &Path) -> Result<Option<Self>> {
        let Some((header, digest)) = Header::read(dir)? else { return Ok(None) };
        let open = |name: Name| {
            let path = dir.join(name.file());
            let Some(bytes) = header.parts.get(name.file()) else {
                return Err(part::damaged(&path, "the header does not tell of it"));
            };
            Ok((name, Part::open(&path, *bytes)?))
        };
        let parts = Name::ALL.into_iter().map(open).collect::<Result<_>>()?;
        Ok(Some(Self::new(dir.into(), header, digest, parts)))
    }

    fn new(dir: PathBuf, header: Header, digest: [u8; 32], parts: BTreeMap<Name, Part>) -> Self {
        Self { dir, header, digest, parts }
    }

    /// The dataset's figures.
    pub fn summary(&self) -> &Summary {
        &self.header.summary
    }

    /// Hash of all rows of tokens.
    pub fn rows(&self) -> [u8; 32] {
        header::unhex(&self.header.rows)
    }

    /// What it was made from.
    pub(super) fn made_from(&self) -> &MadeFrom {
        &self.header.made_from
    }

    /// Hash of all that the dataset says of itself.
    pub fn digest(&self) -> [u8; 32] {
        self.digest
    }

    fn part(&self, name: Name) -> Option<&Part> {
        self.parts.get(&name)
    }

    fn damaged<T>(&self, found: Option<T>) -> Result<T> {
        found.ok_or_else(|| part::damaged(&self.dir, "its parts do not fit together"))
    }

    fn record<T: Stored>(&self, record: usize) -> Option<T> {
        let sequences = self.part(Name::Records)?.piece(record)?;
        let ends = self.part(Name::Sequences)?;
        let mut all: Option<Range<usize>> = None;
        let mut tokens = Vec::with_capacity(sequences.len());
        for sequence in sequences {
            let range = ends.piece(sequence)?;
            tokens.push(self.part(Name::Tokens)?.ids(range.clone())?);
            all = Some(all.map_or(range.clone(), |all| all.start..range.end));
        }
        let targets = match self.part(Name::Targets)? {
            none if none.len() == 0 => vec![],
            targets => targets.get(all?)?.iter().map(|target| *target != 0).collect(),
        };
        let text = match self.part(Name::TextEnds)? {
            none if none.len() == 0 => "",
            ends => std::str::from_utf8(self.part(Name::Texts)?.get(ends.piece(record)?)?).ok()?,
        };
        Some(T::of(tokens, targets, text))
    }
}

/// The records to train on, or those held out, in rows: a row is one record, or several that are packed into one.
///
/// Nothing of it is in memory: what is asked for is read out of the mapped files. Clones are the same.
#[derive(Debug)]
pub struct Half<T> {
    store: Arc<Store>,
    names: [Name; 2],
    kind: PhantomData<fn() -> T>,
}

impl<T> Clone for Half<T> {
    fn clone(&self) -> Self {
        Self { store: Arc::clone(&self.store), names: self.names, kind: PhantomData }
    }
}

impl<T: Stored> Half<T> {
    /// The records of a dataset to train on.
    pub fn train(store: &Arc<Store>) -> Self {
        Self { store: Arc::clone(store), names: [Name::Train, Name::TrainRows], kind: PhantomData }
    }

    /// Those held out.
    pub fn eval(store: &Arc<Store>) -> Self {
        Self { store: Arc::clone(store), names: [Name::Eval, Name::EvalRows], kind: PhantomData }
    }

    /// These records in memory, all of them to train on and none held out.
    ///
    /// # Errors
    /// There is none.
    pub fn held(records: &[T]) -> Result<(Self, Self)> {
        let mut writer = Writer::new(None)?;
        writer.begin("(in memory)".into(), Some(1.0));
        let keys = Keys { split: 1, own: 1, prompt: 1 };
        for record in records {
            writer.keep(std::slice::from_ref(record), keys, About::default())?;
        }
        let plan = Plan { seed: 0, eval_fraction: 0.0, why_dropped: "", packing: None };
        let store = Arc::new(writer.finish(&plan)?.held(MadeFrom::default()));
        Ok((Self::train(&store), Self::eval(&store)))
    }

    fn bytes(&self, name: usize) -> usize {
        self.store.part(self.names[name]).map_or(0, Part::len)
    }

    /// Whether several records may be one row.
    pub fn is_packed(&self) -> bool {
        self.bytes(1) > 0
    }

    /// How many rows there are.
    pub fn len(&self) -> usize {
        if self.is_packed() { self.bytes(1) / 8 } else { self.bytes(0) / 4 }
    }

    /// Whether there is no row.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The numbers of all rows.
    pub fn all(&self) -> Vec<usize> {
        (0..self.len()).collect()
    }

    /// The records of a row, of which there is one where they are not packed.
    ///
    /// # Errors
    /// The files are damaged.
    pub fn row(&self, row: usize) -> Result<Vec<T>> {
        self.store
            .damaged(self.records(row).and_then(|records| records.map(|record| self.store.record(record?)).collect()))
    }

    /// The one record of a row.
    ///
    /// # Errors
    /// The files are damaged.
    pub fn get(&self, row: usize) -> Result<T> {
        self.store.damaged(self.records(row).and_then(|mut records| self.store.record(records.next()??)))
    }

    /// The records of some rows, one after the other.
    ///
    /// # Errors
    /// The files are damaged.
    pub fn rows(&self, rows: &[usize]) -> Result<Vec<T>> {
        let rows = rows.iter().map(|row| self.row(*row)).collect::<Result<Vec<_>>>()?;
        Ok(rows.into_iter().flatten().collect())
    }

    /// How many tokens of a row are to be learnt.
    ///
    /// # Errors
    /// The files are damaged.
    pub fn target_count(&self, row: usize) -> Result<usize> {
        let count = |record: usize| -> Option<usize> {
            let sequences = self.store.part(Name::Records)?.piece(record)?;
            let ends = self.store.part(Name::Sequences)?;
            let mut count = 0;
            for sequence in sequences {
                let targets = self.store.part(Name::Targets)?.get(ends.piece(sequence)?)?;
                count += targets.iter().filter(|target| **target != 0).count();
            }
            Some(count)
        };
        self.store.damaged(
            self.records(row).and_then(|mut records| records.try_fold(0, |n, record| Some(n + count(record?)?))),
        )
    }

    /// The numbers of a row's records.
    fn records(&self, row: usize) -> Option<impl Iterator<Item = Option<usize>>> {
        let order = self.store.part(self.names[0])?;
        let range = if self.is_packed() { self.store.part(self.names[1])?.piece(row)? } else { row..row + 1 };
        Some(range.map(|at| order.u32(at).map(|record| record as usize)))
    }
}

#[cfg(test)]
mod tests;

//! The files of a dataset: which there are, what their fields are called, and how their records become one.

use super::pipeline;
use super::records::{self, Record, Wanted};
use super::split::{Keys, hash};
use super::store::{Plan, Source, Stamp, Stored, Writer, Written};
use super::summary::{About, Dropped};
use crate::error::{Error, Result};
use crate::hex::hex;
use rlhf_api::config::volume_path;
use rlhf_api::report::ExitCode;
use rlhf_api::stage::{Dataset, OnBadRecord};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// The files of a dataset on the mounted volume.
#[derive(Clone, Debug)]
pub struct Files {
    /// Those to train on, each with its weight; never none.
    train: Vec<(DataFile, f64)>,
    /// That for evaluation, where it is one of its own.
    eval: Option<DataFile>,
    /// The share of records that is held out where there is none.
    eval_fraction: f64,
    skip_bad: bool,
}

/// A file of records.
#[derive(Clone, Debug)]
pub(super) struct DataFile {
    pub path: PathBuf,
    /// Which of a dataset's files it is.
    pub index: u32,
    /// What fields are called in it, where it is not as the format calls them.
    pub fields: BTreeMap<String, String>,
}

/// What a record becomes.
pub(super) enum Outcome<T> {
    Kept(Kept<T>),
    Dropped(Dropped),
}

/// A record that is used.
pub(super) struct Kept<T> {
    /// What it is in training: one thing, or a long text's chunks.
    pub items: Vec<T>,
    /// By what it is held out, records with the same key alike, where that is not the record itself.
    pub key: Option<Vec<u8>>,
    /// What it asks, where that is not the key.
    pub prompt: Option<Vec<u8>>,
    pub about: About,
}

impl Files {
    /// Those of a dataset below the mounted `volume`.
    ///
    /// # Errors
    /// A source is no location on the volume, or there is none.
    pub fn of(volume: &Path, dataset: &Dataset) -> Result<Self> {
        let mut index = 0;
        let mut file = |source: &str, fields: &BTreeMap<String, String>| {
            let relative = volume_path(source).ok_or_else(|| {
                Error::config(format!(
                    "dataset source '{source}' is not a file on the job's volume; write volume://path/to/file.jsonl"
                ))
            })?;
            index += 1;
            Ok::<_, Error>(DataFile { path: volume.join(relative), index: index - 1, fields: fields.clone() })
        };
        let mut train = Vec::new();
        if let Some(source) = &dataset.source {
            train.push((file(source, &dataset.fields)?, 1.0));
        }
        for part in &dataset.sources {
            train.push((file(&part.source, &part.fields)?, part.weight));
        }
        if train.is_empty() {
            return Err(Error::config("a dataset names no file; write source: volume://path/to/file.jsonl"));
        }
        let eval = dataset.eval_source.as_ref().map(|source| file(source, &dataset.fields)).transpose()?;
        let eval_fraction = if eval.is_some() { 0.0 } else { dataset.eval_fraction };
        Ok(Self { train, eval, eval_fraction, skip_bad: dataset.on_bad_record == OnBadRecord::Skip })
    }

    /// Reads all of them, on all cores, into a dataset in a folder or in memory. `each` says what a record becomes.
    ///
    /// # Errors
    /// What is wrong with the first record that cannot be used, unless such are left out; or that none can.
    pub(super) fn read<T: Stored + Send>(
        &self,
        wanted: &Wanted,
        plan: &Plan<'_>,
        to: Option<&Path>,
        each: impl Fn(&Record<'_>) -> Result<Outcome<T>> + Sync,
    ) -> Result<(Written, Vec<Source>)> {
        let mut all = Writer::new(to)?;
        let mut sources = Vec::new();
        let hashed = |record: &Record<'_>| {
            Ok(match each(record)? {
                Outcome::Kept(kept) => {
                    let own = hash(plan.seed, &record.key());
                    let split = kept.key.map_or(own, |key| hash(plan.seed, &key));
                    let prompt = kept.prompt.map_or(split, |prompt| hash(plan.seed, &prompt));
                    Ok((kept.items, Keys { split, own, prompt }, kept.about))
                }
                Outcome::Dropped(why) => Err(why),
            })
        };
        for (file, weight) in self.all() {
            let stamp = Stamp::of(&file.path)?;
            all.begin(file.path.display().to_string(), weight);
            let sha256 = pipeline::in_order(file, wanted, &hashed, |record| match record {
                Ok(Ok((items, keys, about))) => all.keep(&items, keys, about),
                Ok(Err(why)) => {
                    all.drop_record(why);
                    Ok(())
                }
                Err(error) if self.skip_bad && error.exit == ExitCode::BadInput => {
                    all.skip(error.message);
                    Ok(())
                }
                Err(error) => Err(error),
            })?;
            all.end()?;
            if Stamp::of(&file.path)? != stamp {
                return Err(Error::input(format!(
                    "{}: the file changed while it was read; start again once it is whole",
                    file.path.display()
                )));
            }
            sources.push(Source { stamp, sha256: hex(&sha256) });
        }
        let plan = Plan { eval_fraction: self.eval_fraction, ..*plan };
        let written = all.finish(&plan).map_err(|e| e.context(self.names()))?;
        Ok((written, sources))
    }

    /// Whether all of them are as they were when they were read; where their lengths or times differ, their bytes say.
    pub(super) fn are(&self, sources: &[Source]) -> Result<bool> {
        let all: Vec<_> = self.all().collect();
        if all.len() != sources.len() {
            return Ok(false);
        }
        for ((file, _), was) in all.into_iter().zip(sources) {
            if Stamp::of(&file.path)? != was.stamp && hex(&records::hash(&file.path)?) != was.sha256 {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Each file, those to train on with their weights.
    fn all(&self) -> impl Iterator<Item = (&DataFile, Option<f64>)> {
        let train = self.train.iter().map(|(file, weight)| (file, Some(*weight)));
        train.chain(self.eval.iter().map(|file| (file, None)))
    }

    /// Their paths.
    fn names(&self) -> String {
        self.all().map(|(file, _)| file.path.display().to_string()).collect::<Vec<_>>().join(", ")
    }
}

impl DataFile {
    /// A file by itself, whose fields are called as the format calls them.
    pub fn alone(path: &Path) -> Self {
        Self { path: path.into(), index: 0, fields: BTreeMap::new() }
    }

    /// What a field is called in the file.
    pub fn field<'f>(&'f self, field: &'f str) -> &'f str {
        self.fields.get(field).map_or(field, String::as_str)
    }

    /// What a record looks like in this file, for error messages.
    pub fn expected(&self, wanted: &Wanted) -> String {
        let renamed: Vec<_> = self.fields.iter().map(|(field, name)| format!("{field} is called '{name}'")).collect();
        match renamed.is_empty() {
            true => wanted.expected.to_string(),
            false => format!("{}, where {}", wanted.expected, renamed.join(", ")),
        }
    }

    /// Makes sure that every field that has another name is one that a record has.
    pub fn check(&self, wanted: &Wanted) -> Result<()> {
        match self.fields.keys().find(|field| !wanted.fields.contains(&field.as_str())) {
            None => Ok(()),
            Some(field) => Err(Error::config(format!(
                "fields: '{field}' is no field of such a record; it may have {}; expected {}",
                wanted.fields.join(", "),
                wanted.expected
            ))),
        }
    }
}

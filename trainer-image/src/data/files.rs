//! The files of a dataset: which there are, what their fields are called, and how their records become one.

use super::records::{self, Record, Wanted};
use super::split::{Collector, Split};
use crate::error::{Error, Result};
use rlhf_api::config::volume_path;
use rlhf_api::stage::{Dataset, OnBadRecord};
use sha2::{Digest, Sha256};
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

    /// Reads all of them; `each` hands on what a record becomes. `why_dropped` completes "no record can be used, n dropped: ".
    pub(super) fn read<T: Clone>(
        &self,
        wanted: &Wanted,
        seed: u64,
        why_dropped: &str,
        mut each: impl FnMut(&Record<'_>, &mut Collector<T>) -> Result<()>,
    ) -> Result<Split<T>> {
        let mut all = Collector::new(seed);
        let mut hashes = Vec::new();
        let train = self.train.iter().map(|(file, weight)| (file, Some(*weight)));
        for (file, weight) in train.chain(self.eval.iter().map(|file| (file, None))) {
            all.begin(weight);
            hashes.push(records::read(file, wanted, |record| {
                match record.and_then(|record| each(record, &mut all)) {
                    Err(error) if self.skip_bad && error.exit == rlhf_api::report::ExitCode::BadInput => {
                        all.skip(error.message);
                        Ok(())
                    }
                    result => result,
                }
            })?);
        }
        let file = match &hashes[..] {
            [one] => *one,
            all => Sha256::digest(all.concat()).into(),
        };
        all.split(file, self.eval_fraction, why_dropped).map_err(|e| e.context(self.names()))
    }

    /// Their paths.
    fn names(&self) -> String {
        let files = self.train.iter().map(|(file, _)| file).chain(&self.eval);
        files.map(|file| file.path.display().to_string()).collect::<Vec<_>>().join(", ")
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

//! The split into training and evaluation records, and the figures of a dataset.

use crate::error::{Error, Result};
use serde::Serialize;
use sha2::{Digest, Sha256};

/// The figures of a dataset.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Summary {
    /// Records in the files.
    pub records: u64,
    /// Records to train on in an epoch, each as often as its file's weight says.
    pub train: u64,
    /// Records held out for evaluation.
    pub eval: u64,
    /// Records left out, for whatever reason.
    pub dropped: u64,
    /// Records left out, since there was nothing in them to learn, or the cut to the longest allowed length left nothing.
    pub without_target: u64,
    /// Records left out, since their responses are the same, or a response is too long to be kept whole.
    pub unusable: u64,
    /// Records left out, since they cannot be read or lack what the format needs.
    pub bad: u64,
    /// What is wrong with the first of them.
    pub first_bad: Option<String>,
    /// Records, of those kept, in which a response is empty.
    pub empty: u64,
    /// Records, of those kept, that lost tokens to the cut.
    pub truncated: u64,
    /// Tokens of the kept records, all their sequences added up, each as often as it is held in memory.
    pub tokens: u64,
    /// Tokens of the longest sequence.
    pub longest_tokens: u64,
    /// Sequences of the record that has the most.
    pub sequences: u64,
    /// The greatest id in any sequence.
    pub highest_id: i64,
}

impl Summary {
    /// What was cut, dropped or is suspicious, each in a sentence with its count.
    pub fn warnings(&self) -> Vec<String> {
        let told = [
            (self.truncated, "are longer than the longest allowed length and were cut"),
            (
                self.without_target,
                "were dropped: nothing in them is to be learnt, or nothing that is lies within the longest allowed length",
            ),
            (self.unusable, "were dropped: responses are the same, or one is too long to be kept whole"),
            (
                self.empty,
                "have an empty response, which teaches the model to end at once; leave them out if that is not meant",
            ),
        ];
        let told = told.into_iter().filter(|(count, _)| *count > 0);
        let told = told.map(|(count, what)| format!("{count} of {} records {what}", self.records));
        let bad = self.first_bad.iter().map(|first| {
            format!(
                "{} of {} records cannot be used and were skipped (onBadRecord), the first: {first}",
                self.bad, self.records
            )
        });
        told.chain(bad).collect()
    }
}

/// Why a record is left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Dropped {
    /// Nothing in it is to be learnt, or nothing that is lies within the longest allowed length.
    WithoutTarget,
    /// Responses are the same, or one is too long to be kept whole.
    Unusable,
}

/// A dataset in two halves, each in the files' order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Split<T> {
    /// To train on; never empty.
    pub train: Vec<T>,
    /// Held out.
    pub eval: Vec<T>,
    /// The dataset's figures.
    pub summary: Summary,
    /// Hash of the file's bytes; of several, of their hashes.
    pub file: [u8; 32],
}

/// What there is to say about a record that is kept.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct About {
    /// It lost tokens to the cut.
    pub truncated: bool,
    /// A response in it is empty.
    pub empty: bool,
}

/// Gathers records on their way into a [`Split`].
pub(super) struct Collector<T> {
    seed: u64,
    /// Of the files to train on, with their weights.
    files: Vec<(f64, Vec<(u64, T)>)>,
    /// Of the file for evaluation, where it is one of its own.
    eval: Option<Vec<T>>,
    summary: Summary,
}

impl<T: Clone> Collector<T> {
    pub fn new(seed: u64) -> Self {
        Self { seed, files: Vec::new(), eval: None, summary: Summary::default() }
    }

    /// A file begins: one to train on with its weight, or that for evaluation.
    pub fn begin(&mut self, weight: Option<f64>) {
        match weight {
            Some(weight) => self.files.push((weight, Vec::new())),
            None => self.eval = Some(Vec::new()),
        }
    }

    /// Counts a record that cannot be used, and says why.
    pub fn skip(&mut self, why: String) {
        self.summary.records += 1;
        self.summary.dropped += 1;
        self.summary.bad += 1;
        self.summary.first_bad.get_or_insert(why);
    }

    /// Counts a record that is left out.
    pub fn drop_record(&mut self, why: Dropped) {
        self.summary.records += 1;
        self.summary.dropped += 1;
        match why {
            Dropped::WithoutTarget => self.summary.without_target += 1,
            Dropped::Unusable => self.summary.unusable += 1,
        }
    }

    /// Adds a record, which has these sequences of tokens. Records with the same `key` end in the same half.
    pub fn keep<'s>(&mut self, key: &[u8], item: T, sequences: impl IntoIterator<Item = &'s [i64]>, about: About) {
        let hash = hash(self.seed, key);
        let weight = self.files.last().filter(|_| self.eval.is_none()).map_or(1.0, |(weight, _)| *weight);
        let copies = times(weight, self.seed, hash).max(1) as u64;
        let summary = &mut self.summary;
        summary.records += 1;
        summary.truncated += u64::from(about.truncated);
        summary.empty += u64::from(about.empty);
        let mut count = 0;
        for sequence in sequences {
            count += 1;
            summary.tokens += sequence.len() as u64 * copies;
            summary.longest_tokens = summary.longest_tokens.max(sequence.len() as u64);
            summary.highest_id = sequence.iter().fold(summary.highest_id, |most, id| most.max(*id));
        }
        summary.sequences = summary.sequences.max(count);
        match (&mut self.eval, self.files.last_mut()) {
            (Some(eval), _) => eval.push(item),
            (None, Some((_, items))) => items.push((hash, item)),
            (None, None) => {}
        }
    }

    /// Splits what was added, which is of files with this hash. `why_dropped` completes "all records were dropped: ".
    ///
    /// # Errors
    /// If no record was kept to train on, or none of the file for evaluation.
    pub fn split(self, file: [u8; 32], eval_fraction: f64, why_dropped: &str) -> Result<Split<T>> {
        let Self { seed, files, eval, mut summary } = self;
        let hashes = files.iter().flat_map(|(_, items)| items).map(|(hash, _)| *hash);
        let below = threshold(hashes, eval_fraction);
        let own_eval = eval.is_some();
        let (mut train, mut held_out) = (Vec::new(), eval.unwrap_or_default());
        for (weight, items) in files {
            for (hash, item) in items {
                match hash < below {
                    true => held_out.push(item),
                    false => train.extend(std::iter::repeat_n(item, times(weight, seed, hash))),
                }
            }
        }
        if train.is_empty() {
            return Err(nothing_left(&summary, "", why_dropped));
        }
        if own_eval && held_out.is_empty() {
            return Err(nothing_left(&summary, " for evaluation", why_dropped));
        }
        (summary.train, summary.eval) = (train.len() as u64, held_out.len() as u64);
        Ok(Split { train, eval: held_out, summary, file })
    }
}

/// There is no record, or none of this use.
fn nothing_left(summary: &Summary, which: &str, why_dropped: &str) -> Error {
    let Summary { records, dropped, first_bad, .. } = summary;
    Error::input(match first_bad {
        _ if *records == 0 => "the file has no record".into(),
        _ if *dropped == 0 => format!("no record{which} is left"),
        Some(first) => format!("no record{which} can be used, {dropped} dropped, the first: {first}"),
        None => format!("no record{which} can be used, {dropped} dropped: {why_dropped}"),
    })
}

/// How often an epoch has a record: the weight's whole part, and once more for a share of the records that is its fraction.
fn times(weight: f64, seed: u64, key: u64) -> usize {
    let draw = hash(seed, &[&key.to_le_bytes()[..], b"weight"].concat()) as f64 / 2f64.powi(64);
    weight as usize + usize::from(draw < weight.fract())
}

/// A hash that is the same on every platform and in every version.
fn hash(seed: u64, key: &[u8]) -> u64 {
    let digest = Sha256::new().chain_update(seed.to_le_bytes()).chain_update(key).finalize();
    digest.iter().take(8).fold(0, |hash, byte| (hash << 8) | u64::from(*byte))
}

/// The hash below which records are held out: the fraction's share of all hashes, moved as far as it takes to leave
/// the least hash out of training and the greatest in it. With one hash only there is nothing to split.
fn threshold(hashes: impl Iterator<Item = u64> + Clone, eval_fraction: f64) -> u64 {
    let (least, greatest) = (hashes.clone().min().unwrap_or(0), hashes.max().unwrap_or(0));
    if eval_fraction <= 0.0 || least == greatest {
        return 0;
    }
    let share = (eval_fraction * 2f64.powi(64)) as u64;
    share.clamp(least + 1, greatest)
}

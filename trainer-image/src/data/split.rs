//! The split into training and evaluation records, and the figures of a dataset.

use crate::error::{Error, Result};
use serde::Serialize;
use sha2::{Digest, Sha256};
use std::path::Path;

/// The figures of a dataset.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Summary {
    /// Records in the file.
    pub records: u64,
    /// Records to train on.
    pub train: u64,
    /// Records held out for evaluation.
    pub eval: u64,
    /// Records left out, for whatever reason.
    pub dropped: u64,
    /// Records left out, since there was nothing in them to learn, or the cut to the longest allowed length left nothing.
    pub without_target: u64,
    /// Records left out, since their responses are the same, or a response is too long to be kept whole.
    pub unusable: u64,
    /// Records, of those kept, in which a response is empty.
    pub empty: u64,
    /// Records, of those kept, that lost tokens to the cut.
    pub truncated: u64,
    /// Tokens of the kept records, all their sequences added up.
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
        told.map(|(count, what)| format!("{count} of {} records {what}", self.records)).collect()
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

/// A dataset in two halves, each in the file's order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Split<T> {
    /// To train on; never empty.
    pub train: Vec<T>,
    /// Held out.
    pub eval: Vec<T>,
    /// The dataset's figures.
    pub summary: Summary,
    /// Hash of the file's bytes.
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
    items: Vec<(u64, T)>,
    summary: Summary,
}

impl<T> Collector<T> {
    pub fn new(seed: u64) -> Self {
        Self { seed, items: Vec::new(), summary: Summary::default() }
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
        let summary = &mut self.summary;
        summary.records += 1;
        summary.truncated += u64::from(about.truncated);
        summary.empty += u64::from(about.empty);
        let mut count = 0;
        for sequence in sequences {
            count += 1;
            summary.tokens += sequence.len() as u64;
            summary.longest_tokens = summary.longest_tokens.max(sequence.len() as u64);
            summary.highest_id = sequence.iter().fold(summary.highest_id, |most, id| most.max(*id));
        }
        summary.sequences = summary.sequences.max(count);
        self.items.push((hash(self.seed, key), item));
    }

    /// Splits what was added, which is of the file at `path` with this hash. `why_dropped` completes "all records were
    /// dropped: ".
    ///
    /// # Errors
    /// If no record was kept.
    pub fn split(self, path: &Path, file: [u8; 32], eval_fraction: f64, why_dropped: &str) -> Result<Split<T>> {
        let Self { items, mut summary, .. } = self;
        if items.is_empty() {
            let dropped = summary.dropped;
            let what = if dropped == 0 {
                "the file has no record".into()
            } else {
                format!("no record can be used, {dropped} dropped: {why_dropped}")
            };
            return Err(Error::input(format!("{}: {what}", path.display())));
        }
        let below = threshold(items.iter().map(|(hash, _)| *hash), eval_fraction);
        let (eval, train): (Vec<_>, Vec<_>) = items.into_iter().partition(|(hash, _)| *hash < below);
        (summary.train, summary.eval) = (train.len() as u64, eval.len() as u64);
        let values = |half: Vec<(u64, T)>| half.into_iter().map(|(_, item)| item).collect();
        Ok(Split { train: values(train), eval: values(eval), summary, file })
    }
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

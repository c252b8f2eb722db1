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
    /// Records left out, since the cut to the longest allowed length left nothing to learn.
    pub dropped: u64,
    /// Records, of those kept, that lost tokens to the cut.
    pub truncated: u64,
    /// Tokens of the kept records, all their sequences added up.
    pub tokens: u64,
    /// Tokens of the longest sequence.
    pub longest_tokens: u64,
    /// Sequences of the record that has the most.
    pub sequences: u64,
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

    /// Counts a record of which nothing is left to learn from.
    pub fn drop_record(&mut self) {
        self.summary.records += 1;
        self.summary.dropped += 1;
    }

    /// Adds a record. Records with the same `key` end in the same half; `lengths` are the tokens of its sequences.
    pub fn keep(&mut self, key: &[u8], item: T, lengths: impl IntoIterator<Item = usize>, truncated: bool) {
        self.summary.records += 1;
        self.summary.truncated += u64::from(truncated);
        let mut sequences = 0;
        for length in lengths {
            sequences += 1;
            self.summary.tokens += length as u64;
            self.summary.longest_tokens = self.summary.longest_tokens.max(length as u64);
        }
        self.summary.sequences = self.summary.sequences.max(sequences);
        self.items.push((hash(self.seed, key), item));
    }

    /// Splits what was added. `why_dropped` completes "all records were dropped: ".
    ///
    /// # Errors
    /// If no record was kept.
    pub fn split(self, path: &Path, eval_fraction: f64, why_dropped: &str) -> Result<Split<T>> {
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
        Ok(Split { train: values(train), eval: values(eval), summary })
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

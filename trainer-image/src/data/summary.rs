//! The figures of a dataset, and what there is to tell of it.

use serde::{Deserialize, Serialize};

/// The figures of a dataset.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Summary {
    /// Records in the files.
    pub records: u64,
    /// Records to train on in an epoch, each as often as its file's weight says; of a text that is cut into chunks, these.
    pub train: u64,
    /// Records held out for evaluation.
    pub eval: u64,
    /// Rows to train on in an epoch, where several records are packed into one.
    pub packed_rows: Option<u64>,
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
    /// Files of which an epoch has no record, though they have some.
    pub sources_left_out: Vec<String>,
    /// Records of the file for evaluation whose prompt (or whole text) is trained on, too.
    pub eval_in_training: u64,
    /// Records, of those kept, in which a response is empty.
    pub empty: u64,
    /// Records, of those kept, that lost tokens to the cut.
    pub truncated: u64,
    /// Tokens of the kept records, all their sequences added up, each record once.
    pub tokens: u64,
    /// Tokens of the longest sequence, or of the longest row where several records are packed into one.
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
            (
                self.eval_in_training,
                "are for evaluation though their prompt is trained on, too: what the evaluation says of new prompts is too good; leave them out of one of the files",
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
        let left_out = self.sources_left_out.iter().map(|file| {
            format!(
                "{file}: none of its records is trained on: all of them were dropped or are held out for evaluation"
            )
        });
        told.chain(bad).chain(left_out).collect()
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

/// What there is to say about a record that is kept.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct About {
    /// It lost tokens to the cut.
    pub truncated: bool,
    /// A response in it is empty.
    pub empty: bool,
}

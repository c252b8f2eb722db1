//! The contract's outward half: what a trainer pod tells the operator.
//!
//! While it runs, rank 0 serves a [`Progress`] document at `GET /progress`. When it ends, each pod's last
//! word is a [`TerminationMessage`] and an [`ExitCode`]; together they decide whether the operator goes on,
//! starts another attempt, or gives up.
//!
//! A pod runs what its author likes, so what it says is a claim: [`Progress::parse`] and [`TerminationMessage::parse`] bound
//! every number and text of it where it enters.

mod bounds;

pub use bounds::{MAX_DOCUMENT_BYTES, MAX_LAYERS, Unbelievable};

use crate::model::ModelSpec;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Most bytes of a termination message. Kubernetes keeps 12 KiB of all of a pod's containers together, so that six of them may
/// say as much.
pub const MAX_TERMINATION_BYTES: usize = 2048;
/// Most bytes of prepare's, which has to tell every model and dataset: what Kubernetes keeps of one container.
pub const MAX_PREPARED_BYTES: usize = 4096;
/// Where a pod writes its termination message.
pub const TERMINATION_FILE: &str = "/dev/termination-log";

/// A checkpoint that is whole and on the volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Checkpoint {
    /// The step (PPO: iteration) after which it was written.
    pub step: u64,
    /// Its path below the volume.
    pub path: String,
}

/// How far a stage is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Progress {
    /// Finished optimizer steps (PPO: iterations).
    pub step: u64,
    /// Steps of the whole stage; 0 while it is not known.
    pub total_steps: u64,
    /// Seconds to the end at the present pace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eta_seconds: Option<u64>,
    /// Grows as long as the trainer works, between steps too: with each micro-batch and each token of a rollout.
    #[serde(default)]
    pub activity: u64,
    /// What the trainer does while it makes no steps, such as the file that it reads or the ranks that it waits for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub doing: Option<String>,
    /// The last step's figures, such as `loss`, `reward`, `kl` and `tokensPerSecond`.
    #[serde(default)]
    pub metrics: BTreeMap<String, f64>,
    /// The last checkpoint that is whole.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoint: Option<Checkpoint>,
}

impl Progress {
    /// Whole percent of the steps done, 0 while the number of steps is not known.
    pub fn percent(&self) -> u32 {
        (self.step.min(self.total_steps) * 100).checked_div(self.total_steps).unwrap_or(0) as u32
    }

    /// Whether a trainer that told this has done anything by the time it tells `new`. Its estimate of the time left moves by
    /// itself, and what it says that it does or waits for is no work.
    pub fn advanced(&self, new: &Self) -> bool {
        let mark = |p: &Self| Self { eta_seconds: None, doing: None, ..p.clone() };
        mark(self) != mark(new)
    }
}

/// Why a trainer or prepare process ended: its exit code, and what the operator makes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum ExitCode {
    /// 0: the stage is done.
    Done,
    /// 64: the config is wrong. Never retried.
    BadConfig,
    /// 65: the data or model files are wrong. Never retried.
    BadInput,
    /// 70: a bug, such as a panic. Retried once.
    Bug,
    /// 71: a device ran out of memory.
    DeviceOutOfMemory,
    /// 72: a device failed, or was lost to the process.
    DeviceLost,
    /// 74: storage failed (full, read-only).
    Storage,
    /// 75: a peer was lost or a collective timed out. The peer's failure, not this pod's own.
    PeerLost,
    /// 76: loss or gradients are not finite. Never retried.
    NotFinite,
    /// 143: stopped by SIGTERM after a checkpoint. A disruption, not a failure.
    Terminated,
}

/// What the operator does about an end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The stage goes on to its successors.
    Success,
    /// The job fails; another attempt would end the same.
    Fail,
    /// Another attempt, at most once for this reason.
    RetryOnce,
    /// Another attempt, counted as a restart.
    Retry,
    /// Another attempt, counted as a disruption.
    Disruption,
}

impl ExitCode {
    /// Every exit code of the contract.
    pub const ALL: [ExitCode; 10] = [
        ExitCode::Done,
        ExitCode::BadConfig,
        ExitCode::BadInput,
        ExitCode::Bug,
        ExitCode::DeviceOutOfMemory,
        ExitCode::DeviceLost,
        ExitCode::Storage,
        ExitCode::PeerLost,
        ExitCode::NotFinite,
        ExitCode::Terminated,
    ];

    /// The process exit code.
    pub const fn code(self) -> i32 {
        match self {
            ExitCode::Done => 0,
            ExitCode::BadConfig => 64,
            ExitCode::BadInput => 65,
            ExitCode::Bug => 70,
            ExitCode::DeviceOutOfMemory => 71,
            ExitCode::DeviceLost => 72,
            ExitCode::Storage => 74,
            ExitCode::PeerLost => 75,
            ExitCode::NotFinite => 76,
            ExitCode::Terminated => 143,
        }
    }

    /// The exit code with this number, if the contract has one.
    pub fn from_code(code: i32) -> Option<Self> {
        Self::ALL.into_iter().find(|e| e.code() == code)
    }

    /// The CamelCase reason used in status, conditions, events and metrics.
    pub const fn reason(self) -> &'static str {
        match self {
            ExitCode::Done => "Done",
            ExitCode::BadConfig => "BadConfig",
            ExitCode::BadInput => "BadInput",
            ExitCode::Bug => "Bug",
            ExitCode::DeviceOutOfMemory => "DeviceOutOfMemory",
            ExitCode::DeviceLost => "DeviceLost",
            ExitCode::Storage => "StorageFailed",
            ExitCode::PeerLost => "PeerLost",
            ExitCode::NotFinite => "NotFinite",
            ExitCode::Terminated => "Terminated",
        }
    }

    /// What the operator does about it.
    pub const fn verdict(self) -> Verdict {
        match self {
            ExitCode::Done => Verdict::Success,
            ExitCode::BadConfig | ExitCode::BadInput | ExitCode::NotFinite => Verdict::Fail,
            ExitCode::Bug => Verdict::RetryOnce,
            ExitCode::DeviceOutOfMemory | ExitCode::DeviceLost | ExitCode::Storage | ExitCode::PeerLost => {
                Verdict::Retry
            }
            ExitCode::Terminated => Verdict::Disruption,
        }
    }
}

/// Where a stage's model is, and its final figures.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Output {
    /// The model's path below the volume, in Hugging Face layout.
    pub path: String,
    /// Final figures, such as `evalLoss`, `evalAccuracy` or `evalReward`.
    #[serde(default)]
    pub metrics: BTreeMap<String, f64>,
}

/// What prepare found out: with it the stages are planned.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Prepared {
    /// The shapes of the models that exist before the job, in the order in which prepare was told of them: the job's model is
    /// the first.
    pub models: Vec<ModelSpec>,
    /// The stages' datasets, in the spec's order.
    pub datasets: Vec<DatasetShape>,
}

/// How large the batches from a dataset can be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DatasetShape {
    /// The stage's name.
    pub stage: String,
    /// Tokens of the longest sequence, or prompt, as it is trained on.
    pub longest_tokens: u32,
    /// Sequences of a record: the responses of a ranking at most, 1 for others.
    pub sequences: u32,
    /// Records, as they are trained and evaluated on (0: not known).
    #[serde(default)]
    pub records: u64,
    /// Tokens of all of them.
    #[serde(default)]
    pub tokens: u64,
}

/// The last word of a pod: one JSON document of at most [`MAX_TERMINATION_BYTES`], prepare's of [`MAX_PREPARED_BYTES`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TerminationMessage {
    /// The exit code's number.
    pub code: i32,
    /// The exit code's reason, or `Killed` where a signal ended a worker.
    pub reason: String,
    /// What was wrong, where, and what to do.
    pub message: String,
    /// The rank that ended first with an error.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rank: Option<u32>,
    /// The last step that was finished.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub step: Option<u64>,
    /// The last checkpoint that is whole.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoint: Option<Checkpoint>,
    /// At success, where the model is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output: Option<Output>,
    /// At prepare's success, what it found out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prepared: Option<Box<Prepared>>,
}

impl TerminationMessage {
    /// The document as JSON within [`MAX_TERMINATION_BYTES`] ([`MAX_PREPARED_BYTES`] where it tells what prepare found): a long
    /// message is cut, and where that is not enough the figures are left out.
    pub fn to_bounded_json(&self) -> String {
        let render = |doc: &Self| serde_json::to_string(doc).unwrap_or_default();
        let most = if self.prepared.is_some() { MAX_PREPARED_BYTES } else { MAX_TERMINATION_BYTES };
        let fits = |doc: &Self| render(doc).len() <= most;
        let mut doc = self.clone();
        let cut =
            |doc: &Self, chars: usize| Self { message: self.message.chars().take(chars).collect(), ..doc.clone() };
        if !fits(&cut(&doc, 0))
            && let Some(output) = &mut doc.output
        {
            output.metrics.clear();
        }
        if fits(&doc) {
            return render(&doc);
        }
        // Escapes make a character up to six bytes long, so what fits is found by trying.
        let (mut short, mut long) = (0, self.message.chars().count());
        while short + 1 < long {
            let middle = (short + long) / 2;
            if fits(&cut(&doc, middle)) { short = middle } else { long = middle }
        }
        render(&cut(&doc, short))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_round_trip() {
        for e in ExitCode::ALL {
            assert_eq!(ExitCode::from_code(e.code()), Some(e));
        }
        assert_eq!(ExitCode::from_code(1), None);
    }

    #[test]
    fn words_and_estimates_are_no_work() {
        let before =
            Progress { step: 3, activity: 7, doing: Some("waiting for ranks 1, 2".into()), ..Progress::default() };
        let words = Progress { eta_seconds: Some(9), doing: Some("waiting for rank 2".into()), ..before.clone() };
        assert!(!before.advanced(&words) && !before.advanced(&Progress { doing: None, ..before.clone() }));
        for work in [
            Progress { step: 4, ..before.clone() },
            Progress { total_steps: 9, ..before.clone() },
            Progress { activity: 8, ..before.clone() },
            Progress { metrics: [("loss".to_owned(), 1.0)].into(), ..before.clone() },
            Progress { checkpoint: Some(Checkpoint { step: 3, path: "p".into() }), ..before.clone() },
        ] {
            assert!(before.advanced(&work), "{work:?}");
        }
    }

    #[test]
    fn a_long_message_is_cut_to_what_kubernetes_keeps() {
        let message = TerminationMessage {
            code: 65,
            reason: "BadInput".into(),
            message: "ü\"\n".repeat(4000),
            rank: Some(0),
            step: Some(3),
            checkpoint: None,
            output: None,
            prepared: None,
        };
        let json = message.to_bounded_json();
        assert!(json.len() <= MAX_TERMINATION_BYTES);
        let back: TerminationMessage = serde_json::from_str(&json).unwrap();
        assert!(back.message.starts_with("ü\"\n") && back.code == 65);
        assert!(json.len() > MAX_TERMINATION_BYTES - 12, "as much as fits is kept: {} bytes", json.len());
    }

    #[test]
    fn percent_never_passes_100() {
        assert_eq!(Progress { step: 9, total_steps: 4, ..Default::default() }.percent(), 100);
        assert_eq!(Progress::default().percent(), 0);
    }
}

//! The contract's inward half: what the operator hands to a trainer pod.
//!
//! Settings that are the same for every attempt of a stage travel in an immutable ConfigMap, mounted as
//! [`CONFIG_FILE`]; what differs by pod or attempt travels in the environment variables of [`mod@env`].

use crate::stage::{CheckpointPolicy, StageKind, Strategy, VOLUME_SCHEME};
use serde::{Deserialize, Serialize};

/// Where the config is mounted in prepare and trainer pods.
pub const CONFIG_DIR: &str = "/etc/rlhf";
/// The config's file name: a [`StageConfig`] for a stage, a [`PrepareConfig`] for prepare.
pub const CONFIG_FILE: &str = "config.json";
/// Where the job's volume is mounted.
pub const VOLUME_DIR: &str = "/data";
/// The port on which the first worker of a pod serves `/metrics` and `/progress`; local rank `r` serves on this plus `r`.
pub const HTTP_PORT: u16 = 9400;
/// The port of the rendezvous store on node rank 0.
pub const RENDEZVOUS_PORT: u16 = 29500;

/// Names of the environment variables that the operator sets. Users may not set them.
pub mod env {
    /// Host of node rank 0.
    pub const MASTER_ADDR: &str = "MASTER_ADDR";
    /// Port of the rendezvous store.
    pub const MASTER_PORT: &str = "MASTER_PORT";
    /// This pod's index among the stage's pods.
    pub const NODE_RANK: &str = "NODE_RANK";
    /// Pods of the stage.
    pub const NNODES: &str = "NNODES";
    /// Workers in each pod.
    pub const NPROC_PER_NODE: &str = "NPROC_PER_NODE";
    /// The attempt's number, from 1.
    pub const ATTEMPT: &str = "RLHF_ATTEMPT";
    /// Where the job's volume is mounted.
    pub const VOLUME: &str = "RLHF_VOLUME";
    /// The attempt's [`Strategy`](crate::stage::Strategy) as JSON. It goes before the config's.
    pub const STRATEGY: &str = "RLHF_STRATEGY";
    /// `text` or `json`.
    pub const LOG_FORMAT: &str = "RLHF_LOG_FORMAT";
    /// What a request for a worker's `/progress` has to carry as its bearer token; from a Secret, and nowhere else.
    pub const PROGRESS_KEY: &str = "RLHF_PROGRESS_KEY";
    /// All of them, for the rule that refuses them in a pod template.
    pub const RESERVED: [&str; 10] = [
        MASTER_ADDR,
        MASTER_PORT,
        NODE_RANK,
        NNODES,
        NPROC_PER_NODE,
        ATTEMPT,
        VOLUME,
        STRATEGY,
        LOG_FORMAT,
        PROGRESS_KEY,
    ];
}

/// The job to which a pod belongs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct JobRef {
    /// Namespace of the RLHFJob.
    pub namespace: String,
    /// Name of the RLHFJob.
    pub name: String,
    /// UID of the RLHFJob: checkpoints of a deleted job with the same name are not resumed from.
    pub uid: String,
}

/// Paths below the mounted volume, without a leading slash.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct StagePaths {
    /// The job's pretrained model: its tokenizer is every stage's tokenizer.
    pub base_model: String,
    /// The model from which the stage starts (the base model or an earlier stage's output).
    pub start_model: String,
    /// The reward model of a PPO stage.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reward_model: Option<String>,
    /// Where the stage's model is written, in Hugging Face layout.
    pub output: String,
    /// Where the stage's checkpoints are written.
    pub checkpoints: String,
}

/// Everything that a stage's trainer needs to know and that is the same in all of its pods and attempts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct StageConfig {
    /// The job to which the stage belongs.
    pub job: JobRef,
    /// The stage's name in the job.
    pub stage: String,
    /// What the stage does.
    pub kind: StageKind,
    /// How the models are placed and run. The operator leaves it out: it may differ from attempt to attempt, and so
    /// travels in [`env::STRATEGY`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub strategy: Option<Strategy>,
    /// When checkpoints are written.
    #[serde(default)]
    pub checkpoint: CheckpointPolicy,
    /// Seeds every random choice.
    pub seed: u64,
    /// Where things are on the volume.
    pub paths: StagePaths,
    /// A collective that takes longer means that a peer is lost.
    pub collective_timeout_seconds: u32,
}

/// What the prepare pod checks: every stage of the job, before any device is taken.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PrepareConfig {
    /// The job.
    pub job: JobRef,
    /// Its stages, in the manifest's order.
    pub stages: Vec<StageConfig>,
}

/// The path below the volume that a `volume://` location names, or `None` where it is not one.
pub fn volume_path(source: &str) -> Option<&str> {
    source
        .strip_prefix(VOLUME_SCHEME)
        .filter(|p| !p.is_empty() && !p.split('/').any(|part| part.is_empty() || part.starts_with('.')))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volume_paths_cannot_leave_the_volume() {
        assert_eq!(volume_path("volume://models/glass"), Some("models/glass"));
        for bad in ["volume://", "volume:///etc", "volume://a/../b", "volume://.hidden", "hf://a/b", "a"] {
            assert_eq!(volume_path(bad), None, "{bad}");
        }
    }
}

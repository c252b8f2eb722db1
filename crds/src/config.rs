//! The contract's inward half: what the operator hands to a trainer pod.
//!
//! Settings that are the same for every attempt of a stage travel in an immutable ConfigMap, mounted as
//! [`CONFIG_FILE`]; what differs by pod or attempt travels in the environment variables of [`mod@env`].

use crate::reference::VOLUME_SCHEME;
use crate::source::Remote;
use crate::stage::{CheckpointPolicy, Export, StageKind, Strategy};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Where the config is mounted in prepare and trainer pods.
pub const CONFIG_DIR: &str = "/etc/rlhf";
/// The config's file name: a [`StageConfig`] for a stage, a [`PrepareConfig`] for prepare.
pub const CONFIG_FILE: &str = "config.json";
/// Where the Secrets are mounted by which prepare fetches, each in a folder of its name. In no other pod.
pub const SECRETS_DIR: &str = "/etc/rlhf-secrets";
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
    /// Accelerators that each pod was given, one for each of its workers; 0 or none where it trains on its CPU.
    pub const DEVICES: &str = "RLHF_DEVICES";
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
    pub const RESERVED: [&str; 11] = [
        MASTER_ADDR,
        MASTER_PORT,
        NODE_RANK,
        NNODES,
        NPROC_PER_NODE,
        DEVICES,
        ATTEMPT,
        VOLUME,
        STRATEGY,
        LOG_FORMAT,
        PROGRESS_KEY,
    ];

    /// What a user may set, as a regular expression over the whole name: settings of the libraries that train, and proxies.
    /// What makes a loader or a library run a file that the variable names is not among them, nor what gives a container devices
    /// that Kubernetes has not: with the NVIDIA runtime `NVIDIA_VISIBLE_DEVICES=all` gives it all of the node's.
    pub const ALLOWED: &str = concat!(
        "^((NCCL|GLOO|UCX|FI|OMP|KMP|GOMP|MKL|DNNL|ONEDNN|OPENBLAS|TOKENIZERS)_[A-Z0-9_]+|RDMAV_(FORK|HUGEPAGES)_SAFE",
        "|TORCH_(NCCL|CPP_LOG|SHOW)_[A-Z0-9_]+|CUDA_(DEVICE_ORDER|DEVICE_MAX_CONNECTIONS|LAUNCH_BLOCKING)",
        "|PYTORCH_(CUDA_)?ALLOC_CONF|NVIDIA_DRIVER_CAPABILITIES|RUST_(LOG|BACKTRACE|LIB_BACKTRACE)",
        "|HF_ENDPOINT|HTTPS?_PROXY|NO_PROXY|ALL_PROXY|https?_proxy|no_proxy|all_proxy|TZ|LANG|LC_ALL|(NODE|POD)_(NAME|IP))$"
    );

    /// Those of them that name a file or folder of code.
    pub const LOADING: &str = "^(NCCL_CONF_FILE|UCX_(MODULE|CONFIG)[A-Z0-9_]*|OMP_TOOL[A-Z0-9_]*|[A-Z0-9_]+_PATH)$";

    /// Those that name a library, which may be one of the image's.
    pub const PLUGIN: &str = "^[A-Z0-9_]+_PLUGIN$";
}

/// The job to which a pod belongs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct JobRef {
    /// Namespace of the RLHFJob.
    pub namespace: String,
    /// Name of the RLHFJob.
    pub name: String,
    /// UID of the RLHFJob.
    pub uid: String,
}

/// Paths below the mounted volume, without a leading slash.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct StagePaths {
    /// The job's pretrained model: its tokenizer is every stage's tokenizer.
    pub base_model: String,
    /// The model from which the stage starts (the base model or an earlier stage's output).
    pub start_model: String,
    /// The policy near which a PPO stage keeps its actor.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reference_model: Option<String>,
    /// The reward model from which a PPO stage's critic starts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub critic_model: Option<String>,
    /// The reward models of a PPO stage, by the names of its rewards.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub reward_models: BTreeMap<String, String>,
    /// Where the stage's model is written, in Hugging Face layout.
    pub output: String,
    /// Where the stage's checkpoints are written.
    pub checkpoints: String,
}

/// Everything that a stage's trainer needs to know and that is the same in all of its pods and attempts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
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
    /// Which of them stay once the stage has succeeded.
    #[serde(default)]
    pub keep_checkpoints: KeepCheckpoints,
    /// How the stage's model is written.
    #[serde(default)]
    pub export: Export,
    /// Seeds every random choice.
    pub seed: u64,
    /// Where things are on the volume.
    pub paths: StagePaths,
    /// A collective that takes longer means that a peer is lost.
    pub collective_timeout_seconds: u32,
}

/// What stays of a stage's checkpoints, with their optimizer state, once its model is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum KeepCheckpoints {
    /// Nothing: they are kept while the stage runs.
    #[default]
    Running,
    /// The last ones.
    Always,
}

/// What the prepare pod checks: every stage of the job, before any device is taken.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PrepareConfig {
    /// The job.
    pub job: JobRef,
    /// Its stages, in the manifest's order.
    pub stages: Vec<StageConfig>,
    /// The folders below the volume of the models that exist before the job, the job's model first, each once.
    #[serde(default)]
    pub models: Vec<String>,
    /// What has to be brought onto the volume first, each once.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub remote: Vec<Remote>,
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

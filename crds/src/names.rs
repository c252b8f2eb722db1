//! Names, labels and field values that the operator gives to what it makes, each defined once.
//!
//! CEL admits only jobs whose job and stage names together have at most [`MAX_JOB_AND_STAGE`] characters,
//! so every name built here, pod names with index and suffix included, fits a DNS label of 63.

use crate::stage::StageKind;

/// The API group.
pub const GROUP: &str = "rlhf.dev";
/// The name under which the operator writes.
pub const FIELD_MANAGER: &str = "rlhf-operator";
/// Most characters of a job's and a stage's name together.
pub const MAX_JOB_AND_STAGE: usize = 46;
/// The name that stands in a stage's place for the prepare Job.
pub const PREPARE: &str = "prepare";

/// Label: the RLHFJob's name.
pub const LABEL_JOB: &str = "rlhf.dev/job";
/// Label: the RLHFJob's UID, which keeps a job's children apart from those of an earlier job of the same name.
pub const LABEL_JOB_UID: &str = "rlhf.dev/job-uid";
/// Label: the stage's name, or [`PREPARE`].
pub const LABEL_STAGE: &str = "rlhf.dev/stage";
/// Label: the attempt's number.
pub const LABEL_ATTEMPT: &str = "rlhf.dev/attempt";
/// Label: who manages the object.
pub const LABEL_MANAGED_BY: &str = "app.kubernetes.io/managed-by";
/// Label: the Kueue LocalQueue in which a Job waits.
pub const LABEL_QUEUE: &str = "kueue.x-k8s.io/queue-name";
/// Labels that an RLHFJob passes on to its Jobs, for Kueue: the queue, and the WorkloadPriorityClass.
pub const QUEUE_LABELS: [&str; 2] = [LABEL_QUEUE, "kueue.x-k8s.io/priority-class"];
/// The prefix of the labels that are the operator's own; a pod template may not set them.
pub const LABEL_PREFIX: &str = "rlhf.dev/";
/// The label by which NVIDIA's GPU feature discovery tells how many MiB of memory a node's devices have.
pub const LABEL_DEVICE_MEMORY: &str = "nvidia.com/gpu.memory";

/// Condition: every stage succeeded.
pub const CONDITION_COMPLETE: &str = "Complete";
/// Condition: the job gave up.
pub const CONDITION_FAILED: &str = "Failed";
/// Condition: `spec.suspend` is set and no pod is left.
pub const CONDITION_SUSPENDED: &str = "Suspended";
/// Condition: pods that should start do not.
pub const CONDITION_WAITING: &str = "Waiting";
/// Condition: a quota keeps pods from being made.
pub const CONDITION_QUOTA_EXCEEDED: &str = "QuotaExceeded";
/// Condition: an attempt stood still, and none has made a step since.
pub const CONDITION_STALLED: &str = "Stalled";

/// The value of `spec.managedBy` that stands for this operator, as does its absence.
pub const MANAGED_BY: &str = "rlhf.dev/rlhf-operator";

/// The Job of one attempt at a stage (or at prepare); its pods' host names are this, a dash and the index.
pub fn attempt(job: &str, stage: &str, attempt: u32) -> String {
    format!("{job}-{stage}-{attempt}")
}

/// The ConfigMap and the headless Service of a stage.
pub fn stage(job: &str, stage: &str) -> String {
    format!("{job}-{stage}")
}

/// The Secret with the key to the progress of a job's trainers. The tag follows from the job's UID and the key, so that
/// no Secret of an earlier job, nor one that somebody made beforehand, has this name.
pub fn progress_secret(job: &str, tag: &str) -> String {
    format!("{job}-progress-{tag}")
}

/// The entry of that Secret.
pub const PROGRESS_SECRET_ENTRY: &str = "key";

/// The NetworkPolicy of a job's pods.
pub fn network_policy(job: &str) -> String {
    format!("{job}-trainers")
}

/// The folder of a job below its volume. The UID keeps a job apart from an earlier one of the same name.
pub fn job_dir(job: &str, uid: &str) -> String {
    let short: String = uid.chars().take(8).collect();
    format!("jobs/{job}-{short}")
}

/// Where a stage's model is written, below the volume.
pub fn model_dir(job: &str, uid: &str, stage: &str) -> String {
    format!("{}/{stage}/model", job_dir(job, uid))
}

/// Where a stage's checkpoints are written, below the volume.
pub fn checkpoints_dir(job: &str, uid: &str, stage: &str) -> String {
    format!("{}/{stage}/checkpoints", job_dir(job, uid))
}

/// The names of the stages whose outputs a stage needs.
pub fn needs(kind: &StageKind) -> Vec<&str> {
    match kind {
        StageKind::Sft(_) => vec![],
        StageKind::RewardModel(s) => s.from.as_deref().into_iter().collect(),
        StageKind::Ppo(s) => s.actor.as_deref().into_iter().chain([s.reward.as_str()]).collect(),
    }
}

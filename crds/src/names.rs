//! Names, labels and field values that the operator gives to what it makes, each defined once.
//!
//! A child's name begins with those of its job and stage, for people, cut to what fits, and carries a hash of the job's UID
//! and the stage: no two stages of any jobs share it, whatever their names put together look like. Names of pods, index
//! included, fit a DNS label of 63.

use sha2::{Digest, Sha256};

/// The API group.
pub const GROUP: &str = "rlhf.dev";
/// The name under which the operator writes.
pub const FIELD_MANAGER: &str = "rlhf-operator";
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
/// Label of an RLHFJob: the class of operators that run it. Without it, those that have no class do.
pub const LABEL_CLASS: &str = "rlhf.dev/class";
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
pub const CONDITION_ATTEMPT_STALLED: &str = "AttemptStalled";
/// Condition: the job asks for something that the operator does not know.
pub const CONDITION_UNSUPPORTED: &str = "Unsupported";
/// Condition of kstatus: the job goes on.
pub const CONDITION_RECONCILING: &str = "Reconciling";
/// Condition of kstatus: the job has failed.
pub const CONDITION_STALLED: &str = "Stalled";

/// The value of `spec.managedBy` that stands for this operator, as does its absence.
pub const MANAGED_BY: &str = "rlhf.dev/rlhf-operator";

/// The hash in a name: five of the characters of which Kubernetes makes its own, none of them a vowel.
fn hash(parts: &[&str]) -> String {
    const ALPHABET: &[u8; 27] = b"bcdfghjklmnpqrstvwxz2456789";
    let mut hasher = Sha256::new();
    for part in parts {
        hasher.update(part.as_bytes());
        hasher.update([0]);
    }
    let digest = hasher.finalize();
    digest.iter().take(HASH).map(|byte| char::from(ALPHABET[usize::from(*byte) % ALPHABET.len()])).collect()
}

/// Characters of a hash.
const HASH: usize = 5;
/// Most characters of a pod's host name.
const LABEL: usize = 63;
/// Characters for an attempt's number and a pod's index, with their dashes: nobody sees the thousandth attempt, and 1,024 pods
/// are the most.
const NUMBERS: usize = "-99999-1023".len();

/// What begins with `prefix`, cut so that `rest` characters fit behind, and ends with a hash of what makes it unique.
fn unique(prefix: &str, of: &[&str], rest: usize) -> String {
    let cut: String = prefix.chars().take(LABEL - rest - HASH - 1).collect();
    format!("{}-{}", cut.trim_end_matches('-'), hash(of))
}

/// The beginning of the names of a stage's children.
pub fn stage(job: &str, uid: &str, stage: &str) -> String {
    unique(&format!("{job}-{stage}"), &[uid, stage], NUMBERS)
}

/// The Job of one attempt at a stage (or at prepare); its pods' host names are this, a dash and the index.
pub fn attempt(job: &str, uid: &str, stage: &str, attempt: u32) -> String {
    format!("{}-{attempt}", self::stage(job, uid, stage))
}

/// The headless Service of a job, by which ranks find the first of their attempt.
pub fn service(job: &str, uid: &str) -> String {
    unique(job, &[uid], NUMBERS)
}

/// The ConfigMap with the configs of all of a job's stages. What is in it is part of the name, since it is immutable, and
/// another version of the operator, or a change while the job was suspended, may write another.
pub fn config_map(job: &str, uid: &str, configs: &str) -> String {
    unique(&format!("{job}-config"), &[uid, configs], 0)
}

/// The Secret with the key to the progress of a job's trainers. The tag follows from the job's UID and the key, so that
/// no Secret of an earlier job, nor one that somebody made beforehand, has this name.
pub fn progress_secret(job: &str, tag: &str) -> String {
    unique(&format!("{job}-progress"), &[tag], 0)
}

/// The entry of that Secret.
pub const PROGRESS_SECRET_ENTRY: &str = "key";

/// The NetworkPolicy of a job's pods.
pub fn network_policy(job: &str, uid: &str) -> String {
    unique(&format!("{job}-trainers"), &[uid], 0)
}

/// The NetworkPolicy that lets a job's prepare fetch.
pub fn prepare_network_policy(job: &str, uid: &str) -> String {
    unique(&format!("{job}-fetch"), &[uid], 0)
}

/// The folder of a job below its volume, where it names none. The UID keeps a job apart from an earlier one of the same name.
pub fn job_dir(job: &str, uid: &str) -> String {
    let short: String = uid.chars().take(8).collect();
    format!("jobs/{job}-{short}")
}

/// Where a stage's model is written, below the volume.
pub fn model_dir(run: &str, stage: &str) -> String {
    format!("{run}/{stage}/model")
}

/// Where a stage's checkpoints are written, below the volume.
pub fn checkpoints_dir(run: &str, stage: &str) -> String {
    format!("{run}/{stage}/checkpoints")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_look_alike_when_put_together_are_apart() {
        assert_ne!(stage("demo", "1", "x-sft"), stage("demo-x", "2", "sft"));
        assert_ne!(stage("demo", "1", "sft"), stage("demo", "2", "sft"), "a job that is created anew");
        assert_ne!(config_map("demo", "1", "{}"), config_map("demo", "1", "{ }"));
        assert_eq!(attempt("demo", "1", "sft", 3), format!("{}-3", stage("demo", "1", "sft")));
    }

    #[test]
    fn the_longest_names_fit_and_are_dns_labels() {
        for (job, stage) in
            [("j".repeat(63), "s".repeat(40)), (format!("{}-", "j".repeat(40)), "s".into()), ("a".into(), "b".into())]
        {
            let pod = format!("{}-1023", attempt(&job, "uid", &stage, 99_999));
            assert!(
                pod.len() <= 63 && pod.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-'),
                "{pod}"
            );
            assert!(
                config_map(&job, "uid", "x").len() <= 63
                    && service(&job, "uid").len() <= 63
                    && network_policy(&job, "uid").len() <= 63
            );
            assert!(progress_secret(&job, "tag").len() <= 63);
        }
    }
}

//! The Indexed Job of one attempt.
//!
//! A gang restarts whole, so the Job itself never does: the first pod that fails ends the attempt, and the next
//! attempt is another Job. Replacing pods only once they have failed keeps two pods of one rank from writing at
//! the same time.

use super::{Attempt, Settings, Task, labels, metadata, pod};
use k8s_openapi::api::batch::v1::{Job, JobSpec};
use kube::ResourceExt;
use rlhf_api::job::RLHFJob;
use rlhf_api::names;

pub(super) fn build(job: &RLHFJob, task: Task<'_>, attempt: Attempt, settings: &Settings) -> Job {
    let compute = task.compute(job);
    let pods = i32::try_from(compute.nodes).ok();
    let mut own = labels(job, task);
    own.insert(names::LABEL_ATTEMPT.into(), attempt.number.to_string());
    Job {
        metadata: metadata(job, names::attempt(&job.name_any(), task.name(), attempt.number), own.clone()),
        spec: Some(JobSpec {
            completion_mode: Some("Indexed".into()),
            completions: pods,
            parallelism: pods,
            backoff_limit: Some(0),
            pod_replacement_policy: Some("Failed".into()),
            suspend: Some(false),
            template: pod::build(job, task, attempt, &compute, own, settings),
            ..Default::default()
        }),
        ..Default::default()
    }
}

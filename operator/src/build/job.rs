//! The Indexed Job of one attempt.
//!
//! A gang restarts whole, so the Job itself never does: the first pod that fails ends the attempt, and the next
//! attempt is another Job. Replacing pods only once they have failed keeps two pods of one rank from writing at
//! the same time.
//!
//! A Job that goes into a queue is made suspended, and whoever keeps the queue lets it run, and stops it, and may change
//! its pod template meanwhile; the operator never writes to a Job that is made.

use super::{Attempt, Settings, Task, attempt_labels, attempt_name, metadata, pod, user_labels};
use k8s_openapi::api::batch::v1::{Job, JobSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::ResourceExt;
use rlhf_api::job::RLHFJob;
use rlhf_api::names;
use std::collections::BTreeMap;

pub(super) fn build(job: &RLHFJob, task: Task<'_>, attempt: Attempt, config: &str, settings: &Settings) -> Job {
    let compute = task.compute(job);
    let pods = i32::try_from(compute.nodes).ok();
    let own = attempt_labels(job, task, attempt);
    // Only the Job is queued, as a whole: pods with these labels would be queued one by one.
    let queue = queue_labels(job);
    let queued = queue.contains_key(names::LABEL_QUEUE);
    let given = &compute.pod_template;
    let labels = user_labels(given).into_iter().chain(own.clone()).chain(queue).collect();
    let metadata = metadata(job, attempt_name(job, task, attempt.number), labels);
    let annotations = (!given.annotations.is_empty()).then(|| given.annotations.clone());
    Job {
        metadata: ObjectMeta { annotations, ..metadata },
        spec: Some(JobSpec {
            completion_mode: Some("Indexed".into()),
            completions: pods,
            parallelism: pods,
            backoff_limit: Some(0),
            pod_replacement_policy: Some("Failed".into()),
            suspend: Some(queued),
            template: pod::build(job, task, attempt, &compute, own, config, settings),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// What the job's own labels say to a queue.
fn queue_labels(job: &RLHFJob) -> BTreeMap<String, String> {
    let set = |key: &str| Some((key.to_owned(), job.labels().get(key).filter(|v| !v.is_empty())?.clone()));
    names::QUEUE_LABELS.into_iter().filter_map(set).collect()
}

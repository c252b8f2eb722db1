//! A Job that the operator made: one attempt.

use super::{Owner, Wait, unsigned};
use jiff::Timestamp;
use k8s_openapi::api::batch::v1::Job;
use kube::ResourceExt;
use rlhf_api::names;
use std::ops::RangeInclusive;

/// A Job that the operator made: one attempt.
#[derive(Clone, Debug, PartialEq)]
pub struct JobView {
    /// Its name.
    pub name: String,
    /// Its UID.
    pub uid: String,
    /// Who controls it.
    pub owner: Option<Owner>,
    /// The stage that its labels name.
    pub stage: String,
    /// The version that was seen.
    pub version: Option<String>,
    /// The attempt's number.
    pub attempt: u32,
    /// Whether somebody deleted it.
    pub deleting: bool,
    /// The queue in which it waits to run.
    pub queue: Option<String>,
    /// `spec.suspend`, which the operator leaves to others, such as the keeper of the queue.
    pub suspended: bool,
    /// Whether it has been suspended before, and so its pods may have been stopped once.
    pub resumed: bool,
    /// When it was made, by the API server's clock.
    pub created: Timestamp,
    /// When the Job controller last began to make pods for it.
    pub started: Option<Timestamp>,
    /// Pods that it keeps.
    pub pods: u32,
    /// The indexes that the Job controller has counted as succeeded.
    pub completed: Vec<RangeInclusive<u32>>,
    /// How far the Job controller is with it.
    pub state: JobState,
}

/// How far the Job controller is with a Job.
#[derive(Clone, Debug, PartialEq)]
pub enum JobState {
    /// Pods are wanted.
    Active,
    /// A pod failed; the others are being stopped.
    Failing,
    /// All pods succeeded. Final.
    Complete,
    /// Pods failed and all have ended. Final.
    Failed,
}

/// The most pods that an attempt has, by the bound of `compute.nodes`. Rules go through the indexes of a Job, of which somebody
/// may have written any number.
const MAX_PODS: u32 = 1024;

impl JobView {
    /// Whether no pod of the Job runs or will run.
    pub fn finished(&self) -> bool {
        matches!(self.state, JobState::Complete | JobState::Failed)
    }

    /// Whether the Job controller has counted the pod of an index as succeeded.
    pub fn has_completed(&self, index: u32) -> bool {
        self.completed.iter().any(|range| range.contains(&index))
    }

    /// Why the Job makes no pods, where it is suspended.
    pub fn held(&self) -> Option<Wait> {
        let wait = match &self.queue {
            Some(queue) => Wait::new(Wait::QUEUED, format!("in queue {queue}")),
            None => Wait::new(Wait::HELD, format!("Job {} is suspended, and not by the operator", self.name)),
        };
        self.suspended.then_some(wait)
    }

    /// Parses a Job, if it has a child's labels.
    pub fn parse(job: &Job) -> Option<Self> {
        let spec = job.spec.as_ref();
        let status = job.status.as_ref();
        let conditions = || status.and_then(|s| s.conditions.as_ref()).into_iter().flatten();
        let holds = |kind: &str| conditions().any(|c| c.type_ == kind && c.status == "True");
        Some(Self {
            name: job.name_any(),
            uid: job.uid()?,
            owner: Owner::of(job),
            stage: job.labels().get(names::LABEL_STAGE)?.clone(),
            version: job.resource_version(),
            attempt: job.labels().get(names::LABEL_ATTEMPT)?.parse().ok()?,
            deleting: job.metadata.deletion_timestamp.is_some(),
            queue: job.labels().get(names::LABEL_QUEUE).cloned(),
            suspended: spec.and_then(|s| s.suspend).unwrap_or(false),
            resumed: conditions().any(|c| c.type_ == "Suspended"),
            created: job.metadata.creation_timestamp.as_ref().map_or(Timestamp::UNIX_EPOCH, |t| t.0),
            started: status.and_then(|s| s.start_time.as_ref()).map(|t| t.0),
            pods: unsigned(spec.and_then(|s| s.parallelism)).min(MAX_PODS),
            completed: status.and_then(|s| s.completed_indexes.as_deref()).map(ranges).unwrap_or_default(),
            state: match () {
                () if holds("Complete") => JobState::Complete,
                () if holds("Failed") => JobState::Failed,
                () if holds("FailureTarget") => JobState::Failing,
                () => JobState::Active,
            },
        })
    }
}

/// The Job controller's way of telling indexes, such as `0,2-4`.
fn ranges(indexes: &str) -> Vec<RangeInclusive<u32>> {
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(first.parse().ok()?..=last.parse().ok()?)
    };
    indexes.split(',').filter_map(range).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_has_no_more_pods_than_an_attempt_can() {
        for (written, pods) in [(2, 2), (i32::MAX, MAX_PODS)] {
            let mut job = Job::default();
            job.metadata.uid = Some("u".into());
            let labels = [(names::LABEL_STAGE, "tune"), (names::LABEL_ATTEMPT, "1")];
            job.metadata.labels = Some(labels.map(|(k, v)| (k.to_owned(), v.to_owned())).into());
            job.spec.get_or_insert_default().parallelism = Some(written);
            assert_eq!(JobView::parse(&job).map(|view| view.pods), Some(pods));
        }
    }

    #[test]
    fn completed_indexes_are_read_as_the_job_controller_writes_them() {
        assert_eq!(ranges("0,2-4"), [0..=0, 2..=4]);
        assert!(ranges("").is_empty() && ranges("x,4294967296").is_empty());
    }
}

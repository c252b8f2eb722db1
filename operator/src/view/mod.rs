//! What is known of a job's children, parsed once where it enters.
//!
//! Kubernetes objects are wide and mostly optional; the rules in [`crate::decide`] and [`crate::classify`]
//! see these narrow types instead. The parsing is pure. An object that lacks the operator's labels is
//! not a child and yields `None`.
//!
//! Labels are anybody's to copy. So whose child an object is follows from its owners' UIDs alone: a Job's controller is the
//! RLHFJob, a pod's controller is such a Job. [`stages`] is the one place where that is looked at, whether objects come from
//! a watch, from a question right before a write, or from a test.

mod job;
mod pod;
#[cfg(test)]
mod tests;
mod wait;

pub use job::{JobState, JobView};
pub use pod::{CONTAINER, End, INDEX_KEY, PodState, PodView};
pub use wait::Wait;

use jiff::SignedDuration;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::{Resource, ResourceExt};
use rlhf_api::job::RLHFJob;
use rlhf_api::names;
use rlhf_api::report::Progress;
use std::collections::BTreeMap;

/// The one owner that controls an object.
pub(crate) fn controller(object: &impl Resource) -> Option<&OwnerReference> {
    object.meta().owner_references.iter().flatten().find(|o| o.controller == Some(true))
}

/// Who controls a child.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    /// Its kind.
    pub kind: String,
    /// Its name.
    pub name: String,
    /// Its UID.
    pub uid: String,
}

impl Owner {
    /// Who controls an object, if anybody does.
    fn of(object: &impl Resource) -> Option<Self> {
        controller(object).map(|o| Self { kind: o.kind.clone(), name: o.name.clone(), uid: o.uid.clone() })
    }
}

/// What was seen of one stage (or of prepare).
#[derive(Clone, Debug, Default)]
pub struct StageView {
    /// Its Jobs, of every attempt.
    pub jobs: Vec<JobView>,
    /// Their pods, of every attempt.
    pub pods: Vec<PodView>,
    /// Pods with the stage's labels whose Job is not there: left behind by one that was deleted, or orphaned. They may still
    /// run and so stand in the way of the next attempt; what they say is not believed, for anybody may label a pod.
    pub strays: Vec<PodView>,
    /// What rank 0 of the current attempt last told.
    pub progress: Option<Progress>,
    /// When it is to be asked again, from now.
    pub ask_again: Option<SignedDuration>,
    /// For how long it has been asked in vain; `None` while it answers or nobody asks.
    pub silent_for: Option<SignedDuration>,
    /// For how long it had told this process nothing new when it was last asked.
    pub unchanged_for: Option<SignedDuration>,
    /// Why no pods of the current attempt are made: what the Job controller or the queue says.
    pub refused: Option<Wait>,
    /// Why the volumes of the current attempt's pods are not there, and of which pod that is told.
    pub mount: Option<(String, Wait)>,
}

/// The children of a job by their stage, of the objects that carry its UID in a label: the Jobs that it controls, and the
/// pods that those control. A pod that nobody controls, or whose Job is not there and had the name that the operator gives,
/// is a stray of its stage. What another object controls is somebody else's.
pub fn stages(job: &RLHFJob, jobs: Vec<JobView>, pods: Vec<PodView>) -> BTreeMap<String, StageView> {
    let mut stages: BTreeMap<String, StageView> = BTreeMap::new();
    let uid = job.metadata.uid.as_deref().unwrap_or_default();
    let owned = jobs.into_iter().filter(|j| j.owner.as_ref().is_some_and(|o| o.uid == uid));
    for child in owned {
        stages.entry(child.stage.clone()).or_default().jobs.push(child);
    }
    for pod in pods {
        let view = stages.entry(pod.stage.clone()).or_default();
        match &pod.owner {
            Some(owner) if view.jobs.iter().any(|j| j.uid == owner.uid && j.attempt == pod.attempt) => {
                view.pods.push(pod);
            }
            Some(owner) if owner.kind != "Job" || owner.name != attempt(job, &pod.stage, pod.attempt) => {}
            _ => view.strays.push(pod),
        }
    }
    stages
}

/// The name of an attempt's Job.
pub fn attempt(job: &RLHFJob, stage: &str, number: u32) -> String {
    names::attempt(&job.name_any(), &job.uid().unwrap_or_default(), stage, number)
}

impl StageView {
    /// The Job of an attempt.
    pub fn job(&self, attempt: u32) -> Option<&JobView> {
        self.jobs.iter().find(|j| j.attempt == attempt)
    }

    /// Whether nothing of the stage runs or can begin to, and nothing of the attempt has been made.
    pub fn is_clear_for(&self, attempt: u32) -> bool {
        self.in_the_way(attempt).is_none()
    }

    /// What keeps an attempt from being made: something that runs or can begin to, or that has been made of it.
    pub fn in_the_way(&self, attempt: u32) -> Option<Obstacle<'_>> {
        let pods = self.pods.iter().chain(&self.strays);
        let job = self.jobs.iter().find(|j| !j.finished() || j.attempt == attempt);
        let mut pods = pods.filter(|p| p.ended().is_none() || p.attempt == attempt);
        pods.next().map(Obstacle::Pod).or(job.map(Obstacle::Job))
    }

    /// The pods of an attempt that its Job has made since it last started. A Job that was suspended and goes on
    /// starts anew; the pods that the suspension stopped have no part in what follows. They were made before that start, as
    /// far as the clocks of two servers can tell; of a Job that was never suspended every pod has its part.
    pub fn pods_of(&self, attempt: u32) -> impl Iterator<Item = &PodView> + Clone {
        let job = self.job(attempt);
        let (started, resumed) = (job.and_then(|j| j.started), job.is_some_and(|j| j.resumed));
        let stopped_before = move |p: &PodView| {
            p.deletion_requested.is_some() && job.is_some() && started.is_none_or(|at| resumed && p.created < at)
        };
        self.pods.iter().filter(move |p| p.attempt == attempt && !stopped_before(p))
    }

    /// Pods with the stage's labels that nobody controls, and that nobody has deleted yet.
    pub fn orphans(&self) -> impl Iterator<Item = &PodView> {
        self.strays.iter().filter(|p| p.owner.is_none() && p.deletion_requested.is_none())
    }
}

/// What keeps an attempt from being made.
#[derive(Clone, Copy, Debug)]
pub enum Obstacle<'a> {
    /// A Job that can make pods, or that is the attempt's own.
    Job(&'a JobView),
    /// A pod that has not ended, or that is the attempt's own.
    Pod(&'a PodView),
}

impl std::fmt::Display for Obstacle<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Obstacle::Job(job) => write!(f, "Job {}", job.name),
            Obstacle::Pod(pod) => write!(f, "pod {}", pod.name),
        }
    }
}

/// A number that Kubernetes gives a sign.
fn unsigned(n: Option<i32>) -> u32 {
    n.and_then(|n| u32::try_from(n).ok()).unwrap_or(0)
}

/// A reason and what is said of it.
fn join(reason: Option<&str>, message: Option<&str>) -> String {
    [reason, message].into_iter().flatten().filter(|s| !s.is_empty()).collect::<Vec<_>>().join(": ")
}

//! A cluster of one job: an API server with its objects, the Job controller, kubelets, the garbage collector, and people.
//!
//! Everything is in the API's own objects, which the operator's own parsers read.

use crate::view::{CONTAINER, INDEX_KEY, JobState, JobView, PodState, PodView};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::batch::v1::{Job, JobCondition, JobStatus};
use k8s_openapi::api::core::v1::{
    ContainerState, ContainerStateRunning, ContainerStateTerminated, ContainerStatus, Pod, PodCondition, PodSpec,
    PodStatus,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference, Time};
use kube::ResourceExt;
use rlhf_api::job::RLHFJob;
use rlhf_api::names;
use std::sync::Arc;

/// Keeps a pod until the Job controller has counted it.
const TRACKING: &str = "batch.kubernetes.io/job-tracking";
/// The grace of every deletion.
pub(super) const GRACE: i64 = 120;
/// How the names of pods begin that are somebody else's, whatever their labels say.
pub(super) const FOREIGN: &str = "foreign";

/// What the API server holds.
#[derive(Clone)]
pub(super) struct Api {
    pub job: RLHFJob,
    pub version: u64,
    pub jobs: Vec<Arc<Job>>,
    pub pods: Vec<Arc<Pod>>,
}

/// How a trainer's container ends.
#[derive(Clone, Copy, Debug)]
pub(super) enum Ending {
    /// With a code, alone in its pod.
    Code(i32),
    /// With 0, and a last word that is no document of the contract.
    Muddled,
    /// With a code, and a container beside it goes on.
    SidecarLives(i32),
    /// With 0, and a container beside it has ended badly.
    SidecarFails,
    /// Evicted for what it used itself.
    Evicted,
    /// Evicted for others.
    Disrupted,
    /// Refused by its node.
    Refused,
    /// Found gone.
    Lost,
}

/// What a pod looks like that is not the job's.
#[derive(Clone, Copy, Debug)]
pub(super) enum Stranger {
    /// Controlled by somebody's own Job.
    OfAJob,
    /// Controlled by something else.
    OfAReplicaSet,
    /// Controlled by nobody.
    Bare,
}

pub(super) fn view(pod: &Pod) -> PodView {
    PodView::parse(pod).unwrap()
}

pub(super) fn job_view(job: &Job) -> JobView {
    JobView::parse(job).unwrap()
}

pub(super) fn is_foreign(pod: &Pod) -> bool {
    pod.name_any().starts_with(FOREIGN)
}

fn is_of(pod: &Pod, job: &Job) -> bool {
    crate::view::controller(pod).is_some_and(|o| Some(&o.uid) == job.metadata.uid.as_ref())
}

fn is_tracked(pod: &Pod) -> bool {
    pod.finalizers().iter().any(|f| f == TRACKING)
}

fn delete(pod: &mut Arc<Pod>, now: Timestamp) {
    let meta = &mut Arc::make_mut(pod).metadata;
    let end = Time(now + SignedDuration::from_secs(GRACE));
    meta.deletion_timestamp.get_or_insert(end);
    meta.deletion_grace_period_seconds = Some(GRACE);
}

fn untrack(pod: &mut Arc<Pod>) {
    Arc::make_mut(pod).metadata.finalizers = None;
}

fn condition(kind: &str, status: &str) -> JobCondition {
    JobCondition { type_: kind.into(), status: status.into(), ..Default::default() }
}

impl Api {
    fn next_version(&mut self) -> String {
        self.version += 1;
        self.version.to_string()
    }

    /// A change of the RLHFJob.
    pub fn bump(&mut self) {
        self.job.metadata.resource_version = Some(self.next_version());
    }

    fn change_job(&mut self, i: usize, change: impl FnOnce(&mut Job)) {
        let version = self.next_version();
        let job = Arc::make_mut(&mut self.jobs[i]);
        change(job);
        job.metadata.resource_version = Some(version);
    }

    pub fn create(&mut self, job: &Job, now: Timestamp) {
        if self.jobs.iter().any(|j| j.metadata.name == job.metadata.name) {
            return;
        }
        let version = self.next_version();
        let mut job = job.clone();
        job.metadata.uid = Some(format!("job-{version}"));
        job.metadata.resource_version = Some(version);
        job.metadata.creation_timestamp = Some(Time(now));
        self.jobs.push(Arc::new(job));
    }

    /// Deletes a Job in the foreground, if it is still the one that was seen.
    pub fn delete_job(&mut self, uid: &str, version: Option<&String>, now: Timestamp) {
        let found = self.jobs.iter().position(|j| j.metadata.uid.as_deref() == Some(uid));
        if let Some(i) =
            found.filter(|i| version.is_none() || version == self.jobs[*i].metadata.resource_version.as_ref())
        {
            self.change_job(i, |job| job.metadata.deletion_timestamp = Some(Time(now)));
        }
    }

    pub fn delete_pod(&mut self, uid: &str, now: Timestamp) {
        self.pods.iter_mut().filter(|p| p.metadata.uid.as_deref() == Some(uid)).for_each(|p| delete(p, now));
    }

    /// Somebody deletes a Job: in the foreground, in the background, or leaving its pods.
    pub fn meddle_with_job(&mut self, pick: u8, how: u8, now: Timestamp) {
        let Some(i) = (!self.jobs.is_empty()).then(|| usize::from(pick) % self.jobs.len()) else { return };
        if how == 0 {
            return self.change_job(i, |job| job.metadata.deletion_timestamp = Some(Time(now)));
        }
        let gone = self.jobs.remove(i);
        for pod in self.pods.iter_mut().filter(|p| is_of(p, &gone)) {
            untrack(pod);
            match how {
                1 => delete(pod, now),
                _ => Arc::make_mut(pod).metadata.owner_references = None,
            }
        }
    }

    pub fn meddle_with_pod(&mut self, pick: u8, force: bool, now: Timestamp) {
        if self.pods.is_empty() {
            return;
        }
        let i = usize::from(pick) % self.pods.len();
        if force { _ = self.pods.remove(i) } else { delete(&mut self.pods[i], now) }
    }

    /// A queue lets a Job run, or stops it.
    pub fn queue(&mut self, pick: u8, suspended: bool) {
        let i = usize::from(pick) % self.jobs.len().max(1);
        if self.jobs.get(i).is_some_and(|j| job_view(j).state == JobState::Active) {
            self.change_job(i, |job| job.spec.as_mut().unwrap().suspend = Some(suspended));
        }
    }

    /// The Job controller looks at everything.
    pub fn job_controller(&mut self, now: Timestamp) {
        for i in 0..self.jobs.len() {
            let job = self.jobs[i].clone();
            let seen = job_view(&job);
            if seen.deleting || seen.finished() {
                continue;
            }
            let status = job.status.clone().unwrap_or_default();
            let next = self.synced(&job, &seen, status.clone(), now);
            if next != status {
                self.change_job(i, |job| job.status = Some(next));
            }
        }
    }

    /// The next status of a Job, once its pods are as it wants them.
    fn synced(&mut self, job: &Job, seen: &JobView, mut status: JobStatus, now: Timestamp) -> JobStatus {
        let conditions = status.conditions.get_or_insert_default();
        conditions.retain(|c| c.type_ != "Suspended" || seen.suspended);
        if seen.suspended && !conditions.iter().any(|c| c.type_ == "Suspended") {
            conditions.push(condition("Suspended", "True"));
        } else if !seen.suspended && seen.resumed {
            conditions.push(condition("Suspended", "False"));
        }
        status.start_time = status.start_time.filter(|_| !seen.suspended).or((!seen.suspended).then_some(Time(now)));
        let phase = |p: &Pod| p.status.as_ref().and_then(|s| s.phase.clone()).unwrap_or_default();
        let own = |p: &&Arc<Pod>| is_of(p, job);
        let failed = self.pods.iter().filter(own).any(|p| is_tracked(p) && phase(p) == "Failed");
        if failed && seen.state == JobState::Active {
            conditions.push(condition("FailureTarget", "True"));
        }
        if failed || seen.state == JobState::Failing {
            self.stop(job, now);
            if self.pods.iter().filter(own).all(|p| ["Failed", "Succeeded"].contains(&phase(p).as_str())) {
                conditions.push(condition("Failed", "True"));
            }
            return status;
        }
        let done = self.pods.iter().filter(own).filter(|p| phase(p) == "Succeeded").map(|p| view(p).index);
        let done: Vec<u32> = done.chain((0..seen.pods).filter(|i| seen.has_completed(*i))).collect();
        let done: Vec<u32> = (0..seen.pods).filter(|i| done.contains(i)).collect();
        status.completed_indexes = Some(done.iter().map(u32::to_string).collect::<Vec<_>>().join(","));
        if done.len() >= seen.pods as usize {
            conditions.push(condition("Complete", "True"));
        } else if seen.suspended {
            self.stop(job, now);
        } else {
            self.fill(job, seen, &done, now);
        }
        status
    }

    /// Deletes pods that have not ended, uncounted, as the Job controller does.
    fn stop(&mut self, job: &Job, now: Timestamp) {
        for pod in self.pods.iter_mut().filter(|p| is_of(p, job)) {
            let ended = pod.status.as_ref().is_some_and(|s| matches!(s.phase.as_deref(), Some("Failed" | "Succeeded")));
            if !ended {
                delete(pod, now);
                untrack(pod);
            }
        }
    }

    /// Makes pods for the indexes that have none.
    fn fill(&mut self, job: &Job, seen: &JobView, done: &[u32], now: Timestamp) {
        for index in (0..seen.pods).filter(|i| !done.contains(i)) {
            if self.pods.iter().any(|p| is_of(p, job) && view(p).index == index) {
                continue;
            }
            let version = self.next_version();
            let owner = OwnerReference {
                api_version: "batch/v1".into(),
                kind: "Job".into(),
                name: seen.name.clone(),
                uid: seen.uid.clone(),
                controller: Some(true),
                ..Default::default()
            };
            let template = job.spec.as_ref().and_then(|s| s.template.metadata.clone()).unwrap_or_default();
            self.pods.push(Arc::new(Pod {
                metadata: ObjectMeta {
                    name: Some(format!("{}-{index}-{version}", seen.name)),
                    uid: Some(format!("pod-{version}")),
                    labels: template.labels,
                    annotations: Some([(INDEX_KEY.to_owned(), index.to_string())].into()),
                    owner_references: Some(vec![owner]),
                    creation_timestamp: Some(Time(now)),
                    finalizers: Some(vec![TRACKING.to_owned()]),
                    ..Default::default()
                },
                spec: Some(PodSpec { node_name: Some(format!("node-{version}")), ..Default::default() }),
                status: Some(PodStatus { phase: Some("Pending".into()), ..Default::default() }),
            }));
        }
    }

    /// Somebody makes a pod with the labels of one of the job's, which says that the data is wrong.
    pub fn strangers(&mut self, pick: u8, stranger: Stranger, now: Timestamp) {
        let Some(job) = self.jobs.get(usize::from(pick) % self.jobs.len().max(1)).cloned() else { return };
        let version = self.next_version();
        let owner = |kind: &str| OwnerReference {
            kind: kind.into(),
            name: "theirs".into(),
            uid: "theirs".into(),
            controller: Some(true),
            ..Default::default()
        };
        let metadata = ObjectMeta {
            name: Some(format!("{FOREIGN}-{version}")),
            uid: Some(format!("{FOREIGN}-{version}")),
            labels: job.metadata.labels.clone(),
            annotations: Some([(INDEX_KEY.to_owned(), "0".to_owned())].into()),
            owner_references: match stranger {
                Stranger::OfAJob => Some(vec![owner("Job")]),
                Stranger::OfAReplicaSet => Some(vec![owner("ReplicaSet")]),
                Stranger::Bare => None,
            },
            creation_timestamp: Some(Time(now)),
            ..Default::default()
        };
        let mut pod = Pod { metadata, ..Default::default() };
        let word = r#"{"code":65,"reason":"BadInput","message":"foreign words"}"#;
        match stranger {
            Stranger::OfAReplicaSet => end(&mut pod, "Running", None, now),
            _ => end(&mut pod, "Failed", Some((65, "Error", Some(word))), now),
        }
        self.pods.push(Arc::new(pod));
    }

    /// A kubelet moves one pod on; `word` is what a trainer leaves that ends well.
    pub fn kubelet(&mut self, pick: u8, ending: Ending, lost: &[String], word: &str, now: Timestamp) {
        let on_lost = |p: &Pod| p.spec.as_ref().and_then(|s| s.node_name.as_ref()).is_some_and(|n| lost.contains(n));
        let moves = |p: &Arc<Pod>| view(p).ended().is_none() && !on_lost(p) && !is_foreign(p);
        let live: Vec<_> = (0..self.pods.len()).filter(|i| moves(&self.pods[*i])).collect();
        let Some(&i) = live.get(usize::from(pick) % live.len().max(1)) else { return };
        let pod = Arc::make_mut(&mut self.pods[i]);
        let seen = view(pod);
        let told = seen.deletion_requested.is_some();
        if matches!(seen.state, PodState::Waiting(_)) && !told {
            let status = pod.status.get_or_insert_default();
            status.phase = Some("Running".into());
            return;
        }
        match ending {
            Ending::Code(0) if told => end(pod, "Failed", Some((143, "Error", None)), now),
            Ending::Code(0) => end(pod, "Succeeded", Some((0, "Completed", Some(word))), now),
            Ending::Muddled if told => end(pod, "Failed", Some((143, "Error", None)), now),
            Ending::Muddled => end(pod, "Succeeded", Some((0, "Completed", Some("no document"))), now),
            Ending::Code(code) => end(pod, "Failed", Some((code, "Error", None)), now),
            Ending::SidecarLives(code) => {
                let (reason, word) = if code == 0 { ("Completed", Some(word)) } else { ("Error", None) };
                end(pod, "Running", Some((code, reason, word)), now);
                let state = ContainerState { running: Some(ContainerStateRunning::default()), ..Default::default() };
                beside(pod, state);
            }
            Ending::SidecarFails => {
                end(pod, "Failed", Some((0, "Completed", Some(word))), now);
                beside(
                    pod,
                    ContainerState { terminated: Some(terminated(1, "Error", None, now)), ..Default::default() },
                );
            }
            Ending::Evicted => reason(pod, "Evicted", false),
            Ending::Disrupted => reason(pod, "Evicted", true),
            Ending::Refused => reason(pod, "OutOfcpu", false),
            Ending::Lost => end(pod, "Failed", Some((255, "Unknown", None)), now),
        }
    }

    /// A kubelet ends the containers that outlive trainers in pods whose deletion was asked for.
    fn end_sidecars(&mut self) {
        for pod in &mut self.pods {
            let seen = view(pod);
            let running = pod.status.as_ref().is_some_and(|s| s.phase.as_deref() == Some("Running"));
            if seen.ended().is_some() && running && seen.deletion_requested.is_some() {
                let phase = if seen.succeeded() { "Succeeded" } else { "Failed" };
                Arc::make_mut(pod).status.as_mut().unwrap().phase = Some(phase.into());
            }
        }
    }

    /// The garbage collector removes what waits for it: ended pods whose deletion was asked for, pods without their Job, and
    /// Jobs that wait for nothing.
    pub fn collect(&mut self, now: Timestamp) {
        self.end_sidecars();
        let jobs = self.jobs.clone();
        for pod in &mut self.pods {
            let controller = jobs.iter().find(|j| is_of(pod, j));
            let orphaned = controller.is_none() && crate::view::controller(&**pod).is_some_and(|o| o.kind == "Job");
            if controller.is_some_and(|j| job_view(j).deleting) || (orphaned && !is_foreign(pod)) {
                delete(pod, now);
            }
            // Counted, or nobody is left to count.
            if controller.is_none_or(|j| job_view(j).deleting || job_view(j).state != JobState::Active) {
                untrack(pod);
            }
        }
        self.pods.retain(|p| {
            let seen = view(p);
            seen.deletion_requested.is_none() || seen.ended().is_none() || is_tracked(p)
        });
        let pods = self.pods.clone();
        self.jobs.retain(|j| !job_view(j).deleting || pods.iter().any(|p| is_of(p, j)));
    }

    /// As an operator declares a pod failed that its node does not end.
    pub fn declare_failed(&mut self, uid: &str) {
        for pod in self.pods.iter_mut().filter(|p| p.metadata.uid.as_deref() == Some(uid)) {
            reason(Arc::make_mut(pod), "NodeLost", true);
        }
    }

    pub fn remove(&mut self, uid: &str) {
        self.pods.retain(|p| p.metadata.uid.as_deref() != Some(uid) || is_tracked(p));
    }

    pub fn of_stage<'a>(&'a self, stage: &'a str) -> (Vec<JobView>, Vec<PodView>) {
        let is = |labels: &std::collections::BTreeMap<String, String>| {
            labels.get(names::LABEL_STAGE).is_some_and(|s| s == stage)
        };
        let jobs = self.jobs.iter().filter(|j| is(j.labels())).map(|j| job_view(j)).collect();
        let pods = self.pods.iter().filter(|p| is(p.labels())).map(|p| view(p)).collect();
        (jobs, pods)
    }
}

fn terminated(code: i32, reason: &str, word: Option<&str>, now: Timestamp) -> ContainerStateTerminated {
    ContainerStateTerminated {
        exit_code: code,
        reason: Some(reason.into()),
        message: word.map(str::to_owned),
        finished_at: Some(Time(now)),
        ..Default::default()
    }
}

/// The pod's trainer ended, and the pod is in this phase by it.
fn end(pod: &mut Pod, phase: &str, ended: Option<(i32, &str, Option<&str>)>, now: Timestamp) {
    let state = match ended {
        Some((code, reason, word)) => {
            ContainerState { terminated: Some(terminated(code, reason, word, now)), ..Default::default() }
        }
        None => ContainerState { running: Some(ContainerStateRunning::default()), ..Default::default() },
    };
    let status = pod.status.get_or_insert_default();
    status.phase = Some(phase.into());
    status.container_statuses =
        Some(vec![ContainerStatus { name: CONTAINER.into(), state: Some(state), ..Default::default() }]);
}

/// A container beside the trainer's is in this state.
fn beside(pod: &mut Pod, state: ContainerState) {
    let sidecar = ContainerStatus { name: "sidecar".into(), state: Some(state), ..Default::default() };
    pod.status.get_or_insert_default().container_statuses.get_or_insert_default().push(sidecar);
}

/// The kubelet, or who stands for it, fails the pod as a whole.
fn reason(pod: &mut Pod, reason: &str, disruption: bool) {
    let status = pod.status.get_or_insert_default();
    (status.phase, status.reason) = (Some("Failed".into()), Some(reason.into()));
    if disruption {
        let target = PodCondition {
            type_: "DisruptionTarget".into(),
            status: "True".into(),
            reason: Some(reason.into()),
            ..Default::default()
        };
        status.conditions.get_or_insert_default().push(target);
    }
}

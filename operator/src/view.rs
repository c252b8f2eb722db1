//! What is known of a job's children, parsed once where it enters.
//!
//! Kubernetes objects are wide and mostly optional; the rules in [`crate::decide`] and [`crate::classify`]
//! see these narrow types instead. The parsing is pure. An object that lacks the operator's labels is
//! not a child and yields `None`.

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{ContainerState, ContainerStateTerminated, ContainerStatus, Pod, PodCondition};
use kube::ResourceExt;
use rlhf_api::job::{StagePhase, StageStatus};
use rlhf_api::names;
use rlhf_api::report::{Progress, TerminationMessage};

/// The trainer's container in every pod of the operator.
pub const CONTAINER: &str = "trainer";
/// Under which the Job controller writes the index of each pod of an Indexed Job, as an annotation and as a label.
pub const INDEX_KEY: &str = "batch.kubernetes.io/job-completion-index";

/// What was seen of one stage (or of prepare).
#[derive(Clone, Debug, Default)]
pub struct StageView {
    /// Its Jobs, of every attempt.
    pub jobs: Vec<JobView>,
    /// Its pods, of every attempt.
    pub pods: Vec<PodView>,
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
}

impl StageView {
    /// The Job of an attempt.
    pub fn job(&self, attempt: u32) -> Option<&JobView> {
        self.jobs.iter().find(|j| j.attempt == attempt)
    }

    /// Whether it cannot be told from what was seen why an attempt is not whole: its Job is not there, or pods of a
    /// running attempt end or are gone, which is no loss if its Job has been suspended.
    pub fn lacks_word_of(&self, slot: &StageStatus) -> bool {
        let Some(job) = self.job(slot.attempt) else { return true };
        let well = |p: &&PodView| p.state == PodState::Running || p.succeeded();
        let whole = self.pods_of(slot.attempt).filter(well).count() >= job.pods as usize;
        slot.phase == StagePhase::Running && job.state == JobState::Active && !job.suspended && !whole
    }

    /// Takes in a Job as the API server has it now, in place of what was seen of it.
    pub fn learn(&mut self, now: Option<JobView>) {
        if let Some(now) = now {
            self.jobs.retain(|j| j.uid != now.uid);
            self.jobs.push(now);
        }
    }

    /// Whether nothing of the stage runs or can begin to, and nothing of the attempt has been made.
    pub fn is_clear_for(&self, attempt: u32) -> bool {
        self.jobs.iter().all(|j| j.finished() && j.attempt != attempt)
            && self.pods.iter().all(|p| p.ended().is_some() && p.attempt != attempt)
    }

    /// The pods of an attempt that its Job has made since it last started. A Job that was suspended and goes on
    /// starts anew; the pods that the suspension stopped have no part in what follows.
    pub fn pods_of(&self, attempt: u32) -> impl Iterator<Item = &PodView> + Clone {
        let started = self.job(attempt).map(|j| j.started);
        let stopped_before = move |p: &PodView| match (p.deletion_requested, started) {
            (Some(asked), Some(Some(started))) => asked <= started,
            (Some(_), Some(None)) => true,
            _ => false,
        };
        self.pods.iter().filter(move |p| p.attempt == attempt && !stopped_before(p))
    }
}

/// A Job that the operator made: one attempt.
#[derive(Clone, Debug, PartialEq)]
pub struct JobView {
    /// Its name.
    pub name: String,
    /// Its UID.
    pub uid: String,
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
    /// When it was made, by the API server's clock.
    pub created: Timestamp,
    /// When the Job controller last began to make pods for it.
    pub started: Option<Timestamp>,
    /// Pods that it keeps.
    pub pods: u32,
    /// Pods that the Job controller has counted as succeeded.
    pub succeeded: u32,
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

impl JobView {
    /// Whether no pod of the Job runs or will run.
    pub fn finished(&self) -> bool {
        matches!(self.state, JobState::Complete | JobState::Failed)
    }

    /// Why the Job makes no pods, where it is suspended.
    pub fn held(&self) -> Option<Wait> {
        let (reason, text) = match &self.queue {
            Some(queue) => (Wait::QUEUED, format!("in queue {queue}")),
            None => (Wait::HELD, format!("Job {} is suspended, and not by the operator", self.name)),
        };
        self.suspended.then(|| Wait { reason: reason.into(), text })
    }

    /// Parses a Job, if it is a child.
    pub fn parse(job: &Job) -> Option<Self> {
        let spec = job.spec.as_ref();
        let status = job.status.as_ref();
        let holds = |kind: &str| {
            status
                .and_then(|s| s.conditions.as_ref())
                .is_some_and(|c| c.iter().any(|c| c.type_ == kind && c.status == "True"))
        };
        Some(Self {
            name: job.name_any(),
            uid: job.uid()?,
            version: job.resource_version(),
            attempt: job.labels().get(names::LABEL_ATTEMPT)?.parse().ok()?,
            deleting: job.metadata.deletion_timestamp.is_some(),
            queue: job.labels().get(names::LABEL_QUEUE).cloned(),
            suspended: spec.and_then(|s| s.suspend).unwrap_or(false),
            created: job.metadata.creation_timestamp.as_ref().map_or(Timestamp::UNIX_EPOCH, |t| t.0),
            started: status.and_then(|s| s.start_time.as_ref()).map(|t| t.0),
            pods: unsigned(spec.and_then(|s| s.parallelism)),
            succeeded: unsigned(status.and_then(|s| s.succeeded)),
            state: match () {
                () if holds("Complete") => JobState::Complete,
                () if holds("Failed") => JobState::Failed,
                () if holds("FailureTarget") => JobState::Failing,
                () => JobState::Active,
            },
        })
    }
}

fn unsigned(n: Option<i32>) -> u32 {
    n.and_then(|n| u32::try_from(n).ok()).unwrap_or(0)
}

/// A pod of an attempt.
#[derive(Clone, Debug, PartialEq)]
pub struct PodView {
    /// Its name.
    pub name: String,
    /// Its UID, the precondition of every change to it.
    pub uid: String,
    /// The attempt to which it belongs.
    pub attempt: u32,
    /// Its index in the gang: the node rank.
    pub index: u32,
    /// The node on which it was placed.
    pub node: Option<String>,
    /// Its address.
    pub ip: Option<String>,
    /// When somebody asked for its deletion.
    pub deletion_requested: Option<Timestamp>,
    /// How long its deletion leaves it to end, after which its kubelet kills what still runs.
    pub grace: SignedDuration,
    /// For how long this process has known of its deletion, by a clock that nobody sets.
    pub deleting_for: SignedDuration,
    /// Why the cluster stops it (preemption, drain, eviction), with the cluster's words.
    pub disruption: Option<String>,
    /// What its trainer does.
    pub state: PodState,
}

/// What keeps an attempt's pods from being made or started.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Wait {
    /// One CamelCase word.
    pub reason: String,
    /// What it is about.
    pub text: String,
}

impl Wait {
    /// The reason of a pod for which no node is found.
    pub const UNSCHEDULABLE: &str = "Unschedulable";
    /// The reason of a pod whose image cannot be pulled.
    pub const IMAGE_PULL: &str = "ImagePull";
    /// The reason of a pod whose image has no valid name, so that no kubelet will ever find it.
    pub const INVALID_IMAGE: &str = "InvalidImageName";
    /// The reason of pods or other children that a quota refuses.
    pub const QUOTA: &str = "QuotaExceeded";
    /// The reason of pods or other children that are refused otherwise.
    pub const REFUSED: &str = "Refused";

    /// The reason of pods that are made once a queue lets their Job run.
    pub const QUEUED: &str = "Queued";
    /// The reason of pods whose Job somebody has suspended without a queue.
    pub const HELD: &str = "JobSuspended";

    /// From the API server's words about an object that it did not take.
    pub fn refusal(message: &str) -> Self {
        // Both of the quota's own sentences: it is used up, or it wants requests or limits that are not there.
        let quota = message.contains("exceeded quota: ") || message.contains("failed quota: ");
        // What comes before names a pod, and another one each time.
        let text = message.split_once(" is forbidden: ").map_or(message, |(_, why)| why);
        let reason = if quota { Self::QUOTA } else { Self::REFUSED };
        Self { reason: reason.into(), text: text.into() }
    }

    /// Whether nobody but the job's author can end the waiting, by another job.
    pub fn is_permanent(&self) -> bool {
        self.reason == Self::INVALID_IMAGE
    }
}

impl std::fmt::Display for Wait {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", join(Some(&self.reason), Some(&self.text)))
    }
}

/// What a pod's trainer container does.
#[derive(Clone, Debug, PartialEq)]
pub enum PodState {
    /// It has not started; with the reason where it is not the ordinary one.
    Waiting(Option<Wait>),
    /// It runs.
    Running,
    /// It ended, and does not start again.
    Ended(End),
}

/// How a trainer container ended.
#[derive(Clone, Debug, PartialEq)]
pub struct End {
    /// The exit code, where a container ran at all.
    pub code: Option<i32>,
    /// Whether the kernel killed it for its memory limit.
    pub oom_killed: bool,
    /// Its last word, if it is one of the contract's documents.
    pub word: Option<TerminationMessage>,
    /// What there is in place of such a document: the container's or the pod's own message.
    pub text: Option<String>,
    /// When it ended.
    pub at: Option<Timestamp>,
}

impl PodView {
    /// Whether the pod's trainer has ended.
    pub fn ended(&self) -> Option<&End> {
        if let PodState::Ended(end) = &self.state { Some(end) } else { None }
    }

    /// Whether the pod's trainer ended well.
    pub fn succeeded(&self) -> bool {
        self.ended().is_some_and(|e| e.code == Some(0))
    }

    /// Parses a pod, if it is a child's.
    pub fn parse(pod: &Pod) -> Option<Self> {
        let status = pod.status.as_ref();
        let meta = &pod.metadata;
        let grace = SignedDuration::from_secs(meta.deletion_grace_period_seconds.unwrap_or(0));
        Some(Self {
            name: pod.name_any(),
            uid: pod.uid().unwrap_or_default(),
            attempt: pod.labels().get(names::LABEL_ATTEMPT)?.parse().ok()?,
            index: pod.annotations().get(INDEX_KEY)?.parse().ok()?,
            node: pod.spec.as_ref().and_then(|s| s.node_name.clone()),
            ip: status.and_then(|s| s.pod_ip.clone()),
            deletion_requested: meta.deletion_timestamp.as_ref().map(|t| t.0.saturating_sub(grace).unwrap_or(t.0)),
            grace,
            deleting_for: SignedDuration::ZERO,
            disruption: condition(pod, "DisruptionTarget", "True").map(words).or_else(|| evicted(pod)),
            state: state(pod),
        })
    }
}

fn condition<'a>(pod: &'a Pod, kind: &str, value: &str) -> Option<&'a PodCondition> {
    let conditions = pod.status.as_ref()?.conditions.as_ref()?;
    conditions.iter().find(|c| c.type_ == kind && c.status == value)
}

fn words(condition: &PodCondition) -> String {
    join(condition.reason.as_deref(), condition.message.as_deref())
}

fn join(reason: Option<&str>, message: Option<&str>) -> String {
    [reason, message].into_iter().flatten().filter(|s| !s.is_empty()).collect::<Vec<_>>().join(": ")
}

/// The kubelet's own eviction, which old kubelets mark by the pod's reason alone.
fn evicted(pod: &Pod) -> Option<String> {
    let status = pod.status.as_ref()?;
    (status.reason.as_deref() == Some("Evicted")).then(|| join(Some("Evicted"), status.message.as_deref()))
}

/// The main container decides, not the pod's phase: a sidecar may outlive it.
fn state(pod: &Pod) -> PodState {
    let status = pod.status.as_ref();
    let container =
        status.and_then(|s| s.container_statuses.as_ref()).and_then(|all| all.iter().find(|c| c.name == CONTAINER));
    if let Some(ContainerState { terminated: Some(t), .. }) = container.and_then(|c| c.state.as_ref()) {
        let word: Option<TerminationMessage> = t.message.as_deref().and_then(|m| serde_json::from_str(m).ok());
        return PodState::Ended(End {
            code: Some(t.exit_code),
            oom_killed: t.reason.as_deref() == Some("OOMKilled") && t.exit_code != 0,
            text: if word.is_some() { None } else { text(t) },
            word,
            at: t.finished_at.as_ref().map(|t| t.0),
        });
    }
    match status.and_then(|s| s.phase.as_deref()) {
        Some("Failed" | "Succeeded") => PodState::Ended(End {
            code: None,
            oom_killed: false,
            word: None,
            text: status.map(|s| join(s.reason.as_deref(), s.message.as_deref())),
            at: condition(pod, "DisruptionTarget", "True").and_then(|c| c.last_transition_time.as_ref()).map(|t| t.0),
        }),
        Some("Running") => PodState::Running,
        _ => PodState::Waiting(waiting_reason(pod, container)),
    }
}

/// What an ended container left in place of a document. The reason `Error` only says that the code is not 0.
fn text(ended: &ContainerStateTerminated) -> Option<String> {
    let message = ended.message.clone().filter(|m| !m.is_empty());
    message.or_else(|| ended.reason.clone().filter(|r| r != "Error"))
}

/// Why a pod does not start, if it is not just starting. Without the kubelet's changing details, so that the
/// same trouble always reads the same and status is not written again for it.
fn waiting_reason(pod: &Pod, container: Option<&ContainerStatus>) -> Option<Wait> {
    let waiting = container.and_then(|c| c.state.as_ref()).and_then(|s| s.waiting.as_ref());
    let image = container.map(|c| c.image.as_str()).unwrap_or_default();
    let (reason, text) = match waiting.and_then(|w| w.reason.as_deref()) {
        Some("ContainerCreating" | "PodInitializing") => return None,
        Some("ErrImagePull" | "ImagePullBackOff") => (Wait::IMAGE_PULL, format!("image {image} cannot be pulled")),
        Some(Wait::INVALID_IMAGE) => (Wait::INVALID_IMAGE, format!("{image} is no name of an image")),
        Some(reason) => (reason, waiting.and_then(|w| w.message.clone()).unwrap_or_default()),
        None => {
            let unplaced = condition(pod, "PodScheduled", "False")?;
            let text = unplaced.message.clone().unwrap_or_default();
            (unplaced.reason.as_deref().unwrap_or(Wait::UNSCHEDULABLE), text)
        }
    };
    Some(Wait { reason: reason.into(), text })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn pod(status: Value) -> PodView {
        let pod: Pod = serde_json::from_value(json!({
            "metadata": {
                "name": "j-sft-2-1-abcde",
                "labels": {names::LABEL_ATTEMPT: "2"},
                "annotations": {INDEX_KEY: "1"},
            },
            "spec": {"containers": [], "nodeName": "node1"},
            "status": status,
        }))
        .unwrap();
        PodView::parse(&pod).unwrap()
    }

    fn terminated(code: i32, reason: &str, message: &str) -> Value {
        json!({"phase": "Failed", "containerStatuses": [{
            "name": CONTAINER, "ready": false, "restartCount": 0, "image": "i", "imageID": "",
            "state": {"terminated": {"exitCode": code, "reason": reason, "message": message, "finishedAt": "2026-01-01T00:00:05Z"}},
        }]})
    }

    fn waiting(reason: &str) -> Value {
        json!({"phase": "Pending", "containerStatuses": [{
            "name": CONTAINER, "ready": false, "restartCount": 0, "image": "docker.io/x:1", "imageID": "",
            "state": {"waiting": {"reason": reason, "message": "back-off 40s"}},
        }]})
    }

    #[test]
    fn a_termination_message_is_read_whole() {
        let view =
            pod(terminated(65, "Error", r#"{"code":65,"reason":"BadInput","message":"data.jsonl line 3","rank":1}"#));
        let end = view.ended().unwrap();
        assert_eq!((end.code, end.text.as_deref()), (Some(65), None));
        assert_eq!(end.word.as_ref().unwrap().message, "data.jsonl line 3");
        assert_eq!(end.at, Some("2026-01-01T00:00:05Z".parse().unwrap()));
        assert_eq!((view.attempt, view.index, view.node.as_deref()), (2, 1, Some("node1")));
    }

    #[test]
    fn a_message_that_is_no_document_is_kept_as_text() {
        let view = pod(terminated(1, "Error", "no such file"));
        assert_eq!(view.ended().unwrap().text.as_deref(), Some("no such file"));
        assert_eq!(view.ended().unwrap().word, None);
        assert_eq!(pod(terminated(1, "Error", "")).ended().unwrap().text, None, "`Error` says nothing");
        assert_eq!(pod(terminated(128, "StartError", "")).ended().unwrap().text.as_deref(), Some("StartError"));
    }

    #[test]
    fn a_container_killed_for_memory_is_told_by_its_reason_unless_it_ended_well() {
        assert!(pod(terminated(137, "OOMKilled", "")).ended().unwrap().oom_killed);
        assert!(!pod(terminated(0, "OOMKilled", "")).ended().unwrap().oom_killed);
    }

    #[test]
    fn a_pod_that_the_kubelet_evicted_before_it_started_has_ended_without_a_code() {
        let view = pod(json!({"phase": "Failed", "reason": "Evicted", "message": "low on disk"}));
        assert_eq!(view.ended().unwrap().code, None);
        assert_eq!(view.disruption.as_deref(), Some("Evicted: low on disk"));
    }

    #[test]
    fn waiting_names_what_keeps_a_pod_from_starting_and_nothing_else() {
        assert_eq!(pod(waiting("ContainerCreating")).state, PodState::Waiting(None));
        let wait =
            |reason: &str, text: &str| PodState::Waiting(Some(Wait { reason: reason.into(), text: text.into() }));
        let pull = wait("ImagePull", "image docker.io/x:1 cannot be pulled");
        assert_eq!(pod(waiting("ErrImagePull")).state, pull);
        assert_eq!(pod(waiting("ImagePullBackOff")).state, pull, "the two take turns, and read the same");
        let invalid = pod(waiting("InvalidImageName")).state;
        assert!(matches!(&invalid, PodState::Waiting(Some(w)) if w.is_permanent()), "{invalid:?}");
        assert_eq!(
            pod(waiting("CreateContainerConfigError")).state,
            wait("CreateContainerConfigError", "back-off 40s")
        );
        let unschedulable = json!({"phase": "Pending", "conditions": [
            {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/1 nodes are available"}]});
        assert_eq!(pod(unschedulable).state, wait("Unschedulable", "0/1 nodes are available"));
    }

    #[test]
    fn case_4_and_38_a_quota_is_told_from_other_refusals_and_pods_are_not_named() {
        for (message, reason, text) in [
            (
                r#"Error creating: pods "d-tune-1-0-abcde" is forbidden: exceeded quota: q, requested: pods=1, used: pods=2, limited: pods=2"#,
                "QuotaExceeded",
                "exceeded quota: q, requested: pods=1, used: pods=2, limited: pods=2",
            ),
            (
                r#"Error creating: pods "d-tune-1-0-fghij" is forbidden: failed quota: q: must specify limits.cpu for: trainer"#,
                "QuotaExceeded",
                "failed quota: q: must specify limits.cpu for: trainer",
            ),
            (
                r#"Error creating: pods "d-tune-1-0-abcde" is forbidden: violates PodSecurity "restricted:latest""#,
                "Refused",
                r#"violates PodSecurity "restricted:latest""#,
            ),
            (
                "admission webhook \"w\" denied the request: no",
                "Refused",
                "admission webhook \"w\" denied the request: no",
            ),
        ] {
            assert_eq!(Wait::refusal(message), Wait { reason: reason.into(), text: text.into() });
        }
    }

    #[test]
    fn a_deletion_is_dated_to_when_it_was_asked_for() {
        let pod: Pod = serde_json::from_value(json!({
            "metadata": {
                "name": "p", "labels": {names::LABEL_ATTEMPT: "1"}, "annotations": {INDEX_KEY: "0"},
                "deletionTimestamp": "2026-01-01T00:02:00Z", "deletionGracePeriodSeconds": 120,
            },
        }))
        .unwrap();
        let view = PodView::parse(&pod).unwrap();
        assert_eq!(view.deletion_requested, Some("2026-01-01T00:00:00Z".parse().unwrap()));
        assert_eq!(view.grace, SignedDuration::from_secs(120));
    }

    #[test]
    fn a_job_that_loses_pods_is_failing_until_all_have_ended() {
        let job = |conditions: Value| {
            let job: Job = serde_json::from_value(json!({
                "metadata": {"name": "j-sft-1", "uid": "u", "labels": {names::LABEL_ATTEMPT: "1"}},
                "spec": {"parallelism": 2, "template": {}},
                "status": {"conditions": conditions},
            }))
            .unwrap();
            JobView::parse(&job).unwrap().state
        };
        let condition = |kind: &str| json!({"type": kind, "status": "True"});
        assert_eq!(job(json!([])), JobState::Active);
        assert_eq!(job(json!([condition("FailureTarget")])), JobState::Failing);
        assert_eq!(job(json!([condition("FailureTarget"), condition("Failed")])), JobState::Failed);
        assert_eq!(job(json!([condition("SuccessCriteriaMet"), condition("Complete")])), JobState::Complete);
    }

    #[test]
    fn an_object_without_the_labels_is_no_child() {
        assert_eq!(PodView::parse(&Pod::default()), None);
        assert_eq!(JobView::parse(&Job::default()), None);
    }
}

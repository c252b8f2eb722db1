//! A pod of an attempt.

use super::{Owner, Wait, join};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{ContainerState, ContainerStateTerminated, ContainerStatus, Pod, PodCondition};
use kube::ResourceExt;
use rlhf_api::names;
use rlhf_api::report::TerminationMessage;

/// The trainer's container in every pod of the operator.
pub const CONTAINER: &str = "trainer";
/// Under which the Job controller writes the index of each pod of an Indexed Job, as an annotation and as a label.
pub const INDEX_KEY: &str = "batch.kubernetes.io/job-completion-index";

/// A pod of an attempt.
#[derive(Clone, Debug, PartialEq)]
pub struct PodView {
    /// Its name.
    pub name: String,
    /// Its UID, the precondition of every change to it.
    pub uid: String,
    /// Who controls it.
    pub owner: Option<Owner>,
    /// The stage that its labels name.
    pub stage: String,
    /// The attempt to which it belongs.
    pub attempt: u32,
    /// Its index in the gang: the node rank.
    pub index: u32,
    /// The node on which it was placed.
    pub node: Option<String>,
    /// Of prepare's pod: the image that its kubelet has found for it, by which all the job's pods are made.
    pub image_id: Option<String>,
    /// Its address.
    pub ip: Option<String>,
    /// When it was made, by the API server's clock.
    pub created: Timestamp,
    /// When somebody asked for its deletion.
    pub deletion_requested: Option<Timestamp>,
    /// How long its deletion leaves it to end, or would leave it, after which its kubelet kills what still runs.
    pub grace: SignedDuration,
    /// For how long this process has known of its deletion, by a clock that nobody sets.
    pub deleting_for: SignedDuration,
    /// Why the cluster stops it (preemption, drain, eviction), or its node refused it, with the cluster's words.
    pub disruption: Option<String>,
    /// That its kubelet evicted it for what it used itself, with the kubelet's words.
    pub evicted: Option<String>,
    /// What its trainer does.
    pub state: PodState,
    /// Whether its trainer has ended and a container beside it goes on, which nobody has told to end: the Job controller counts
    /// the pod when that ends, and so may never.
    pub lives_on: bool,
}

/// What a pod's trainer container does.
#[derive(Clone, Debug, PartialEq)]
pub enum PodState {
    /// It has not started; with the reason where it is not the ordinary one.
    Waiting(Option<Wait>),
    /// It runs.
    Running,
    /// It ended, and does not start again.
    Ended(Box<End>),
}

/// How a trainer container ended.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct End {
    /// The exit code, where a container ran at all.
    pub code: Option<i32>,
    /// Whether the kernel killed it for its memory limit.
    pub oom_killed: bool,
    /// Whether it was lost: its node's runtime found it gone, as after a loss of power.
    pub lost: bool,
    /// The container beside a trainer that ended well which ended badly, and so failed the pod.
    pub spoiled_by: Option<String>,
    /// Its last word, if it is one of the contract's documents.
    pub word: Option<TerminationMessage>,
    /// Why that word, or a part of it, is not believed; it may be the word of another program.
    pub doubt: Option<String>,
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

    /// Whether the pod ended, and not well: its trainer did, or another container of it.
    pub fn failed(&self) -> bool {
        self.ended().is_some_and(|e| e.code != Some(0) || e.spoiled_by.is_some())
    }

    /// Parses a pod, if it has a child's labels.
    pub fn parse(pod: &Pod) -> Option<Self> {
        let status = pod.status.as_ref();
        let meta = &pod.metadata;
        let by_spec = pod.spec.as_ref().and_then(|s| s.termination_grace_period_seconds);
        let grace = SignedDuration::from_secs(meta.deletion_grace_period_seconds.or(by_spec).unwrap_or(0));
        let state = state(pod);
        let stage = pod.labels().get(names::LABEL_STAGE)?.clone();
        let image = trainer(pod).filter(|_| stage == names::PREPARE).map(|c| c.image_id.clone());
        Some(Self {
            name: pod.name_any(),
            uid: pod.uid().unwrap_or_default(),
            owner: Owner::of(pod),
            stage,
            attempt: pod.labels().get(names::LABEL_ATTEMPT)?.parse().ok()?,
            index: pod.annotations().get(INDEX_KEY)?.parse().ok()?,
            node: pod.spec.as_ref().and_then(|s| s.node_name.clone()),
            image_id: image.filter(|id| !id.is_empty()),
            ip: status.and_then(|s| s.pod_ip.clone()),
            created: meta.creation_timestamp.as_ref().map_or(Timestamp::UNIX_EPOCH, |t| t.0),
            deletion_requested: meta.deletion_timestamp.as_ref().map(|t| t.0.saturating_sub(grace).unwrap_or(t.0)),
            grace,
            deleting_for: SignedDuration::ZERO,
            disruption: disruption(pod, &state),
            evicted: evicted(pod),
            lives_on: matches!(state, PodState::Ended(_)) && meta.deletion_timestamp.is_none() && has_company(pod),
            state,
        })
    }
}

/// Whether a container beside the trainer has not ended. The pod's phase does not say it: a kubelet leaves it at `Running` for a
/// while after the last container has ended. Sidecars of Kubernetes' own kind, which are init containers, it ends itself.
fn has_company(pod: &Pod) -> bool {
    let mut all = pod.status.iter().flat_map(|s| s.container_statuses.iter().flatten());
    all.any(|c| c.name != CONTAINER && c.state.as_ref().is_none_or(|s| s.terminated.is_none()))
}

fn condition<'a>(pod: &'a Pod, kind: &str, value: &str) -> Option<&'a PodCondition> {
    let conditions = pod.status.as_ref()?.conditions.as_ref()?;
    conditions.iter().find(|c| c.type_ == kind && c.status == value)
}

fn words(condition: &PodCondition) -> String {
    join(condition.reason.as_deref(), condition.message.as_deref())
}

/// The reason of a pod that its kubelet evicted.
const EVICTED: &str = "Evicted";
/// Reasons of pods that a kubelet ends together with its node, or for others that come first.
const ENDED_BY_NODE: [&str; 5] = ["Terminated", "NodeShutdown", "Shutdown", "Preempting", "NodeLost"];
/// Reasons of pods that end by their own doing before a container has ended: by a limit in their spec.
const OWN_LIMITS: [&str; 2] = [EVICTED, "DeadlineExceeded"];

/// What was done to the pod. Kubernetes marks it; of what it does not mark it is a node that goes down, or that has refused
/// a pod before any container of it ran (`OutOfcpu`, `NodeAffinity`, `UnexpectedAdmissionError`, …).
fn disruption(pod: &Pod, state: &PodState) -> Option<String> {
    if let Some(target) = condition(pod, "DisruptionTarget", "True") {
        return Some(words(target));
    }
    let status = pod.status.as_ref()?;
    let reason = status.reason.as_deref().filter(|r| !r.is_empty() && status.phase.as_deref() == Some("Failed"))?;
    let refused = matches!(state, PodState::Ended(end) if end.code.is_none()) && !OWN_LIMITS.contains(&reason);
    (refused || ENDED_BY_NODE.contains(&reason)).then(|| join(Some(reason), status.message.as_deref()))
}

/// The kubelet evicts a pod that passes its own limits without calling it a disruption: the next would be evicted as well.
fn evicted(pod: &Pod) -> Option<String> {
    let status = pod.status.as_ref()?;
    let own = status.reason.as_deref() == Some(EVICTED) && condition(pod, "DisruptionTarget", "True").is_none();
    own.then(|| join(Some(EVICTED), status.message.as_deref()))
}

/// What is told of the main container.
fn trainer(pod: &Pod) -> Option<&ContainerStatus> {
    pod.status.as_ref()?.container_statuses.as_ref()?.iter().find(|c| c.name == CONTAINER)
}

/// The main container decides, not the pod's phase: a sidecar may outlive it.
fn state(pod: &Pod) -> PodState {
    let status = pod.status.as_ref();
    let container = trainer(pod);
    if let Some(ContainerState { terminated: Some(t), .. }) = container.and_then(|c| c.state.as_ref()) {
        return PodState::Ended(Box::new(end(pod, t)));
    }
    match status.and_then(|s| s.phase.as_deref()) {
        Some("Failed" | "Succeeded") => PodState::Ended(Box::new(End {
            text: status.map(|s| join(s.reason.as_deref(), s.message.as_deref())),
            at: condition(pod, "DisruptionTarget", "True").and_then(|c| c.last_transition_time.as_ref()).map(|t| t.0),
            ..End::default()
        })),
        Some("Running") => PodState::Running,
        _ => PodState::Waiting(waiting_reason(pod, container)),
    }
}

/// The code with which runtimes tell of a container that they have found gone.
const GONE: i32 = 255;

fn end(pod: &Pod, ended: &ContainerStateTerminated) -> End {
    let (word, doubt) = ended.message.as_deref().filter(|said| !said.is_empty()).map(word).unwrap_or_default();
    let unknown = matches!(ended.reason.as_deref(), Some("Unknown" | "ContainerStatusUnknown"));
    End {
        code: Some(ended.exit_code),
        oom_killed: ended.reason.as_deref() == Some("OOMKilled") && ended.exit_code != 0,
        lost: word.is_none() && ended.exit_code != 0 && (unknown || ended.exit_code == GONE),
        spoiled_by: (ended.exit_code == 0).then(|| spoiler(pod)).flatten(),
        text: if word.is_some() { None } else { text(ended) },
        word,
        doubt,
        at: ended.finished_at.as_ref().map(|t| t.0),
    }
}

/// A pod's last word, and why it, or a part of it that is left out, is not believed.
fn word(text: &str) -> (Option<TerminationMessage>, Option<String>) {
    match TerminationMessage::parse(text.as_bytes()) {
        Ok((word, doubt)) => (Some(word), doubt.map(|doubt| doubt.to_string())),
        Err(error) => (None, Some(error.to_string())),
    }
}

/// The other container whose end has failed the pod.
fn spoiler(pod: &Pod) -> Option<String> {
    let status = pod.status.as_ref().filter(|s| s.phase.as_deref() == Some("Failed"))?;
    let others = status.container_statuses.iter().flatten().chain(status.init_container_statuses.iter().flatten());
    let mut bad = others.filter(|c| c.name != CONTAINER).filter_map(|c| {
        let code = c.state.as_ref()?.terminated.as_ref()?.exit_code;
        (code != 0).then(|| format!("container {} beside the trainer ended with exit code {code}", c.name))
    });
    bad.next()
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
    Some(Wait::new(reason, text))
}

//! What no longer has a part: Jobs of earlier attempts, orphaned pods, and pods that their nodes do not end.

use super::{Event, JobRef, NodeState, Pass, PodRef};
use crate::view::{JobState, JobView, PodView, StageView};
use jiff::SignedDuration;
use rlhf_api::job::{RLHFJobStatus, StagePhase, StageStatus};

/// A pod that has not ended so long after the grace of its deletion is overdue: its kubelet would have killed it by then. So
/// long after its trainer's end and that grace it would have said that the pod has ended.
pub const LOST_AFTER: SignedDuration = SignedDuration::from_secs(180);

impl Pass<'_> {
    /// Deletes every Job that no longer has a part: those of earlier attempts, and unfinished ones of stages that do
    /// not run. What has finished stays for its logs until the job's deletion, and of a stage that has failed so does the
    /// attempt before, until the next has ended.
    ///
    /// A suspended job's Jobs go too, and are made again under their numbers. Suspending them instead would be a word
    /// against that of a queue, which lets a Job run that it has admitted, and they would go on taking quota.
    pub(super) fn sweep(&mut self, status: &RLHFJobStatus) {
        for slot in status.slots() {
            let live = matches!(slot.phase, StagePhase::Starting | StagePhase::Running);
            let seen = |j: &JobView| j.version.clone().filter(|_| live && j.attempt == slot.attempt);
            let of = |j: &JobView| JobRef { name: j.name.clone(), uid: j.uid.clone(), version: seen(j) };
            let unwanted = |j: &&JobView| !j.deleting && !self.has_part(slot, j);
            let unwanted: Vec<_> = self.view(&slot.name).jobs.iter().filter(unwanted).map(of).collect();
            self.decision.delete.extend(unwanted);
            self.await_kubelets(slot);
        }
        for view in self.observed.stages.values() {
            self.decision.orphans.extend(view.orphans().map(pod_ref));
        }
        self.give_up_lost();
    }

    fn has_part(&self, slot: &StageStatus, job: &JobView) -> bool {
        let live = matches!(slot.phase, StagePhase::Starting | StagePhase::Running);
        let stopped = self.job.spec.suspend && job.state == JobState::Active;
        let current =
            job.attempt == slot.attempt && (live || job.finished() || self.ends_itself(slot, job)) && !stopped;
        // Its log says what the next attempt is to do better.
        let log_of_last = job.attempt + 1 == slot.attempt && job.state == JobState::Failed;
        current || (log_of_last && slot.phase != StagePhase::Succeeded)
    }

    /// Whether Kubernetes is about to call a Job over: nothing of the stage's pods runs on, such as a sidecar.
    fn ends_itself(&self, slot: &StageStatus, job: &JobView) -> bool {
        let mut pods = self.view(&slot.name).pods.iter().filter(|p| p.attempt == job.attempt).peekable();
        let is_told = |p: &PodView| !p.lives_on && (job.state != JobState::Active || !self.lives_on(p));
        slot.phase == StagePhase::Succeeded && pods.peek().is_some() && pods.all(|p| p.ended().is_some() && is_told(p))
    }

    /// Whether a pod, whose Job counts it as active, may be that for ever although its trainer has ended: a container beside it
    /// goes on, or its kubelet is gone that was to say that the pod has ended.
    pub(super) fn lives_on(&self, pod: &PodView) -> bool {
        pod.lives_on || self.left_to_tell(pod).is_some_and(|left| left <= SignedDuration::ZERO)
    }

    /// How long the kubelet of a pod whose trainer has ended has until it is taken not to say so any more.
    fn left_to_tell(&self, pod: &PodView) -> Option<SignedDuration> {
        let passed = self.now.duration_since(pod.ended()?.at?);
        Some(pod.grace.saturating_add(LOST_AFTER).saturating_sub(passed))
    }

    /// Looks again when a kubelet's time is over to say that a pod has ended, which its Job waits for.
    fn await_kubelets(&mut self, slot: &StageStatus) {
        let view = self.view(&slot.name);
        let Some(job) = view.job(slot.attempt).filter(|j| j.state == JobState::Active && !j.suspended) else { return };
        let left = view.pods_of(job.attempt).filter_map(|p| self.left_to_tell(p));
        let next = left.filter(|left| *left > SignedDuration::ZERO).min();
        next.iter().for_each(|left| self.decision.look_again(*left));
    }

    /// Gives up pods whose kubelets do not carry out their deletion, where it is known that they cannot run on, or the job
    /// says that it takes the risk. Kubernetes itself waits for ever, for the node might only be cut off; so do others here.
    pub(super) fn give_up_lost(&mut self) {
        for (stage, view) in &self.observed.stages {
            for pod in all_pods(view) {
                let Some(left) = left_to_end(pod) else { continue };
                if left > SignedDuration::ZERO {
                    self.decision.look_again(left);
                } else if let Some(why) = self.is_lost(pod) {
                    let note = format!("{}: it is taken for lost, for {why}", overdue(pod));
                    self.decision.lost.push(pod_ref(pod));
                    self.tell(Event::PodLost, note, Some(self.attempt(stage, pod.attempt)));
                }
            }
        }
    }

    /// Why a pod that is overdue cannot run on, or may be taken not to.
    fn is_lost(&self, pod: &PodView) -> Option<&'static str> {
        let node = pod.node.as_ref().and_then(|node| self.observed.nodes.get(node));
        match node {
            Some(NodeState::Gone) => Some("its node is gone"),
            Some(NodeState::OutOfService) => Some("its node has the taint node.kubernetes.io/out-of-service"),
            _ if self.job.spec.failure_policy.force_delete_lost_pods => {
                Some("failurePolicy.forceDeleteLostPods is set")
            }
            _ => None,
        }
    }

    /// A pod of the stage that is overdue and may still run, and what to do about it.
    pub(super) fn stuck(&self, view: &StageView) -> Option<String> {
        let mut pods = all_pods(view);
        let pod = pods.find(|p| is_overdue(p) && self.is_lost(p).is_none())?;
        Some(format!(
            "{}; if the node is down, taint it node.kubernetes.io/out-of-service or remove it, or set failurePolicy.forceDeleteLostPods",
            overdue(pod)
        ))
    }
}

fn all_pods(view: &StageView) -> impl Iterator<Item = &PodView> {
    view.pods.iter().chain(&view.strays)
}

/// How long a pod that is being deleted has until it is overdue.
fn left_to_end(pod: &PodView) -> Option<SignedDuration> {
    let deleting = pod.ended().is_none() && pod.deletion_requested.is_some();
    deleting.then(|| pod.grace.saturating_add(LOST_AFTER).saturating_sub(pod.deleting_for))
}

/// Whether a pod should long have ended by its deletion and has not.
pub(super) fn is_overdue(pod: &PodView) -> bool {
    left_to_end(pod).is_some_and(|left| left <= SignedDuration::ZERO)
}

fn overdue(pod: &PodView) -> String {
    format!(
        "pod {} should have ended {} s after its deletion, and node {} has not ended it",
        pod.name,
        pod.grace.saturating_add(LOST_AFTER).as_secs(),
        pod.node.as_deref().unwrap_or("-")
    )
}

fn pod_ref(pod: &PodView) -> PodRef {
    PodRef { name: pod.name.clone(), uid: pod.uid.clone(), node: pod.node.clone() }
}

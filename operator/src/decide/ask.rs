//! What a pass has to ask the API server beyond what its watches tell, and whom. Pure: [`crate::observe`] asks.

use super::sweep::is_overdue;
use crate::view::{JobState, JobView, PodState, PodView, StageView};
use jiff::{SignedDuration, Timestamp};
use rlhf_api::job::{Compute, RLHFJob, RLHFJobStatus, StagePhase, StageStatus};
use rlhf_api::names;
use std::collections::{BTreeMap, BTreeSet};

/// The Job controller has a Job's pods made by then, and it would have said what keeps it from it.
const PODS_ARE_MADE: SignedDuration = SignedDuration::from_secs(3);
/// A pod's volumes are there by then, or its kubelet has said why not.
const VOLUMES_ARE_MOUNTED: SignedDuration = SignedDuration::from_secs(20);

/// Stages of which an attempt is to run.
pub fn live(status: &RLHFJobStatus) -> impl Iterator<Item = &StageStatus> {
    status.slots().filter(|s| matches!(s.phase, StagePhase::Starting | StagePhase::Running))
}

/// Whether it cannot be told from what was seen why the stage's attempt is not whole: its Job is not there, or pods of a
/// running attempt end or are gone, which is no loss if its Job has been suspended.
pub fn for_job(slot: &StageStatus, view: &StageView) -> bool {
    let Some(job) = view.job(slot.attempt) else { return true };
    let well = |p: &&PodView| p.state == PodState::Running || p.succeeded();
    let whole = view.pods_of(slot.attempt).filter(well).count() >= job.pods as usize;
    slot.phase == StagePhase::Running && job.state == JobState::Active && !job.suspended && !whole
}

/// Why an attempt lacks pods: who knows it.
#[derive(Debug)]
pub enum Lack<'a> {
    /// The queue that does not let it run yet.
    Queue(&'a JobView),
    /// The Job controller, which cannot make them, and says so in events alone.
    JobController(&'a JobView),
}

/// Whether the stage's attempt lacks pods and somebody knows why.
pub fn for_lack<'a>(job: &RLHFJob, slot: &StageStatus, view: &'a StageView, now: Timestamp) -> Option<Lack<'a>> {
    let starting = slot.phase == StagePhase::Starting && !job.spec.suspend;
    let child = view.job(slot.attempt).filter(|j| starting && j.state == JobState::Active)?;
    if child.suspended {
        return Some(Lack::Queue(child));
    }
    let since = slot.starting_since.or(slot.pending_since);
    let late = since.is_some_and(|since| now.duration_since(since) >= PODS_ARE_MADE);
    let lacks = view.pods_of(slot.attempt).count() < child.pods as usize;
    (late && lacks).then_some(Lack::JobController(child))
}

/// The first pod of the stage's attempt that has a node and does not start, and does not say why: its events may.
pub fn for_mount<'a>(slot: &StageStatus, view: &'a StageView, now: Timestamp) -> Option<&'a PodView> {
    let late = slot.starting_since.is_some_and(|since| now.duration_since(since) >= VOLUMES_ARE_MOUNTED);
    let waits = |p: &&PodView| p.state == PodState::Waiting(None) && p.node.is_some();
    let found = view.pods_of(slot.attempt).filter(waits).min_by_key(|p| p.index);
    found.filter(|_| late && slot.phase == StagePhase::Starting)
}

/// Nodes that have not ended a pod for long: are they gone?
pub fn for_nodes(stages: &BTreeMap<String, StageView>) -> BTreeSet<String> {
    let pods = stages.values().flat_map(|view| view.pods.iter().chain(&view.strays));
    pods.filter(|p| is_overdue(p)).filter_map(|p| p.node.clone()).collect()
}

/// The stages that are about to be planned, and need to know how much memory the devices have on which they run.
pub fn for_memory<'a>(
    job: &'a RLHFJob,
    stages: &BTreeMap<String, StageView>,
) -> impl Iterator<Item = (&'a str, Compute)> {
    let status = job.status.as_ref();
    let slot = status.and_then(|s| s.prepare.as_ref());
    let done = slot.is_some_and(|slot| {
        let complete = |view: &StageView| view.job(slot.attempt).is_some_and(|j| j.state == JobState::Complete);
        slot.phase == StagePhase::Succeeded || stages.get(names::PREPARE).is_some_and(complete)
    });
    let over = status.is_some_and(|s| s.phase.is_terminal());
    let planned = move |name: &str| status.is_some_and(|s| s.slot(name).is_some_and(|slot| slot.plan.is_some()));
    let open = job
        .spec
        .stages
        .iter()
        .filter(move |stage| done && !over && job.strategy(stage).has_auto() && !planned(&stage.name));
    let computes = open.map(|stage| (stage.name.as_str(), job.compute(stage)));
    computes.filter(|(_, compute)| compute.devices_per_node > 0 && compute.device_memory.is_none())
}

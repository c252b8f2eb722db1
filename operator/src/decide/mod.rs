//! What follows from a job and what was seen of its children: the operator's rules, all of them.
//!
//! [`decide`] is a pure function of the job, the observation and the time; it reads no clock, calls no API and is
//! the only place where a status is made. It promises:
//! - a stage never has two live attempts: an attempt's Job is made only when every earlier Job of the stage has
//!   finished or is gone and no pod of the stage runs;
//! - an attempt's number and the counters are in status before its children are made, so a crash between any two
//!   writes ends the same;
//! - attempts and counters never fall, and a terminal job stays as it is;
//! - the same input gives the same output, so a pass that changes nothing writes nothing.
//!
//! It goes in two steps and a fold: of each stage `facts` makes one of a few cases out of what was seen, `transition`
//! draws from the case and the stage's phase what follows and when to look again, and `status` sums the stages up.
//!
//! The attempt number as a fence is JobSet's idea (`failurePolicy`, restart attempts).

pub mod ask;
mod clocks;
mod conditions;
mod facts;
mod plan;
mod stage;
mod start;
mod status;
mod sweep;
#[cfg(test)]
mod tests;
mod transition;
mod words;
#[cfg(test)]
mod world;

pub use sweep::LOST_AFTER;

use crate::build::{self, Children, Settings, Task};
use crate::view::{self, JobView, StageView, Wait};
use jiff::{SignedDuration, Timestamp};
use rlhf_api::job::{Images, RLHFJob, RLHFJobStatus, StageStatus};
use rlhf_api::names;
use std::collections::BTreeMap;

/// How often rank 0 of a running stage is asked how far it is at most, and so how often progress is written.
pub const PROGRESS_PERIOD: SignedDuration = SignedDuration::from_secs(10);

/// How often a job that is not over is looked at although nothing has told of a change: what a watch missed is seen then.
pub const RESYNC: SignedDuration = SignedDuration::from_secs(600);

/// So far the clocks of operators that work one after the other may differ.
const CLOCK_SKEW: SignedDuration = SignedDuration::from_secs(60);

/// What was seen of a job's children.
#[derive(Clone, Debug, Default)]
pub struct Observed {
    /// By the stage's name; prepare is one of them. A stage without children may be absent.
    pub stages: BTreeMap<String, StageView>,
    /// What the API server said when attempts' objects were last made, where it was no success; one for a stage at most.
    pub troubles: Vec<Trouble>,
    /// What nodes tell of the devices of a stage, by the stage's name, where that was asked.
    pub device_memory: BTreeMap<String, DeviceMemory>,
    /// What is known of nodes that do not end pods, by their names.
    pub nodes: BTreeMap<String, NodeState>,
}

/// How much memory the devices have on which a stage would run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceMemory {
    /// So many bytes, at the least.
    Bytes(u64),
    /// There is no node yet on which its pods can run, as where a pool is scaled to zero.
    NoNode,
    /// There are such nodes, and none says it.
    Untold,
    /// The operator may not read nodes.
    Unreadable,
}

/// What is known of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodeState {
    /// It is there; whether its pods run nobody can tell.
    There,
    /// Somebody who knows has said that it is down.
    OutOfService,
    /// It is no part of the cluster any more.
    Gone,
    /// The operator may not read nodes.
    Unreadable,
}

impl Observed {
    /// What keeps the objects of the stage's current attempt from being made.
    fn trouble(&self, slot: &StageStatus) -> Option<&Trouble> {
        self.troubles.iter().find(|t| t.stage == slot.name && t.attempt == slot.attempt)
    }
}

/// An attempt's objects could not be made.
#[derive(Clone, Debug, PartialEq)]
pub struct Trouble {
    /// The stage.
    pub stage: String,
    /// The attempt.
    pub attempt: u32,
    /// What was refused and why.
    pub message: String,
    /// Not tried again before so long.
    pub retry_after: SignedDuration,
    /// Whether another try would end the same, because what the job says is wrong.
    pub permanent: bool,
    /// Whether this process has not told it yet.
    pub is_news: bool,
}

/// What is to be written.
#[derive(Clone, Debug, Default)]
pub struct Decision {
    /// The next status; written first, and only if it differs.
    pub status: RLHFJobStatus,
    /// Jobs to delete with their pods.
    pub delete: Vec<JobRef>,
    /// Pods that nobody controls any more: to be deleted, as their Job would have been.
    pub orphans: Vec<PodRef>,
    /// Pods that their nodes should long have ended: to be declared failed, and removed.
    pub lost: Vec<PodRef>,
    /// Attempts to make.
    pub make: Vec<Children>,
    /// What to tell people, once the status is written.
    pub notices: Vec<Notice>,
    /// How attempts ended in this pass, for the metrics, once the status is written.
    pub outcomes: Vec<Outcome>,
    /// Whether the job itself is to be deleted, because it ended long enough ago.
    pub expired: bool,
    /// When to look again although nothing changes.
    pub requeue: Option<SignedDuration>,
}

impl Decision {
    /// Whether children are made, changed or deleted.
    pub fn touches_children(&self) -> bool {
        !(self.delete.is_empty() && self.make.is_empty())
    }

    fn look_again(&mut self, after: SignedDuration) {
        self.requeue = Some(self.requeue.map_or(after, |r| r.min(after)));
    }
}

/// One Job, and no other of the same name.
#[derive(Clone, Debug, PartialEq)]
pub struct JobRef {
    /// Its name.
    pub name: String,
    /// Its UID.
    pub uid: String,
    /// Where the Job is taken for live: the version that was seen, since it may have ended well meanwhile, which its deletion
    /// would undo.
    pub version: Option<String>,
}

/// One pod, and no other of the same name.
#[derive(Clone, Debug, PartialEq)]
pub struct PodRef {
    /// Its name.
    pub name: String,
    /// Its UID.
    pub uid: String,
    /// Its node.
    pub node: Option<String>,
}

/// An event for people.
#[derive(Clone, Debug, PartialEq)]
pub struct Notice {
    /// What happened.
    pub event: Event,
    /// In words.
    pub note: String,
    /// The child Job that it concerns. Events of one kind that concern the same Job are counted, not repeated.
    pub about: Option<String>,
}

/// What happened to a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// An attempt's number is written and its children are wanted. Not told of a stage's first, which follows what it needs.
    StageStarted,
    /// A stage (or prepare) is done.
    StageSucceeded,
    /// An attempt ended otherwise.
    AttemptFailed,
    /// An attempt's objects cannot be made.
    Blocked,
    /// A pod's node has not ended it, and it is taken for lost.
    PodLost,
    /// A pod's node has not ended it, and nothing says that it does not run on.
    PodStuck,
    /// A stage is planned to take more memory than there is.
    MayNotFit,
    /// Every stage is done.
    JobSucceeded,
    /// The job gave up.
    JobFailed,
    /// The job is suspended and no pod is left.
    Suspended,
    /// The job goes on.
    Resumed,
}

impl Event {
    /// The event's reason.
    pub const fn reason(self) -> &'static str {
        match self {
            Event::StageStarted => "StageStarted",
            Event::StageSucceeded => "StageSucceeded",
            Event::AttemptFailed => "AttemptFailed",
            Event::Blocked => "Blocked",
            Event::PodLost => "PodLost",
            Event::PodStuck => "PodStuck",
            Event::MayNotFit => "MayNotFit",
            Event::JobSucceeded => "JobSucceeded",
            Event::JobFailed => "JobFailed",
            Event::Suspended => "Suspended",
            Event::Resumed => "Resumed",
        }
    }

    /// Whether somebody should look.
    pub const fn is_warning(self) -> bool {
        use Event::{AttemptFailed, Blocked, JobFailed, MayNotFit, PodLost, PodStuck};
        matches!(self, AttemptFailed | Blocked | PodLost | PodStuck | MayNotFit | JobFailed)
    }
}

/// How an attempt ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Well.
    Succeeded,
    /// Badly; another attempt follows and counts as a restart.
    Restarted,
    /// By a disruption; another attempt follows.
    Disrupted,
    /// Badly, and no other attempt follows.
    Failed,
}

impl Outcome {
    /// Every outcome.
    pub const ALL: [Outcome; 4] = [Outcome::Succeeded, Outcome::Restarted, Outcome::Disrupted, Outcome::Failed];

    /// The value of the metric's label.
    pub const fn as_str(self) -> &'static str {
        match self {
            Outcome::Succeeded => "succeeded",
            Outcome::Restarted => "restarted",
            Outcome::Disrupted => "disrupted",
            Outcome::Failed => "failed",
        }
    }
}

/// Decides what follows.
pub fn decide(job: &RLHFJob, observed: &Observed, settings: &Settings, now: Timestamp) -> Decision {
    let before = job.status.clone().unwrap_or_default();
    if job.metadata.deletion_timestamp.is_some() {
        return Decision { status: before, ..Decision::default() };
    }
    let mut pass = Pass { job, observed, settings, now, defeat: None, obstacle: None, decision: Decision::default() };
    let mut status = before.clone();
    if let Some(child) = newer_child(&before, observed) {
        pass.disown(child, &mut status);
        pass.give_up_lost();
        return Decision { status, ..pass.decision };
    }
    status.observed_generation = job.metadata.generation.unwrap_or_default();
    if status.phase.is_terminal() {
        pass.expire(&status);
    } else {
        pass.advance(&before, &mut status);
    }
    pass.sweep(&status);
    pass.decision.status = status;
    pass.decision
}

/// A child of an attempt that the status does not know of.
fn newer_child<'a>(status: &RLHFJobStatus, observed: &'a Observed) -> Option<&'a JobView> {
    observed.stages.iter().find_map(|(name, view)| {
        let current = status.slot(name).map_or(0, |s| s.attempt);
        view.jobs.iter().find(|j| j.attempt > current)
    })
}

/// Why the job is given up.
struct Defeat {
    reason: &'static str,
    message: String,
}

/// One run of the rules.
struct Pass<'a> {
    job: &'a RLHFJob,
    observed: &'a Observed,
    settings: &'a Settings,
    now: Timestamp,
    defeat: Option<Defeat>,
    /// What keeps every stage from being started, and may pass.
    obstacle: Option<Wait>,
    decision: Decision,
}

impl<'a> Pass<'a> {
    /// Settles what has ended, starts what may start, and says where that leaves the job.
    fn advance(&mut self, before: &RLHFJobStatus, status: &mut RLHFJobStatus) {
        self.lay_out(status);
        self.correct_times(status);
        self.check_spec();
        for slot in slots(status) {
            self.settle(slot);
        }
        self.note_prepared(status);
        self.pin_images(status);
        self.limit_active_time(status);
        if self.may_start() {
            self.plan_stages(before, status);
        }
        if self.may_start() {
            self.start_ready(status);
        }
        self.conclude(before, status);
    }

    /// What the operator does not know it leaves alone: another version of it may. What is wrong ends a job that has not begun.
    fn check_spec(&mut self) {
        if let Some(what) = self.job.unknown() {
            let text = format!("{what} that this version of the operator does not know");
            self.obstacle = Some(Wait::new(names::CONDITION_UNSUPPORTED, text));
        } else if let Err(error) = build::check(self.job, self.settings) {
            self.refuse_spec(&error);
        }
    }

    /// The spec says what this operator does not take. It took it once from a job that has begun, and other settings of the
    /// operator, which can be set back, cost nobody what he has trained: what runs goes on, and nothing new starts.
    fn refuse_spec(&mut self, error: &build::SpecError) {
        let (reason, message) = ("InvalidSpec", error.to_string());
        if self.job.status.as_ref().is_some_and(|status| status.start_time.is_some()) {
            self.obstacle = Some(Wait::new(reason, message));
        } else {
            self.defeat = Some(Defeat { reason, message });
        }
    }

    /// Keeps by which digest the image was found that the job was started with. A tag may be moved, and a job's pods are all
    /// of one image.
    fn pin_images(&self, status: &mut RLHFJobStatus) {
        let Some(slot) = status.prepare.as_ref().filter(|slot| slot.attempt > 0) else { return };
        let pods = self.view(&slot.name).pods_of(slot.attempt);
        let started = || Images { trainer: self.settings.trainer_image.clone() };
        crate::images::pin(status.images.get_or_insert_with(started), pods);
    }

    fn may_start(&self) -> bool {
        self.defeat.is_none() && self.obstacle.is_none()
    }

    /// The status is older than a child. Mostly the new one is on its way, and nothing is to be done; but if the child is old
    /// itself, somebody has set the status back, and what it counted is lost. What is written here although a newer status is
    /// on its way is refused.
    fn disown(&mut self, child: &JobView, status: &mut RLHFJobStatus) {
        let left = CLOCK_SKEW - self.now.duration_since(child.created);
        if left >= SignedDuration::ZERO {
            return self.decision.look_again(left + SignedDuration::from_secs(1));
        }
        let name = &child.name;
        status.message = Some(format!(
            "the status was set back: it knows nothing of Job {name}; delete this RLHFJob's Jobs, and it starts anew from its checkpoints"
        ));
    }

    /// Gives every stage of the spec its place in status.
    fn lay_out(&self, status: &mut RLHFJobStatus) {
        let fresh = |task: Task<'_>| StageStatus { name: task.name().to_owned(), ..Default::default() };
        let mut old = std::mem::take(&mut status.stages);
        for task in Task::all(self.job) {
            let known = old.iter().position(|s| s.name == task.name()).map(|i| old.swap_remove(i));
            match task {
                Task::Prepare => _ = status.prepare.get_or_insert_with(|| fresh(task)),
                Task::Stage(_) => status.stages.push(known.unwrap_or_else(|| fresh(task))),
            }
        }
    }

    fn view(&self, stage: &str) -> &'a StageView {
        const NOTHING: &StageView = &StageView {
            jobs: Vec::new(),
            pods: Vec::new(),
            strays: Vec::new(),
            progress: None,
            ask_again: None,
            silent_for: None,
            unchanged_for: None,
            refused: None,
            mount: None,
        };
        self.observed.stages.get(stage).unwrap_or(NOTHING)
    }

    /// The name of an attempt's Job.
    fn attempt(&self, stage: &str, number: u32) -> String {
        view::attempt(self.job, stage, number)
    }

    fn tell(&mut self, event: Event, note: String, about: Option<String>) {
        self.decision.notices.push(Notice { event, note: crate::classify::bounded(note), about });
    }
}

/// Prepare and the stages, in order.
fn slots(status: &mut RLHFJobStatus) -> impl Iterator<Item = &mut StageStatus> {
    status.prepare.iter_mut().chain(status.stages.iter_mut())
}

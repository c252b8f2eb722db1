//! What follows for a stage from what status says and what was seen: the second of the two steps of [`super::decide`].
//!
//! [`next`] is the whole life of an attempt in one match: Starting, Running, and its end. Time enters here and only here.
//! Each limit runs by a time in status that was written under the operator's own clock, and what is waited for is named with
//! the wait, so that no pass is needed for its end to be seen.

use super::facts::{Facts, Starting, Told, Unmade};
use super::{PROGRESS_PERIOD, Pass};
use crate::classify::{Reason, vanished};
use crate::view::StageView;
use jiff::{SignedDuration, Timestamp};
use rlhf_api::job::{Failure, StagePhase, StageStatus};
use rlhf_api::names;
use rlhf_api::report::{Checkpoint, Progress};

/// How soon after its Job a queue has something to say of it, or is asked again.
const QUEUE_ANSWERS: SignedDuration = SignedDuration::from_secs(10);
/// How often it is asked why a Job waits, which no watch tells.
const QUEUE_PERIOD: SignedDuration = SignedDuration::from_secs(60);
/// Between steps a trainer's signs of life are kept in status once in so long at most, or in half of `stallSeconds`.
const SIGNS_OF_LIFE: SignedDuration = SignedDuration::from_secs(60);

/// A prepare that has not told anything by then tells nothing.
const PREPARE_ANSWERS: SignedDuration = SignedDuration::from_secs(60);

/// What follows for a stage.
#[derive(Debug)]
pub(super) enum Transition {
    /// Nothing.
    Stay,
    /// Somebody else decides when it goes on, and no time runs meanwhile.
    Hold,
    /// It starts, or waits for room or permission, or both.
    Start {
        /// Whether the time runs that it has to start.
        starting: bool,
        /// Whether the time runs that it may wait for others.
        pending: bool,
    },
    /// It runs.
    Run(Option<Heard>),
    /// The evidence of its end is kept.
    Record(Failure),
    /// It ended badly.
    End(Failure),
    /// It is done.
    Succeed,
}

/// What rank 0 told, as it is written down.
#[derive(Debug)]
pub(super) struct Heard {
    pub progress: Progress,
    pub advanced_at: Option<Timestamp>,
    pub checkpoint: Option<Checkpoint>,
}

/// What follows, and when to look again although nothing changes.
pub(super) type Next = (Transition, Option<SignedDuration>);

/// What follows for a stage from what was seen of its current attempt.
pub(super) fn next(pass: &Pass<'_>, slot: &StageStatus, facts: Facts) -> Next {
    use StagePhase::{Failed, Pending, Running, Stopped, Succeeded};
    let lost = |what: &str| vanished(slot.attempt, format!("attempt {}: {what}", slot.attempt), pass.now);
    let now = |transition| (transition, None);
    match (slot.phase, facts) {
        (Pending | Succeeded | Failed | Stopped, _) => now(Transition::Stay),

        (Running, Facts::Unmade(_)) => now(Transition::End(lost("its Job was deleted"))),
        (_, Facts::Unmade(unmade)) => unmade_next(pass, slot, unmade),

        (_, Facts::Held { unanswered, .. }) => {
            let pending = !pass.job.spec.suspend;
            if let Some(end) = pending_too_long(pass, slot).filter(|_| pending) {
                return now(Transition::End(end));
            }
            let ask = Some(if unanswered { QUEUE_ANSWERS } else { QUEUE_PERIOD });
            let wait = Transition::Start { starting: false, pending };
            (if pending { wait } else { Transition::Hold }, earlier(ask, pending_left(pass, slot).filter(|_| pending)))
        }

        // Deleted for a suspension, or before it ran: it is made again under its number. What a pod could not save is told.
        (StagePhase::Starting, Facts::Deleted { own_error: None, .. }) => now(Transition::Hold),
        (StagePhase::Starting, Facts::Deleted { own_error: Some(error), .. }) => now(Transition::End(error)),
        (Running, Facts::Deleted { end, .. }) => now(Transition::End(end)),

        (Running, Facts::Starting(_)) => now(Transition::End(lost("a pod of it is gone"))),
        (_, Facts::Starting(starting)) => starting_next(pass, slot, starting),

        (_, Facts::Running) => running_next(pass, slot),

        (_, Facts::Failing(Some(failure))) => now(Transition::Record(failure)),
        (_, Facts::Failing(None) | Facts::Lingering) => now(Transition::Stay),
        (_, Facts::Failed(failure)) => now(Transition::End(failure)),

        (_, Facts::Succeeded) => now(pass.lacks_word(slot).map_or(Transition::Succeed, Transition::End)),
    }
}

fn unmade_next(pass: &Pass<'_>, slot: &StageStatus, unmade: Unmade) -> Next {
    match unmade.refusal {
        _ if pass.job.spec.suspend => (Transition::Hold, None),
        Some((wait, true)) => {
            let reason = Reason::Rejected.as_str().into();
            (Transition::End(Failure { reason, ..vanished(slot.attempt, wait.text, pass.now) }), None)
        }
        Some(_) => match pending_too_long(pass, slot) {
            Some(end) => (Transition::End(end), None),
            None => (Transition::Start { starting: false, pending: true }, pending_left(pass, slot)),
        },
        // It is made as soon as nothing is in its way, and its time begins then.
        None => (Transition::Stay, None),
    }
}

/// An attempt whose pods are to start. Only what is in the job's hand is limited by `startupDeadlineSeconds`: what its pods
/// ask for of their nodes, and how long they take on them.
fn starting_next(pass: &Pass<'_>, slot: &StageStatus, starting: Starting) -> Next {
    let Starting { missing, placed, pending, trouble, .. } = starting;
    let runs = trouble.is_some() || !pending;
    let limit = pass.job.spec.failure_policy.startup_deadline_seconds;
    let left = runs.then(|| pass.left(slot.starting_since, limit));
    let permanent = trouble.as_ref().is_some_and(|told| told.wait.is_permanent());
    if permanent || left.is_some_and(|left| left <= SignedDuration::ZERO) {
        return (Transition::End(not_started(pass, slot, permanent, limit, trouble)), None);
    }
    if let Some(end) = pending_too_long(pass, slot).filter(|_| pending) {
        return (Transition::End(end), None);
    }
    // What keeps the Job controller from making pods no watch tells, nor why a volume is not there.
    let ask = (missing || (placed && trouble.is_none())).then_some(PROGRESS_PERIOD);
    let left = earlier(left, pending_left(pass, slot).filter(|_| pending));
    (Transition::Start { starting: runs, pending }, earlier(ask, left))
}

fn not_started(pass: &Pass<'_>, slot: &StageStatus, permanent: bool, limit: u32, trouble: Option<Told>) -> Failure {
    let what = trouble.as_ref().map_or_else(
        || "its pods or their volumes are still being made; see their events".to_owned(),
        |told| told.to_string(),
    );
    let (reason, message) = if permanent {
        (Reason::InvalidImageName, what)
    } else {
        let late = format!("not all pods ran after failurePolicy.startupDeadlineSeconds ({limit} s): {what}");
        (Reason::StartupDeadline, late)
    };
    let (pod, node) = trouble.map_or((None, None), |told| (told.pod, told.node));
    Failure { reason: reason.as_str().into(), pod, node, ..vanished(slot.attempt, message, pass.now) }
}

/// What is left of the time that the job allows for waiting, where it bounds that.
pub(super) fn pending_left(pass: &Pass<'_>, slot: &StageStatus) -> Option<SignedDuration> {
    let limit = pass.job.spec.failure_policy.pending_timeout_seconds?;
    Some(pass.left(slot.pending_since, limit))
}

/// The end of an attempt that has waited for others longer than the job allows.
fn pending_too_long(pass: &Pass<'_>, slot: &StageStatus) -> Option<Failure> {
    let what = || Facts::of(pass, slot).waiting().map(|told| told.to_string()).unwrap_or_default();
    let message = waited_too_long(pass, slot, what)?;
    let reason = Reason::PendingTimeout.as_str().into();
    Some(Failure { reason, ..vanished(slot.attempt, message, pass.now) })
}

/// In words, that a stage has waited for others longer than the job allows, and what for.
pub(super) fn waited_too_long(pass: &Pass<'_>, slot: &StageStatus, what: impl FnOnce() -> String) -> Option<String> {
    pending_left(pass, slot).filter(|left| *left <= SignedDuration::ZERO)?;
    let limit = pass.job.spec.failure_policy.pending_timeout_seconds?;
    Some(format!("it waited for failurePolicy.pendingTimeoutSeconds ({limit} s): {}", what()))
}

fn running_next(pass: &Pass<'_>, slot: &StageStatus) -> Next {
    let view = pass.view(&slot.name);
    let heard = view.progress.as_ref().map(|progress| hear(pass, slot, progress.clone()));
    if slot.name == names::PREPARE {
        return prepare_next(pass, slot, view, heard);
    }
    let ask = Some(view.ask_again.unwrap_or(PROGRESS_PERIOD));
    match stalled(pass, slot, view, heard.as_ref()) {
        Some(failure) => (Transition::End(failure), None),
        None => (Transition::Run(heard), ask),
    }
}

/// Prepare has a deadline in place of steps; what it tells is shown.
fn prepare_next(pass: &Pass<'_>, slot: &StageStatus, view: &StageView, heard: Option<Heard>) -> Next {
    let limit = pass.job.spec.prepare.deadline_seconds;
    let running = slot.advanced_at.filter(|_| slot.phase == StagePhase::Running);
    let left = pass.left(running, limit);
    if left <= SignedDuration::ZERO {
        let pod = view.pods_of(slot.attempt).next();
        let message = format!(
            "prepare ran for spec.prepare.deadlineSeconds ({limit} s) and has not ended; is a source of data or of a model one that never ends, such as a pipe, or does the volume hang?"
        );
        let failure = Failure {
            reason: Reason::PrepareDeadline.as_str().into(),
            pod: pod.map(|p| p.name.clone()),
            node: pod.and_then(|p| p.node.clone()),
            ..vanished(slot.attempt, message, pass.now)
        };
        return (Transition::End(failure), None);
    }
    // Its time runs from its start on, whatever it tells.
    let heard = heard.map(|heard| Heard { advanced_at: running, ..heard });
    // A trainer of another version may have nothing to tell of it.
    let ask = view.ask_again.filter(|_| view.silent_for.is_none_or(|silence| silence < PREPARE_ANSWERS));
    (Transition::Run(heard), earlier(Some(left), ask))
}

/// Takes in what rank 0 tells. That it works, between steps, is not written down each time.
fn hear(pass: &Pass<'_>, slot: &StageStatus, mut progress: Progress) -> Heard {
    let advanced_at = slot.advanced_at.filter(|_| slot.phase == StagePhase::Running);
    if let Some(old) = &slot.progress {
        let limit = SignedDuration::from_secs(i64::from(pass.job.spec.failure_policy.stall_seconds) / 2);
        let period = if limit > SignedDuration::ZERO { limit.min(SIGNS_OF_LIFE) } else { SIGNS_OF_LIFE };
        let recent = advanced_at.is_some_and(|at| pass.now.duration_since(at) < period);
        if recent && !old.advanced(&Progress { activity: old.activity, ..progress.clone() }) {
            progress.activity = old.activity;
        }
    }
    let news = slot.progress.as_ref().is_none_or(|old| old.advanced(&progress));
    Heard {
        advanced_at: if news { Some(pass.now) } else { advanced_at },
        checkpoint: progress.checkpoint.clone(),
        progress,
    }
}

/// The end of an attempt that stands still. Only what a trainer says counts: one that does not answer is its kubelet's to
/// restart, for an operator that cannot reach trainers must not. Nor must one whose clock was set: it has heard nothing new
/// itself for as long. While models are loaded, and after the last step, while the model is written, the longer of the two
/// limits holds.
fn stalled(pass: &Pass<'_>, slot: &StageStatus, view: &StageView, heard: Option<&Heard>) -> Option<Failure> {
    let policy = &pass.job.spec.failure_policy;
    let heard = heard.filter(|_| policy.stall_seconds > 0 && view.silent_for.is_none())?;
    let since = heard.advanced_at.filter(|_| slot.phase == StagePhase::Running)?;
    let progress = &heard.progress;
    let finished = progress.total_steps > 0 && progress.step >= progress.total_steps;
    let patience = if !progress.metrics.is_empty() && !finished { 0 } else { policy.startup_deadline_seconds };
    let limit = SignedDuration::from_secs(policy.stall_seconds.max(patience).into());
    let unchanged = view.unchanged_for.is_some_and(|time| time >= limit);
    if !unchanged || pass.now.duration_since(since) < limit {
        return None;
    }
    let first = view.pods_of(slot.attempt).find(|p| p.index == 0);
    let message = format!("no sign of life after step {} for {} s", progress.step, limit.as_secs());
    Some(Failure {
        reason: Reason::Stalled.as_str().into(),
        pod: first.map(|p| p.name.clone()),
        node: first.and_then(|p| p.node.clone()),
        ..vanished(slot.attempt, message, pass.now)
    })
}

impl Pass<'_> {
    /// What is left of a limit that runs since then, or from now on.
    fn left(&self, since: Option<Timestamp>, limit: u32) -> SignedDuration {
        let passed = since.map_or(SignedDuration::ZERO, |since| self.now.duration_since(since));
        SignedDuration::from_secs(limit.into()) - passed
    }
}

/// The earlier of two times to look again.
fn earlier(one: Option<SignedDuration>, other: Option<SignedDuration>) -> Option<SignedDuration> {
    one.into_iter().chain(other).min()
}

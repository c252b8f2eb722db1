//! The life of one stage (prepare is one of them): Pending, Starting, Running, and back to Pending after a bad end
//! until the stage has succeeded or is given up.

use super::plan::strategy_of;
use super::{Defeat, Event, Outcome, PROGRESS_PERIOD, Pass};
use crate::build::{self, Attempt, Task};
use crate::classify::{Reason, bounded, cause, vanished};
use crate::view::{JobState, JobView, PodState, PodView, StageView, Wait};
use jiff::SignedDuration;
use memory_plan::Named;
use rlhf_api::job::{Failure, StagePhase, StageStatus};
use rlhf_api::names;
use rlhf_api::report::{Checkpoint, ExitCode, Output, Progress, Verdict};

/// The wait before the first attempt that follows a failure; it doubles with each, as the Job controller's does.
const FIRST_BACKOFF: SignedDuration = SignedDuration::from_secs(10);
/// How soon after its Job a queue has something to say of it, or is asked again.
const QUEUE_ANSWERS: SignedDuration = SignedDuration::from_secs(10);
/// How often it is asked why a Job waits, which no watch tells.
const QUEUE_PERIOD: SignedDuration = SignedDuration::from_secs(60);
/// Between steps a trainer's signs of life are kept in status once in so long at most, or in half of `stallSeconds`.
const SIGNS_OF_LIFE: SignedDuration = SignedDuration::from_secs(60);
/// The longest wait.
pub(super) const LONGEST_BACKOFF: SignedDuration = SignedDuration::from_secs(300);

impl Pass<'_> {
    /// Draws what follows from the current attempt's Job and pods.
    pub(super) fn settle(&mut self, slot: &mut StageStatus) {
        if !matches!(slot.phase, StagePhase::Starting | StagePhase::Running) {
            return;
        }
        let view = self.view(&slot.name);
        let Some(job) = view.job(slot.attempt) else { return self.settle_absent(slot) };
        if job.state != JobState::Active || job.deleting {
            slot.checkpoint = last_checkpoint(view, slot.attempt).or(slot.checkpoint.take());
        }
        match job.state {
            // Whoever is told of success may use the quota and the volume: no pod lingers on.
            JobState::Complete if view.pods.iter().any(|p| p.attempt == slot.attempt && p.ended().is_none()) => {}
            JobState::Complete => self.succeed(slot, view),
            // Deleted for a suspension, or before it ran: it is made again under its number.
            _ if job.deleting && slot.phase == StagePhase::Starting => self.stand_still(slot),
            JobState::Failed => self.lose(slot, view, "its pods are gone"),
            JobState::Active | JobState::Failing if job.deleting => self.lose(slot, view, "its Job was deleted"),
            JobState::Failing => self.record(slot, view),
            JobState::Active => self.watch(slot, job, view),
        }
    }

    /// The attempt has no Job: it has not been made yet, cannot be made, or was deleted.
    fn settle_absent(&mut self, slot: &mut StageStatus) {
        if let Some(trouble) = self.observed.trouble(slot).filter(|t| t.permanent) {
            let failure = Failure {
                reason: Reason::Rejected.as_str().into(),
                ..vanished(slot.attempt, trouble.message.clone(), self.now)
            };
            self.end(slot, failure);
        } else if slot.phase == StagePhase::Running || self.has_orphans(slot) {
            self.lose(slot, self.view(&slot.name), "its Job was deleted");
        } else {
            self.stand_still(slot);
        }
    }

    /// Whether pods of the attempt go on without their Job.
    fn has_orphans(&self, slot: &StageStatus) -> bool {
        let goes_on = |p: &PodView| p.attempt == slot.attempt && p.deletion_requested.is_none();
        self.view(&slot.name).pods.iter().any(goes_on)
    }

    /// An attempt that has no Job yet or no more. Its time to start runs unless the job is suspended.
    fn stand_still(&mut self, slot: &mut StageStatus) {
        if self.job.spec.suspend {
            slot.starting_since = None;
        } else if slot.starting_since.is_some() {
            self.limit_start(slot);
        }
    }

    fn cause(&self, slot: &StageStatus, view: &StageView) -> Option<Failure> {
        cause(slot.attempt, view.pods_of(slot.attempt), slot.last_failure.as_ref(), self.now)
    }

    /// Stores why the attempt is about to end, while its pods are still there to tell.
    fn record(&self, slot: &mut StageStatus, view: &StageView) {
        slot.last_failure = self.cause(slot, view).or(slot.last_failure.take());
    }

    fn lose(&mut self, slot: &mut StageStatus, view: &StageView, otherwise: &str) {
        let trace = self.cause(slot, view);
        let failure =
            trace.unwrap_or_else(|| vanished(slot.attempt, format!("attempt {}: {otherwise}", slot.attempt), self.now));
        self.end(slot, failure);
    }

    /// An attempt whose Job is active: it waits to be let run, starts or runs.
    fn watch(&mut self, slot: &mut StageStatus, job: &JobView, view: &StageView) {
        if self.job.spec.suspend || job.suspended {
            slot.phase = StagePhase::Starting;
            (slot.starting_since, slot.advanced_at) = (None, None);
            let unanswered = job.queue.is_some() && view.refused.is_none();
            return self.decision.look_again(if unanswered { QUEUE_ANSWERS } else { QUEUE_PERIOD });
        }
        let pods = || view.pods_of(slot.attempt);
        if pods().any(|p| p.ended().is_some() && !p.succeeded()) {
            return self.record(slot, view);
        }
        let running = pods().filter(|p| p.state == PodState::Running).count() as u32;
        let succeeded = job.succeeded.max(pods().filter(|p| p.succeeded()).count() as u32);
        match (slot.phase, running + succeeded >= job.pods) {
            (StagePhase::Running, false) => self.lose(slot, view, "a pod of it is gone"),
            (_, true) => self.run(slot, view),
            (_, false) => {
                if pods().count() < job.pods as usize {
                    // What keeps the Job controller from making pods, no watch tells.
                    self.decision.look_again(PROGRESS_PERIOD);
                }
                self.limit_start(slot);
            }
        }
    }

    /// Ends an attempt that will never start, or has not in time.
    fn limit_start(&mut self, slot: &mut StageStatus) {
        let since = *slot.starting_since.get_or_insert(self.now);
        let limit = self.job.spec.failure_policy.startup_deadline_seconds;
        let left = SignedDuration::from_secs(limit.into()) - self.now.duration_since(since);
        let waiting = self.waiting(slot);
        let permanent = waiting.as_ref().is_some_and(|(_, wait)| wait.is_permanent());
        if left > SignedDuration::ZERO && !permanent {
            return self.decision.look_again(left);
        }
        let pod = waiting.as_ref().and_then(|(pod, _)| *pod).map(str::to_owned);
        let view = self.view(&slot.name);
        let node = view.pods_of(slot.attempt).find(|p| Some(&p.name) == pod.as_ref()).and_then(|p| p.node.clone());
        let who = pod.as_ref().map(|pod| format!("pod {pod}: ")).unwrap_or_default();
        let what = match waiting {
            Some((_, wait)) => format!("{who}{wait}"),
            None if view.job(slot.attempt).is_some() => {
                "its pods or their volumes are still being made; see their events".into()
            }
            None if view.is_clear_for(slot.attempt) => "its Job could not be made; the operator's log says why".into(),
            None => "pods that were made before have not ended".into(),
        };
        let (reason, message) = if permanent {
            (Reason::InvalidImageName, what)
        } else {
            let late = format!("not all pods ran after failurePolicy.startupDeadlineSeconds ({limit} s): {what}");
            (Reason::StartupDeadline, late)
        };
        let failure =
            Failure { reason: reason.as_str().into(), pod, node, ..vanished(slot.attempt, message, self.now) };
        self.end(slot, failure);
    }

    /// What keeps an attempt from starting, and the pod that says so where it is one: the first of those that do.
    pub(super) fn waiting(&self, slot: &StageStatus) -> Option<(Option<&str>, Wait)> {
        if slot.phase != StagePhase::Starting || self.job.spec.suspend {
            return None;
        }
        let view = self.view(&slot.name);
        if let Some(held) = view.job(slot.attempt).and_then(JobView::held) {
            return Some((None, view.refused.clone().unwrap_or(held)));
        }
        let why = |p: &PodView| if let PodState::Waiting(why) = &p.state { why.clone() } else { None };
        let pods = view.pods_of(slot.attempt).filter_map(|p| Some((p.index, p.name.as_str(), why(p)?)));
        // One that can never start says more than one that may.
        let pod = pods.min_by_key(|(index, name, wait)| (!wait.is_permanent(), *index, *name));
        let trouble = || {
            let trouble = self.observed.trouble(slot)?;
            Some(Wait { text: trouble.message.clone(), ..Wait::refusal(&trouble.message) })
        };
        let pod = pod.map(|(_, name, wait)| (Some(name), wait));
        pod.or_else(|| Some((None, view.refused.clone().or_else(trouble)?)))
    }

    fn run(&mut self, slot: &mut StageStatus, view: &StageView) {
        let begins = slot.phase != StagePhase::Running;
        slot.phase = StagePhase::Running;
        slot.starting_since = None;
        if slot.name == names::PREPARE {
            return;
        }
        if begins {
            slot.advanced_at = Some(self.now);
        }
        if let Some(progress) = &view.progress {
            self.hear(slot, progress.clone());
        }
        self.decision.look_again(view.ask_again.unwrap_or(PROGRESS_PERIOD));
        self.limit_stall(slot, view);
    }

    /// Takes in what rank 0 tells. That it works, between steps, is not written down each time.
    fn hear(&self, slot: &mut StageStatus, mut progress: Progress) {
        if let Some(old) = &slot.progress {
            let limit = SignedDuration::from_secs(i64::from(self.job.spec.failure_policy.stall_seconds) / 2);
            let period = if limit > SignedDuration::ZERO { limit.min(SIGNS_OF_LIFE) } else { SIGNS_OF_LIFE };
            let recent = slot.advanced_at.is_some_and(|at| self.now.duration_since(at) < period);
            if recent && !old.advanced(&Progress { activity: old.activity, ..progress.clone() }) {
                progress.activity = old.activity;
            }
        }
        if slot.progress.as_ref().is_none_or(|old| old.advanced(&progress)) {
            slot.advanced_at = Some(self.now);
        }
        slot.checkpoint = progress.checkpoint.clone().or(slot.checkpoint.take());
        slot.progress = Some(progress);
    }

    /// Ends an attempt that stands still. Only what a trainer says counts, or the silence of one that spoke to this very
    /// process before: an operator that cannot reach trainers at all must not restart them. Nor must one whose clock was set:
    /// it has heard nothing new itself for as long. While models are loaded, and after the last step, while the model is
    /// written, the longer of the two limits holds.
    fn limit_stall(&mut self, slot: &mut StageStatus, view: &StageView) {
        let policy = &self.job.spec.failure_policy;
        let (Some(since), 1..) = (slot.advanced_at, policy.stall_seconds) else { return };
        let finished = slot.progress.as_ref().is_some_and(|p| p.total_steps > 0 && p.step >= p.total_steps);
        let patience = if has_figures(slot) && !finished { 0 } else { policy.startup_deadline_seconds };
        let limit = SignedDuration::from_secs(policy.stall_seconds.max(patience).into());
        let heard = view.progress.is_some() && view.silent_for.is_none_or(|silence| silence >= limit);
        let unchanged = view.unchanged_for.is_some_and(|time| time >= limit);
        if !heard || !unchanged || self.now.duration_since(since) < limit {
            return;
        }
        let first = view.pods_of(slot.attempt).find(|p| p.index == 0);
        let step = slot.progress.as_ref().map_or(0, |p| p.step);
        let silent = if view.silent_for.is_some() { ", and it does not answer" } else { "" };
        let message = format!("no sign of life after step {step} for {} s{silent}", limit.as_secs());
        let failure = Failure {
            reason: Reason::Stalled.as_str().into(),
            pod: first.map(|p| p.name.clone()),
            node: first.and_then(|p| p.node.clone()),
            ..vanished(slot.attempt, message, self.now)
        };
        self.end(slot, failure);
    }

    fn succeed(&mut self, slot: &mut StageStatus, view: &StageView) {
        if slot.name == names::PREPARE
            && self.job.spec.stages.iter().any(|s| self.job.strategy(s).has_auto())
            && self.prepared(slot.attempt).is_none()
        {
            return self.lose(slot, view, "its last word, with which strategies are chosen, was lost");
        }
        let word = view.pods_of(slot.attempt).find(|p| p.index == 0).and_then(|p| p.ended()?.word.as_ref());
        if slot.name != names::PREPARE {
            slot.output = Some(word.and_then(|w| w.output.clone()).unwrap_or_else(|| self.place_of_output(slot)));
        }
        if let (Some(progress), Some(step)) = (&mut slot.progress, word.and_then(|w| w.step)) {
            progress.step = step;
            progress.eta_seconds = None;
        }
        // What was recorded of this very attempt did not keep it from succeeding.
        slot.last_failure = slot.last_failure.take().filter(|f| f.attempt != slot.attempt);
        slot.phase = StagePhase::Succeeded;
        (slot.starting_since, slot.advanced_at) = (None, None);
        self.decision.outcomes.push(Outcome::Succeeded);
        self.tell(
            Event::StageSucceeded,
            format!("{} succeeded (attempt {})", slot.name, slot.attempt),
            self.about(slot),
        );
    }

    /// Where the trainer wrote the model, for an attempt whose first pod was deleted before its last word was read.
    fn place_of_output(&self, slot: &StageStatus) -> Output {
        let path = names::model_dir(&self.job.run_dir(), &slot.name);
        Output { path, metrics: Default::default() }
    }

    /// A bad end: another attempt, or the end of the job.
    fn end(&mut self, slot: &mut StageStatus, failure: Failure) {
        let failure = Failure { message: bounded(failure.message), ..failure };
        let reason = Reason::parse(&failure.reason);
        let mut said = format!("{}, attempt {}: {}: {}", slot.name, slot.attempt, failure.reason, failure.message);
        slot.last_failure = Some(failure);
        (slot.starting_since, slot.advanced_at) = (None, None);
        let mut outcome = self.outcome(slot, reason);
        match self.more_frugal(slot, reason) {
            Some(Ok(_)) if outcome == Outcome::Failed => {}
            Some(Ok(plan)) => {
                slot.plan = Some(plan);
                said += &format!("; the next attempt takes {}", Named(&plan.strategy));
            }
            Some(Err(nothing_left)) => {
                outcome = Outcome::Failed;
                said += &format!("; {nothing_left}");
            }
            None => {}
        }
        match outcome {
            Outcome::Restarted => {
                slot.restarts.since_progress += 1;
                slot.restarts.total += 1;
                slot.not_before = Some(self.now + backoff(slot.restarts.since_progress));
            }
            Outcome::Disrupted => slot.disruptions += 1,
            Outcome::Failed | Outcome::Succeeded => {}
        }
        if reason == Reason::Exit(ExitCode::Bug) {
            slot.bugs += 1;
        }
        if outcome == Outcome::Failed {
            slot.phase = StagePhase::Failed;
            self.give_up(slot, reason, &said);
        } else {
            slot.phase = StagePhase::Pending;
        }
        self.decision.outcomes.push(outcome);
        self.tell(Event::AttemptFailed, said, self.about(slot));
    }

    fn outcome(&self, slot: &StageStatus, reason: Reason) -> Outcome {
        let policy = &self.job.spec.failure_policy;
        match reason.verdict() {
            Verdict::Fail | Verdict::Success => Outcome::Failed,
            Verdict::RetryOnce if slot.bugs > 0 => Outcome::Failed,
            Verdict::RetryOnce | Verdict::Retry if slot.restarts.since_progress >= policy.max_restarts => {
                Outcome::Failed
            }
            Verdict::RetryOnce | Verdict::Retry => Outcome::Restarted,
            Verdict::Disruption if slot.disruptions >= policy.max_disruptions => Outcome::Failed,
            Verdict::Disruption => Outcome::Disrupted,
        }
    }

    fn give_up(&mut self, slot: &StageStatus, reason: Reason, said: &str) {
        let policy = &self.job.spec.failure_policy;
        let (reason, why) = match reason.verdict() {
            Verdict::Retry if slot.restarts.since_progress >= policy.max_restarts => {
                ("RestartsExhausted", format!("; failurePolicy.maxRestarts is {}", policy.max_restarts))
            }
            Verdict::Disruption => {
                ("DisruptionsExhausted", format!("; failurePolicy.maxDisruptions is {}", policy.max_disruptions))
            }
            _ => (reason.as_str(), String::new()),
        };
        let also = if slot.attempt > 1 { format!(" after {} attempts", slot.attempt) } else { String::new() };
        self.defeat = Some(Defeat { reason, message: format!("given up{also}: {said}{why}") });
    }

    /// Gives the next attempt its number, if the stage waits for nothing. The children follow once the number is
    /// in status.
    pub(super) fn start(&mut self, slot: &mut StageStatus, ready: bool) -> bool {
        if slot.phase != StagePhase::Pending || !ready || self.job.spec.suspend {
            return false;
        }
        let wait = slot.not_before.map_or(SignedDuration::ZERO, |t| t.duration_since(self.now));
        if wait > SignedDuration::ZERO {
            self.decision.look_again(wait);
            return false;
        }
        slot.attempt += 1;
        slot.phase = StagePhase::Starting;
        slot.not_before = None;
        slot.progress = None;
        // A stage's first attempt starts when what it needs has succeeded, which is told.
        if slot.attempt > 1 || slot.name == names::PREPARE {
            self.tell(Event::StageStarted, format!("{}: attempt {} starts", slot.name, slot.attempt), self.about(slot));
        }
        true
    }

    /// Makes a started attempt's children, as soon as nothing of an earlier attempt can run beside it.
    pub(super) fn make(&mut self, task: Task<'_>, slot: &mut StageStatus) {
        let view = self.view(&slot.name);
        let wanted = slot.phase == StagePhase::Starting && !self.job.spec.suspend;
        if !wanted || !view.is_clear_for(slot.attempt) {
            return;
        }
        if let Some(trouble) = self.observed.trouble(slot).filter(|t| t.retry_after > SignedDuration::ZERO) {
            return self.decision.look_again(trouble.retry_after);
        }
        let spec = self.stage(&slot.name).and_then(|stage| self.job.strategy(stage).fixed());
        let strategy = strategy_of(slot, spec);
        let attempt = Attempt { number: slot.attempt, strategy };
        match build::children(self.job, task, attempt, self.settings) {
            Ok(children) => {
                slot.starting_since.get_or_insert(self.now);
                self.decision.make.push(children);
            }
            Err(error) => self.defeat = Some(Defeat { reason: "InvalidSpec", message: error.to_string() }),
        }
    }

    pub(super) fn about(&self, slot: &StageStatus) -> Option<String> {
        Some(self.attempt(&slot.name, slot.attempt))
    }
}

/// Whether the current attempt has told the figures of a step or of an evaluation.
pub(super) fn has_figures(slot: &StageStatus) -> bool {
    slot.progress.as_ref().is_some_and(|p| !p.metrics.is_empty())
}

fn backoff(restarts: u32) -> SignedDuration {
    let doubled = FIRST_BACKOFF.saturating_mul(1 << restarts.saturating_sub(1).min(16));
    doubled.min(LONGEST_BACKOFF)
}

/// The newest checkpoint that the pods of an attempt spoke of when they ended.
fn last_checkpoint(view: &StageView, attempt: u32) -> Option<Checkpoint> {
    let told = |p: &PodView| p.ended()?.word.as_ref()?.checkpoint.clone();
    view.pods_of(attempt).filter_map(told).max_by_key(|c| c.step)
}

//! The life of one stage (prepare is one of them): Pending, Starting, Running, and back to Pending after a bad end
//! until the stage has succeeded or is given up. [`super::transition`] says what follows; here it is written down.

use super::facts::Facts;
use super::transition::{Heard, Transition, next};
use super::{Defeat, Event, Outcome, Pass};
use crate::classify::{Reason, bounded, vanished, wordless};
use crate::view::StageView;
use jiff::SignedDuration;
use memory_plan::Named;
use rlhf_api::config::KeepCheckpoints;
use rlhf_api::job::{AttemptRecord, Failure, MAX_ATTEMPTS, StagePhase, StageStatus};
use rlhf_api::names;
use rlhf_api::report::{Checkpoint, ExitCode, Output, Progress, Verdict};

/// The wait before the first attempt that follows a failure; it doubles with each, as the Job controller's does.
const FIRST_BACKOFF: SignedDuration = SignedDuration::from_secs(10);
/// The longest wait.
pub(super) const LONGEST_BACKOFF: SignedDuration = SignedDuration::from_secs(300);

impl Pass<'_> {
    /// Draws what follows from the current attempt's Job and pods.
    pub(super) fn settle(&mut self, slot: &mut StageStatus) {
        if !matches!(slot.phase, StagePhase::Starting | StagePhase::Running) {
            return;
        }
        let facts = Facts::of(self, slot);
        if !matches!(facts, Facts::Starting(_) | Facts::Running | Facts::Held { .. }) {
            slot.checkpoint = last_checkpoint(self.view(&slot.name), slot.attempt).or(slot.checkpoint.take());
        }
        let (transition, look_again) = next(self, slot, facts);
        look_again.iter().for_each(|after| self.decision.look_again(*after));
        match transition {
            Transition::Stay => {}
            Transition::Hold => hold(slot),
            Transition::Start { starting, pending } => {
                if slot.phase == StagePhase::Running {
                    hold(slot);
                }
                let now = self.now;
                slot.starting_since = starting.then(|| slot.starting_since.unwrap_or(now));
                slot.pending_since = pending.then(|| slot.pending_since.unwrap_or(now));
            }
            Transition::Run(heard) => self.run(slot, heard),
            Transition::Record(failure) => slot.last_failure = Some(failure),
            Transition::End(failure) => self.end(slot, failure),
            Transition::Succeed => self.succeed(slot),
        }
    }

    fn run(&self, slot: &mut StageStatus, heard: Option<Heard>) {
        if slot.phase != StagePhase::Running {
            (slot.phase, slot.advanced_at) = (StagePhase::Running, Some(self.now));
        }
        (slot.starting_since, slot.pending_since) = (None, None);
        let Some(Heard { progress, advanced_at, checkpoint }) = heard else { return };
        slot.advanced_at = advanced_at.or(slot.advanced_at);
        forget_lost_steps(slot, &progress);
        slot.checkpoint = checkpoint.or(slot.checkpoint.take());
        self.count_progress(slot, progress.step);
        slot.progress = Some(progress);
    }

    /// Restarts are counted anew once the stage has gone far enough beyond where it was.
    fn count_progress(&self, slot: &mut StageStatus, step: u64) {
        let restarts = &mut slot.restarts;
        if step >= restarts.from_step.saturating_add(self.job.spec.failure_policy.progress_steps.into()) {
            (restarts.from_step, restarts.since_progress) = (step, 0);
        }
    }

    /// The end of an attempt that went well, but for what it found out, by which strategies are to be chosen. A word that went
    /// with its pod is nobody's fault. One that is there and cannot be used is the trainer's own doing, and so may be the next.
    pub(super) fn lacks_word(&self, slot: &StageStatus) -> Option<Failure> {
        if slot.name != names::PREPARE || !self.has_auto() || self.prepared(slot.attempt).is_some() {
            return None;
        }
        let attempt = slot.attempt;
        let ended = self.view(&slot.name).pods_of(attempt).find_map(|pod| Some((pod, pod.ended()?)));
        Some(match ended {
            Some((pod, end)) => wordless(attempt, pod, end, self.now),
            None => {
                let what = format!("attempt {attempt}: its last word, with which strategies are chosen, was lost");
                vanished(attempt, what, self.now)
            }
        })
    }

    fn succeed(&mut self, slot: &mut StageStatus) {
        let first = self.view(&slot.name).pods_of(slot.attempt).find(|p| p.index == 0);
        let end = first.and_then(|p| p.ended());
        let doubt = end.and_then(|end| end.doubt.as_ref());
        let doubt = doubt.map(|doubt| format!("; its last word is not believed: {doubt}")).unwrap_or_default();
        let word = end.and_then(|end| end.word.clone());
        let (output, step) = word.map_or((None, None), |w| (w.output, w.step));
        // Prepare's word tells what it has found, and no step: it has looked at everything.
        let all = slot.progress.as_ref().filter(|_| slot.name == names::PREPARE).map(|p| p.total_steps);
        let step = step.or(all);
        if let (Some(progress), Some(step)) = (&mut slot.progress, step) {
            // Figures of an earlier step are not the ones at the end.
            if progress.step != step {
                progress.metrics = output.as_ref().map(|o| o.metrics.clone()).unwrap_or_default();
            }
            (progress.step, progress.eta_seconds) = (step, None);
        }
        if slot.name != names::PREPARE {
            slot.output = Some(output.unwrap_or_else(|| self.place_of_output(slot)));
        }
        // What was recorded of this very attempt did not keep it from succeeding.
        slot.last_failure = slot.last_failure.take().filter(|f| f.attempt != slot.attempt);
        let node = first.and_then(|p| p.node.clone());
        self.note_attempt(slot, ExitCode::Done.reason(), node);
        hold(slot);
        self.forget_checkpoint(slot);
        (slot.phase, slot.completion_time) = (StagePhase::Succeeded, Some(self.now));
        self.decision.outcomes.push(Outcome::Succeeded);
        self.tell(
            Event::StageSucceeded,
            format!("{} succeeded (attempt {}){doubt}", slot.name, slot.attempt),
            self.about(slot),
        );
    }

    /// Names no checkpoint that the trainer has removed after its success.
    fn forget_checkpoint(&self, slot: &mut StageStatus) {
        if self.job.spec.storage.keep_checkpoints == KeepCheckpoints::Running {
            slot.checkpoint = None;
            if let Some(progress) = &mut slot.progress {
                progress.checkpoint = None;
            }
        }
    }

    /// Where the trainer wrote the model, for an attempt whose first pod was deleted before its last word was read.
    fn place_of_output(&self, slot: &StageStatus) -> Output {
        Output { path: names::model_dir(&self.job.run_dir(), &slot.name), metrics: Default::default() }
    }

    /// Keeps that the current attempt has ended, and how.
    pub(super) fn note_attempt(&self, slot: &mut StageStatus, reason: &str, node: Option<String>) {
        let step = slot.progress.as_ref().map(|p| p.step);
        if step.unwrap_or(0) > slot.furthest_step {
            (slot.furthest_step, slot.fruitless) = (step.unwrap_or(0), 0);
        } else {
            slot.fruitless = slot.fruitless.saturating_add(1);
        }
        let record = AttemptRecord {
            number: slot.attempt,
            start: slot.attempt_start,
            end: self.now,
            reason: reason.to_owned(),
            node,
            step,
            strategy: self.strategy_of(slot).filter(|_| slot.name != names::PREPARE),
        };
        slot.attempts.push(record);
        let surplus = slot.attempts.len().saturating_sub(MAX_ATTEMPTS);
        slot.attempts.drain(..surplus);
    }

    /// A bad end: another attempt, or the end of the job.
    fn end(&mut self, slot: &mut StageStatus, failure: Failure) {
        let failure = Failure { message: bounded(failure.message), ..failure };
        let reason = Reason::parse(&failure.reason);
        let mut said = format!("{}, attempt {}: {}: {}", slot.name, slot.attempt, failure.reason, failure.message);
        self.note_attempt(slot, &failure.reason, failure.node.clone());
        slot.last_failure = Some(failure);
        hold(slot);
        let mut outcome = self.outcome(slot, reason);
        let (mut frugal, mut nothing_takes_less) = (false, false);
        match self.more_frugal(slot, reason) {
            Some(Ok(plan)) => {
                slot.plan = Some(plan);
                said += &format!("; the next attempt takes {}", Named(&plan.strategy));
                // There are only so many settings: this ends by itself.
                (outcome, frugal) = (Outcome::Restarted, true);
            }
            Some(Err(nothing_left)) => {
                (outcome, nothing_takes_less) = (Outcome::Failed, true);
                said += &format!("; {nothing_left}");
            }
            None => {}
        }
        match outcome {
            Outcome::Restarted => {
                slot.restarts.total += 1;
                slot.restarts.since_progress += u32::from(!frugal);
            }
            Outcome::Disrupted => slot.disruptions += 1,
            Outcome::Failed | Outcome::Succeeded => {}
        }
        if reason == Reason::Exit(ExitCode::Bug) {
            slot.bugs += 1;
        }
        if outcome == Outcome::Failed {
            (slot.phase, slot.completion_time) = (StagePhase::Failed, Some(self.now));
            self.give_up(slot, reason, nothing_takes_less, &said);
        } else {
            slot.phase = StagePhase::Pending;
            slot.not_before = Some(self.now + backoff(slot, outcome)).filter(|at| *at > self.now);
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

    fn give_up(&mut self, slot: &StageStatus, reason: Reason, nothing_takes_less: bool, said: &str) {
        let policy = &self.job.spec.failure_policy;
        let (reason, why) = match reason.verdict() {
            _ if nothing_takes_less => (reason.as_str(), String::new()),
            Verdict::Retry if slot.restarts.since_progress >= policy.max_restarts => {
                let steps = policy.progress_steps;
                let why = format!("; failurePolicy.maxRestarts is {} for each {steps} steps", policy.max_restarts);
                ("RestartsExhausted", why)
            }
            Verdict::Disruption => {
                ("DisruptionsExhausted", format!("; failurePolicy.maxDisruptions is {}", policy.max_disruptions))
            }
            _ => (reason.as_str(), String::new()),
        };
        let also = if slot.attempt > 1 { format!(" after {} attempts", slot.attempt) } else { String::new() };
        self.defeat = Some(Defeat { reason, message: format!("given up{also}: {said}{why}") });
    }

    pub(super) fn about(&self, slot: &StageStatus) -> Option<String> {
        Some(self.attempt(&slot.name, slot.attempt))
    }
}

/// Stops every clock of the attempt: it has ended, or waits for somebody's word to go on.
pub(super) fn hold(slot: &mut StageStatus) {
    if slot.phase == StagePhase::Running {
        slot.phase = StagePhase::Starting;
    }
    (slot.starting_since, slot.pending_since, slot.advanced_at) = (None, None, None);
}

/// Whether the current attempt has told the figures of a step or of an evaluation.
pub(super) fn has_figures(slot: &StageStatus) -> bool {
    slot.progress.as_ref().is_some_and(|p| !p.metrics.is_empty())
}

/// How long the next attempt waits. A failure counts since the last progress; a disruption by how many attempts in a row
/// have not gone beyond those before them: one that did is followed at once.
fn backoff(slot: &StageStatus, outcome: Outcome) -> SignedDuration {
    let times = match outcome {
        Outcome::Disrupted => slot.fruitless,
        _ => slot.restarts.since_progress.max(1),
    };
    let doubled = FIRST_BACKOFF.saturating_mul(1 << times.saturating_sub(1).min(16));
    if times == 0 { SignedDuration::ZERO } else { doubled.min(LONGEST_BACKOFF) }
}

/// An attempt that makes steps before the last checkpoint went on from an earlier one, or began again: that checkpoint is
/// not there to go on from, and the steps up to it are new ground once more. While it loads, a trainer may not know its step.
fn forget_lost_steps(slot: &mut StageStatus, progress: &Progress) {
    let from = progress.checkpoint.as_ref().map_or(0, |c| c.step);
    let is_lost = |last: &Checkpoint| progress.step < last.step && from < last.step && !progress.metrics.is_empty();
    if slot.checkpoint.as_ref().is_some_and(is_lost) {
        slot.furthest_step = slot.furthest_step.min(from);
        slot.checkpoint = None;
    }
}

/// The newest checkpoint that the pods of an attempt spoke of when they ended.
fn last_checkpoint(view: &StageView, attempt: u32) -> Option<Checkpoint> {
    let told = |p: &crate::view::PodView| p.ended()?.word.as_ref()?.checkpoint.clone();
    view.pods_of(attempt).filter_map(told).max_by_key(|c| c.step)
}

//! Where the stages leave the job: its phase, conditions, and the words for people.

use super::{Defeat, Event, Outcome, Pass, Trouble, slots};
use crate::classify::{MAX_BYTES, Reason, bounded, shortened, vanished};
use crate::view::Wait;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use rlhf_api::job::{Failure, Phase, RLHFJobStatus, StagePhase, StageStatus};
use rlhf_api::names;

impl Pass<'_> {
    /// Says where the stages leave the job.
    pub(super) fn conclude(&mut self, before: &RLHFJobStatus, status: &mut RLHFJobStatus) {
        if let Some(defeat) = self.defeat.take() {
            self.fail(status, defeat);
        } else if slots(status).all(|s| s.phase == StagePhase::Succeeded) {
            self.succeed_job(status);
        } else {
            status.phase = self.phase(status);
            self.turn(before.phase, status);
            self.count_active_time(status);
            self.tell_waiting(status);
            self.tell_stalled(status);
            status.message = self.message(status);
            self.tell_troubles(before, status);
        }
        status.restarts = slots(status).map(|s| s.restarts.total).sum();
        let active: Vec<_> = slots(status).filter(|s| is_active(s)).map(|s| (s.name.clone(), progress(s))).collect();
        let (stages, steps): (Vec<_>, Vec<_>) = active.into_iter().unzip();
        status.stage = some_joined(&stages);
        status.progress = some_joined(&steps);
    }

    fn fail(&mut self, status: &mut RLHFJobStatus, defeat: Defeat) {
        let Defeat { reason, message } = defeat;
        let message = bounded(message);
        for slot in slots(status).filter(|s| is_active(s)) {
            slot.phase = StagePhase::Failed;
            (slot.starting_since, slot.advanced_at) = (None, None);
            slot.last_failure = Some(Failure {
                reason: Reason::Stopped.as_str().into(),
                ..vanished(slot.attempt, "stopped because the job has failed".into(), self.now)
            });
            self.decision.outcomes.push(Outcome::Failed);
        }
        // Nothing is made for a job that has just been given up.
        self.decision.make.clear();
        self.end_job(status, Phase::Failed, (names::CONDITION_FAILED, reason), &message);
        self.tell(Event::JobFailed, message, None);
    }

    fn succeed_job(&mut self, status: &mut RLHFJobStatus) {
        let message = "every stage succeeded";
        self.end_job(status, Phase::Succeeded, (names::CONDITION_COMPLETE, "Succeeded"), message);
        self.tell(Event::JobSucceeded, message.into(), None);
    }

    fn end_job(&mut self, status: &mut RLHFJobStatus, phase: Phase, (condition, reason): (&str, &str), message: &str) {
        status.phase = phase;
        status.completion_time = Some(self.now);
        status.message = Some(message.to_owned());
        self.stop_active_time(status);
        self.decision.requeue = None;
        use names::{CONDITION_ATTEMPT_STALLED, CONDITION_QUOTA_EXCEEDED, CONDITION_SUSPENDED, CONDITION_WAITING};
        for passing in [CONDITION_SUSPENDED, CONDITION_WAITING, CONDITION_QUOTA_EXCEEDED, CONDITION_ATTEMPT_STALLED] {
            self.unset_condition(status, passing, "Finished", "the job has finished");
        }
        self.set_condition(status, condition, true, reason, message);
    }

    /// Deletes a job that ended long enough ago.
    pub(super) fn expire(&mut self, status: &RLHFJobStatus) {
        let (Some(ttl), Some(end)) = (self.job.spec.ttl_seconds_after_finished, status.completion_time) else { return };
        let left = SignedDuration::from_secs(ttl.into()) - self.now.duration_since(end);
        if left > SignedDuration::ZERO {
            self.decision.look_again(left);
        } else {
            self.decision.expired = true;
        }
    }

    /// How long the job has been active, in all.
    fn active_time(&self, status: &RLHFJobStatus) -> SignedDuration {
        let now = status.active_since.map_or(SignedDuration::ZERO, |since| self.now.duration_since(since));
        SignedDuration::from_secs(status.active_seconds.into()) + now.max(SignedDuration::ZERO)
    }

    fn stop_active_time(&self, status: &mut RLHFJobStatus) {
        status.active_seconds = u32::try_from(self.active_time(status).as_secs()).unwrap_or(u32::MAX);
        status.active_since = None;
    }

    /// The time runs from the first start on, except while the job is suspended or only waits in a queue.
    fn count_active_time(&mut self, status: &mut RLHFJobStatus) {
        if status.phase == Phase::Suspended {
            self.stop_active_time(status);
            self.decision.requeue = None;
        } else if self.only_waits(status) {
            self.stop_active_time(status);
        } else if status.start_time.is_some() {
            status.active_since.get_or_insert(self.now);
        }
    }

    /// Whether every attempt that is to run waits to be let run.
    fn only_waits(&self, status: &RLHFJobStatus) -> bool {
        let held =
            |s: &StageStatus| self.view(&s.name).job(s.attempt).is_some_and(|j| j.suspended && j.queue.is_some());
        let mut active = status.slots().filter(|s| is_active(s)).peekable();
        active.peek().is_some() && active.all(held)
    }

    /// Gives the job up once its time is over, unless it has succeeded.
    pub(super) fn limit_active_time(&mut self, status: &mut RLHFJobStatus) {
        let Some(limit) = self.job.spec.active_deadline_seconds else { return };
        if status.active_since.is_none()
            || self.defeat.is_some()
            || slots(status).all(|s| s.phase == StagePhase::Succeeded)
        {
            return;
        }
        let left = SignedDuration::from_secs(limit.into()) - self.active_time(status);
        if left > SignedDuration::ZERO {
            return self.decision.look_again(left);
        }
        let message = format!("the job was active for activeDeadlineSeconds ({limit} s) and has not succeeded");
        self.defeat = Some(Defeat { reason: "DeadlineExceeded", message });
    }

    /// What the first attempt that cannot start waits for.
    fn tell_waiting(&self, status: &mut RLHFJobStatus) {
        let found = slots(status).find_map(|s| Some((starting(s, self.waiting(s)?), self.waiting(s)?.1.reason)));
        let quota = found.as_ref().is_some_and(|(_, reason)| reason == Wait::QUOTA);
        for (kind, holds) in [(names::CONDITION_WAITING, true), (names::CONDITION_QUOTA_EXCEEDED, quota)] {
            match &found {
                Some((message, reason)) if holds => {
                    self.set_condition(status, kind, true, reason, &bounded(message.clone()))
                }
                _ => self.unset_condition(status, kind, "Passed", "no pod waits for it any more"),
            }
        }
    }

    /// Holds from the time an attempt stood still until a later one has told its first figures.
    fn tell_stalled(&self, status: &mut RLHFJobStatus) {
        let stalled = slots(status).find_map(|s| {
            let failure = s.last_failure.as_ref().filter(|f| f.reason == Reason::Stalled.as_str())?;
            let goes_on = failure.attempt < s.attempt && super::stage::has_figures(s);
            (!goes_on && s.phase != StagePhase::Succeeded)
                .then(|| format!("{}, attempt {}: {}", s.name, failure.attempt, failure.message))
        });
        match stalled {
            Some(message) => {
                self.set_condition(status, names::CONDITION_ATTEMPT_STALLED, true, Reason::Stalled.as_str(), &message);
            }
            None => self.unset_condition(status, names::CONDITION_ATTEMPT_STALLED, "Advanced", "the stage goes on"),
        }
    }

    /// The transitions into and out of suspension.
    fn turn(&mut self, before: Phase, status: &mut RLHFJobStatus) {
        match (before, status.phase) {
            (Phase::Suspended, Phase::Suspended) => {}
            (_, Phase::Suspended) => {
                self.set_condition(
                    status,
                    names::CONDITION_SUSPENDED,
                    true,
                    "Suspended",
                    "spec.suspend is set and no pod is left",
                );
                self.tell(Event::Suspended, "suspended: no pod is left".into(), None);
            }
            (Phase::Suspended, _) => {
                self.set_condition(status, names::CONDITION_SUSPENDED, false, "Resumed", "the job goes on");
                self.tell(Event::Resumed, "resumed".into(), None);
            }
            _ => {}
        }
    }

    /// Ends a condition, if it holds.
    fn unset_condition(&self, status: &mut RLHFJobStatus, kind: &str, reason: &str, message: &str) {
        if status.conditions.iter().any(|c| c.type_ == kind && c.status == "True") {
            self.set_condition(status, kind, false, reason, message);
        }
    }

    fn set_condition(&self, status: &mut RLHFJobStatus, kind: &str, holds: bool, reason: &str, message: &str) {
        let value = if holds { "True" } else { "False" };
        let old = status.conditions.iter().find(|c| c.type_ == kind);
        let since = old.filter(|c| c.status == value).map_or(Time(self.now), |c| c.last_transition_time.clone());
        let condition = Condition {
            type_: kind.into(),
            status: value.into(),
            reason: reason.into(),
            message: message.into(),
            observed_generation: Some(status.observed_generation),
            last_transition_time: since,
        };
        match status.conditions.iter_mut().find(|c| c.type_ == kind) {
            Some(old) => *old = condition,
            None => status.conditions.push(condition),
        }
    }

    /// One sentence on where the job is. It holds no count and no time that moves by itself.
    fn message(&self, status: &RLHFJobStatus) -> Option<String> {
        let text = match status.phase {
            Phase::Suspended => "suspended; set spec.suspend to false to go on".to_owned(),
            _ if self.job.spec.suspend => {
                "to be suspended: waits until the pods have written a checkpoint and ended".to_owned()
            }
            _ => {
                let said = status.slots().filter_map(|s| self.sentence(s));
                said.collect::<Vec<_>>().join("; ")
            }
        };
        (!text.is_empty()).then(|| bounded(text))
    }

    fn sentence(&self, slot: &StageStatus) -> Option<String> {
        let StageStatus { name, attempt, .. } = slot;
        if let Some(trouble) = self.observed.trouble(slot).filter(|_| slot.phase == StagePhase::Starting) {
            return Some(self.told(trouble));
        }
        match (slot.phase, &slot.last_failure) {
            (StagePhase::Running, _) => Some(format!("{name} runs (attempt {attempt})")),
            (StagePhase::Starting, _) => Some(match self.waiting(slot) {
                Some(waiting) => starting(slot, waiting),
                None if self.view(name).job(*attempt).is_none() && !self.view(name).is_clear_for(*attempt) => {
                    format!("{name}: attempt {attempt} waits for the pods of an earlier attempt to end")
                }
                None => format!("{name}: attempt {attempt} starts"),
            }),
            (StagePhase::Pending, Some(failure)) => Some(format!(
                "{name}: attempt {attempt} ended: {}: {}; the next follows{}",
                failure.reason,
                failure.message,
                slot.not_before.map(|t| format!(" at {}", seconds(t))).unwrap_or_default(),
            )),
            _ => None,
        }
    }

    /// Tells what is news to this process, unless a pass that failed afterwards has told it: then it stands in the message.
    fn tell_troubles(&mut self, before: &RLHFJobStatus, status: &RLHFJobStatus) {
        for slot in status.slots() {
            let Some(trouble) = self.observed.trouble(slot).filter(|t| t.is_news) else { continue };
            let text = self.told(trouble);
            if !before.message.as_ref().is_some_and(|message| message.contains(&text)) {
                self.tell(Event::Blocked, text, self.about(slot));
            }
        }
    }

    /// A trouble in words; where there are several, so short that the message has room for each.
    fn told(&self, trouble: &Trouble) -> String {
        let text = format!("{}, attempt {}: {}", trouble.stage, trouble.attempt, trouble.message);
        shortened(text, (MAX_BYTES / self.observed.troubles.len().max(1)).saturating_sub(BETWEEN))
    }
}

/// Bytes for the mark of a cut and for what stands between two sentences.
const BETWEEN: usize = 8;

fn is_active(slot: &StageStatus) -> bool {
    matches!(slot.phase, StagePhase::Starting | StagePhase::Running)
}

/// Why an attempt has not begun to run.
fn starting(slot: &StageStatus, (pod, wait): (Option<&str>, Wait)) -> String {
    let StageStatus { name, attempt, .. } = slot;
    let who = pod.map(|pod| format!("pod {pod}: ")).unwrap_or_default();
    format!("{name}: attempt {attempt} waits: {who}{wait}")
}

fn progress(slot: &StageStatus) -> String {
    match &slot.progress {
        Some(p) if p.total_steps > 0 => format!("{}/{}", p.step, p.total_steps),
        Some(p) if p.step > 0 => p.step.to_string(),
        _ => "-".into(),
    }
}

fn some_joined(parts: &[String]) -> Option<String> {
    (!parts.is_empty()).then(|| parts.join(","))
}

fn seconds(time: Timestamp) -> String {
    time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

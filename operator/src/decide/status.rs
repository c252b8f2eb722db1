//! Where the stages leave the job: its phase, conditions, and the words for people.

use super::{Defeat, Event, Outcome, Pass, Trouble, slots};
use crate::classify::{Reason, bounded, vanished};
use crate::view::{PodState, StageView};
use jiff::Timestamp;
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
            status.message = self.message(status);
            self.tell_trouble(before, status);
        }
        status.restarts = slots(status).map(|s| s.restarts).sum();
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
            slot.last_failure = Some(Failure {
                reason: Reason::Stopped.as_str().into(),
                ..vanished(slot.attempt, "stopped because the job failed elsewhere".into(), self.now)
            });
            self.decision.outcomes.push(Outcome::Failed);
        }
        // Nothing is made or resumed for a job that has just been given up.
        self.decision.make.clear();
        self.decision.suspend.clear();
        self.decision.requeue = None;
        self.end_job(status, Phase::Failed, (names::CONDITION_FAILED, reason), &message);
        self.tell(Event::JobFailed, message, None);
    }

    fn succeed_job(&mut self, status: &mut RLHFJobStatus) {
        let message = "every stage succeeded";
        self.end_job(status, Phase::Succeeded, (names::CONDITION_COMPLETE, "Succeeded"), message);
        self.tell(Event::JobSucceeded, message.into(), None);
    }

    fn end_job(&self, status: &mut RLHFJobStatus, phase: Phase, (condition, reason): (&str, &str), message: &str) {
        status.phase = phase;
        status.completion_time = Some(self.now);
        status.message = Some(message.to_owned());
        if status.conditions.iter().any(|c| c.type_ == names::CONDITION_SUSPENDED && c.status == "True") {
            self.set_condition(status, names::CONDITION_SUSPENDED, false, "Finished", "the job has finished");
        }
        self.set_condition(status, condition, true, reason, message);
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
        status.conditions.retain(|c| c.type_ != kind);
        status.conditions.push(condition);
    }

    /// One sentence on where the job is. It holds no count and no time that moves by itself.
    fn message(&self, status: &RLHFJobStatus) -> Option<String> {
        let text = match (&self.observed.trouble, status.phase) {
            (_, Phase::Suspended) => "suspended; set spec.suspend to false to go on".to_owned(),
            _ if self.job.spec.suspend => {
                "to be suspended: waits until the pods have written a checkpoint and ended".to_owned()
            }
            (Some(trouble), _) => told(trouble),
            _ => {
                let said = status.prepare.iter().chain(&status.stages).filter_map(|s| self.sentence(s));
                said.collect::<Vec<_>>().join("; ")
            }
        };
        (!text.is_empty()).then(|| bounded(text))
    }

    fn sentence(&self, slot: &StageStatus) -> Option<String> {
        let StageStatus { name, attempt, .. } = slot;
        match (slot.phase, &slot.last_failure) {
            (StagePhase::Running, _) => Some(format!("{name} runs (attempt {attempt})")),
            (StagePhase::Starting, _) => Some(starting(slot, self.view(name))),
            (StagePhase::Pending, Some(failure)) => Some(format!(
                "{name}: attempt {attempt} ended: {}: {}; the next follows{}",
                failure.reason,
                failure.message,
                slot.not_before.map(|t| format!(" at {}", seconds(t))).unwrap_or_default(),
            )),
            _ => None,
        }
    }

    fn tell_trouble(&mut self, before: &RLHFJobStatus, status: &RLHFJobStatus) {
        if let Some(trouble) = &self.observed.trouble
            && status.message != before.message
            && status.message.as_deref() == Some(&bounded(told(trouble)))
        {
            self.tell(Event::Blocked, told(trouble), None);
        }
    }
}

fn told(trouble: &Trouble) -> String {
    format!("{}, attempt {}: {}", trouble.stage, trouble.attempt, trouble.message)
}

fn is_active(slot: &StageStatus) -> bool {
    matches!(slot.phase, StagePhase::Starting | StagePhase::Running)
}

/// Why an attempt has not begun to run: the first pod that waits for something says so.
fn starting(slot: &StageStatus, view: &StageView) -> String {
    let StageStatus { name, attempt, .. } = slot;
    let mut waiting: Vec<_> = view
        .pods_of(*attempt)
        .filter_map(|p| if let PodState::Waiting(Some(why)) = &p.state { Some((p.index, &p.name, why)) } else { None })
        .collect();
    waiting.sort();
    match waiting.first() {
        Some((_, pod, why)) => format!("{name}: attempt {attempt} waits: pod {pod}: {why}"),
        None if view.job(*attempt).is_none() && !view.is_clear_for(*attempt) => {
            format!("{name}: attempt {attempt} waits for the pods of an earlier attempt to end")
        }
        None => format!("{name}: attempt {attempt} starts"),
    }
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

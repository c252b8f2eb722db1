//! The beginning of an attempt: its number, and then its children.

use super::facts::Facts;
use super::{Event, Pass};
use crate::build::{self, Attempt, Task};
use jiff::SignedDuration;
use rlhf_api::job::{Images, RLHFJobStatus, StagePhase, StageStatus};
use rlhf_api::names;

impl Pass<'_> {
    /// Starts the stages whose needs are met and makes the children of those that were started.
    pub(super) fn start_ready(&mut self, status: &mut RLHFJobStatus) {
        for task in Task::all(self.job) {
            let ready = is_ready(status, task);
            let Some(slot) = super::slots(status).find(|s| s.name == task.name()) else { continue };
            if self.start(slot, ready) {
                status.start_time.get_or_insert(self.now);
            }
        }
        if status.start_time.is_some() {
            // Another version of the operator, or other settings, change no job that has started.
            status.images.get_or_insert_with(|| Images { trainer: self.settings.trainer_image.clone() });
        }
        for task in Task::all(self.job) {
            if let Some(slot) = super::slots(status).find(|s| s.name == task.name()) {
                self.make(task, slot);
            }
        }
    }

    /// Gives the next attempt its number, if the stage waits for nothing. The children follow once the number is
    /// in status.
    fn start(&mut self, slot: &mut StageStatus, ready: bool) -> bool {
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
        slot.attempt_start = Some(self.now);
        slot.start_time.get_or_insert(self.now);
        // A stage's first attempt starts when what it needs has succeeded, which is told.
        if slot.attempt > 1 || slot.name == names::PREPARE {
            self.tell(Event::StageStarted, format!("{}: attempt {} starts", slot.name, slot.attempt), self.about(slot));
        }
        true
    }

    /// Makes a started attempt's children, as soon as nothing of an earlier attempt can run beside it.
    fn make(&mut self, task: Task<'_>, slot: &mut StageStatus) {
        if slot.phase != StagePhase::Starting || self.job.spec.suspend {
            return;
        }
        let Facts::Unmade(unmade) = Facts::of(self, slot) else { return };
        if unmade.obstacle.is_some() {
            return;
        }
        if let Some(trouble) = self.observed.trouble(slot).filter(|t| t.retry_after > SignedDuration::ZERO) {
            return self.decision.look_again(trouble.retry_after);
        }
        let strategy = self.strategy_of(slot).unwrap_or_default();
        let attempt = Attempt { number: slot.attempt, strategy };
        match build::children(self.job, task, attempt, self.settings) {
            Ok(children) => {
                if unmade.refusal.is_none() {
                    slot.starting_since.get_or_insert(self.now);
                }
                self.decision.make.push(children);
            }
            Err(error) => self.refuse_spec(&error),
        }
    }
}

/// Whether everything that a task needs is there: prepare needs nothing, a stage needs prepare and the stages that
/// it names.
fn is_ready(status: &RLHFJobStatus, task: Task<'_>) -> bool {
    let Task::Stage(stage) = task else { return true };
    let done = |s: &StageStatus| s.phase == StagePhase::Succeeded;
    let needs = stage.needs();
    status.prepare.as_ref().is_some_and(done)
        && needs.iter().all(|need| status.stages.iter().any(|s| s.name == *need && done(s)))
}

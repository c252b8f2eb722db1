//! Where the stages leave the job: its phase, its sums and its end. [`super::conditions`] and [`super::words`] say it in
//! other ways.

use super::words::{brief, joined, progress};
use super::{Defeat, Event, Outcome, Pass, RESYNC, slots};
use crate::classify::{Reason, bounded, vanished};
use crate::view::JobView;
use rlhf_api::job::{Failure, Phase, RLHFJobStatus, StagePhase, StageStatus};

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
            status.message = self.message(status);
            self.tell_conditions(status);
            self.tell_troubles(before, status);
            self.tell_stuck(before, status);
            self.decision.look_again(RESYNC);
        }
        status.restarts = slots(status).map(|s| s.restarts.total).sum();
        status.disruptions = slots(status).map(|s| s.disruptions).sum();
        self.show_active(status);
    }

    /// What the stages that are to run do, for people.
    fn show_active(&self, status: &mut RLHFJobStatus) {
        let active: Vec<_> = status.slots().filter(|s| is_active(s)).collect();
        let (stages, steps): (Vec<_>, Vec<_>) = active.iter().map(|s| (s.name.clone(), progress(s))).unzip();
        let told = active.iter().find_map(|s| s.progress.as_ref()).map(brief).unwrap_or_default();
        (status.stage, status.progress) = (joined(&stages), joined(&steps));
        (status.figure, status.tokens_per_second, status.eta) = (told.figure, told.tokens_per_second, told.eta);
    }

    /// What is so now. A job runs while an attempt at a stage does; what has begun and does not run waits.
    fn phase(&self, status: &RLHFJobStatus) -> Phase {
        let Some(prepare) = status.prepare.as_ref() else { return Phase::Pending };
        let waits = self.first_wait(status).is_some() || prepare.phase == StagePhase::Pending;
        match prepare.phase {
            _ if self.job.spec.suspend && self.at_rest() => Phase::Suspended,
            StagePhase::Succeeded if status.stages.iter().any(|s| s.phase == StagePhase::Running) => Phase::Running,
            StagePhase::Succeeded => Phase::Waiting,
            _ if prepare.attempt == 0 && self.obstacle.is_none() => Phase::Pending,
            StagePhase::Running => Phase::Preparing,
            _ if waits => Phase::Waiting,
            _ => Phase::Preparing,
        }
    }

    /// Whether a suspended job has come to rest: no Job of it can make pods, and its pods have ended.
    fn at_rest(&self) -> bool {
        self.observed.stages.values().all(|view| {
            let mut pods = view.pods.iter().chain(&view.strays);
            view.jobs.iter().all(JobView::finished) && pods.all(|p| p.ended().is_some())
        })
    }

    fn fail(&mut self, status: &mut RLHFJobStatus, defeat: Defeat) {
        let Defeat { reason, message } = defeat;
        let message = bounded(message);
        for slot in slots(status).filter(|s| !matches!(s.phase, StagePhase::Succeeded | StagePhase::Failed)) {
            self.stop(slot);
        }
        // Nothing is made for a job that has just been given up.
        self.decision.make.clear();
        self.end_job(status, Phase::Failed, reason, &message);
        self.tell(Event::JobFailed, message, None);
    }

    /// A stage that another's end stops, or keeps from ever being started.
    fn stop(&mut self, slot: &mut StageStatus) {
        if is_active(slot) {
            self.note_attempt(slot, Reason::Stopped.as_str(), None);
            slot.last_failure = Some(Failure {
                reason: Reason::Stopped.as_str().into(),
                ..vanished(slot.attempt, "stopped because the job has failed".into(), self.now)
            });
            slot.completion_time = Some(self.now);
            self.decision.outcomes.push(Outcome::Failed);
        }
        super::stage::hold(slot);
        (slot.phase, slot.not_before) = (StagePhase::Stopped, None);
    }

    fn succeed_job(&mut self, status: &mut RLHFJobStatus) {
        let message = "every stage succeeded";
        self.end_job(status, Phase::Succeeded, "Succeeded", message);
        self.tell(Event::JobSucceeded, message.into(), None);
    }

    fn end_job(&mut self, status: &mut RLHFJobStatus, phase: Phase, reason: &str, message: &str) {
        status.phase = phase;
        status.completion_time = Some(self.now);
        status.message = Some(message.to_owned());
        self.stop_active_time(status);
        self.decision.requeue = None;
        self.conclude_conditions(status, reason, message);
    }

    /// The transitions into and out of suspension.
    fn turn(&mut self, before: Phase, status: &RLHFJobStatus) {
        match (before, status.phase) {
            (Phase::Suspended, Phase::Suspended) => {}
            (_, Phase::Suspended) => self.tell(Event::Suspended, "suspended: no pod is left".into(), None),
            (Phase::Suspended, _) => self.tell(Event::Resumed, "resumed".into(), None),
            _ => {}
        }
    }
}

pub(super) fn is_active(slot: &StageStatus) -> bool {
    matches!(slot.phase, StagePhase::Starting | StagePhase::Running)
}

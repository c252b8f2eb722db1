//! Times of a job: how long it has been active, its deadline, and how long it stays once it has ended.

use super::stage::LONGEST_BACKOFF;
use super::status::is_active;
use super::{CLOCK_SKEW, Defeat, Pass, slots};
use crate::view::Wait;
use jiff::{SignedDuration, Timestamp};
use rlhf_api::job::{Phase, RLHFJobStatus, StagePhase, StageStatus};

impl Pass<'_> {
    /// Brings back times that only a clock that has been set meanwhile can have written, so that nothing waits until it is
    /// that late again.
    pub(super) fn correct_times(&self, status: &mut RLHFJobStatus) {
        let now = self.now;
        let correct = |time: &mut Option<Timestamp>, ahead: SignedDuration| {
            let latest = now + ahead;
            *time = time.map(|t| if t > latest + CLOCK_SKEW { latest } else { t });
        };
        for slot in slots(status) {
            correct(&mut slot.not_before, LONGEST_BACKOFF);
            correct(&mut slot.starting_since, SignedDuration::ZERO);
            correct(&mut slot.pending_since, SignedDuration::ZERO);
            correct(&mut slot.advanced_at, SignedDuration::ZERO);
        }
        correct(&mut status.active_since, SignedDuration::ZERO);
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

    pub(super) fn stop_active_time(&self, status: &mut RLHFJobStatus) {
        status.active_seconds = u32::try_from(self.active_time(status).as_secs()).unwrap_or(u32::MAX);
        status.active_since = None;
    }

    /// The time runs from the first start on, except while the job is suspended, or only waits in a queue or for nodes by which
    /// it can be planned.
    pub(super) fn count_active_time(&mut self, status: &mut RLHFJobStatus) {
        if status.phase == Phase::Suspended {
            self.stop_active_time(status);
            self.decision.requeue = None;
        } else if self.only_waits(status) {
            self.stop_active_time(status);
        } else if status.start_time.is_some() {
            status.active_since.get_or_insert(self.now);
        }
    }

    /// Whether every attempt that is to run waits to be let run, or none is, for nothing can be planned yet.
    fn only_waits(&self, status: &RLHFJobStatus) -> bool {
        let held =
            |s: &StageStatus| self.view(&s.name).job(s.attempt).is_some_and(|j| j.suspended && j.queue.is_some());
        let mut active = status.slots().filter(|s| is_active(s)).peekable();
        if active.peek().is_some() {
            return active.all(held);
        }
        self.obstacle.as_ref().is_some_and(Wait::is_for_others)
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
}

//! How long attempts take from the making of their Job to their first step.
//!
//! What an attempt waits in a queue is left out. An attempt that resumes tells at once of the step from which it goes on; its first own step is one beyond. What is
//! not known (the attempt was made by an earlier process of the operator) is not measured.

use rlhf_api::job::{RLHFJobStatus, StagePhase, StageStatus};
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

struct Waiting {
    uid: String,
    attempt: u32,
    /// The step after which the attempt goes on.
    from: u64,
    /// When it was made, or let run; `None` while it waits in a queue.
    since: Option<Instant>,
}

/// Attempts that were made and have not told of a step yet: by namespace and name of the job, then by stage.
#[derive(Default)]
pub(super) struct FirstSteps(Mutex<HashMap<(String, String), HashMap<String, Waiting>>>);

impl FirstSteps {
    fn lock(&self) -> MutexGuard<'_, HashMap<(String, String), HashMap<String, Waiting>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The attempt that `slot` speaks of was made now.
    pub(super) fn made(&self, (namespace, name, uid): (&str, &str, &str), slot: &StageStatus) {
        let from = slot.checkpoint.as_ref().map_or(0, |c| c.step);
        let waiting = Waiting { uid: uid.into(), attempt: slot.attempt, from, since: Some(Instant::now()) };
        self.lock().entry((namespace.into(), name.into())).or_default().insert(slot.name.clone(), waiting);
    }

    /// How long those attempts took whose first step this status is the first to tell of.
    pub(super) fn told(
        &self,
        (namespace, name, uid): (&str, &str, &str),
        status: &RLHFJobStatus,
        suspended: bool,
    ) -> Vec<Duration> {
        let mut all = self.lock();
        let key = (namespace.to_owned(), name.to_owned());
        let Some(stages) = all.get_mut(&key) else { return Vec::new() };
        let mut took = Vec::new();
        stages.retain(|stage, waiting| {
            let slot = status.slot(stage);
            let step = slot.and_then(|s| s.progress.as_ref()).map_or(0, |p| p.step);
            let live = |s: &StageStatus| matches!(s.phase, StagePhase::Starting | StagePhase::Running);
            let same = waiting.uid == uid && slot.is_some_and(|s| s.attempt == waiting.attempt);
            if same && step > waiting.from {
                took.extend(waiting.since.map(|since| since.elapsed()));
                return false;
            }
            let held = slot.is_some_and(|s| s.phase == StagePhase::Starting && s.starting_since.is_none());
            waiting.since = if held { None } else { waiting.since.or_else(|| Some(Instant::now())) };
            same && !suspended && slot.is_some_and(live)
        });
        if stages.is_empty() {
            all.remove(&key);
        }
        took
    }

    /// The job is gone.
    pub(super) fn forget(&self, namespace: &str, name: &str) {
        self.lock().remove(&(namespace.to_owned(), name.to_owned()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rlhf_api::report::{Checkpoint, Progress};

    const JOB: (&str, &str, &str) = ("team", "demo", "uid");

    fn slot(attempt: u32, step: u64) -> StageStatus {
        let progress = Some(Progress { step, ..Default::default() });
        StageStatus { name: "tune".into(), attempt, phase: StagePhase::Running, progress, ..Default::default() }
    }

    fn status(slot: StageStatus) -> RLHFJobStatus {
        RLHFJobStatus { stages: vec![slot], ..Default::default() }
    }

    #[test]
    fn an_attempt_is_measured_once_at_the_first_step_of_its_own() {
        let first = FirstSteps::default();
        let checkpoint = Some(Checkpoint { step: 40, path: "p".into() });
        first.made(JOB, &StageStatus { checkpoint, ..slot(2, 0) });
        assert!(first.told(JOB, &status(slot(2, 40)), false).is_empty(), "the step from which it resumes");
        assert_eq!(first.told(JOB, &status(slot(2, 42)), false).len(), 1);
        assert!(first.told(JOB, &status(slot(2, 43)), false).is_empty());
        assert!(first.lock().is_empty());
    }

    #[test]
    fn the_time_in_a_queue_is_left_out() {
        let first = FirstSteps::default();
        let starting = |since| StageStatus { phase: StagePhase::Starting, starting_since: since, ..slot(1, 0) };
        first.made(JOB, &starting(None));
        let since = || first.lock().values().flat_map(|stages| stages.values().map(|w| w.since)).next().unwrap();
        assert!(since().is_some());
        first.told(JOB, &status(starting(None)), false);
        assert_eq!(since(), None, "it waits");
        first.told(JOB, &status(starting(Some(jiff::Timestamp::UNIX_EPOCH))), false);
        let let_run = since();
        assert!(let_run.is_some());
        first.told(JOB, &status(slot(1, 0)), false);
        assert_eq!(since(), let_run, "it counts from when it was let run");
        assert_eq!(first.told(JOB, &status(slot(1, 2)), false).len(), 1);
    }

    #[test]
    fn an_attempt_that_ends_or_stops_before_its_first_step_is_not_measured_and_leaves_nothing() {
        for (told, suspended) in [
            (status(slot(2, 0)), false),
            (status(StageStatus { phase: StagePhase::Pending, ..slot(1, 0) }), false),
            (status(slot(1, 0)), true),
            (RLHFJobStatus::default(), false),
        ] {
            let first = FirstSteps::default();
            first.made(JOB, &slot(1, 0));
            assert!(first.told(JOB, &told, suspended).is_empty());
            assert!(first.lock().is_empty(), "{told:?}");
        }
        let first = FirstSteps::default();
        first.made(JOB, &slot(1, 0));
        first.forget("team", "demo");
        assert!(first.told(JOB, &status(slot(1, 3)), false).is_empty());
    }
}

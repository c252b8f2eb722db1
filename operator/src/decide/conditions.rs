//! The job's conditions. All of them are there from the first status on, so that a reader need not guess what the absence
//! of one means.

use super::stage::has_figures;
use super::words::Waiting;
use super::{Pass, slots};
use crate::classify::{Reason, bounded};
use crate::view::Wait;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use rlhf_api::job::{Phase, RLHFJobStatus, StagePhase};
use rlhf_api::names;

/// A condition while it does not hold.
struct Absent {
    kind: &'static str,
    /// The reason and the words where it never held, and where it did.
    never: (&'static str, &'static str),
    passed: (&'static str, &'static str),
}

const SUSPENDED: Absent = Absent {
    kind: names::CONDITION_SUSPENDED,
    never: ("NotSuspended", "the job is not suspended"),
    passed: ("Resumed", "the job goes on"),
};
const WAITING: Absent = Absent {
    kind: names::CONDITION_WAITING,
    never: ("NothingWaits", "nothing waits that is to run"),
    passed: ("Passed", "no pod waits for it any more"),
};
const QUOTA_EXCEEDED: Absent = Absent {
    kind: names::CONDITION_QUOTA_EXCEEDED,
    never: ("WithinQuota", "no quota keeps pods from being made"),
    passed: WAITING.passed,
};
const ATTEMPT_STALLED: Absent = Absent {
    kind: names::CONDITION_ATTEMPT_STALLED,
    never: ("NoStall", "no attempt stood still"),
    passed: ("Advanced", "the stage goes on"),
};
const UNSUPPORTED: Absent = Absent {
    kind: names::CONDITION_UNSUPPORTED,
    never: ("Supported", "the operator knows all that the job asks for"),
    passed: ("Supported", "the operator knows all that the job asks for"),
};
const COMPLETE: Absent = Absent {
    kind: names::CONDITION_COMPLETE,
    never: ("NotComplete", "not every stage has succeeded"),
    passed: ("NotComplete", "not every stage has succeeded"),
};
const FAILED: Absent = Absent {
    kind: names::CONDITION_FAILED,
    never: ("NotFailed", "the job has not failed"),
    passed: ("NotFailed", "the job has not failed"),
};
/// For tools that know no RLHFJobs.
const RECONCILING: Absent = Absent {
    kind: names::CONDITION_RECONCILING,
    never: ("Suspended", "the job is suspended"),
    passed: ("Settled", "nothing is going on"),
};
const STALLED: Absent = Absent { kind: names::CONDITION_STALLED, ..FAILED };

/// What an end leaves without a part.
const PASSING: [Absent; 5] = [SUSPENDED, WAITING, QUOTA_EXCEEDED, ATTEMPT_STALLED, UNSUPPORTED];

impl Pass<'_> {
    /// The conditions of a job that is not over.
    pub(super) fn tell_conditions(&self, status: &mut RLHFJobStatus) {
        let phase = status.phase;
        for end in [COMPLETE, FAILED, STALLED] {
            self.put(status, &end, None);
        }
        let suspended = (phase == Phase::Suspended).then_some(("Suspended", "spec.suspend is set and no pod is left"));
        self.put(status, &SUSPENDED, suspended);
        let waiting = self.waiting_condition(status);
        let waiting = waiting.as_ref().map(|w| (w.reason.as_str(), w.text.as_str()));
        self.put(status, &WAITING, waiting);
        self.put(status, &QUOTA_EXCEEDED, waiting.filter(|(reason, _)| *reason == Wait::QUOTA));
        let stalled = stalled(status);
        let stalled = stalled.as_deref().map(|message| (Reason::Stalled.as_str(), message));
        self.put(status, &ATTEMPT_STALLED, stalled);
        let unknown = self.obstacle.as_ref().filter(|o| o.reason == names::CONDITION_UNSUPPORTED);
        self.put(status, &UNSUPPORTED, unknown.map(|o| ("NotKnown", o.text.as_str())));
        let going_on = (phase != Phase::Suspended).then_some(("Progressing", "the job is not over"));
        self.put(status, &RECONCILING, going_on);
    }

    /// The conditions of a job that has ended.
    pub(super) fn conclude_conditions(&self, status: &mut RLHFJobStatus, reason: &str, message: &str) {
        let said = Some((reason, message));
        let failed = status.phase == Phase::Failed;
        self.put(status, &COMPLETE, said.filter(|_| !failed));
        self.put(status, &FAILED, said.filter(|_| failed));
        self.put(status, &STALLED, said.filter(|_| failed));
        for passing in PASSING {
            let finished = ("Finished", "the job has finished");
            self.put(status, &Absent { passed: finished, ..passing }, None);
        }
        self.put(status, &Absent { never: RECONCILING.passed, ..RECONCILING }, None);
    }

    /// What the first attempt that cannot start waits for; where nothing runs, what the job waits for in any case.
    fn waiting_condition(&self, status: &RLHFJobStatus) -> Option<Wait> {
        let told = |Waiting { reason, text }| Wait::new(reason, bounded(text));
        let any = || self.any_wait(status).filter(|_| status.phase == Phase::Waiting);
        self.first_wait(status).or_else(any).map(told)
    }

    /// Sets a condition: it holds, with its reason and words, or it does not.
    fn put(&self, status: &mut RLHFJobStatus, absent: &Absent, holds: Option<(&str, &str)>) {
        let generation = Some(status.observed_generation);
        let old = status.conditions.iter_mut().find(|c| c.type_ == absent.kind);
        let was = old.as_ref().map(|c| c.status == "True");
        let (value, (reason, message)) = match (holds, was) {
            (Some(said), _) => ("True", said),
            (None, None) => ("False", absent.never),
            (None, Some(true)) => ("False", absent.passed),
            // As it was said when it ceased to hold.
            (None, Some(false)) => {
                old.into_iter().for_each(|c| c.observed_generation = generation);
                return;
            }
        };
        let since = old.as_ref().filter(|c| c.status == value).map(|c| c.last_transition_time.clone());
        let condition = Condition {
            type_: absent.kind.into(),
            status: value.into(),
            reason: reason.into(),
            message: message.into(),
            observed_generation: generation,
            last_transition_time: since.unwrap_or(Time(self.now)),
        };
        match old {
            Some(old) => *old = condition,
            None => status.conditions.push(condition),
        }
    }
}

/// Holds from the time an attempt stood still until a later one has told its first figures.
fn stalled(status: &mut RLHFJobStatus) -> Option<String> {
    slots(status).find_map(|s| {
        let failure = s.last_failure.as_ref().filter(|f| f.reason == Reason::Stalled.as_str())?;
        let goes_on = failure.attempt < s.attempt && has_figures(s);
        (!goes_on && s.phase != StagePhase::Succeeded)
            .then(|| format!("{}, attempt {}: {}", s.name, failure.attempt, failure.message))
    })
}

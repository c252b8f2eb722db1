//! What was seen of a stage's current attempt, as one of a few cases.
//!
//! This is the first of the two steps of [`super::decide`]; [`super::transition`] is the second, which draws from a case and
//! from what status says what follows. Nothing here looks at the stage's phase, and nothing here waits.

use super::Pass;
use crate::classify::{cause, own_error, vanished};
use crate::view::{JobState, JobView, PodState, PodView, StageView, Wait};
use rlhf_api::job::{Failure, StageStatus};
use std::collections::BTreeSet;

/// What was seen of a stage's current attempt.
#[derive(Debug)]
pub(super) enum Facts {
    /// It has no Job.
    Unmade(Unmade),
    /// Its Job makes no pods: the job is suspended, or the Job is, by its queue or by somebody.
    Held {
        /// What it waits for.
        wait: Wait,
        /// Whether it is in a queue that has not said anything yet.
        unanswered: bool,
    },
    /// Its Job is being deleted.
    Deleted {
        /// The error of its own by which a pod ended all the same.
        own_error: Option<Failure>,
        /// How it ended, if it was not to end.
        end: Failure,
    },
    /// Not all of its pods run.
    Starting(Starting),
    /// Every pod runs, or has done its part.
    Running,
    /// A pod ended badly, and the others are being stopped.
    Failing(Option<Failure>),
    /// It ended badly, and nothing of it runs.
    Failed(Failure),
    /// It is done, but for a pod that has not ended.
    Lingering,
    /// Every trainer has ended well.
    Succeeded,
}

/// An attempt without a Job.
#[derive(Debug)]
pub(super) struct Unmade {
    /// What it has to wait for: something of an earlier attempt, or what was left of this one.
    pub obstacle: Option<String>,
    /// What the API server said when its objects were to be made, and whether it would say so again.
    pub refusal: Option<(Wait, bool)>,
}

/// An attempt whose pods start.
#[derive(Debug, Default)]
pub(super) struct Starting {
    /// Whether there are pods that have not been made.
    pub missing: bool,
    /// Whether every pod has a node.
    pub placed: bool,
    /// Whether it waits for what others have to give: nodes, a quota, a permission.
    pub pending: bool,
    /// What keeps a pod from starting that could: its image, its configuration, its volumes.
    pub trouble: Option<Told>,
    /// What says most of why it does not run yet.
    pub told: Option<Told>,
}

/// What something waits for.
#[derive(Clone, Debug)]
pub(super) struct Told {
    /// The pod that says so, where it is one.
    pub pod: Option<String>,
    /// Its node.
    pub node: Option<String>,
    /// What for.
    pub wait: Wait,
}

impl std::fmt::Display for Told {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let who = self.pod.as_ref().map(|pod| format!("pod {pod}: ")).unwrap_or_default();
        write!(f, "{who}{}", self.wait)
    }
}

impl Facts {
    /// Of a stage's current attempt.
    pub(super) fn of(pass: &Pass<'_>, slot: &StageStatus) -> Self {
        let view = pass.view(&slot.name);
        let attempt = slot.attempt;
        let Some(job) = view.job(attempt) else { return Self::Unmade(Unmade::of(pass, slot, view)) };
        if job.state == JobState::Complete || all_done(job, view) {
            // Whoever is told of success may use the quota and the volume: no trainer lingers on.
            let lingers = view.pods.iter().any(|p| p.attempt == attempt && p.ended().is_none());
            return if lingers { Self::Lingering } else { Self::Succeeded };
        }
        let pods = || view.pods_of(attempt);
        let recorded = slot.last_failure.as_ref();
        let cause = || cause(attempt, pods(), recorded, pass.now);
        let lost = |what: &str| vanished(attempt, format!("attempt {attempt}: {what}"), pass.now);
        if job.deleting {
            let end = cause().unwrap_or_else(|| lost("its Job was deleted"));
            return Self::Deleted { own_error: own_error(attempt, pods(), pass.now), end };
        }
        match job.state {
            JobState::Failed => Self::Failed(cause().unwrap_or_else(|| lost("its pods are gone"))),
            JobState::Failing => Self::Failing(cause()),
            JobState::Complete | JobState::Active => Self::active(pass, slot, job, view),
        }
    }

    /// Of an attempt whose Job wants pods.
    fn active(pass: &Pass<'_>, slot: &StageStatus, job: &JobView, view: &StageView) -> Self {
        if pass.job.spec.suspend || job.suspended {
            let held = job.held().unwrap_or_else(|| Wait::new("Suspended", "spec.suspend is set"));
            let unanswered = job.suspended && job.queue.is_some() && view.refused.is_none();
            return Self::Held { wait: view.refused.clone().filter(|_| job.suspended).unwrap_or(held), unanswered };
        }
        let pods = || view.pods_of(slot.attempt);
        if pods().any(PodView::failed) {
            let cause = cause(slot.attempt, pods(), slot.last_failure.as_ref(), pass.now);
            // The Job controller waits for a container beside the trainer, or for a kubelet that is gone, and stops nothing: then
            // it ends once no trainer runs.
            let waits = |p: &PodView| p.failed() && pass.lives_on(p);
            let uncounted = pods().any(waits) && !pods().any(|p| p.state == PodState::Running);
            return match cause {
                Some(cause) if uncounted => Self::Failed(cause),
                cause => Self::Failing(cause),
            };
        }
        let running = pods().filter(|p| p.state == PodState::Running).map(|p| p.index);
        let up: BTreeSet<u32> = done(job, view).chain(running).collect();
        if up.len() >= job.pods as usize { Self::Running } else { Self::Starting(Starting::of(job, view)) }
    }

    /// What the attempt waits for, and so why it does not run.
    pub(super) fn waiting(self) -> Option<Told> {
        let of_all = |wait| Some(Told { pod: None, node: None, wait });
        match self {
            Self::Unmade(Unmade { refusal: Some((wait, _)), .. }) | Self::Held { wait, .. } => of_all(wait),
            Self::Starting(starting) => starting.told,
            _ => None,
        }
    }
}

/// The indexes of an attempt whose trainers have ended well, by their pods or by the count of the Job controller.
fn done<'a>(job: &'a JobView, view: &'a StageView) -> impl Iterator<Item = u32> + 'a {
    let ended = view.pods_of(job.attempt).filter(|p| p.succeeded()).map(|p| p.index);
    (0..job.pods).filter(|i| job.has_completed(*i)).chain(ended.filter(|i| *i < job.pods))
}

/// Whether every trainer has done its part. Its pod may go on for a container beside it, or have failed by one: the Job
/// controller then never counts it as succeeded.
fn all_done(job: &JobView, view: &StageView) -> bool {
    job.pods > 0 && done(job, view).collect::<BTreeSet<_>>().len() >= job.pods as usize
}

impl Unmade {
    fn of(pass: &Pass<'_>, slot: &StageStatus, view: &StageView) -> Self {
        let refusal = pass.observed.trouble(slot).map(|trouble| {
            let wait = Wait { text: trouble.message.clone(), ..Wait::refusal(&trouble.message) };
            // What was taken once is refused for what has changed since, and that may change again.
            (wait, trouble.permanent && slot.attempt == 1)
        });
        Self { obstacle: view.in_the_way(slot.attempt).map(|o| o.to_string()), refusal }
    }
}

impl Starting {
    fn of(job: &JobView, view: &StageView) -> Self {
        let pods = || view.pods_of(job.attempt);
        let missing = pods().count() < job.pods as usize;
        let told = |p: &PodView| match &p.state {
            PodState::Waiting(Some(wait)) => {
                Some((p.index, Told { pod: Some(p.name.clone()), node: p.node.clone(), wait: wait.clone() }))
            }
            _ => None,
        };
        let mut waits: Vec<_> = pods().filter_map(told).collect();
        // One that can never start says more than one that may.
        waits.sort_by(|(i, a), (j, b)| (!a.wait.is_permanent(), i, &a.pod).cmp(&(!b.wait.is_permanent(), j, &b.pod)));
        let of_all = view.refused.clone().map(|wait| Told { pod: None, node: None, wait });
        let mount = view.mount.as_ref().and_then(|(pod, wait)| {
            let pod = pods().find(|p| p.name == *pod && p.state == PodState::Waiting(None))?;
            Some(Told { pod: Some(pod.name.clone()), node: pod.node.clone(), wait: wait.clone() })
        });
        let all = waits.into_iter().map(|(_, told)| told).chain(of_all).chain(mount);
        let (pending, trouble): (Vec<_>, Vec<_>) = all.partition(|told| told.wait.is_for_others());
        let first = |told: &[Told]| told.first().cloned();
        Self {
            missing,
            placed: !missing && pods().all(|p| p.node.is_some()),
            pending: !pending.is_empty(),
            told: first(&trouble).filter(|t| t.wait.is_permanent()).or(first(&pending)).or(first(&trouble)),
            trouble: first(&trouble),
        }
    }
}

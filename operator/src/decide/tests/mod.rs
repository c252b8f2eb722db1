//! The rules by cases: what is seen, what follows.

mod ends;
mod lost;
pub(super) mod planning;
mod progress;
mod refusals;
mod running;
mod stalls;
mod success;
mod suspension;
mod times;
mod waiting;

use super::*;
use crate::build::tests::{job, settings};
use crate::view::{End, JobState, PodState, PodView, Wait};
use kube::ResourceExt;
use rlhf_api::job::{Failure, Phase, StagePhase};
use rlhf_api::names as api_names;
use rlhf_api::report::{Checkpoint, Output, Progress, TerminationMessage};

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(1_800_000_000 + second).unwrap()
}

fn job_view(stage: &str, attempt: u32, state: JobState) -> JobView {
    let pods = if stage == "prepare" { 1 } else { 2 };
    let name = view::attempt(&job(), stage, attempt);
    JobView {
        uid: format!("uid-{name}"),
        name,
        owner: None,
        stage: stage.into(),
        version: None,
        attempt,
        deleting: false,
        queue: None,
        suspended: false,
        resumed: false,
        created: at(0),
        started: Some(at(0)),
        pods,
        completed: vec![],
        state,
    }
}

fn pod_view(stage: &str, attempt: u32, index: u32, state: PodState) -> PodView {
    PodView {
        name: format!("{stage}-{attempt}-{index}-x"),
        uid: format!("uid-{stage}-{attempt}-{index}"),
        owner: None,
        stage: stage.into(),
        attempt,
        index,
        node: Some("node1".into()),
        image_id: None,
        ip: Some("10.0.0.1".into()),
        created: at(0),
        deletion_requested: None,
        grace: SignedDuration::ZERO,
        deleting_for: SignedDuration::ZERO,
        disruption: None,
        evicted: None,
        state,
        lives_on: false,
    }
}

fn ended(code: i32, word: Option<TerminationMessage>) -> PodState {
    PodState::Ended(Box::new(End { code: Some(code), word, at: Some(at(5)), ..End::default() }))
}

fn waits(reason: &str, text: &str) -> PodState {
    PodState::Waiting(Some(Wait { reason: reason.into(), text: text.into() }))
}

/// The first attempt of a stage is refused, which is news, and tried again after so many seconds.
fn trouble(stage: &str, message: &str, seconds: i64) -> Trouble {
    Trouble {
        stage: stage.into(),
        attempt: 1,
        message: message.into(),
        retry_after: SignedDuration::from_secs(seconds),
        permanent: false,
        is_news: true,
    }
}

fn names<const N: usize>(of: [&str; N]) -> Vec<String> {
    of.map(str::to_owned).into()
}

/// A job on its way, driven by what is seen.
struct Case {
    job: RLHFJob,
    observed: Observed,
    now: Timestamp,
    last: Decision,
}

impl Case {
    fn new() -> Self {
        Self { job: job(), observed: Observed::default(), now: at(0), last: Decision::default() }
    }

    /// Prepare done and the first two stages started.
    fn prepared() -> Self {
        let mut case = Self::new();
        case.pass();
        case.see("prepare", 1, JobState::Complete, &[ended(0, None)]);
        case.pass();
        case
    }

    /// As [`Case::prepared`], with every pod of the first two stages running.
    fn running() -> Self {
        let mut case = Self::prepared();
        for stage in ["tune", "judge"] {
            case.see(stage, 1, JobState::Active, &[PodState::Running, PodState::Running]);
        }
        case.pass();
        case
    }

    /// Decides until nothing more follows from what is seen, as passes do that see their own status again.
    fn pass(&mut self) -> &Decision {
        let decision = decide(&self.job, &self.observed, &settings(), self.now);
        self.job.status = Some(decision.status.clone());
        self.last = decision;
        &self.last
    }

    fn see(&mut self, stage: &str, attempt: u32, state: JobState, pods: &[PodState]) {
        let view = self.observed.stages.entry(stage.into()).or_default();
        view.jobs = vec![job_view(stage, attempt, state)];
        view.pods = pods.iter().enumerate().map(|(i, s)| pod_view(stage, attempt, i as u32, s.clone())).collect();
    }

    fn view(&mut self, stage: &str) -> &mut StageView {
        self.observed.stages.get_mut(stage).unwrap()
    }

    fn slot(&self, stage: &str) -> &StageStatus {
        self.status().slot(stage).unwrap()
    }

    fn status(&self) -> &RLHFJobStatus {
        self.job.status.as_ref().unwrap()
    }

    /// The attempts that are to be made, as stage and number.
    fn made(&self) -> Vec<String> {
        self.last.make.iter().map(|c| format!("{}-{}", c.stage, c.job.labels()[api_names::LABEL_ATTEMPT])).collect()
    }

    /// The attempts whose Jobs are to be deleted, in the same way.
    fn deleted(&self) -> Vec<String> {
        let all = self.observed.stages.values().flat_map(|view| &view.jobs);
        let of = |uid: &str| all.clone().find(|j| j.uid == uid).unwrap();
        self.last.delete.iter().map(|d| of(&d.uid)).map(|j| format!("{}-{}", j.stage, j.attempt)).collect()
    }

    fn events(&self) -> Vec<&str> {
        self.last.notices.iter().map(|n| n.event.reason()).collect()
    }

    fn condition(&self, kind: &str) -> Option<(&str, &str)> {
        self.status().conditions.iter().find(|c| c.type_ == kind).map(|c| (c.status.as_str(), c.reason.as_str()))
    }

    fn holds(&self, kind: &str) -> bool {
        self.condition(kind).is_some_and(|(status, _)| status == "True")
    }

    /// Another job at the same place.
    fn again(&self) -> Self {
        Self { job: self.job.clone(), observed: self.observed.clone(), now: self.now, last: Decision::default() }
    }

    /// Nothing follows from what is seen any more.
    fn assert_quiet(&mut self) {
        let before = self.job.status.clone();
        self.pass();
        assert_eq!(Some(&self.last.status), before.as_ref(), "status moves by itself");
        let Decision { delete, notices, .. } = &self.last;
        assert!(delete.is_empty() && notices.is_empty(), "{:?}", self.last);
    }
}

/// What one bad end of the attempt that runs leads to.
fn bad_end(code: i32, prepare: impl FnOnce(&mut Case)) -> Case {
    let mut case = Case::running();
    prepare(&mut case);
    case.now = at(10);
    case.see("tune", 1, JobState::Failed, &[ended(code, None), ended(75, None)]);
    case.pass();
    case
}

/// A running stage of which rank 0 told a step at second 0, and what it says `seconds` later.
fn later(case: &mut Case, seconds: i64, progress: Option<Progress>, silent_for: Option<i64>) {
    let passed = at(seconds).duration_since(std::mem::replace(&mut case.now, at(seconds)));
    let view = case.view("tune");
    let news = view.progress.as_ref().zip(progress.as_ref()).is_none_or(|(old, new)| old.advanced(new));
    let unchanged_for = view.unchanged_for.filter(|_| !news).map_or(SignedDuration::ZERO, |time| time + passed);
    (view.progress, view.unchanged_for) = (progress, Some(unchanged_for));
    view.silent_for = silent_for.map(SignedDuration::from_secs);
    case.pass();
}

fn step(step: u64, loss: Option<f64>) -> Option<Progress> {
    let metrics = loss.map(|l| ("loss".to_owned(), l)).into_iter().collect();
    Some(Progress { step, total_steps: 9, eta_seconds: Some(step), metrics, ..Default::default() })
}

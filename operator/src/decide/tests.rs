//! The rules by cases: what is seen, what follows.

pub(super) mod planning;

use super::*;
use crate::build::tests::{job, settings};
use crate::view::{End, JobState, PodState, PodView, Wait};
use rlhf_api::job::Failure;
use rlhf_api::report::{Checkpoint, Output, Progress, TerminationMessage};

/// The UID of the tests' job.
const UID: &str = "0123456789-abc";

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(1_800_000_000 + second).unwrap()
}

fn job_view(stage: &str, attempt: u32, state: JobState) -> JobView {
    let pods = if stage == "prepare" { 1 } else { 2 };
    let name = names::attempt("demo", UID, stage, attempt);
    JobView {
        uid: format!("uid-{name}"),
        name,
        version: None,
        attempt,
        deleting: false,
        queue: None,
        suspended: false,
        created: at(0),
        started: Some(at(0)),
        pods,
        succeeded: 0,
        state,
    }
}

fn pod_view(stage: &str, attempt: u32, index: u32, state: PodState) -> PodView {
    PodView {
        name: format!("{}-{index}-x", names::attempt("demo", UID, stage, attempt)),
        uid: format!("uid-{stage}-{attempt}-{index}"),
        attempt,
        index,
        node: Some("node1".into()),
        ip: Some("10.0.0.1".into()),
        deletion_requested: None,
        grace: SignedDuration::ZERO,
        deleting_for: SignedDuration::ZERO,
        disruption: None,
        state,
    }
}

fn ended(code: i32, word: Option<TerminationMessage>) -> PodState {
    PodState::Ended(End { code: Some(code), oom_killed: false, word, text: None, at: Some(at(5)) })
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

    fn made(&self) -> Vec<&str> {
        self.last.make.iter().map(|c| c.job.metadata.name.as_deref().unwrap()).collect()
    }

    fn deleted(&self) -> Vec<&str> {
        self.last.delete.iter().map(|j| j.name.as_str()).collect()
    }

    fn events(&self) -> Vec<&str> {
        self.last.notices.iter().map(|n| n.event.reason()).collect()
    }

    fn condition(&self, kind: &str) -> Option<(&str, &str)> {
        self.status().conditions.iter().find(|c| c.type_ == kind).map(|c| (c.status.as_str(), c.reason.as_str()))
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

#[test]
fn case_17_the_first_pass_numbers_prepare_and_makes_nothing_else() {
    let mut case = Case::new();
    case.pass();
    assert_eq!(case.made(), ["demo-prepare-mfgjn-1"]);
    assert_eq!((case.status().phase, case.slot("prepare").attempt), (Phase::Preparing, 1));
    assert_eq!(case.status().start_time, Some(at(0)));
    assert_eq!(case.status().observed_generation, 1);
    assert_eq!((case.events(), case.slot("tune").attempt), (vec!["StageStarted"], 0));
}

#[test]
fn children_that_a_crash_kept_from_being_made_are_made_by_the_next_pass() {
    let mut case = Case::new();
    case.pass();
    case.pass();
    assert_eq!(case.made(), ["demo-prepare-mfgjn-1"]);
    assert!(case.events().is_empty());
    assert_eq!(case.slot("prepare").attempt, 1);
}

#[test]
fn stages_without_an_edge_between_them_run_side_by_side_once_prepare_is_done() {
    let mut case = Case::prepared();
    assert_eq!(case.made(), ["demo-tune-prgzn-1", "demo-judge-xmzgs-1"]);
    assert_eq!((case.status().phase, case.slot("act").phase), (Phase::Running, StagePhase::Pending));
    assert_eq!(case.status().stage.as_deref(), Some("tune,judge"));
    assert_eq!(case.events(), ["StageSucceeded"]);
    assert!(case.deleted().is_empty(), "the finished prepare Job keeps its log");
    case.observed.stages.remove("prepare");
    case.pass();
    assert_eq!(case.slot("prepare").phase, StagePhase::Succeeded, "a success is not undone by the deletion of its Job");
}

#[test]
fn a_stage_runs_when_all_its_pods_do() {
    let mut case = Case::prepared();
    case.see("tune", 1, JobState::Active, &[PodState::Running, PodState::Waiting(None)]);
    case.pass();
    assert_eq!(case.slot("tune").phase, StagePhase::Starting);
    case.see("tune", 1, JobState::Active, &[PodState::Running, PodState::Running]);
    case.pass();
    assert_eq!(case.slot("tune").phase, StagePhase::Running);
    assert_eq!(case.last.requeue, Some(PROGRESS_PERIOD));
}

#[test]
fn what_keeps_pods_from_starting_stands_in_the_message() {
    let mut case = Case::prepared();
    case.see("judge", 1, JobState::Active, &[PodState::Running, PodState::Running]);
    case.see("tune", 1, JobState::Active, &[PodState::Running, waits("Unschedulable", "0/1 nodes")]);
    case.pass();
    let message = case.status().message.as_deref().unwrap();
    assert_eq!(
        message,
        "tune: attempt 1 waits: pod demo-tune-prgzn-1-1-x: Unschedulable: 0/1 nodes; judge runs (attempt 1)"
    );
    case.assert_quiet();
}

#[test]
fn progress_of_rank_0_is_shown_while_a_stage_runs() {
    let mut case = Case::running();
    let checkpoint = Some(Checkpoint { step: 80, path: "c/80".into() });
    case.view("tune").progress =
        Some(Progress { step: 84, total_steps: 200, checkpoint: checkpoint.clone(), ..Default::default() });
    case.pass();
    assert_eq!(case.status().progress.as_deref(), Some("84/200,-"));
    assert_eq!(case.slot("tune").checkpoint, checkpoint);
    case.assert_quiet();
}

#[test]
fn a_stage_succeeds_with_what_rank_0_said_last() {
    let mut case = Case::running();
    let output = Output { path: "jobs/demo/tune/model".into(), metrics: [("evalLoss".to_owned(), 2.5)].into() };
    let word = TerminationMessage {
        code: 0,
        reason: "Done".into(),
        message: String::new(),
        rank: None,
        step: Some(200),
        checkpoint: None,
        output: Some(output.clone()),
        prepared: None,
    };
    case.see("tune", 1, JobState::Complete, &[ended(0, Some(word)), ended(0, None)]);
    case.see("judge", 1, JobState::Complete, &[ended(0, None), ended(0, None)]);
    case.pass();
    assert_eq!(case.slot("tune").output.as_ref(), Some(&output));
    let fallback = case.slot("judge").output.as_ref().unwrap();
    assert_eq!(fallback.path, "jobs/demo-01234567/judge/model", "a last word that is lost does not lose the model");
    assert_eq!(case.made(), ["demo-act-8cnx7-1"]);
    assert_eq!(case.last.outcomes, [Outcome::Succeeded, Outcome::Succeeded]);
}

#[test]
fn case_25_a_job_whose_stages_all_succeed_has_succeeded_for_good() {
    let mut case = Case::running();
    for stage in ["tune", "judge", "act"] {
        case.see(stage, 1, JobState::Complete, &[ended(0, None), ended(0, None)]);
        case.pass();
    }
    case.now = at(60);
    case.pass();
    assert_eq!((case.status().phase, case.condition("Complete")), (Phase::Succeeded, Some(("True", "Succeeded"))));
    assert!(case.status().completion_time.is_some());
    assert_eq!((case.status().stage.as_deref(), case.status().progress.as_deref()), (None, None));
    case.observed = Observed::default();
    case.job.spec.suspend = true;
    case.job.metadata.generation = Some(2);
    case.pass();
    assert_eq!((case.status().phase, case.status().observed_generation), (Phase::Succeeded, 2));
    assert!(!case.last.touches_children() && case.last.requeue.is_none());
    case.assert_quiet();
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

#[test]
fn case_20_a_failure_is_followed_by_another_attempt_after_its_back_off() {
    let mut case = bad_end(1, |_| ());
    assert_eq!(
        (case.slot("tune").phase, case.slot("tune").attempt, case.slot("tune").restarts.total),
        (StagePhase::Pending, 1, 1)
    );
    assert_eq!(case.slot("tune").not_before, Some(at(20)));
    assert_eq!((case.status().restarts, case.last.requeue), (1, Some(SignedDuration::from_secs(10))));
    assert_eq!(case.slot("tune").last_failure.as_ref().unwrap().reason, "UnexpectedExit");
    assert!(case.made().is_empty() && case.deleted().is_empty(), "the log stays during the back-off");
    assert_eq!(
        (case.events(), case.last.outcomes.as_slice()),
        (vec!["AttemptFailed"], [Outcome::Restarted].as_slice())
    );
    case.now = at(19);
    case.assert_quiet();
    case.now = at(20);
    case.pass();
    assert_eq!((case.made(), case.deleted()), (vec!["demo-tune-prgzn-2"], vec!["demo-tune-prgzn-1"]));
    assert_eq!((case.slot("tune").attempt, case.slot("tune").not_before), (2, None));
}

#[test]
fn the_back_off_doubles_up_to_five_minutes() {
    let mut case = Case::running();
    case.job.spec.failure_policy.max_restarts = 100;
    let mut waits = vec![];
    for attempt in 1..9 {
        case.see("tune", attempt, JobState::Failed, &[ended(1, None)]);
        case.pass();
        let until = case.slot("tune").not_before.unwrap();
        waits.push(until.duration_since(case.now).as_secs());
        case.now = until;
        case.pass();
    }
    assert_eq!(waits, [10, 20, 40, 80, 160, 300, 300, 300]);
}

#[test]
fn a_permanent_failure_ends_the_job_and_stops_what_runs_beside() {
    let mut case = bad_end(65, |_| ());
    assert_eq!((case.status().phase, case.condition("Failed")), (Phase::Failed, Some(("True", "BadInput"))));
    assert_eq!(case.slot("tune").phase, StagePhase::Failed);
    assert_eq!((case.slot("judge").phase, case.slot("act").phase), (StagePhase::Failed, StagePhase::Pending));
    assert_eq!(case.slot("judge").last_failure.as_ref().unwrap().reason, "Stopped");
    assert_eq!(case.deleted(), ["demo-judge-xmzgs-1"], "the failed attempt's Job keeps its log");
    assert_eq!(case.events(), ["AttemptFailed", "JobFailed"]);
    assert!(case.status().message.as_deref().unwrap().starts_with("given up: tune, attempt 1: BadInput: "));
    case.observed.stages.remove("judge");
    case.assert_quiet();
}

#[test]
fn a_crash_after_the_failure_was_written_still_stops_what_runs() {
    let mut case = bad_end(64, |_| ());
    case.pass();
    assert_eq!(case.deleted(), ["demo-judge-xmzgs-1"]);
}

#[test]
fn case_21_and_24_restarts_are_bounded_and_disruptions_are_bounded_apart() {
    let mut case = bad_end(1, |c| c.job.spec.failure_policy.max_restarts = 0);
    assert_eq!(case.condition("Failed"), Some(("True", "RestartsExhausted")));
    assert!(case.status().message.as_deref().unwrap().ends_with("failurePolicy.maxRestarts is 0"));
    case = bad_end(143, |c| c.job.spec.failure_policy.max_restarts = 0);
    assert_eq!(
        (case.status().phase, case.slot("tune").disruptions, case.slot("tune").restarts.total),
        (Phase::Running, 1, 0)
    );
    case = bad_end(143, |c| c.job.spec.failure_policy.max_disruptions = 0);
    assert_eq!(case.condition("Failed"), Some(("True", "DisruptionsExhausted")));
}

#[test]
fn a_disruption_is_followed_by_another_attempt_at_once() {
    let case = bad_end(143, |_| ());
    assert_eq!((case.made(), case.deleted()), (vec!["demo-tune-prgzn-2"], vec!["demo-tune-prgzn-1"]));
    assert_eq!(case.events(), ["AttemptFailed", "StageStarted"]);
    assert_eq!((case.slot("tune").attempt, case.status().restarts), (2, 0));
}

#[test]
fn a_bug_is_retried_once_whatever_lies_between() {
    let mut case = bad_end(70, |_| ());
    assert_eq!((case.slot("tune").bugs, case.slot("tune").restarts.total), (1, 1));
    for (attempt, code) in [(2, 143), (3, 70)] {
        case.now = at(100 * i64::from(attempt));
        case.pass();
        case.see("tune", attempt, JobState::Failed, &[ended(code, None)]);
        case.pass();
    }
    assert_eq!(case.condition("Failed"), Some(("True", "Bug")));
}

#[test]
fn no_attempt_is_made_while_pods_of_an_earlier_one_run() {
    let mut case = Case::running();
    case.view("tune").jobs[0].deleting = true;
    case.view("tune").pods[1].state = PodState::Running;
    case.pass();
    assert_eq!((case.slot("tune").attempt, case.slot("tune").disruptions), (2, 1));
    assert_eq!(case.slot("tune").last_failure.as_ref().unwrap().reason, "PodDeleted");
    assert!(case.made().is_empty());
    case.assert_quiet();
    assert!(
        case.status()
            .message
            .as_deref()
            .unwrap()
            .starts_with("tune: attempt 2 waits for the pods of an earlier attempt")
    );
    case.view("tune").jobs.clear();
    case.pass();
    assert!(case.made().is_empty(), "an orphaned pod still runs");
    case.view("tune").pods.clear();
    case.pass();
    assert_eq!(case.made(), ["demo-tune-prgzn-2"]);
}

#[test]
fn a_pod_that_is_gone_without_a_trace_ends_the_attempt_as_a_disruption() {
    for pods in [vec![PodState::Running], vec![PodState::Running, PodState::Waiting(None)]] {
        let mut case = Case::running();
        case.see("tune", 1, JobState::Active, &pods);
        case.pass();
        assert_eq!((case.slot("tune").attempt, case.slot("tune").disruptions), (2, 1));
        assert_eq!(case.deleted(), ["demo-tune-prgzn-1"]);
        assert!(case.made().is_empty());
    }
}

#[test]
fn a_pod_that_succeeded_and_was_deleted_is_not_missed() {
    let mut case = Case::running();
    case.see("tune", 1, JobState::Active, &[PodState::Running]);
    case.view("tune").jobs[0].succeeded = 1;
    case.pass();
    assert_eq!((case.slot("tune").phase, case.slot("tune").attempt), (StagePhase::Running, 1));
}

#[test]
fn case_26_evidence_is_stored_as_soon_as_the_attempt_fails_and_outlives_its_pods() {
    let mut case = Case::running();
    case.see("tune", 1, JobState::Failing, &[ended(65, None), PodState::Running]);
    case.pass();
    assert_eq!(
        (case.slot("tune").phase, case.slot("tune").last_failure.as_ref().unwrap().code),
        (StagePhase::Running, Some(65))
    );
    case.assert_quiet();
    case.see("tune", 1, JobState::Failed, &[ended(75, None)]);
    case.pass();
    assert_eq!(case.condition("Failed"), Some(("True", "BadInput")));
}

#[test]
fn a_job_without_any_trace_of_its_pods_was_disrupted() {
    let mut case = Case::running();
    case.see("tune", 1, JobState::Failed, &[]);
    case.pass();
    assert_eq!(case.slot("tune").last_failure.as_ref().unwrap().reason, "PodDeleted");
    assert_eq!(case.slot("tune").disruptions, 1);
}

#[test]
fn a_running_attempt_whose_job_is_gone_is_followed_by_the_next() {
    let mut case = Case::running();
    case.observed.stages.remove("tune");
    case.pass();
    assert_eq!((case.made(), case.slot("tune").attempt), (vec!["demo-tune-prgzn-2"], 2));
}

#[test]
fn case_31_a_job_made_suspended_makes_nothing_until_it_is_resumed() {
    let mut case = Case::new();
    case.job.spec.suspend = true;
    case.pass();
    assert_eq!((case.status().phase, case.condition("Suspended")), (Phase::Suspended, Some(("True", "Suspended"))));
    assert!(!case.last.touches_children() && case.last.requeue.is_none());
    case.assert_quiet();
    case.job.spec.suspend = false;
    case.pass();
    assert_eq!((case.made(), case.events()), (vec!["demo-prepare-mfgjn-1"], vec!["StageStarted", "Resumed"]));
    assert_eq!(case.condition("Suspended"), Some(("False", "Resumed")));
}

#[test]
fn case_35_suspension_stops_the_pods_first_and_resumes_the_same_attempt() {
    let mut case = Case::running();
    case.job.spec.suspend = true;
    case.pass();
    assert_eq!(case.deleted(), ["demo-tune-prgzn-1", "demo-judge-xmzgs-1"]);
    assert_eq!(
        (case.status().phase, case.slot("tune").phase),
        (Phase::Running, StagePhase::Starting),
        "pods still run"
    );
    for stage in ["tune", "judge"] {
        // As the Job controller counts them, for it does not mind that the Job is being deleted.
        case.view(stage).jobs[0].state = JobState::Failed;
        case.view(stage).jobs[0].deleting = true;
        for pod in &mut case.view(stage).pods {
            pod.deletion_requested = Some(at(1));
            pod.state = ended(143, None);
        }
    }
    case.pass();
    assert_eq!((case.status().phase, case.last.requeue, case.events()), (Phase::Suspended, None, vec!["Suspended"]));
    assert_eq!(
        (case.slot("tune").disruptions, case.slot("tune").last_failure.as_ref()),
        (0, None),
        "a suspension is no failure"
    );
    case.assert_quiet();
    case.job.spec.suspend = false;
    case.pass();
    assert!(case.made().is_empty(), "the Jobs and their pods are still going");
    for stage in ["tune", "judge"] {
        case.view(stage).jobs.clear();
    }
    case.pass();
    assert!(case.made().is_empty(), "nor is a pod taken for lost that outlives its Job for a moment");
    for stage in ["tune", "judge"] {
        case.view(stage).pods.clear();
    }
    case.pass();
    assert_eq!(case.made(), ["demo-tune-prgzn-1", "demo-judge-xmzgs-1"]);
    assert_eq!((case.status().phase, case.slot("tune").attempt), (Phase::Running, 1));
    for stage in ["tune", "judge"] {
        case.see(stage, 1, JobState::Active, &[PodState::Waiting(None), PodState::Waiting(None)]);
    }
    case.pass();
    assert_eq!(
        (case.slot("tune").phase, case.slot("tune").attempt),
        (StagePhase::Starting, 1),
        "pods that come back are not missed"
    );
}

/// The attempt's Job in the queue, its pods stopped.
fn in_queue(case: &mut Case, stage: &str, pods: &[PodState]) {
    case.see(stage, 1, JobState::Active, pods);
    let job = &mut case.view(stage).jobs[0];
    (job.queue, job.suspended, job.started) = (Some("team-a".into()), true, None);
    for pod in &mut case.view(stage).pods {
        pod.deletion_requested = Some(at(1));
    }
}

#[test]
fn an_attempt_in_a_queue_waits_without_a_deadline_and_says_for_what() {
    let mut case = Case::prepared();
    case.job.spec.active_deadline_seconds = Some(100);
    for stage in ["tune", "judge"] {
        in_queue(&mut case, stage, &[]);
    }
    case.pass();
    let message = "tune: attempt 1 waits: Queued: in queue team-a; judge: attempt 1 waits: Queued: in queue team-a";
    assert_eq!(case.status().message.as_deref(), Some(message));
    assert_eq!(case.last.requeue, Some(SignedDuration::from_secs(10)), "the queue has not spoken yet");
    let text = "in queue team-a: insufficient unused quota for cpu in flavor a, 1 more needed".to_owned();
    case.view("tune").refused = Some(Wait { reason: Wait::QUEUED.into(), text: text.clone() });
    case.pass();
    assert_eq!(case.condition("Waiting"), Some(("True", "Queued")));
    assert!(case.status().message.as_deref().unwrap().contains(&text));
    assert!(case.condition("QuotaExceeded").is_none() && case.condition("AttemptStalled").is_none());
    case.now = at(1_000_000);
    case.assert_quiet();
    assert_eq!((case.slot("tune").attempt, case.slot("tune").starting_since), (1, None));
    assert!(case.status().active_since.is_none() && case.status().active_seconds == 0, "a queue takes no time");
    case.see("tune", 1, JobState::Active, &[PodState::Waiting(None), PodState::Waiting(None)]);
    case.pass();
    assert_eq!(
        (case.slot("tune").starting_since, case.status().active_since),
        (Some(at(1_000_000)), Some(at(1_000_000)))
    );
}

#[test]
fn case_34_an_attempt_that_a_queue_stops_and_lets_go_on_is_the_same_attempt() {
    let mut case = Case::running();
    for turn in 0..20 {
        in_queue(&mut case, "tune", &[ended(143, None), PodState::Running]);
        case.pass();
        assert_eq!(case.slot("tune").phase, StagePhase::Starting, "turn {turn}");
        assert!(case.deleted().is_empty() && case.made().is_empty() && case.last.outcomes.is_empty());
        case.see("tune", 1, JobState::Active, &[PodState::Running, PodState::Running]);
        case.pass();
        assert_eq!(case.slot("tune").phase, StagePhase::Running, "turn {turn}");
    }
    let slot = case.slot("tune");
    assert_eq!((slot.attempt, slot.restarts.total, slot.disruptions, slot.last_failure.as_ref()), (1, 0, 0, None));
}

#[test]
fn a_suspended_job_leaves_its_queue_and_is_queued_again() {
    let mut case = Case::prepared();
    for stage in ["tune", "judge"] {
        in_queue(&mut case, stage, &[]);
    }
    case.job.spec.suspend = true;
    case.pass();
    assert_eq!(case.deleted(), ["demo-tune-prgzn-1", "demo-judge-xmzgs-1"]);
    assert_eq!(case.status().phase, Phase::Running, "a queue may let a Job run until it is gone");
    case.observed = Observed::default();
    case.pass();
    assert_eq!(case.status().phase, Phase::Suspended);
    case.job.spec.suspend = false;
    case.pass();
    assert_eq!(case.made(), ["demo-tune-prgzn-1", "demo-judge-xmzgs-1"]);
}

#[test]
fn a_job_that_somebody_suspended_is_left_to_them_and_told() {
    let mut case = Case::running();
    case.view("tune").jobs[0].suspended = true;
    case.pass();
    assert_eq!(case.condition("Waiting"), Some(("True", "JobSuspended")));
    assert!(case.deleted().is_empty());
    let message = case.status().message.clone().unwrap();
    assert!(message.contains("Job demo-tune-prgzn-1 is suspended, and not by the operator"), "{message}");
}

#[test]
fn pods_that_a_suspension_stopped_have_no_part_in_what_follows() {
    let mut case = Case::running();
    let mut old = |state: &PodState| {
        case.see("tune", 1, JobState::Active, &[state.clone(), state.clone()]);
        case.view("tune").jobs[0].started = Some(at(30));
        for pod in &mut case.view("tune").pods {
            pod.deletion_requested = Some(at(30));
        }
        case.job.status.as_mut().unwrap().stages[0].phase = StagePhase::Starting;
        case.pass();
        (case.slot("tune").phase, case.slot("tune").last_failure.clone())
    };
    assert_eq!(old(&PodState::Running), (StagePhase::Starting, None), "they do not make the attempt run again");
    assert_eq!(old(&ended(143, None)), (StagePhase::Starting, None), "nor are they its failure");
    let mut new = pod_view("tune", 1, 0, ended(65, None));
    new.name = "new".into();
    case.view("tune").pods.push(new);
    case.view("tune").jobs[0].state = JobState::Failed;
    case.pass();
    assert_eq!(case.condition("Failed"), Some(("True", "BadInput")));
}

#[test]
fn what_was_recorded_of_an_attempt_that_then_succeeds_is_dropped() {
    let mut case = Case::running();
    case.see("tune", 1, JobState::Active, &[ended(143, None), PodState::Running]);
    case.pass();
    assert_eq!(case.slot("tune").last_failure.as_ref().unwrap().reason, "Terminated");
    case.assert_quiet();
    case.see("tune", 1, JobState::Complete, &[ended(0, None), ended(0, None)]);
    case.pass();
    assert_eq!((case.slot("tune").phase, case.slot("tune").last_failure.as_ref()), (StagePhase::Succeeded, None));
}

#[test]
fn case_36_no_back_off_runs_out_during_suspension() {
    let mut case = bad_end(1, |c| {
        c.see("judge", 1, JobState::Complete, &[ended(0, None), ended(0, None)]);
        c.pass();
    });
    case.job.spec.suspend = true;
    case.now = at(500);
    case.pass();
    assert_eq!((case.status().phase, case.last.requeue), (Phase::Suspended, None));
    assert!(case.made().is_empty());
    case.job.spec.suspend = false;
    case.pass();
    assert_eq!(case.made(), ["demo-tune-prgzn-2"]);
}

#[test]
fn children_that_are_newer_than_the_status_mean_that_the_status_is_old() {
    let mut case = Case::running();
    case.see("tune", 2, JobState::Active, &[]);
    case.assert_quiet();
    assert!(case.made().is_empty());
    case.now = at(61);
    case.pass();
    let message = case.status().message.clone().unwrap();
    assert!(message.starts_with("the status was set back: it knows nothing of Job demo-tune-prgzn-2"), "{message}");
    case.assert_quiet();
    assert!(case.made().is_empty());
}

#[test]
fn case_39_a_refusal_is_told_once_and_tried_again_later() {
    let mut case = Case::new();
    case.pass();
    let trouble = trouble("prepare", "Job demo-prepare-mfgjn-1 exists and belongs to somebody else", 5);
    case.observed.troubles = vec![trouble.clone()];
    case.pass();
    let message = "prepare, attempt 1: Job demo-prepare-mfgjn-1 exists and belongs to somebody else";
    assert_eq!((case.status().message.as_deref(), case.events()), (Some(message), vec!["Blocked"]));
    assert!(case.made().is_empty());
    assert_eq!(case.last.requeue, Some(SignedDuration::from_secs(5)));
    case.assert_quiet();
    case.now = at(5);
    case.observed.troubles = vec![Trouble { retry_after: SignedDuration::ZERO, ..trouble.clone() }];
    case.pass();
    assert_eq!(case.made(), ["demo-prepare-mfgjn-1"]);
    case.observed.troubles = vec![Trouble { permanent: true, ..trouble }];
    case.pass();
    assert_eq!((case.status().phase, case.condition("Failed")), (Phase::Failed, Some(("True", "Rejected"))));
}

#[test]
fn two_stages_that_are_refused_wait_each_for_itself() {
    let mut case = Case::prepared();
    let refused =
        |stage, seconds| trouble(stage, &format!("Job {} is refused", names::attempt("demo", UID, stage, 1)), seconds);
    case.observed.troubles = vec![refused("tune", 5), refused("judge", 10)];
    case.pass();
    let message =
        "tune, attempt 1: Job demo-tune-prgzn-1 is refused; judge, attempt 1: Job demo-judge-xmzgs-1 is refused";
    assert_eq!((case.status().message.as_deref(), case.events()), (Some(message), vec!["Blocked", "Blocked"]));
    assert_eq!((case.made().len(), case.last.requeue), (0, Some(SignedDuration::from_secs(5))));
    case.assert_quiet();
    case.observed.troubles = vec![refused("tune", 0), refused("judge", 5)];
    case.pass();
    assert_eq!(case.made(), ["demo-tune-prgzn-1"]);
    assert!(case.events().is_empty(), "what stands in the message was told");
    case.observed.troubles.remove(0);
    case.see("tune", 1, JobState::Active, &[PodState::Running, PodState::Running]);
    case.pass();
    let message = "tune runs (attempt 1); judge, attempt 1: Job demo-judge-xmzgs-1 is refused";
    assert_eq!((case.status().message.as_deref(), case.events()), (Some(message), vec![]));
    assert_eq!((case.made().len(), case.condition("Waiting")), (0, Some(("True", "Refused"))));
}

#[test]
fn long_refusals_are_cut_so_that_each_is_told() {
    let mut case = Case::prepared();
    let refused = |stage| trouble(stage, &"policy ".repeat(200), 5);
    case.observed.troubles = vec![refused("tune"), refused("judge")];
    case.pass();
    let message = case.status().message.clone().unwrap();
    assert!(message.contains("tune, attempt 1: policy") && message.contains("judge, attempt 1: policy"), "{message}");
    assert_eq!(case.events(), ["Blocked", "Blocked"]);
    assert_eq!(case.last.notices[1].about.as_deref(), Some("demo-judge-xmzgs-1"));
    case.observed.troubles = vec![Trouble { is_news: false, ..refused("judge") }];
    case.pass();
    assert!(!case.events().contains(&"Blocked"), "that there is more room for it is no news");
}

#[test]
fn case_6_a_spec_that_admission_should_have_refused_fails_with_the_field_named() {
    let mut case = Case::new();
    case.job.spec.model.source = Some("elsewhere".into());
    case.pass();
    assert_eq!(case.condition("Failed"), Some(("True", "InvalidSpec")));
    assert!(case.status().message.as_deref().unwrap().starts_with("spec.model.source"));
    assert!(!case.last.touches_children());
}

#[test]
fn a_job_that_is_being_deleted_is_left_alone() {
    let mut case = Case::running();
    case.job.metadata.deletion_timestamp = Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(at(0)));
    case.see("tune", 1, JobState::Failed, &[]);
    case.assert_quiet();
    assert!(case.made().is_empty());
}

#[test]
fn a_condition_keeps_its_time_while_it_holds() {
    let mut case = Case::new();
    case.job.spec.suspend = true;
    case.pass();
    case.now = at(100);
    case.pass();
    assert_eq!(case.status().conditions[0].last_transition_time.0, at(0));
    case.job.spec.suspend = false;
    case.pass();
    assert_eq!(case.status().conditions[0].last_transition_time.0, at(100));
}

#[test]
fn the_same_failure_reads_the_same_in_status_and_event() {
    let case = bad_end(74, |_| ());
    let Failure { reason, code, pod, attempt, .. } = case.slot("tune").last_failure.clone().unwrap();
    assert_eq!(
        (reason.as_str(), code, pod.as_deref(), attempt),
        ("StorageFailed", Some(74), Some("demo-tune-prgzn-1-0-x"), 1)
    );
    assert!(case.last.notices[0].note.starts_with("tune, attempt 1: StorageFailed: "));
    assert_eq!(case.last.notices[0].about.as_deref(), Some("demo-tune-prgzn-1"));
}

/// A stage whose second pod waits, the other stage running.
fn one_waits(pod: PodState) -> Case {
    let mut case = Case::prepared();
    case.see("judge", 1, JobState::Active, &[PodState::Running, PodState::Running]);
    case.see("tune", 1, JobState::Active, &[PodState::Running, pod]);
    case.pass();
    case
}

#[test]
fn case_16_and_48_pods_that_do_not_start_in_time_end_the_attempt_with_what_they_wait_for() {
    for (reason, text) in [
        ("Unschedulable", "0/1 nodes are available: 1 Insufficient cpu"),
        ("ImagePull", "image docker.io/x:1 cannot be pulled"),
        ("CreateContainerConfigError", "secret \"token\" not found"),
    ] {
        let mut case = one_waits(waits(reason, text));
        assert_eq!(case.condition("Waiting"), Some(("True", reason)));
        assert_eq!((case.condition("QuotaExceeded"), case.slot("tune").starting_since), (None, Some(at(0))));
        case.now = at(1799);
        case.assert_quiet();
        assert_eq!(case.last.requeue, Some(SignedDuration::from_secs(1)));
        case.now = at(1800);
        case.pass();
        let failure = case.slot("tune").last_failure.clone().unwrap();
        assert_eq!((failure.reason.as_str(), failure.code), ("StartupDeadlineExceeded", None));
        assert_eq!((failure.pod.as_deref(), failure.node.as_deref()), (Some("demo-tune-prgzn-1-1-x"), Some("node1")));
        assert!(failure.message.contains("(1800 s): pod demo-tune-prgzn-1-1-x: ") && failure.message.ends_with(text));
        assert_eq!((case.slot("tune").restarts.total, case.deleted()), (1, vec!["demo-tune-prgzn-1"]));
        assert_eq!(case.condition("Waiting"), Some(("False", "Passed")));
    }
}

#[test]
fn an_image_name_that_is_none_fails_the_job_at_once() {
    let case = one_waits(waits("InvalidImageName", "x y is no name of an image"));
    assert_eq!(case.condition("Failed"), Some(("True", "InvalidImageName")));
    assert_eq!((case.slot("tune").restarts.total, case.last.requeue), (0, None));
}

#[test]
fn pods_that_start_late_but_in_time_are_no_failure() {
    let mut case = one_waits(waits("Unschedulable", "0/1 nodes"));
    case.now = at(1799);
    case.see("tune", 1, JobState::Active, &[PodState::Running, PodState::Running]);
    case.pass();
    assert_eq!((case.slot("tune").phase, case.slot("tune").starting_since), (StagePhase::Running, None));
    assert_eq!(case.condition("Waiting"), Some(("False", "Passed")));
    case.now = at(1801);
    case.assert_quiet();
}

#[test]
fn case_13_and_38_a_quota_that_refuses_part_of_a_gang_is_a_condition_and_its_pods_go_at_the_deadline() {
    let mut case = Case::prepared();
    case.see("judge", 1, JobState::Active, &[PodState::Running, PodState::Running]);
    case.see("tune", 1, JobState::Active, &[PodState::Running]);
    case.view("tune").refused = Some(Wait { reason: Wait::QUOTA.into(), text: "exceeded quota: q".into() });
    case.pass();
    assert_eq!(case.slot("tune").phase, StagePhase::Starting, "not running while a rank is missing");
    for kind in ["Waiting", "QuotaExceeded"] {
        assert_eq!(case.condition(kind), Some(("True", "QuotaExceeded")), "{kind}");
    }
    assert!(case.status().message.as_deref().unwrap().starts_with("tune: attempt 1 waits: QuotaExceeded: exceeded"));
    assert_eq!(case.last.requeue, Some(PROGRESS_PERIOD), "no watch tells when the quota changes");
    case.assert_quiet();
    case.now = at(1800);
    case.pass();
    assert_eq!((case.deleted(), case.slot("tune").restarts.total), (vec!["demo-tune-prgzn-1"], 1));
    assert_eq!(case.condition("QuotaExceeded"), Some(("False", "Passed")));
}

#[test]
fn case_5_children_that_are_refused_are_a_condition_and_a_failure_at_the_deadline() {
    let mut case = Case::new();
    case.pass();
    let message = "Job demo-prepare-mfgjn-1 is refused by the API server: admission webhook \"w\" denied the request";
    case.observed.troubles = vec![trouble("prepare", message, 5)];
    case.pass();
    assert_eq!(case.condition("Waiting"), Some(("True", "Refused")));
    case.assert_quiet();
    case.now = at(1800);
    case.pass();
    let failure = case.slot("prepare").last_failure.clone().unwrap();
    assert_eq!(failure.reason, "StartupDeadlineExceeded");
    assert!(failure.message.ends_with(&format!("Refused: {message}")), "{}", failure.message);
}

#[test]
fn the_time_to_start_is_counted_anew_after_a_suspension_and_not_while_an_earlier_attempts_pods_end() {
    let mut case = one_waits(waits("Unschedulable", "0/1 nodes"));
    (case.now, case.job.spec.suspend) = (at(1700), true);
    case.pass();
    case.observed = Observed::default();
    case.pass();
    assert_eq!((case.status().phase, case.last.requeue), (Phase::Suspended, None), "no timer runs");
    assert_eq!(case.slot("tune").starting_since, None);
    (case.now, case.job.spec.suspend) = (at(9000), false);
    case.pass();
    assert_eq!((case.slot("tune").starting_since, case.slot("tune").restarts.total), (Some(at(9000)), 0));

    let mut case = Case::running();
    case.view("tune").jobs[0].deleting = true;
    case.pass();
    case.now = at(9000);
    case.pass();
    assert_eq!((case.slot("tune").attempt, case.slot("tune").starting_since), (2, None), "attempt 2 is not made yet");
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

#[test]
fn an_attempt_that_stands_still_is_restarted_and_one_that_moves_or_cannot_be_heard_is_not() {
    let told = || step(3, Some(0.5));
    let estimate = told().map(|p| Progress { eta_seconds: Some(99), ..p });
    let saved = told().map(|p| Progress { checkpoint: Some(Checkpoint { step: 3, path: "c".into() }), ..p });
    for (name, first, seconds, then, silent, stalls) in [
        ("a step not long ago", told(), 899, told(), None, false),
        ("no step for too long", told(), 900, told(), None, true),
        ("only the estimate moves", told(), 900, estimate, None, true),
        ("a step just now", told(), 5000, step(4, Some(0.4)), None, false),
        ("a long step in which it works", told(), 900, told().map(|p| Progress { activity: 7, ..p }), None, false),
        ("an evaluation just now", told(), 900, step(3, Some(0.4)), None, false),
        ("a checkpoint just now", told(), 900, saved, None, false),
        ("it spoke and has long been silent", told(), 2000, told(), Some(900), true),
        ("the operator has only begun to ask", told(), 2000, None, Some(0), false),
        ("it spoke to another process and never to this one", told(), 5000, None, Some(5000), false),
        ("the model is written after the last step", step(9, Some(0.5)), 1799, step(9, Some(0.5)), None, false),
        ("the model is written for too long", step(9, Some(0.5)), 1800, step(9, Some(0.5)), None, true),
        ("it never spoke", None, 5000, None, Some(5000), false),
        ("nobody asked", told(), 5000, None, None, false),
        ("it still loads", step(0, None), 1799, step(0, None), None, false),
        ("it loads for too long", step(0, None), 1800, step(0, None), None, true),
    ] {
        let mut case = Case::running();
        later(&mut case, 0, first, None);
        later(&mut case, seconds, then, silent);
        assert_eq!(case.slot("tune").restarts.total, u32::from(stalls), "{name}");
        let condition = stalls.then_some(("True", "Stalled"));
        assert_eq!(case.condition("AttemptStalled"), condition, "{name}");
        if stalls {
            let failure = case.slot("tune").last_failure.clone().unwrap();
            assert_eq!(
                (failure.reason.as_str(), failure.pod.as_deref()),
                ("Stalled", Some("demo-tune-prgzn-1-0-x")),
                "{name}"
            );
            assert_eq!((case.deleted(), case.events()), (vec!["demo-tune-prgzn-1"], vec!["AttemptFailed"]), "{name}");
        }
    }
}

#[test]
fn a_clock_that_is_set_restarts_nothing_and_holds_up_nothing() {
    for jump in [100_000, -100_000] {
        let mut case = Case::running();
        later(&mut case, 0, step(3, Some(0.5)), None);
        case.now = at(jump);
        later(&mut case, jump + 10, step(3, Some(0.5)), None);
        assert_eq!(case.slot("tune").restarts.total, 0, "set by {jump}");
        later(&mut case, jump + 1000, step(3, Some(0.5)), None);
        assert_eq!(case.slot("tune").restarts.total, 1, "set by {jump}: a stall is seen as soon as before");
        case.observed.stages.remove("tune");
        case.now = at(jump + 1000 - 100_000);
        case.pass();
        let until = case.slot("tune").not_before.unwrap();
        assert!(
            until.duration_since(case.now) <= SignedDuration::from_secs(300),
            "the next attempt waits until {until}"
        );
        case.now = until;
        case.pass();
        assert_eq!(case.slot("tune").attempt, 2);
        assert_eq!(case.made(), ["demo-tune-prgzn-2"]);
    }
}

#[test]
fn deadlines_are_no_later_for_a_clock_that_is_set_back() {
    let mut starting = Case::prepared();
    for stage in ["tune", "judge"] {
        starting.see(stage, 1, JobState::Active, &[PodState::Waiting(None), PodState::Waiting(None)]);
    }
    starting.pass();
    starting.now = at(-100_000);
    starting.pass();
    assert_eq!(starting.slot("tune").starting_since, Some(starting.now));
    let deadline = i64::from(starting.job.spec.failure_policy.startup_deadline_seconds);
    for (second, restarts) in [(deadline - 1, 0), (deadline, 1)] {
        starting.now = at(second - 100_000);
        starting.pass();
        assert_eq!(starting.slot("tune").restarts.total, restarts, "{second} s after");
    }

    let mut active = Case::running();
    active.job.spec.active_deadline_seconds = Some(100);
    for (second, phase) in [(0, Phase::Running), (99, Phase::Running), (100, Phase::Failed)] {
        active.now = at(second - 100_000);
        active.pass();
        assert_eq!(active.status().phase, phase, "{second} s after");
    }
}

#[test]
fn signs_of_life_count_for_a_short_limit_too() {
    let mut case = Case::running();
    case.job.spec.failure_policy.stall_seconds = 30;
    let working = |activity| step(3, Some(0.5)).map(|p| Progress { activity, ..p });
    for second in (0..200).step_by(10) {
        later(&mut case, second, working(second as u64), None);
        assert_eq!(case.slot("tune").restarts.total, 0, "at {second}");
    }
    later(&mut case, 200, working(190), None);
    later(&mut case, 230, working(190), None);
    assert_eq!(case.slot("tune").restarts.total, 1);
}

#[test]
fn signs_of_life_between_steps_are_written_once_a_minute() {
    let mut case = Case::running();
    let working = |activity| step(3, Some(0.5)).map(|p| Progress { activity, ..p });
    later(&mut case, 0, working(1), None);
    later(&mut case, 59, working(2), None);
    assert_eq!(case.slot("tune").progress, working(1));
    later(&mut case, 60, working(3), None);
    assert_eq!((case.slot("tune").progress.clone(), case.slot("tune").advanced_at), (working(3), Some(at(60))));
    later(&mut case, 61, step(4, Some(0.4)).map(|p| Progress { activity: 4, ..p }), None);
    assert_eq!(
        case.slot("tune").progress.as_ref().map(|p| (p.step, p.activity)),
        Some((4, 4)),
        "a step is told at once"
    );
}

#[test]
fn a_stall_is_over_once_the_next_attempt_has_made_a_step() {
    let mut case = Case::running();
    later(&mut case, 0, step(3, Some(0.5)), None);
    later(&mut case, 900, step(3, Some(0.5)), None);
    case.observed.stages.remove("tune");
    case.assert_quiet();
    case.now = at(910);
    case.pass();
    assert_eq!(case.made(), ["demo-tune-prgzn-2"]);
    case.see("tune", 2, JobState::Active, &[PodState::Running, PodState::Running]);
    later(&mut case, 920, step(2, None), None);
    assert_eq!(case.condition("AttemptStalled"), Some(("True", "Stalled")), "it has only resumed");
    later(&mut case, 930, step(3, Some(0.5)), None);
    assert_eq!(case.condition("AttemptStalled"), Some(("False", "Advanced")));
    case.assert_quiet();
}

#[test]
fn zero_stall_seconds_never_restart_and_prepare_is_not_watched() {
    let mut case = Case::running();
    case.job.spec.failure_policy.stall_seconds = 0;
    later(&mut case, 0, step(3, Some(0.5)), None);
    later(&mut case, 1_000_000, step(3, Some(0.5)), None);
    assert_eq!((case.slot("tune").phase, case.slot("tune").restarts.total), (StagePhase::Running, 0));
    let mut case = Case::new();
    case.pass();
    case.see("prepare", 1, JobState::Active, &[PodState::Running]);
    case.pass();
    case.now = at(1_000_000);
    case.assert_quiet();
    assert_eq!(case.last.requeue, None);
}

#[test]
fn the_active_deadline_counts_all_time_but_suspensions_and_gives_way_to_success() {
    let mut case = Case::running();
    case.job.spec.active_deadline_seconds = Some(100);
    case.now = at(60);
    case.job.spec.suspend = true;
    case.observed = Observed::default();
    case.job.status.as_mut().unwrap().stages[..2].iter_mut().for_each(|s| s.phase = StagePhase::Starting);
    case.pass();
    assert_eq!((case.status().active_seconds, case.status().active_since, case.last.requeue), (60, None, None));
    case.now = at(10_000);
    case.assert_quiet();
    case.job.spec.suspend = false;
    for stage in ["tune", "judge"] {
        case.see(stage, 1, JobState::Active, &[PodState::Running, PodState::Running]);
    }
    case.pass();
    case.now = at(10_039);
    case.pass();
    assert_eq!((case.status().phase, case.last.requeue), (Phase::Running, Some(SignedDuration::from_secs(1))));
    let mut done =
        Case { job: case.job.clone(), observed: case.observed.clone(), now: at(10_040), last: Decision::default() };
    case.now = at(10_040);
    case.pass();
    assert_eq!(case.condition("Failed"), Some(("True", "DeadlineExceeded")));
    assert_eq!((case.deleted(), case.status().active_seconds), (vec!["demo-tune-prgzn-1", "demo-judge-xmzgs-1"], 100));
    assert_eq!(case.slot("tune").last_failure.as_ref().unwrap().reason, "Stopped");
    case.observed = Observed::default();
    case.assert_quiet();

    let status = done.job.status.as_mut().unwrap();
    status.stages[2].phase = StagePhase::Succeeded;
    for stage in ["tune", "judge"] {
        done.see(stage, 1, JobState::Complete, &[ended(0, None), ended(0, None)]);
    }
    done.pass();
    assert_eq!(done.status().phase, Phase::Succeeded);
}

#[test]
fn a_job_that_ended_is_deleted_after_its_time_to_live_and_not_before() {
    let mut case = bad_end(65, |_| ());
    case.observed = Observed::default();
    case.assert_quiet();
    assert_eq!((case.last.expired, case.last.requeue), (false, None), "without the field it stays, and no timer runs");
    case.job.spec.ttl_seconds_after_finished = Some(60);
    case.now = at(69);
    case.assert_quiet();
    assert_eq!((case.last.expired, case.last.requeue), (false, Some(SignedDuration::from_secs(1))));
    case.now = at(70);
    case.assert_quiet();
    assert!(case.last.expired);
}

#[test]
fn case_27_success_is_told_once_no_pod_lingers() {
    let mut case = Case::running();
    case.see("tune", 1, JobState::Complete, &[ended(0, None), PodState::Running]);
    case.pass();
    assert_eq!(case.slot("tune").phase, StagePhase::Running);
    case.see("tune", 1, JobState::Complete, &[ended(0, None), ended(0, None)]);
    case.pass();
    assert_eq!(case.slot("tune").phase, StagePhase::Succeeded);
}

#[test]
fn case_23_a_pod_whose_node_does_not_end_it_is_given_up_and_the_gang_starts_anew() {
    let mut case = Case::running();
    case.see("tune", 1, JobState::Failing, &[ended(75, None), PodState::Running]);
    case.view("tune").pods[1].deletion_requested = Some(at(6));
    case.view("tune").pods[1].grace = SignedDuration::from_secs(114);
    case.now = at(100_000);
    case.view("tune").pods[1].deleting_for = SignedDuration::from_secs(293);
    case.pass();
    assert!(case.last.lost.is_empty(), "the clock alone says nothing");
    assert_eq!(case.last.requeue, Some(SignedDuration::from_secs(1)));
    case.view("tune").pods[1].deleting_for = SignedDuration::from_secs(294);
    case.pass();
    let lost: Vec<_> = case.last.lost.iter().map(|p| (p.name.as_str(), p.uid.as_str(), p.node.as_deref())).collect();
    assert_eq!(lost, [("demo-tune-prgzn-1-1-x", "uid-tune-1-1", Some("node1"))]);
    assert_eq!(case.events(), ["PodLost"]);
    assert_eq!(case.slot("tune").last_failure.as_ref().unwrap().reason, "PeerLost", "until it is known");
    case.view("tune").pods[1].disruption = Some("NodeLost: node node1 did not end the pod in time".into());
    case.view("tune").pods[1].state =
        PodState::Ended(End { code: None, oom_killed: false, word: None, text: None, at: None });
    case.view("tune").jobs[0].state = JobState::Failed;
    case.pass();
    assert_eq!(
        (case.made(), case.slot("tune").disruptions, case.slot("tune").restarts.total),
        (vec!["demo-tune-prgzn-2"], 1, 0)
    );
    let failure = case.slot("tune").last_failure.clone().unwrap();
    assert_eq!((failure.reason.as_str(), failure.node.as_deref()), ("NodeLost", Some("node1")));
}

#[test]
fn a_terminal_job_gives_up_its_lost_pods_too() {
    let mut case = bad_end(65, |_| ());
    case.view("judge").pods[0].deletion_requested = Some(at(20));
    case.view("judge").pods[0].deleting_for = LOST_AFTER;
    case.pass();
    assert_eq!((case.last.lost.len(), case.status().phase), (1, Phase::Failed));
}

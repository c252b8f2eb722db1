//! What follows a bad end.

use super::*;

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
    assert_eq!((case.made(), case.deleted()), (names(["tune-2"]), vec![]), "its log stays still");
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
    assert_eq!((case.slot("judge").phase, case.slot("act").phase), (StagePhase::Stopped, StagePhase::Stopped));
    assert_eq!((case.slot("judge").completion_time, case.slot("act").completion_time), (Some(at(10)), None));
    assert_eq!(case.slot("judge").last_failure.as_ref().unwrap().reason, "Stopped");
    assert_eq!(case.deleted(), ["judge-1"], "the failed attempt's Job keeps its log");
    assert_eq!(case.events(), ["AttemptFailed", "JobFailed"]);
    assert!(case.status().message.as_deref().unwrap().starts_with("given up: tune, attempt 1: BadInput: "));
    case.observed.stages.remove("judge");
    case.assert_quiet();
}

#[test]
fn a_crash_after_the_failure_was_written_still_stops_what_runs() {
    let mut case = bad_end(64, |_| ());
    case.pass();
    assert_eq!(case.deleted(), ["judge-1"]);
}

#[test]
fn case_21_and_24_restarts_are_bounded_and_disruptions_are_bounded_apart() {
    let mut case = bad_end(1, |c| c.job.spec.failure_policy.max_restarts = 0);
    assert_eq!(case.condition("Failed"), Some(("True", "RestartsExhausted")));
    assert!(case.status().message.as_deref().unwrap().ends_with("failurePolicy.maxRestarts is 0 for each 10 steps"));
    case = bad_end(143, |c| c.job.spec.failure_policy.max_restarts = 0);
    assert_eq!(
        (case.status().phase, case.slot("tune").disruptions, case.slot("tune").restarts.total),
        (Phase::Running, 1, 0)
    );
    case = bad_end(143, |c| c.job.spec.failure_policy.max_disruptions = 0);
    assert_eq!(case.condition("Failed"), Some(("True", "DisruptionsExhausted")));
}

#[test]
fn a_disruption_after_a_step_is_followed_by_another_attempt_at_once() {
    let case = bad_end(143, |c| later(c, 1, step(3, None), None));
    assert_eq!((case.made(), case.deleted()), (names(["tune-2"]), vec![]));
    assert_eq!(case.events(), ["AttemptFailed", "StageStarted"]);
    assert_eq!((case.slot("tune").attempt, case.status().restarts, case.status().disruptions), (2, 0, 1));
}

#[test]
fn a_bug_is_retried_once_whatever_lies_between() {
    let mut case = bad_end(70, |_| ());
    assert_eq!((case.slot("tune").bugs, case.slot("tune").restarts.total), (1, 1));
    for (attempt, code) in [(2, 143), (3, 70)] {
        case.now = at(1000 * i64::from(attempt));
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
    assert_eq!((case.slot("tune").attempt, case.slot("tune").disruptions), (1, 1));
    assert_eq!(case.slot("tune").last_failure.as_ref().unwrap().reason, "PodDeleted");
    case.now = at(10);
    case.pass();
    assert_eq!(case.slot("tune").attempt, 2);
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
    let left = std::mem::take(&mut case.view("tune").pods);
    case.view("tune").strays = left;
    case.pass();
    assert!(case.made().is_empty(), "a pod that is left behind still runs");
    case.view("tune").strays.clear();
    case.pass();
    assert_eq!(case.made(), ["tune-2"]);
}

#[test]
fn a_pod_that_is_gone_without_a_trace_ends_the_attempt_as_a_disruption() {
    for pods in [vec![PodState::Running], vec![PodState::Running, PodState::Waiting(None)]] {
        let mut case = Case::running();
        case.see("tune", 1, JobState::Active, &pods);
        case.pass();
        assert_eq!((case.slot("tune").phase, case.slot("tune").disruptions), (StagePhase::Pending, 1));
        assert_eq!(case.deleted(), ["tune-1"]);
        assert!(case.made().is_empty());
    }
}

#[test]
fn a_pod_that_succeeded_and_was_deleted_is_not_missed() {
    let mut case = Case::running();
    case.see("tune", 1, JobState::Active, &[PodState::Running]);
    case.view("tune").jobs[0].completed = vec![1..=1];
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
    assert_eq!(case.slot("tune").last_failure.as_ref().unwrap().reason, "PodDeleted");
    case.now = at(10);
    case.pass();
    assert_eq!((case.made(), case.slot("tune").attempt), (names(["tune-2"]), 2));
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
fn the_same_failure_reads_the_same_in_status_and_event() {
    let case = bad_end(74, |_| ());
    let Failure { reason, code, pod, attempt, .. } = case.slot("tune").last_failure.clone().unwrap();
    assert_eq!((reason.as_str(), code, pod.as_deref(), attempt), ("StorageFailed", Some(74), Some("tune-1-0-x"), 1));
    assert!(case.last.notices[0].note.starts_with("tune, attempt 1: StorageFailed: "));
    assert_eq!(case.last.notices[0].about, Some(view::attempt(&case.job, "tune", 1)));
}

//! What keeps attempts from starting.

use super::*;

/// A stage whose second pod waits, the other stage running.
fn one_waits(pod: PodState) -> Case {
    let mut case = Case::prepared();
    case.see("judge", 1, JobState::Active, &[PodState::Running, PodState::Running]);
    case.see("tune", 1, JobState::Active, &[PodState::Running, pod]);
    case.pass();
    case
}

#[test]
fn case_16_pods_that_do_not_start_in_time_end_the_attempt_with_what_they_wait_for() {
    for (reason, text) in [
        ("ImagePull", "image docker.io/x:1 cannot be pulled"),
        ("CreateContainerConfigError", "secret \"token\" not found"),
    ] {
        let mut case = one_waits(waits(reason, text));
        assert_eq!(case.condition("Waiting"), Some(("True", reason)));
        assert_eq!((case.holds("QuotaExceeded"), case.slot("tune").starting_since), (false, Some(at(0))));
        case.now = at(1799);
        case.assert_quiet();
        assert_eq!(case.last.requeue, Some(SignedDuration::from_secs(1)));
        case.now = at(1800);
        case.pass();
        let failure = case.slot("tune").last_failure.clone().unwrap();
        assert_eq!((failure.reason.as_str(), failure.code), ("StartupDeadlineExceeded", None));
        assert_eq!((failure.pod.as_deref(), failure.node.as_deref()), (Some("tune-1-1-x"), Some("node1")));
        assert!(failure.message.contains("(1800 s): pod tune-1-1-x: ") && failure.message.ends_with(text));
        assert_eq!((case.slot("tune").restarts.total, case.deleted()), (1, names(["tune-1"])));
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
    let mut case = one_waits(waits("ImagePull", "image x cannot be pulled"));
    case.now = at(1799);
    case.see("tune", 1, JobState::Active, &[PodState::Running, PodState::Running]);
    case.pass();
    assert_eq!((case.slot("tune").phase, case.slot("tune").starting_since), (StagePhase::Running, None));
    assert_eq!(case.condition("Waiting"), Some(("False", "Passed")));
    case.now = at(1801);
    case.assert_quiet();
}

#[test]
fn case_13_and_38_a_quota_that_refuses_part_of_a_gang_is_a_condition_and_no_failure() {
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
    case.now = at(1_000_000);
    case.assert_quiet();
    case.see("tune", 1, JobState::Active, &[PodState::Running, PodState::Running]);
    case.pass();
    assert_eq!((case.slot("tune").restarts.total, case.slot("tune").phase), (0, StagePhase::Running));
    assert_eq!(case.condition("QuotaExceeded"), Some(("False", "Passed")));
}

#[test]
fn the_time_to_start_is_counted_anew_after_a_suspension_and_not_while_an_earlier_attempts_pods_end() {
    let mut case = one_waits(waits("ImagePull", "image x cannot be pulled"));
    (case.now, case.job.spec.suspend) = (at(1700), true);
    case.pass();
    case.observed = Observed::default();
    case.pass();
    assert_eq!((case.status().phase, case.last.requeue), (Phase::Suspended, Some(RESYNC)), "no timer runs");
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

#[test]
fn case_48_waiting_for_room_is_no_failure_however_long_it_takes() {
    let unschedulable = || waits("Unschedulable", "0/1 nodes are available: 1 Insufficient cpu");
    let mut case = one_waits(unschedulable());
    assert_eq!((case.slot("tune").starting_since, case.slot("tune").pending_since), (None, Some(at(0))));
    case.now = at(10_000_000);
    case.assert_quiet();
    assert_eq!(case.condition("Waiting"), Some(("True", "Unschedulable")));
    let mut patient = case.again();
    // Once it has room, the time to start begins.
    let pulls = |case: &mut Case| case.see("tune", 1, JobState::Active, &[PodState::Running, PodState::Waiting(None)]);
    pulls(&mut patient);
    patient.pass();
    assert_eq!(patient.slot("tune").starting_since, Some(at(10_000_000)));
    assert_eq!(patient.slot("tune").pending_since, None);
    patient.now = at(10_001_799);
    patient.assert_quiet();
    patient.now = at(10_001_800);
    patient.pass();
    assert_eq!(patient.slot("tune").last_failure.as_ref().unwrap().reason, "StartupDeadlineExceeded");
    // Who does not want to wait for ever says so.
    case.job.spec.failure_policy.pending_timeout_seconds = Some(10_000_001);
    case.assert_quiet();
    assert_eq!(case.last.requeue, Some(SignedDuration::from_secs(1)));
    case.now = at(10_000_001);
    case.pass();
    assert_eq!(case.condition("Failed"), Some(("True", "PendingTimeoutExceeded")));
    let message = case.status().message.clone().unwrap();
    assert!(message.contains("(10000001 s): pod tune-1-1-x: Unschedulable: 0/1 nodes"), "{message}");
}

#[test]
fn an_image_that_is_missing_counts_although_another_pod_has_no_node() {
    let mut case = Case::prepared();
    let image = waits("ImagePull", "image x cannot be pulled");
    case.see("tune", 1, JobState::Active, &[waits("Unschedulable", "0/1 nodes"), image]);
    case.pass();
    assert_eq!((case.slot("tune").starting_since, case.slot("tune").pending_since), (Some(at(0)), Some(at(0))));
    case.now = at(1800);
    case.pass();
    let failure = case.slot("tune").last_failure.clone().unwrap();
    assert!(failure.message.ends_with("pod tune-1-1-x: ImagePull: image x cannot be pulled"), "{}", failure.message);
}

#[test]
fn a_volume_that_is_not_there_is_told_with_the_pod_that_waits_for_it() {
    let mut case = one_waits(PodState::Waiting(None));
    assert_eq!(case.last.requeue, Some(PROGRESS_PERIOD), "its events are looked at");
    let wait = Wait::new("FailedMount", "no-such-folder is not a directory");
    case.view("tune").mount = Some(("tune-1-1-x".into(), wait));
    case.pass();
    assert_eq!(case.condition("Waiting"), Some(("True", "FailedMount")));
    let message = "tune: attempt 1 waits: pod tune-1-1-x: FailedMount: no-such-folder is not a directory";
    assert!(case.status().message.as_deref().unwrap().starts_with(message));
    case.now = at(1800);
    case.pass();
    assert!(case.slot("tune").last_failure.as_ref().unwrap().message.ends_with("no-such-folder is not a directory"));
}

#[test]
fn what_a_pass_has_to_ask_follows_from_its_own_clock() {
    let mut case = one_waits(PodState::Waiting(None));
    let slot = case.slot("tune").clone();
    for (second, asked) in [(19, false), (20, true)] {
        assert_eq!(ask::for_mount(&slot, case.view("tune"), at(second)).is_some(), asked, "{second}");
    }
    case.see("tune", 1, JobState::Active, &[PodState::Running]);
    case.view("tune").jobs[0].started = Some(at(-100_000));
    for (second, asked) in [(2, false), (3, true)] {
        let job = case.job.clone();
        let lack = ask::for_lack(&job, &slot, case.view("tune"), at(second));
        assert_eq!(matches!(lack, Some(ask::Lack::JobController(_))), asked, "{second}");
    }
    (case.view("tune").jobs[0].suspended, case.view("tune").jobs[0].queue) = (true, Some("q".into()));
    let job = case.job.clone();
    assert!(matches!(ask::for_lack(&job, &slot, case.view("tune"), at(0)), Some(ask::Lack::Queue(_))));
}

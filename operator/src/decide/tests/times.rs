//! Deadlines, and clocks that are set.

use super::*;

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
        assert_eq!(case.made(), ["tune-2"]);
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
fn the_active_deadline_counts_all_time_but_suspensions_and_gives_way_to_success() {
    let mut case = Case::running();
    case.job.spec.active_deadline_seconds = Some(100);
    case.now = at(60);
    case.job.spec.suspend = true;
    case.observed = Observed::default();
    case.job.status.as_mut().unwrap().stages[..2].iter_mut().for_each(|s| s.phase = StagePhase::Starting);
    case.pass();
    assert_eq!((case.status().active_seconds, case.status().active_since, case.last.requeue), (60, None, Some(RESYNC)));
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
    assert_eq!((case.deleted(), case.status().active_seconds), (names(["tune-1", "judge-1"]), 100));
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

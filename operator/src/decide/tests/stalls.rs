//! Attempts that stand still.

use super::*;

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
        ("it spoke and has long been silent, which is its kubelet's to see", told(), 2000, told(), Some(900), false),
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
        let condition = if stalls { ("True", "Stalled") } else { ("False", "NoStall") };
        assert_eq!(case.condition("AttemptStalled"), Some(condition), "{name}");
        if stalls {
            let failure = case.slot("tune").last_failure.clone().unwrap();
            assert_eq!((failure.reason.as_str(), failure.pod.as_deref()), ("Stalled", Some("tune-1-0-x")), "{name}");
            assert_eq!((case.deleted(), case.events()), (names(["tune-1"]), vec!["AttemptFailed"]), "{name}");
        }
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
    assert_eq!(case.made(), ["tune-2"]);
    case.see("tune", 2, JobState::Active, &[PodState::Running, PodState::Running]);
    later(&mut case, 920, step(2, None), None);
    assert_eq!(case.condition("AttemptStalled"), Some(("True", "Stalled")), "it has only resumed");
    later(&mut case, 930, step(3, Some(0.5)), None);
    assert_eq!(case.condition("AttemptStalled"), Some(("False", "Advanced")));
    case.assert_quiet();
}

#[test]
fn zero_stall_seconds_never_restart() {
    let mut case = Case::running();
    case.job.spec.failure_policy.stall_seconds = 0;
    later(&mut case, 0, step(3, Some(0.5)), None);
    later(&mut case, 1_000_000, step(3, Some(0.5)), None);
    assert_eq!((case.slot("tune").phase, case.slot("tune").restarts.total), (StagePhase::Running, 0));
}

#[test]
fn an_operator_that_hears_of_nobody_restarts_nobody_and_says_who_does_not_answer() {
    let mut case = Case::running();
    later(&mut case, 0, step(3, Some(0.5)), None);
    later(&mut case, 1_000_000, step(3, Some(0.5)), Some(1_000_000));
    assert_eq!((case.slot("tune").phase, case.slot("tune").restarts.total), (StagePhase::Running, 0));
    let message = case.status().message.clone().unwrap();
    assert!(message.starts_with("tune runs (attempt 1, and its rank 0 does not answer); judge runs"), "{message}");
    case.assert_quiet();
}

#[test]
fn prepare_has_a_deadline_whatever_it_tells() {
    let mut case = Case::new();
    case.pass();
    case.now = at(100);
    case.see("prepare", 1, JobState::Active, &[PodState::Running]);
    case.pass();
    assert_eq!((case.status().phase, case.last.requeue), (Phase::Preparing, Some(RESYNC)));
    for (silence, period) in [(59, SignedDuration::from_secs(10)), (60, RESYNC)] {
        (case.view("prepare").silent_for, case.view("prepare").ask_again) =
            (Some(SignedDuration::from_secs(silence)), Some(SignedDuration::from_secs(10)));
        case.pass();
        assert_eq!(case.last.requeue, Some(period), "silent for {silence} s");
    }
    case.view("prepare").silent_for = None;
    case.view("prepare").ask_again = None;
    case.now = at(7299);
    case.view("prepare").progress = Some(Progress { step: 7, total_steps: 9, ..Default::default() });
    case.pass();
    assert_eq!(case.status().progress.as_deref(), Some("7/9"), "what it tells is shown");
    assert_eq!(case.last.requeue, Some(SignedDuration::from_secs(1)));
    case.now = at(7300);
    case.pass();
    assert_eq!(case.condition("Failed"), Some(("True", "PrepareDeadlineExceeded")));
    let failure = case.slot("prepare").last_failure.clone().unwrap();
    assert_eq!(failure.pod.as_deref(), Some("prepare-1-0-x"));
    assert_eq!(case.deleted(), ["prepare-1"]);
}

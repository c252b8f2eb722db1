//! Restarts and back-offs by the progress that is made between them, and the records of attempts.

use super::*;

/// What rank 0 tells at a step, and of which checkpoint.
fn saved(at_step: u64, checkpoint: Option<u64>) -> Option<Progress> {
    let checkpoint = checkpoint.map(|step| Checkpoint { step, path: format!("c/{step}") });
    step(at_step, Some(0.5)).map(|p| Progress { checkpoint, ..p })
}

/// Ends the stage's attempt so, at this step, and starts the next once its back-off is over; returns the back-off.
fn fails_at(case: &mut Case, at_step: u64, code: i32) -> i64 {
    let attempt = case.slot("tune").attempt;
    case.see("tune", attempt, JobState::Active, &[PodState::Running, PodState::Running]);
    case.pass();
    case.view("tune").progress = step(at_step, Some(0.5));
    case.pass();
    ends(case, code)
}

/// Ends the stage's attempt where it is, and starts the next once its back-off is over; returns the back-off.
fn ends(case: &mut Case, code: i32) -> i64 {
    let attempt = case.slot("tune").attempt;
    case.see("tune", attempt, JobState::Failed, &[ended(code, None)]);
    case.pass();
    let until = case.slot("tune").not_before.unwrap_or(case.now);
    let wait = until.duration_since(case.now).as_secs();
    case.now = until;
    case.observed.stages.remove("tune");
    case.pass();
    wait
}

#[test]
fn restarts_are_counted_since_the_last_progress_and_in_all() {
    let mut case = Case::running();
    let counts = |case: &Case| (case.slot("tune").restarts.since_progress, case.slot("tune").restarts.total);
    for (step, wanted) in [(5, (1, 1)), (9, (2, 2)), (10, (1, 3)), (19, (2, 4)), (30, (1, 5))] {
        fails_at(&mut case, step, 1);
        assert_eq!(counts(&case), wanted, "step {step}");
    }
    // From the same checkpoint to the same end again and again is no progress, however many steps lie between.
    for wanted in [(2, 6), (3, 7)] {
        fails_at(&mut case, 30, 1);
        assert_eq!(counts(&case), wanted);
    }
    fails_at(&mut case, 30, 1);
    assert_eq!(case.condition("Failed"), Some(("True", "RestartsExhausted")));
    assert_eq!(case.status().restarts, 7);
}

#[test]
fn disruptions_back_off_while_no_step_is_made_between_them() {
    let mut case = Case::running();
    let waits: Vec<_> = [7, 7, 7, 8, 8].map(|step| fails_at(&mut case, step, 143)).into();
    assert_eq!(waits, [0, 10, 20, 0, 10]);
    let mut never = Case::running();
    let waits: Vec<_> = [0; 8].map(|step| fails_at(&mut never, step, 143)).into();
    assert_eq!(waits, [10, 20, 40, 80, 160, 300, 300, 300], "however few attempts are kept");
    assert_eq!(never.slot("tune").restarts.total, 0);
    // What an attempt reached whose record is long gone is no new ground, either.
    let mut far = Case::running();
    let waits: Vec<_> = [9, 7, 7, 7, 7, 7, 8, 10].map(|step| fails_at(&mut far, step, 143)).into();
    assert_eq!(waits, [0, 10, 20, 40, 80, 160, 300, 0]);
}

#[test]
fn steps_whose_checkpoint_is_lost_are_new_ground_once_more() {
    let attempt = |case: &mut Case, told: &[Option<Progress>]| {
        let attempt = case.slot("tune").attempt;
        case.see("tune", attempt, JobState::Active, &[PodState::Running, PodState::Running]);
        case.pass();
        for progress in told {
            case.view("tune").progress = progress.clone();
            case.pass();
        }
        ends(case, 143)
    };
    let checkpoint = |case: &Case| case.slot("tune").checkpoint.as_ref().map(|c| c.step);
    let begun = || {
        let mut case = Case::running();
        assert_eq!(attempt(&mut case, &[saved(300, Some(280))]), 0);
        case
    };
    let mut kept = begun();
    // It does not know yet from where it goes on; then it makes no step beyond the last.
    assert_eq!(attempt(&mut kept, &[step(0, None), saved(281, Some(280)), saved(290, Some(280))]), 10);
    assert_eq!((kept.slot("tune").furthest_step, checkpoint(&kept)), (300, Some(280)));
    let mut again = begun();
    assert_eq!(attempt(&mut again, &[step(3, Some(0.5)), step(120, Some(0.5))]), 0, "it begins again");
    assert_eq!((again.slot("tune").furthest_step, checkpoint(&again)), (120, None));
    assert_eq!(attempt(&mut again, &[step(3, Some(0.5)), step(100, Some(0.5))]), 10, "no checkpoint was lost");
    let mut earlier = begun();
    assert_eq!(attempt(&mut earlier, &[saved(141, Some(140)), saved(150, Some(140))]), 0);
    assert_eq!((earlier.slot("tune").furthest_step, checkpoint(&earlier)), (150, Some(140)));
}

#[test]
fn the_last_five_attempts_are_kept_with_what_they_ran_with_and_where_they_ended() {
    let mut case = Case::running();
    case.job.spec.failure_policy.max_restarts = 50;
    for attempt in 1..8 {
        fails_at(&mut case, attempt, 74);
    }
    let records = &case.slot("tune").attempts;
    let numbers: Vec<_> = records.iter().map(|r| (r.number, r.step)).collect();
    assert_eq!(numbers, [(3, Some(3)), (4, Some(4)), (5, Some(5)), (6, Some(6)), (7, Some(7))]);
    let last = records.last().unwrap();
    assert_eq!((last.reason.as_str(), last.node.as_deref()), ("StorageFailed", Some("node1")));
    assert!(last.strategy.is_some() && last.start.unwrap() <= last.end);
    assert_eq!(case.slot("tune").start_time, Some(at(0)));
}

#[test]
fn the_log_of_the_attempt_before_stays_until_the_next_has_ended() {
    let mut case = Case::running();
    case.job.spec.failure_policy.max_restarts = 50;
    let all = |case: &mut Case, states: &[JobState]| {
        let view = case.observed.stages.entry("tune".into()).or_default();
        view.jobs = (1..).zip(states).map(|(i, state)| job_view("tune", i, state.clone())).collect();
        view.pods = vec![pod_view("tune", states.len() as u32, 0, ended(1, None))];
    };
    all(&mut case, &[JobState::Failed]);
    case.pass();
    case.now = at(10);
    case.pass();
    assert_eq!((case.slot("tune").attempt, case.deleted()), (2, vec![]));
    all(&mut case, &[JobState::Failed, JobState::Failed]);
    case.pass();
    assert_eq!((case.slot("tune").phase, case.deleted()), (StagePhase::Pending, vec![]));
    case.now = at(100);
    case.pass();
    assert_eq!((case.slot("tune").attempt, case.deleted()), (3, names(["tune-1"])));
    all(&mut case, &[JobState::Failed, JobState::Failed, JobState::Complete]);
    case.view("tune").jobs.remove(0);
    case.view("tune").pods = vec![pod_view("tune", 3, 0, ended(0, None))];
    case.pass();
    assert_eq!((case.slot("tune").phase, case.deleted()), (StagePhase::Succeeded, names(["tune-2"])));
}

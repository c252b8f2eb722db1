//! What the API server refuses.

use super::*;

#[test]
fn case_39_a_refusal_is_told_once_and_tried_again_later() {
    let mut case = Case::new();
    case.pass();
    let trouble = trouble("prepare", "Job demo-prepare-1 exists and belongs to somebody else", 5);
    case.observed.troubles = vec![trouble.clone()];
    case.pass();
    let message = "prepare, attempt 1: Job demo-prepare-1 exists and belongs to somebody else";
    assert_eq!((case.status().message.as_deref(), case.events()), (Some(message), vec!["Blocked"]));
    assert!(case.made().is_empty());
    assert_eq!(case.last.requeue, Some(SignedDuration::from_secs(5)));
    case.assert_quiet();
    case.now = at(5);
    case.observed.troubles = vec![Trouble { retry_after: SignedDuration::ZERO, ..trouble.clone() }];
    case.pass();
    assert_eq!(case.made(), ["prepare-1"]);
    case.observed.troubles = vec![Trouble { permanent: true, ..trouble }];
    case.pass();
    assert_eq!((case.status().phase, case.condition("Failed")), (Phase::Failed, Some(("True", "Rejected"))));
}

#[test]
fn two_stages_that_are_refused_wait_each_for_itself() {
    let mut case = Case::prepared();
    let refused = |stage, seconds| trouble(stage, &format!("Job demo-{stage}-1 is refused"), seconds);
    case.observed.troubles = vec![refused("tune", 5), refused("judge", 10)];
    case.pass();
    let message = "tune, attempt 1: Job demo-tune-1 is refused; judge, attempt 1: Job demo-judge-1 is refused";
    assert_eq!((case.status().message.as_deref(), case.events()), (Some(message), vec!["Blocked", "Blocked"]));
    assert_eq!((case.made().len(), case.last.requeue), (0, Some(SignedDuration::from_secs(5))));
    case.assert_quiet();
    case.observed.troubles = vec![refused("tune", 0), refused("judge", 5)];
    case.pass();
    assert_eq!(case.made(), ["tune-1"]);
    assert!(case.events().is_empty(), "what stands in the message was told");
    case.observed.troubles.remove(0);
    case.see("tune", 1, JobState::Active, &[PodState::Running, PodState::Running]);
    case.pass();
    let message = "tune runs (attempt 1); judge, attempt 1: Job demo-judge-1 is refused";
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
    assert_eq!(case.last.notices[1].about, Some(view::attempt(&case.job, "judge", 1)));
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
fn a_job_that_has_begun_waits_while_its_spec_is_refused_and_what_runs_goes_on() {
    let mut case = Case::running();
    let source = case.job.spec.model.source.replace("elsewhere".into());
    case.pass();
    assert_eq!((case.condition("Failed"), case.deleted()), (Some(("False", "NotFailed")), vec![]));
    assert_eq!(case.condition("Waiting"), Some(("True", "InvalidSpec")));
    assert!(case.status().message.as_deref().unwrap().starts_with("spec.model.source"));
    assert_eq!(case.slot("tune").phase, StagePhase::Running);
    // An attempt that ends is settled, and no other follows until the spec is taken again.
    case.see("tune", 1, JobState::Failed, &[ended(71, None), ended(75, None)]);
    case.pass();
    case.now = at(1000);
    case.pass();
    assert_eq!((case.slot("tune").phase, case.slot("tune").attempt), (StagePhase::Pending, 1));
    assert!(!case.status().phase.is_terminal() && case.made().is_empty());
    case.job.spec.model.source = source;
    case.pass();
    case.pass();
    assert_eq!((case.made(), case.condition("Waiting")), (names(["tune-2"]), Some(("False", "Passed"))));
}

#[test]
fn case_5_children_that_are_refused_are_a_condition_and_no_failure_however_long_it_takes() {
    let mut case = Case::new();
    case.pass();
    let message = "Job demo-prepare-1 is refused by the API server: admission webhook \"w\" denied the request";
    case.observed.troubles = vec![trouble("prepare", message, 5)];
    case.pass();
    assert_eq!(case.condition("Waiting"), Some(("True", "Refused")));
    assert_eq!(case.status().phase, Phase::Waiting);
    case.assert_quiet();
    case.now = at(1_000_000);
    case.observed.troubles[0].is_news = false;
    case.assert_quiet();
    assert_eq!((case.slot("prepare").restarts.total, case.slot("prepare").pending_since), (0, Some(at(0))));
    case.job.spec.failure_policy.pending_timeout_seconds = Some(1_000_000);
    case.pass();
    let failure = case.slot("prepare").last_failure.clone().unwrap();
    assert_eq!(failure.reason, "PendingTimeoutExceeded");
    assert!(failure.message.ends_with(&format!("Refused: {message}")), "{}", failure.message);
    assert_eq!(case.condition("Failed"), Some(("True", "PendingTimeoutExceeded")));
}

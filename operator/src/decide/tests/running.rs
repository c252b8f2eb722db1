//! What is done while all goes well.

use super::*;

#[test]
fn case_17_the_first_pass_numbers_prepare_and_makes_nothing_else() {
    let mut case = Case::new();
    case.pass();
    assert_eq!(case.made(), ["prepare-1"]);
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
    assert_eq!(case.made(), ["prepare-1"]);
    assert!(case.events().is_empty());
    assert_eq!(case.slot("prepare").attempt, 1);
}

#[test]
fn stages_without_an_edge_between_them_run_side_by_side_once_prepare_is_done() {
    let mut case = Case::prepared();
    assert_eq!(case.made(), ["tune-1", "judge-1"]);
    assert_eq!((case.status().phase, case.slot("act").phase), (Phase::Waiting, StagePhase::Pending));
    assert_eq!(case.condition("Waiting"), Some(("True", "Starting")));
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
    assert_eq!((case.slot("tune").phase, case.status().phase), (StagePhase::Starting, Phase::Waiting));
    case.see("tune", 1, JobState::Active, &[PodState::Running, PodState::Running]);
    case.pass();
    assert_eq!((case.slot("tune").phase, case.status().phase), (StagePhase::Running, Phase::Running));
    assert_eq!(case.condition("Waiting"), Some(("False", "Passed")));
    assert_eq!(case.last.requeue, Some(PROGRESS_PERIOD));
}

#[test]
fn what_keeps_pods_from_starting_stands_in_the_message() {
    let mut case = Case::prepared();
    case.see("judge", 1, JobState::Active, &[PodState::Running, PodState::Running]);
    case.see("tune", 1, JobState::Active, &[PodState::Running, waits("Unschedulable", "0/1 nodes")]);
    case.pass();
    let message = case.status().message.as_deref().unwrap();
    assert_eq!(message, "tune: attempt 1 waits: pod tune-1-1-x: Unschedulable: 0/1 nodes; judge runs (attempt 1)");
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
    assert_eq!(case.made(), ["act-1"]);
    assert_eq!(case.last.outcomes, [Outcome::Succeeded, Outcome::Succeeded]);
}

#[test]
fn a_last_word_that_is_not_believed_does_not_undo_a_trainers_success_but_is_told() {
    let mut case = Case::running();
    let doubt = Some("it is no document of the contract".to_owned());
    let end = End { code: Some(0), doubt, at: Some(at(5)), ..End::default() };
    case.see("tune", 1, JobState::Complete, &[PodState::Ended(Box::new(end)), ended(0, None)]);
    case.pass();
    assert_eq!((case.slot("tune").phase, case.slot("tune").restarts.total), (StagePhase::Succeeded, 0));
    let told = &case.last.notices[0];
    assert_eq!(told.event, Event::StageSucceeded);
    assert!(told.note.ends_with("its last word is not believed: it is no document of the contract"), "{}", told.note);
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
    let since = |case: &Case| {
        let suspended = case.status().conditions.iter().find(|c| c.type_ == "Suspended").cloned();
        suspended.unwrap().last_transition_time.0
    };
    assert_eq!(since(&case), at(0));
    case.job.spec.suspend = false;
    case.pass();
    assert_eq!(since(&case), at(100));
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
    assert!(message.starts_with("the status was set back: it knows nothing of Job "), "{message}");
    assert!(message.contains(&view::attempt(&case.job, "tune", 2)), "{message}");
    case.assert_quiet();
    assert!(case.made().is_empty());
}

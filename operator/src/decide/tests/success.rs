//! Success, and what containers beside the trainer and the Job controller make of it.

use super::*;
use rlhf_api::config::KeepCheckpoints;

/// A stage whose trainers ended well, with its pods in this state for Kubernetes.
fn trainers_done(state: JobState, spoiled: bool, lives_on: bool) -> Case {
    let mut case = Case::running();
    let end = End {
        code: Some(0),
        spoiled_by: spoiled.then(|| "container logs beside the trainer ended with exit code 1".to_owned()),
        at: Some(at(5)),
        ..End::default()
    };
    case.see("tune", 1, state, &[PodState::Ended(Box::new(end.clone())), PodState::Ended(Box::new(end))]);
    case.view("tune").pods[1].lives_on = lives_on;
    case.pass();
    case
}

#[test]
fn case_44_a_stage_has_succeeded_once_every_trainer_has_whatever_else_is_in_its_pods() {
    for (state, spoiled, lives_on) in [
        (JobState::Active, false, true),
        (JobState::Active, false, false),
        (JobState::Failing, true, true),
        (JobState::Failing, true, false),
        (JobState::Failed, true, false),
    ] {
        let mut case = trainers_done(state.clone(), spoiled, lives_on);
        let slot = case.slot("tune");
        assert_eq!((slot.phase, slot.disruptions), (StagePhase::Succeeded, 0), "{state:?}");
        assert!(slot.output.is_some() && slot.completion_time == Some(at(0)));
        let deleted = if lives_on { names(["tune-1"]) } else { vec![] };
        assert_eq!(
            case.deleted(),
            deleted,
            "what lives on is removed, once the output is stored; the rest ends itself"
        );
        case.observed.stages.remove("tune");
        case.assert_quiet();
    }
}

#[test]
fn a_container_beside_the_trainer_that_fails_its_pod_before_the_gang_is_done_is_a_failure() {
    let mut case = Case::running();
    let spoiled = End {
        code: Some(0),
        spoiled_by: Some("container logs beside the trainer ended with exit code 1".into()),
        at: Some(at(5)),
        ..End::default()
    };
    case.see("tune", 1, JobState::Failed, &[PodState::Ended(Box::new(spoiled)), ended(143, None)]);
    case.view("tune").pods[1].deletion_requested = Some(at(6));
    case.pass();
    let failure = case.slot("tune").last_failure.clone().unwrap();
    assert_eq!((failure.reason.as_str(), case.slot("tune").restarts.total), ("UnexpectedExit", 1));
    assert!(failure.message.contains("container logs beside the trainer"), "{}", failure.message);
}

#[test]
fn a_trainer_that_fails_beside_a_container_that_lives_on_ends_its_attempt_once_no_trainer_runs() {
    let mut case = Case::running();
    case.see("tune", 1, JobState::Active, &[PodState::Running, ended(71, None)]);
    case.view("tune").pods[1].lives_on = true;
    case.pass();
    assert_eq!((case.slot("tune").phase, case.deleted()), (StagePhase::Running, vec![]), "its peer has its last word");
    case.see("tune", 1, JobState::Active, &[ended(75, None), ended(71, None)]);
    case.view("tune").pods[1].lives_on = true;
    case.pass();
    let failure = case.slot("tune").last_failure.clone().unwrap();
    assert_eq!((failure.code, failure.pod.as_deref()), (Some(71), Some("tune-1-1-x")));
    assert_eq!((case.slot("tune").phase, case.deleted()), (StagePhase::Pending, names(["tune-1"])));
    // The next is not made before the Job is gone.
    case.view("tune").jobs[0].deleting = true;
    case.now = at(1000);
    case.pass();
    case.pass();
    assert_eq!((case.slot("tune").attempt, case.made()), (2, vec![]));
    case.observed.stages.remove("tune");
    case.pass();
    assert_eq!(case.made(), ["tune-2"]);
}

#[test]
fn a_kubelet_that_never_says_that_a_pod_has_ended_is_not_waited_for_without_bound() {
    // The trainers ended at second 5, and Kubernetes was told no more.
    let mut done = trainers_done(JobState::Active, false, false);
    let mut failed = Case::running();
    failed.see("tune", 1, JobState::Active, &[ended(75, None), ended(71, None)]);
    for (case, before, after) in [
        (&mut done, StagePhase::Succeeded, StagePhase::Succeeded),
        (&mut failed, StagePhase::Running, StagePhase::Pending),
    ] {
        case.view("tune").pods.iter_mut().for_each(|pod| pod.grace = SignedDuration::from_secs(100));
        case.now = at(284);
        case.pass();
        assert_eq!((case.slot("tune").phase, case.deleted()), (before, vec![]));
        assert_eq!(case.last.requeue, Some(SignedDuration::from_secs(1)));
        case.now = at(285);
        case.pass();
        assert_eq!((case.slot("tune").phase, case.deleted()), (after, names(["tune-1"])));
    }
    assert_eq!(failed.slot("tune").last_failure.as_ref().unwrap().code, Some(71));
}

#[test]
fn case_27_success_is_told_once_no_trainer_lingers() {
    let mut case = Case::running();
    case.see("tune", 1, JobState::Complete, &[ended(0, None), PodState::Running]);
    case.pass();
    assert_eq!(case.slot("tune").phase, StagePhase::Running);
    case.see("tune", 1, JobState::Complete, &[ended(0, None), ended(0, None)]);
    case.pass();
    assert_eq!(case.slot("tune").phase, StagePhase::Succeeded);
}

#[test]
fn the_count_of_the_job_controller_stands_for_pods_that_are_gone() {
    let mut case = Case::running();
    case.see("tune", 1, JobState::Active, &[ended(0, None)]);
    case.view("tune").jobs[0].completed = vec![1..=1];
    case.pass();
    assert_eq!(case.slot("tune").phase, StagePhase::Succeeded);
}

#[test]
fn the_final_figures_are_those_of_one_and_the_same_step() {
    let mut case = Case::running();
    later(&mut case, 1, step(150, Some(1.13)), None);
    let output = Output { path: "o".into(), metrics: [("evalLoss".to_owned(), 2.5)].into() };
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
    case.pass();
    let progress = case.slot("tune").progress.clone().unwrap();
    assert_eq!((progress.step, &progress.metrics, progress.eta_seconds), (200, &output.metrics, None));
    let record = case.slot("tune").attempts.last().unwrap();
    assert_eq!((record.number, record.reason.as_str(), record.step), (1, "Done", Some(200)));
    assert_eq!((record.start, record.end), (Some(at(0)), at(1)));
}

#[test]
fn a_checkpoint_is_named_as_long_as_it_is_there() {
    for (keep, named) in [(KeepCheckpoints::Running, None), (KeepCheckpoints::Always, Some(150))] {
        let mut case = Case::running();
        case.job.spec.storage.keep_checkpoints = keep;
        let checkpoint = Some(Checkpoint { step: 150, path: "c/150".into() });
        later(&mut case, 1, step(150, Some(1.13)).map(|p| Progress { checkpoint, ..p }), None);
        assert_eq!(case.slot("tune").checkpoint.as_ref().map(|c| c.step), Some(150));
        case.see("tune", 1, JobState::Complete, &[ended(0, None), ended(0, None)]);
        case.pass();
        let slot = case.slot("tune");
        let last = slot.progress.clone().unwrap().checkpoint;
        assert_eq!([slot.checkpoint.clone(), last].map(|c| c.map(|c| c.step)), [named, named], "{keep:?}");
    }
}

#[test]
fn every_condition_is_there_from_the_first_status_on() {
    let mut case = Case::new();
    case.pass();
    let kinds: std::collections::BTreeSet<_> = case.status().conditions.iter().map(|c| c.type_.clone()).collect();
    let wanted = [
        "AttemptStalled",
        "Complete",
        "Failed",
        "QuotaExceeded",
        "Reconciling",
        "Stalled",
        "Suspended",
        "Unsupported",
        "Waiting",
    ];
    assert!(kinds.iter().eq(wanted.iter()), "{kinds:?}");
    let holding: Vec<_> = wanted.into_iter().filter(|kind| case.holds(kind)).collect();
    assert_eq!(holding, ["Reconciling"]);
    let failed = bad_end(65, |_| ());
    let holding: Vec<_> = wanted.into_iter().filter(|kind| failed.holds(kind)).collect();
    assert_eq!(holding, ["Failed", "Stalled"], "for tools that know no RLHFJobs");
}

#[test]
fn a_stage_of_a_kind_that_is_not_known_is_a_condition_and_starts_nothing() {
    let mut case = Case::new();
    case.job.spec.stages[2].ppo = None;
    case.pass();
    assert_eq!(case.condition("Unsupported"), Some(("True", "NotKnown")));
    assert_eq!((case.made().len(), case.status().phase), (0, Phase::Waiting));
    assert!(case.status().message.as_deref().unwrap().starts_with("stage act is of a kind"));
    case.assert_quiet();
    case.job.spec.stages = job().spec.stages;
    case.pass();
    assert_eq!((case.condition("Unsupported"), case.made()), (Some(("False", "Supported")), names(["prepare-1"])));
}

#[test]
fn a_member_or_a_source_that_is_not_known_is_a_condition_that_names_it_and_starts_nothing() {
    use serde_json::{Value, json};
    type Change = fn(&mut Value);
    let cases: [(Change, &str); 5] = [
        (|s| s["stages"][2]["ppo"]["advantage"] = json!({"optimalTransport": {}}), "spec.stages[act].ppo.advantage"),
        (
            |s| s["stages"][2]["ppo"]["rewards"][0] = json!({"name": "tests", "http": {"url": "https://x"}}),
            "spec.stages[act].ppo.rewards[tests]",
        ),
        (|s| s["model"] = json!({"source": "oci://a/b"}), "spec.model.source"),
        (|s| s["stages"][1]["rewardModel"]["start"] = json!({"hub": {}}), "spec.stages[judge].rewardModel.start"),
        (
            |s| s["stages"][0]["sft"]["dataset"]["source"] = json!("oci://datasets/a"),
            "spec.stages[tune].sft.dataset.source",
        ),
    ];
    for (change, field) in cases {
        let mut case = Case::new();
        let mut spec = serde_json::to_value(&case.job.spec).unwrap();
        change(&mut spec);
        case.job.spec = serde_json::from_value(spec).unwrap();
        case.pass();
        assert_eq!(case.condition("Unsupported"), Some(("True", "NotKnown")), "{field}");
        let told = format!("{field} says something that this version of the operator does not know");
        assert_eq!(case.status().message.as_deref(), Some(told.as_str()));
        assert_eq!((case.made().len(), case.status().phase), (0, Phase::Waiting), "{field}");
        case.assert_quiet();
    }
}

#[test]
fn the_image_is_the_one_with_which_the_job_started() {
    let mut case = Case::new();
    case.pass();
    let image = |case: &Case| {
        let pod = case.last.make[0].job.spec.clone().unwrap().template.spec.unwrap();
        pod.containers[0].image.clone().unwrap()
    };
    let first = image(&case);
    assert_eq!(case.status().images.as_ref().unwrap().trainer, first);
    let upgraded = Settings { trainer_image: "docker.io/rlhf/trainer:next".into(), ..settings() };
    case.last = decide(&case.job, &case.observed, &upgraded, case.now);
    assert_eq!(image(&case), first);
}

#[test]
fn case_25_the_image_is_pinned_by_the_digest_that_prepares_own_pod_tells() {
    let id = |byte: &str| Some(format!("docker.io/rlhf/trainer@sha256:{}", byte.repeat(32)));
    let mut case = Case::new();
    case.pass();
    let by_tag = case.status().images.clone().unwrap().trainer;
    assert_eq!(by_tag, settings().trainer_image);
    case.see("prepare", 1, JobState::Active, &[PodState::Running]);
    // One with the same labels and a Job of the same name, which is not the job's.
    let stray = PodView { image_id: id("0b"), ..pod_view("prepare", 1, 0, PodState::Running) };
    case.view("prepare").strays = vec![stray];
    case.pass();
    assert_eq!(case.status().images.as_ref().unwrap().trainer, by_tag);
    case.view("prepare").pods[0].image_id = id("0a");
    case.pass();
    assert_eq!(case.status().images.as_ref().unwrap().trainer, id("0a").unwrap());
    case.view("prepare").pods[0].image_id = id("0c");
    case.assert_quiet();
}

#[test]
fn prepare_that_has_succeeded_has_done_all_whenever_it_was_last_asked() {
    let mut case = Case::new();
    case.pass();
    case.see("prepare", 1, JobState::Active, &[PodState::Running]);
    case.view("prepare").progress =
        Some(Progress { step: 7, total_steps: 9, eta_seconds: Some(3), ..Default::default() });
    case.pass();
    case.see("prepare", 1, JobState::Complete, &[ended(0, None)]);
    case.pass();
    let progress = case.slot("prepare").progress.clone().unwrap();
    assert_eq!((progress.step, progress.total_steps, progress.eta_seconds), (9, 9, None));
}

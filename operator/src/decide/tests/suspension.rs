//! Suspensions, by the job and by queues.

use super::*;

#[test]
fn case_31_a_job_made_suspended_makes_nothing_until_it_is_resumed() {
    let mut case = Case::new();
    case.job.spec.suspend = true;
    case.pass();
    assert_eq!((case.status().phase, case.condition("Suspended")), (Phase::Suspended, Some(("True", "Suspended"))));
    assert!(!case.last.touches_children() && case.last.requeue == Some(RESYNC));
    assert!(!case.holds("Reconciling"), "nothing goes on");
    case.assert_quiet();
    case.job.spec.suspend = false;
    case.pass();
    assert_eq!((case.made(), case.events()), (names(["prepare-1"]), vec!["StageStarted", "Resumed"]));
    assert_eq!(case.condition("Suspended"), Some(("False", "Resumed")));
}

#[test]
fn case_35_suspension_stops_the_pods_first_and_resumes_the_same_attempt() {
    let mut case = Case::running();
    case.job.spec.suspend = true;
    case.pass();
    assert_eq!(case.deleted(), ["tune-1", "judge-1"]);
    assert_eq!(
        (case.status().phase, case.slot("tune").phase),
        (Phase::Waiting, StagePhase::Starting),
        "pods still run"
    );
    assert_eq!(case.condition("Waiting"), Some(("True", "Suspending")));
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
    assert_eq!(
        (case.status().phase, case.last.requeue, case.events()),
        (Phase::Suspended, Some(RESYNC), vec!["Suspended"])
    );
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
    assert_eq!(case.made(), ["tune-1", "judge-1"]);
    assert_eq!((case.status().phase, case.slot("tune").attempt), (Phase::Waiting, 1));
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
    assert!(!case.holds("QuotaExceeded") && !case.holds("AttemptStalled") && !case.holds("Stalled"));
    case.now = at(1_000_000);
    case.assert_quiet();
    assert_eq!((case.slot("tune").attempt, case.slot("tune").starting_since), (1, None));
    assert!(case.status().active_since.is_none() && case.status().active_seconds == 0, "a queue takes no time");
    case.view("tune").refused = None;
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
    assert_eq!(case.deleted(), ["tune-1", "judge-1"]);
    assert_eq!(case.status().phase, Phase::Waiting, "a queue may let a Job run until it is gone");
    case.observed = Observed::default();
    case.pass();
    assert_eq!(case.status().phase, Phase::Suspended);
    case.job.spec.suspend = false;
    case.pass();
    assert_eq!(case.made(), ["tune-1", "judge-1"]);
}

#[test]
fn a_job_that_somebody_suspended_is_left_to_them_and_told() {
    let mut case = Case::running();
    case.view("tune").jobs[0].suspended = true;
    case.pass();
    assert_eq!(case.condition("Waiting"), Some(("True", "JobSuspended")));
    assert!(case.deleted().is_empty());
    let message = case.status().message.clone().unwrap();
    let name = view::attempt(&case.job, "tune", 1);
    assert!(message.contains(&format!("Job {name} is suspended, and not by the operator")), "{message}");
}

#[test]
fn pods_that_a_suspension_stopped_have_no_part_in_what_follows() {
    let mut case = Case::running();
    let mut old = |state: &PodState| {
        case.see("tune", 1, JobState::Active, &[state.clone(), state.clone()]);
        case.view("tune").jobs[0].started = Some(at(30));
        case.view("tune").jobs[0].resumed = true;
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
    (new.name, new.created) = ("new".into(), at(31));
    case.view("tune").pods.push(new);
    case.view("tune").jobs[0].state = JobState::Failed;
    case.pass();
    assert_eq!(case.condition("Failed"), Some(("True", "BadInput")));
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
    assert_eq!((case.status().phase, case.last.requeue), (Phase::Suspended, Some(RESYNC)));
    assert!(case.made().is_empty());
    case.job.spec.suspend = false;
    case.pass();
    assert_eq!(case.made(), ["tune-2"]);
}

#[test]
fn a_checkpoint_that_a_suspension_could_not_write_is_told_and_tried_again_on_resumption() {
    let mut case = Case::running();
    case.job.spec.suspend = true;
    case.pass();
    for stage in ["tune", "judge"] {
        case.see(stage, 1, JobState::Failing, &[ended(143, None), ended(if stage == "tune" { 74 } else { 143 }, None)]);
        case.view(stage).jobs[0].deleting = true;
        for pod in &mut case.view(stage).pods {
            pod.deletion_requested = Some(at(1));
        }
    }
    case.pass();
    let slot = case.slot("tune");
    assert_eq!((slot.phase, slot.restarts.total), (StagePhase::Pending, 1));
    assert_eq!(slot.last_failure.as_ref().unwrap().reason, "StorageFailed");
    assert!(case.events().contains(&"AttemptFailed"));
    assert_eq!((case.slot("judge").phase, case.slot("judge").restarts.total), (StagePhase::Starting, 0));
    case.observed = Observed::default();
    case.pass();
    assert_eq!(case.status().phase, Phase::Suspended);
    (case.job.spec.suspend, case.now) = (false, at(100));
    case.pass();
    assert_eq!(case.made(), ["tune-2", "judge-1"]);
}

#[test]
fn a_pod_that_is_deleted_in_its_jobs_first_second_leaves_its_evidence() {
    let mut case = Case::running();
    case.see("tune", 1, JobState::Failed, &[ended(65, None), ended(75, None)]);
    let (job, created) = (at(30), at(29));
    case.view("tune").jobs[0].started = Some(job);
    for pod in &mut case.view("tune").pods {
        (pod.created, pod.deletion_requested) = (created, Some(at(30)));
    }
    case.pass();
    assert_eq!(case.condition("Failed"), Some(("True", "BadInput")), "two servers' clocks differ by a second");
}

//! Pods that their nodes do not end, and pods that nobody controls.

use super::*;

/// An attempt of which a pod ended by itself, and another should have ended long ago: its deletion was asked for at second 6,
/// and has been known of for so long.
fn overdue(deleting_for: i64) -> Case {
    let mut case = Case::running();
    case.see("tune", 1, JobState::Failing, &[ended(75, None), PodState::Running]);
    case.now = at(100_000);
    let pod = &mut case.view("tune").pods[1];
    (pod.deletion_requested, pod.grace) = (Some(at(6)), SignedDuration::from_secs(114));
    pod.deleting_for = SignedDuration::from_secs(deleting_for);
    case
}

#[test]
fn case_23_a_pod_that_its_node_does_not_end_is_given_up_only_where_it_cannot_run_on() {
    let mut case = overdue(293);
    case.pass();
    assert!(case.last.lost.is_empty(), "the clock alone says nothing");
    assert_eq!(case.last.requeue, Some(SignedDuration::from_secs(1)));
    let asked = |case: &Case| ask::for_nodes(&case.observed.stages).into_iter().collect::<Vec<_>>();
    assert!(asked(&case).is_empty());
    case.view("tune").pods[1].deleting_for = SignedDuration::from_secs(294);
    assert_eq!(asked(&case), ["node1"]);
    for (state, forced, lost) in [
        (None, false, false),
        (Some(NodeState::There), false, false),
        (Some(NodeState::Unreadable), false, false),
        (Some(NodeState::There), true, true),
        (Some(NodeState::OutOfService), false, true),
        (Some(NodeState::Gone), false, true),
    ] {
        let mut case = case.again();
        case.job.spec.failure_policy.force_delete_lost_pods = forced;
        case.observed.nodes = state.map(|state| ("node1".to_owned(), state)).into_iter().collect();
        case.pass();
        let given_up: Vec<_> = case.last.lost.iter().map(|p| (p.uid.as_str(), p.node.as_deref())).collect();
        let wanted = if lost { vec![("uid-tune-1-1", Some("node1"))] } else { vec![] };
        assert_eq!(given_up, wanted, "{state:?} {forced}");
        assert_eq!(case.events(), [if lost { "PodLost" } else { "PodStuck" }], "{state:?} {forced}");
        if !lost {
            let message = case.status().message.clone().unwrap();
            let wanted = "tune: pod tune-1-1-x should have ended 294 s after its deletion, and node node1 has not ended it; if the node is down, taint it node.kubernetes.io/out-of-service";
            assert!(message.contains(wanted), "{message}");
            assert_eq!(case.condition("Waiting"), Some(("True", "NodeLost")));
            case.assert_quiet();
        }
    }
}

#[test]
fn once_it_is_given_up_the_gang_starts_anew() {
    let mut case = overdue(294);
    case.observed.nodes = [("node1".to_owned(), NodeState::OutOfService)].into();
    case.pass();
    assert_eq!(case.slot("tune").last_failure.as_ref().unwrap().reason, "PeerLost", "until it is known");
    case.view("tune").pods[1].disruption = Some("NodeLost: node node1 did not end the pod in time".into());
    case.view("tune").pods[1].state = PodState::Ended(Box::default());
    case.view("tune").jobs[0].state = JobState::Failed;
    case.pass();
    assert_eq!((case.slot("tune").disruptions, case.slot("tune").restarts.total), (1, 0));
    let failure = case.slot("tune").last_failure.clone().unwrap();
    assert_eq!((failure.reason.as_str(), failure.node.as_deref()), ("NodeLost", Some("node1")));
    case.now += SignedDuration::from_secs(10);
    case.pass();
    assert_eq!(case.made(), ["tune-2"]);
}

#[test]
fn a_terminal_job_gives_up_its_lost_pods_too() {
    let mut case = bad_end(65, |_| ());
    case.job.spec.failure_policy.force_delete_lost_pods = true;
    case.view("judge").pods[0].deletion_requested = Some(at(20));
    case.view("judge").pods[0].deleting_for = LOST_AFTER;
    case.pass();
    assert_eq!((case.last.lost.len(), case.status().phase), (1, Phase::Failed));
}

#[test]
fn pods_that_nobody_controls_are_removed_and_awaited_and_not_believed() {
    let mut case = Case::running();
    let mut left = std::mem::take(&mut case.view("tune").pods);
    case.view("tune").jobs.clear();
    left[0].state = ended(65, None);
    case.view("tune").strays = left;
    case.pass();
    let orphans: Vec<_> = case.last.orphans.iter().map(|p| p.uid.as_str()).collect();
    assert_eq!(orphans, ["uid-tune-1-0", "uid-tune-1-1"]);
    assert_eq!(case.slot("tune").last_failure.as_ref().unwrap().reason, "PodDeleted", "anybody may label a pod");
    case.now = at(10);
    case.pass();
    assert_eq!((case.slot("tune").attempt, case.made().len()), (2, 0));
    let message = case.status().message.clone().unwrap();
    assert!(message.starts_with("tune: attempt 2 waits for the pods of an earlier attempt to end: pod tune-1-1-x"));
    for pod in &mut case.view("tune").strays {
        pod.deletion_requested = Some(at(10));
    }
    case.assert_quiet();
    assert!(case.last.orphans.is_empty(), "once is enough");
    case.view("tune").strays.clear();
    case.pass();
    assert_eq!(case.made(), ["tune-2"]);
}

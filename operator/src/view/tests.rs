//! What the parsers make of Kubernetes' objects, and whose they are.

use super::*;
use crate::build::tests::job as rlhf_job;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{Pod, PodSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde_json::{Value, json};

fn pod(status: Value) -> PodView {
    let pod: Pod = serde_json::from_value(json!({
        "metadata": {
            "name": "j-sft-2-1-abcde",
            "labels": {names::LABEL_ATTEMPT: "2", names::LABEL_STAGE: "sft"},
            "annotations": {INDEX_KEY: "1"},
        },
        "spec": {"containers": [], "nodeName": "node1"},
        "status": status,
    }))
    .unwrap();
    PodView::parse(&pod).unwrap()
}

fn terminated(code: i32, reason: &str, message: &str) -> Value {
    json!({"phase": "Failed", "containerStatuses": [{
        "name": CONTAINER, "ready": false, "restartCount": 0, "image": "i", "imageID": "",
        "state": {"terminated": {"exitCode": code, "reason": reason, "message": message, "finishedAt": "2026-01-01T00:00:05Z"}},
    }]})
}

fn waiting(reason: &str) -> Value {
    json!({"phase": "Pending", "containerStatuses": [{
        "name": CONTAINER, "ready": false, "restartCount": 0, "image": "docker.io/x:1", "imageID": "",
        "state": {"waiting": {"reason": reason, "message": "back-off 40s"}},
    }]})
}

#[test]
fn a_termination_message_is_read_whole() {
    let view =
        pod(terminated(65, "Error", r#"{"code":65,"reason":"BadInput","message":"data.jsonl line 3","rank":1}"#));
    let end = view.ended().unwrap();
    assert_eq!((end.code, end.text.as_deref()), (Some(65), None));
    assert_eq!(end.word.as_ref().unwrap().message, "data.jsonl line 3");
    assert_eq!(end.at, Some("2026-01-01T00:00:05Z".parse().unwrap()));
    assert_eq!((view.attempt, view.index, view.node.as_deref()), (2, 1, Some("node1")));
}

#[test]
fn of_prepares_pod_alone_the_image_is_kept() {
    let image = |stage: &str, id: &str| {
        let pod: Pod = serde_json::from_value(json!({
            "metadata": {"name": "p", "labels": {names::LABEL_ATTEMPT: "1", names::LABEL_STAGE: stage}, "annotations": {INDEX_KEY: "0"}},
            "status": {"phase": "Running", "containerStatuses": [
                {"name": "sidecar", "ready": true, "restartCount": 0, "image": "s", "imageID": "s@sha256:0"},
                {"name": CONTAINER, "ready": true, "restartCount": 0, "image": "i", "imageID": id}]},
        }))
        .unwrap();
        PodView::parse(&pod).unwrap().image_id
    };
    assert_eq!(image("prepare", "i@sha256:1").as_deref(), Some("i@sha256:1"));
    assert_eq!((image("prepare", ""), image("sft", "i@sha256:1")), (None, None));
}

#[test]
fn a_message_that_is_no_document_is_kept_as_text() {
    let view = pod(terminated(1, "Error", "no such file"));
    assert_eq!(view.ended().unwrap().text.as_deref(), Some("no such file"));
    assert_eq!(view.ended().unwrap().word, None);
    let doubt = |view: &PodView| view.ended().unwrap().doubt.clone();
    assert!(doubt(&view).unwrap().starts_with("it is no document of the contract"));
    assert_eq!(doubt(&pod(terminated(0, "Completed", ""))), None, "one that left no word is not doubted");
    assert_eq!(pod(terminated(1, "Error", "")).ended().unwrap().text, None, "`Error` says nothing");
    assert_eq!(pod(terminated(128, "StartError", "")).ended().unwrap().text.as_deref(), Some("StartError"));
}

#[test]
fn a_pod_lives_on_while_a_container_beside_its_trainer_does_whatever_its_phase() {
    let with = |others: Value| {
        let mut status = terminated(0, "Completed", "");
        status["phase"] = json!("Running");
        status["containerStatuses"].as_array_mut().unwrap().extend(others.as_array().unwrap().clone());
        pod(status).lives_on
    };
    let sidecar = |state: Value| json!([{"name": "proxy", "ready": true, "restartCount": 0, "image": "i", "imageID": "", "state": state}]);
    assert!(!with(json!([])), "its kubelet is about to call it succeeded");
    assert!(with(sidecar(json!({"running": {}}))));
    assert!(with(sidecar(json!({"waiting": {"reason": "CrashLoopBackOff"}}))));
    assert!(!with(sidecar(json!({"terminated": {"exitCode": 0}}))));
}

#[test]
fn a_container_killed_for_memory_is_told_by_its_reason_unless_it_ended_well() {
    assert!(pod(terminated(137, "OOMKilled", "")).ended().unwrap().oom_killed);
    assert!(!pod(terminated(0, "OOMKilled", "")).ended().unwrap().oom_killed);
}

#[test]
fn a_pod_that_the_kubelet_evicted_has_passed_a_limit_of_its_own_unless_kubernetes_says_otherwise() {
    let view = pod(json!({"phase": "Failed", "reason": "Evicted", "message": "exceeds the limit"}));
    assert_eq!(view.ended().unwrap().code, None);
    assert_eq!((view.disruption, view.evicted.as_deref()), (None, Some("Evicted: exceeds the limit")));
    let target = json!({"type": "DisruptionTarget", "status": "True", "reason": "TerminationByKubelet", "message": "low on disk"});
    let view = pod(json!({"phase": "Failed", "reason": "Evicted", "message": "low on disk", "conditions": [target]}));
    assert_eq!((view.disruption.as_deref(), view.evicted), (Some("TerminationByKubelet: low on disk"), None));
}

#[test]
fn waiting_names_what_keeps_a_pod_from_starting_and_nothing_else() {
    assert_eq!(pod(waiting("ContainerCreating")).state, PodState::Waiting(None));
    let wait = |reason: &str, text: &str| PodState::Waiting(Some(Wait { reason: reason.into(), text: text.into() }));
    let pull = wait("ImagePull", "image docker.io/x:1 cannot be pulled");
    assert_eq!(pod(waiting("ErrImagePull")).state, pull);
    assert_eq!(pod(waiting("ImagePullBackOff")).state, pull, "the two take turns, and read the same");
    let invalid = pod(waiting("InvalidImageName")).state;
    assert!(matches!(&invalid, PodState::Waiting(Some(w)) if w.is_permanent()), "{invalid:?}");
    assert_eq!(pod(waiting("CreateContainerConfigError")).state, wait("CreateContainerConfigError", "back-off 40s"));
    let unschedulable = json!({"phase": "Pending", "conditions": [
        {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/1 nodes are available"}]});
    assert_eq!(pod(unschedulable).state, wait("Unschedulable", "0/1 nodes are available"));
}

#[test]
fn case_4_and_38_a_quota_is_told_from_other_refusals_and_pods_are_not_named() {
    for (message, reason, text) in [
        (
            r#"Error creating: pods "d-tune-1-0-abcde" is forbidden: exceeded quota: q, requested: pods=1, used: pods=2, limited: pods=2"#,
            "QuotaExceeded",
            "exceeded quota: q, requested: pods=1, used: pods=2, limited: pods=2",
        ),
        (
            r#"Error creating: pods "d-tune-1-0-fghij" is forbidden: failed quota: q: must specify limits.cpu for: trainer"#,
            "QuotaExceeded",
            "failed quota: q: must specify limits.cpu for: trainer",
        ),
        (
            r#"Error creating: pods "d-tune-1-0-abcde" is forbidden: violates PodSecurity "restricted:latest""#,
            "Refused",
            r#"violates PodSecurity "restricted:latest""#,
        ),
        ("admission webhook \"w\" denied the request: no", "Refused", "admission webhook \"w\" denied the request: no"),
    ] {
        assert_eq!(Wait::refusal(message), Wait { reason: reason.into(), text: text.into() });
    }
}

#[test]
fn a_deletion_is_dated_to_when_it_was_asked_for() {
    let pod: Pod = serde_json::from_value(json!({
        "metadata": {
            "name": "p", "labels": {names::LABEL_ATTEMPT: "1", names::LABEL_STAGE: "sft"}, "annotations": {INDEX_KEY: "0"},
            "deletionTimestamp": "2026-01-01T00:02:00Z", "deletionGracePeriodSeconds": 120,
        },
    }))
    .unwrap();
    let view = PodView::parse(&pod).unwrap();
    assert_eq!(view.deletion_requested, Some("2026-01-01T00:00:00Z".parse().unwrap()));
    assert_eq!(view.grace, SignedDuration::from_secs(120));
    let lives = Pod {
        metadata: ObjectMeta { deletion_timestamp: None, deletion_grace_period_seconds: None, ..pod.metadata },
        spec: Some(PodSpec { termination_grace_period_seconds: Some(90), ..PodSpec::default() }),
        ..pod
    };
    let view = PodView::parse(&lives).unwrap();
    assert_eq!((view.deletion_requested, view.grace), (None, SignedDuration::from_secs(90)));
}

#[test]
fn a_job_that_loses_pods_is_failing_until_all_have_ended() {
    let job = |conditions: Value| {
        let job: Job = serde_json::from_value(json!({
            "metadata": {"name": "j-sft-1", "uid": "u", "labels": {names::LABEL_ATTEMPT: "1", names::LABEL_STAGE: "sft"}},
            "spec": {"parallelism": 2, "template": {}},
            "status": {"conditions": conditions},
        }))
        .unwrap();
        JobView::parse(&job).unwrap().state
    };
    let condition = |kind: &str| json!({"type": kind, "status": "True"});
    assert_eq!(job(json!([])), JobState::Active);
    assert_eq!(job(json!([condition("FailureTarget")])), JobState::Failing);
    assert_eq!(job(json!([condition("FailureTarget"), condition("Failed")])), JobState::Failed);
    assert_eq!(job(json!([condition("SuccessCriteriaMet"), condition("Complete")])), JobState::Complete);
}

#[test]
fn an_object_without_the_labels_is_no_child() {
    assert_eq!(PodView::parse(&Pod::default()), None);
    assert_eq!(JobView::parse(&Job::default()), None);
}

/// A Job with the labels of the tests' job, and what controls it.
fn made(name: &str, uid: &str, owner: &str) -> JobView {
    let job: Job = serde_json::from_value(json!({
        "metadata": {"name": name, "uid": uid, "labels": labels(),
            "ownerReferences": [{"apiVersion": "rlhf.dev/v1alpha1", "kind": "RLHFJob", "name": "demo", "uid": owner, "controller": true}]},
        "spec": {"parallelism": 1, "template": {}},
    }))
    .unwrap();
    JobView::parse(&job).unwrap()
}

fn labels() -> Value {
    json!({names::LABEL_JOB_UID: "0123456789-abc", names::LABEL_STAGE: "tune", names::LABEL_ATTEMPT: "1"})
}

fn controlled(name: &str, owner: Value) -> PodView {
    let pod: Pod = serde_json::from_value(json!({
        "metadata": {"name": name, "uid": name, "labels": labels(), "annotations": {INDEX_KEY: "0"}, "ownerReferences": owner},
    }))
    .unwrap();
    PodView::parse(&pod).unwrap()
}

#[test]
fn a_child_is_one_by_the_uids_of_its_owners_and_not_by_its_labels() {
    let owner = |kind: &str, name: &str, uid: &str, controls: bool| json!([{"apiVersion": "v1", "kind": kind, "name": name, "uid": uid, "controller": controls}]);
    let job = rlhf_job();
    let name = attempt(&job, "tune", 1);
    let jobs = || vec![made(&name, "own", "0123456789-abc"), made("theirs", "foreign", "another")];
    for (what, of, children, strays) in [
        ("a pod of the job's own Job", owner("Job", &name, "own", true), 1, 0),
        ("a pod of somebody's Job with copied labels", owner("Job", "theirs", "foreign", true), 0, 0),
        ("a pod of a Job that nobody knows", owner("Job", "gone", "gone", true), 0, 0),
        ("a pod of the attempt's Job before the one that is there", owner("Job", &name, "before", true), 0, 1),
        ("a pod of a ReplicaSet", owner("ReplicaSet", &name, "own2", true), 0, 0),
        ("a pod that the Job owns and does not control", owner("Job", &name, "own", false), 0, 1),
        ("an orphan", json!([]), 0, 1),
    ] {
        let seen = stages(&job, jobs(), vec![controlled("p", of)]);
        let view = &seen["tune"];
        assert_eq!((view.jobs.len(), view.pods.len(), view.strays.len()), (1, children, strays), "{what}");
    }
}

#[test]
fn what_is_left_of_a_stage_stands_in_the_way_whoever_controls_it() {
    let job = rlhf_job();
    let left = json!([{"apiVersion": "batch/v1", "kind": "Job", "name": attempt(&job, "tune", 1), "uid": "gone", "controller": true}]);
    for (owner, is_orphan) in [(json!([]), true), (left, false)] {
        let seen = stages(&job, vec![], vec![controlled("p", owner)]);
        let view = &seen["tune"];
        assert_eq!(view.in_the_way(2).unwrap().to_string(), "pod p");
        assert_eq!(view.orphans().count(), usize::from(is_orphan), "the others go with their Job");
    }
}

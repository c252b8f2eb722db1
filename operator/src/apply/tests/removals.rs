//! What is removed, and that nothing else is.

use super::*;

#[tokio::test]
async fn deletion_reaches_only_the_job_that_was_seen() {
    let (ctx, log) = server(vec![]);
    let job = started();
    let child = |name: &str| JobRef { name: name.into(), uid: format!("uid-{name}"), version: Some("12".into()) };
    let decision = Decision { status: job.status.clone().unwrap(), delete: vec![child("a")], ..Decision::default() };
    apply(&job, &decision, &ctx).await.unwrap();
    let deletion = body(&log, "DELETE jobs/a");
    assert_eq!(
        (&deletion["preconditions"], &deletion["propagationPolicy"]),
        (&json!({"uid": "uid-a", "resourceVersion": "12"}), &json!("Foreground"))
    );
    // It has ended meanwhile, perhaps well: the next pass looks again.
    let (ctx, _) = server(vec![("DELETE jobs/a", 409, failure("Conflict", 409))]);
    assert!(matches!(apply(&job, &decision, &ctx).await, Err(Error::Stale)));
}

#[tokio::test]
async fn an_expired_job_is_deleted_as_it_was_seen_and_only_so() {
    let job = started();
    let expired = Decision { status: job.status.clone().unwrap(), expired: true, ..Decision::default() };
    let (ctx, log) = server(vec![]);
    apply(&job, &expired, &ctx).await.unwrap();
    assert_eq!(lines(&log), ["DELETE rlhfjobs/demo"]);
    let deletion = body(&log, "DELETE rlhfjobs/demo");
    assert_eq!(deletion["preconditions"], json!({"uid": "0123456789-abc", "resourceVersion": "7"}));
    assert_eq!(deletion["propagationPolicy"], "Foreground");
    let (ctx, _) = server(vec![("DELETE rlhfjobs/demo", 409, failure("Conflict", 409))]);
    assert!(matches!(apply(&job, &expired, &ctx).await, Err(Error::Stale)), "its time to live was changed meanwhile");
}

#[tokio::test]
async fn a_job_that_has_ended_before_goes_without_another_status() {
    let mut job = started();
    let mut status = job.status.clone().unwrap();
    status.completion_time = Some(Timestamp::UNIX_EPOCH);
    let ends = Decision { status: status.clone(), expired: true, ..Decision::default() };
    let (ctx, log) = server(vec![]);
    apply(&job, &ends, &ctx).await.unwrap();
    assert_eq!(lines(&log), ["PATCH rlhfjobs/demo/status", "DELETE rlhfjobs/demo"], "how it ended is told");
    job.status = Some(status.clone());
    status.observed_generation += 1;
    let (ctx, log) = server(vec![]);
    apply(&job, &Decision { status, ..ends }, &ctx).await.unwrap();
    assert_eq!(lines(&log), ["DELETE rlhfjobs/demo"]);
}

#[tokio::test]
async fn case_23_a_lost_pod_is_declared_failed_before_it_is_removed() {
    let (ctx, log) = server(vec![("PATCH pods/p/status", 200, json!({"metadata": {"name": "p"}}))]);
    let job = started();
    let pod = PodRef { name: "p".into(), uid: "uid-p".into(), node: Some("node7".into()) };
    let decision = Decision { status: job.status.clone().unwrap(), lost: vec![pod], ..Decision::default() };
    apply(&job, &decision, &ctx).await.unwrap();
    assert_eq!(lines(&log), ["PATCH pods/p/status", "DELETE pods/p"]);
    let failed = body(&log, "PATCH pods/p/status");
    assert_eq!((&failed["metadata"]["uid"], &failed["status"]["phase"]), (&json!("uid-p"), &json!("Failed")));
    assert_eq!(failed["status"]["conditions"][0]["reason"], NODE_LOST);
    let deletion = body(&log, "DELETE pods/p");
    assert_eq!((&deletion["gracePeriodSeconds"], &deletion["preconditions"]["uid"]), (&json!(0), &json!("uid-p")));
}

#[tokio::test]
async fn a_pod_that_nobody_controls_is_deleted_with_its_grace_and_no_other_of_its_name() {
    let (ctx, log) = server(vec![]);
    let job = started();
    let pod = PodRef { name: "p".into(), uid: "uid-p".into(), node: None };
    let decision = Decision { status: job.status.clone().unwrap(), orphans: vec![pod], ..Decision::default() };
    apply(&job, &decision, &ctx).await.unwrap();
    assert_eq!(lines(&log), ["DELETE pods/p"]);
    let deletion = body(&log, "DELETE pods/p");
    assert_eq!((&deletion["gracePeriodSeconds"], &deletion["preconditions"]["uid"]), (&Value::Null, &json!("uid-p")));
}

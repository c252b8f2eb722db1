//! What is written of a job itself.

use super::*;

#[tokio::test]
async fn a_status_that_is_out_of_date_stops_every_other_write() {
    let (ctx, log) = server(vec![("PATCH rlhfjobs/demo/status", 409, failure("Conflict", 409))]);
    let (job, decision) = first();
    assert!(matches!(apply(&job, &decision, &ctx).await, Err(Error::Stale)));
    assert_eq!(lines(&log), ["PATCH rlhfjobs/demo/status"]);
}

#[tokio::test]
async fn case_18_and_40_a_pass_that_changes_nothing_asks_nothing() {
    let (ctx, log) = server(vec![]);
    let job = started();
    let decision = Decision { status: job.status.clone().unwrap(), ..Decision::default() };
    apply(&job, &decision, &ctx).await.unwrap();
    assert!(lines(&log).is_empty());
}

#[tokio::test]
async fn a_job_that_another_manages_is_left_alone() {
    let (ctx, log) = server(vec![]);
    let mut job = tests::job();
    job.spec.managed_by = Some("kueue.x-k8s.io/multikueue".into());
    let guarded = Arc::new(kube::core::DeserializeGuard(Ok(job)));
    let action = crate::pass::reconcile(guarded, Arc::new(ctx)).await.unwrap();
    assert_eq!(action, kube::runtime::controller::Action::await_change());
    assert!(lines(&log).is_empty());
}

#[tokio::test]
async fn a_status_is_written_over_defaults_that_do_not_stand_there_and_keeps_what_a_newer_operator_wrote() {
    let status = "PATCH rlhfjobs/demo/status";
    let there = json!({"metadata": {"name": "demo", "resourceVersion": "7"},
        "status": {"newer": 1, "prepare": {"name": "prepare", "newer": true}}});
    let missing = || failure("Invalid", 422);
    for (version, wanted) in [("7", false), ("8", true)] {
        let mut there = there.clone();
        there["metadata"]["resourceVersion"] = json!(version);
        let (ctx, log) = server(vec![(status, 422, missing()), ("GET rlhfjobs/demo", 200, there)]);
        let (mut job, decision) = first();
        job.status = Some(rlhf_api::job::RLHFJobStatus::default());
        let written = apply(&job, &decision, &ctx).await;
        assert_eq!(matches!(written, Err(Error::Stale)), wanted, "{written:?}");
        let last = log.lock().unwrap().iter().rfind(|s| s.line == status).unwrap().body.to_string();
        assert!(!last.contains("newer") && !last.contains("remove"), "what is not known is not touched: {last}");
    }
}

fn undecodable(status: Value) -> Arc<crate::controller::Guarded> {
    let error = "unknown variant";
    let mut raw = serde_json::to_value(tests::job()).unwrap();
    raw["spec"]["stages"] = json!([{"name": 5}]);
    raw["status"] = status;
    let guarded: crate::controller::Guarded = serde_json::from_value(raw).unwrap();
    assert!(guarded.0.is_err(), "{error}");
    Arc::new(guarded)
}

#[tokio::test]
async fn case_7_a_job_that_cannot_be_read_says_so_in_a_condition_once_and_keeps_all_else() {
    let mut there = serde_json::to_value(tests::job()).unwrap();
    there["status"] = json!({"newer": 1, "conditions": [{"type": "Complete", "status": "False"}]});
    let (ctx, log) = server(vec![("GET rlhfjobs/demo", 200, there.clone())]);
    let ctx = Arc::new(ctx);
    let action = crate::pass::reconcile(undecodable(json!({})), ctx.clone()).await.unwrap();
    assert_eq!(action, kube::runtime::controller::Action::await_change());
    assert_eq!(lines(&log), ["GET rlhfjobs/demo", "PATCH rlhfjobs/demo/status", "POST events"]);
    let patch = body(&log, "PATCH rlhfjobs/demo/status");
    assert_eq!(patch[0]["value"], "7");
    assert_eq!((&patch[1]["op"], &patch[1]["path"]), (&json!("add"), &json!("/status/conditions/1")));
    let condition = &patch[1]["value"];
    assert_eq!(
        (&condition["type"], &condition["status"], &condition["reason"]),
        (&json!("Unsupported"), &json!("True"), &json!("Undecodable"))
    );
    assert_eq!(patch.as_array().unwrap().len(), 2);

    there["status"]["conditions"].as_array_mut().unwrap().push(condition.clone());
    let (ctx, log) = server(vec![("GET rlhfjobs/demo", 200, there)]);
    crate::pass::reconcile(undecodable(json!({})), Arc::new(ctx)).await.unwrap();
    assert_eq!(lines(&log), ["GET rlhfjobs/demo"], "it is said");
}

#[tokio::test]
async fn a_condition_that_a_job_is_not_supported_goes_once_it_is() {
    let (_, decision) = first();
    let mut status = decision.status;
    let before = status.clone();
    unsupported::take_back(&mut status, Some(1));
    assert_eq!(status, before, "it never was");
    let condition = json!([{"type": "Unsupported", "status": "True", "reason": "Undecided", "message": "m",
        "lastTransitionTime": "2026-01-01T00:00:00Z"}]);
    status.conditions = serde_json::from_value(condition).unwrap();
    unsupported::take_back(&mut status, Some(1));
    assert_eq!(status.conditions[0].status, "False");
    status.conditions[0].status = "True".into();
    unsupported::take_back(&mut status, Some(1));
    assert_eq!(status.conditions[0].status, "True", "another reason is the rules' own");
}

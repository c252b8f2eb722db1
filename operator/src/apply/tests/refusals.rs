//! What the API server refuses, and for how long that counts.

use super::*;

#[tokio::test]
async fn case_30_somebody_elses_object_is_left_alone_and_named_and_other_stages_go_on() {
    let foreign = json!({"metadata": {"name": "demo-tune-prgzn-1", "ownerReferences": [
        {"apiVersion": "v1", "kind": "Team", "name": "other", "uid": "another", "controller": true}]}});
    let (ctx, log) = server(vec![("GET jobs/demo-tune-prgzn-1", 200, foreign)]);
    let job = started();
    assert!(!apply(&job, &two_stages(&job), &ctx).await.unwrap());
    let [Trouble { stage, message, permanent: false, .. }] = &ctx.retries.troubles(&job)[..] else {
        panic!("{:?}", ctx.retries.troubles(&job))
    };
    assert_eq!(stage, "tune");
    assert!(message.starts_with("Job demo-tune-prgzn-1 exists and belongs to Team other"), "{message}");
    let seen = log.lock().unwrap();
    let made: Vec<_> = seen.iter().filter(|s| s.line == "POST jobs").map(|s| &s.body["metadata"]["labels"]).collect();
    assert_eq!(made.len(), 1, "no Job of the blocked stage");
    assert_eq!(made[0][names::LABEL_STAGE], "judge");
}

#[tokio::test]
async fn a_child_that_is_leaving_keeps_no_other_stage_from_being_made() {
    let leaving = json!({"metadata": {"name": "demo-tune-prgzn-1", "deletionTimestamp": "2026-01-01T00:00:00Z"}});
    let (ctx, log) = server(vec![("GET jobs/demo-tune-prgzn-1", 200, leaving)]);
    let job = started();
    let error = apply(&job, &two_stages(&job), &ctx).await.unwrap_err();
    assert!(matches!(&error, Error::InTheWay { stage, .. } if stage == "tune"), "{error}");
    let seen = log.lock().unwrap();
    let made = seen.iter().filter(|s| s.line == "POST jobs");
    let stages: Vec<_> = made.map(|s| s.body["metadata"]["labels"][names::LABEL_STAGE].as_str().unwrap()).collect();
    assert_eq!(stages, ["judge"]);
}

/// A refusal by the API server's own validation of a Job.
fn invalid(name: &str) -> Value {
    json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "Invalid", "code": 422,
        "message": format!("Job.batch \"{name}\" is invalid: spec.template.spec.containers[0].resources.requests: Invalid value: \"8\": must be less than or equal to cpu limit of 4"),
        "details": {"name": name, "group": "batch", "kind": "Job", "causes": [
            {"reason": "FieldValueInvalid", "message": "Invalid value", "field": "spec.template.spec.containers[0].resources.requests"}]}})
}

/// What a policy of the cluster's answers.
fn denied(code: u16, reason: &str) -> Value {
    json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "code": code,
        "message": "jobs.batch \"x\" is forbidden: ValidatingAdmissionPolicy 'p' with binding 'b' denied request: no",
        "details": {"name": "x", "group": "batch", "kind": "jobs", "causes": [{"message": "no"}]}})
}

#[tokio::test]
async fn case_3_and_29_a_field_that_is_invalid_is_refused_for_good_unless_the_stage_has_run_and_a_denial_never_is() {
    for (name, code, answer, attempt, permanent) in [
        ("an invalid field", 422, invalid("x"), 1, true),
        ("an invalid field of a stage that has run", 422, invalid("x"), 2, false),
        ("a policy's 422", 422, denied(422, "Invalid"), 1, false),
        ("a policy's 422 in the middle of a run", 422, denied(422, "Invalid"), 2, false),
        ("a policy's 403", 403, denied(403, "Forbidden"), 2, false),
    ] {
        let (ctx, _) = server(vec![("POST jobs", code, answer)]);
        let job = started();
        let mut decision = two_stages(&job);
        decision.status.stages.iter_mut().for_each(|slot| slot.attempt = attempt);
        assert!(!apply(&job, &decision, &ctx).await.unwrap());
        let troubles = ctx.retries.troubles(&job);
        let stages: Vec<_> = troubles.iter().map(|t| t.stage.as_str()).collect();
        assert_eq!(stages, ["judge", "tune"], "each stage's own");
        for trouble in troubles {
            assert_eq!(trouble.permanent, permanent, "{name}");
            assert!(trouble.message.contains("is refused by the API server: ") && !trouble.retry_after.is_zero());
        }
    }
}

#[tokio::test]
async fn case_5_a_webhook_that_cannot_be_called_is_a_refusal_that_may_pass() {
    let mut no_webhook = failure("InternalError", 500);
    no_webhook["message"] =
        json!("Internal error occurred: failed calling webhook \"jobs.example\": connection refused");
    let (ctx, _) = server(vec![("POST jobs", 500, no_webhook)]);
    let job = started();
    assert!(!apply(&job, &two_stages(&job), &ctx).await.unwrap());
    let troubles = ctx.retries.troubles(&job);
    assert!(
        troubles.len() == 2 && troubles.iter().all(|t| !t.permanent && t.message.contains("webhook \"jobs.example\""))
    );
}

#[tokio::test]
async fn an_api_server_that_fails_or_is_overloaded_ends_the_pass_and_is_held_against_nobody() {
    for (reason, code) in [("TooManyRequests", 429), ("InternalError", 500), ("ServiceUnavailable", 503)] {
        let policy = "PATCH networkpolicies/demo-trainers-qz4zp";
        for line in ["PATCH rlhfjobs/demo/status", policy, "POST configmaps", "POST jobs"] {
            let (ctx, log) = server(vec![(line, code, failure(reason, code))]);
            let (job, decision) = first();
            ctx.known.check_done(&job);
            let error = apply(&job, &decision, &ctx).await.unwrap_err();
            assert!(matches!(error, Error::Api { .. }), "{line}, {code}: {error}");
            let made = writes(&log).iter().filter(|l| *l == "POST jobs").count();
            assert_eq!(made, usize::from(line == "POST jobs"), "no Job without what it needs: {line}");
            assert!(ctx.retries.troubles(&job).is_empty());
        }
        let (ctx, log) = server(vec![("POST jobs", code, failure(reason, code))]);
        let (job, decision) = first();
        assert!(matches!(apply(&job, &decision, &ctx).await, Err(Error::Api { .. })), "asked by a dry run");
        assert!(ctx.retries.troubles(&job).is_empty() && !lines(&log).contains(&"POST configmaps".to_owned()));
        // An event is no more than news.
        let (ctx, log) = server(vec![("POST events", code, failure(reason, code))]);
        let (job, decision) = first();
        assert!(apply(&job, &decision, &ctx).await.unwrap());
        assert!(lines(&log).contains(&"POST jobs".to_owned()));
    }
}

fn dry_runs(log: &Log) -> Vec<String> {
    let seen = log.lock().unwrap();
    let asked = seen.iter().filter(|s| s.query.contains("dryRun=All"));
    asked.map(|s| s.body["metadata"]["labels"][names::LABEL_STAGE].as_str().unwrap().to_owned()).collect()
}

#[tokio::test]
async fn before_prepare_the_api_server_is_asked_about_every_stages_job_once() {
    let (ctx, log) = server(vec![]);
    let (mut job, decision) = first();
    for _ in 0..3 {
        apply(&job, &decision, &ctx).await.unwrap();
    }
    assert_eq!(dry_runs(&log), ["tune", "judge", "act"]);
    let seen = lines(&log);
    let at = |line: &str| seen.iter().position(|l| l == line).unwrap();
    assert!(at("PATCH rlhfjobs/demo/status") < at("POST jobs") && at("POST jobs") < at("POST configmaps"));
    job.metadata.generation = Some(2);
    apply(&job, &decision, &ctx).await.unwrap();
    assert_eq!(dry_runs(&log).len(), 6, "the spec has changed");
}

#[tokio::test]
async fn a_later_stage_that_would_be_refused_is_found_before_prepare_is_made() {
    for (answer, code, permanent) in [(invalid("x"), 422, true), (denied(403, "Forbidden"), 403, false)] {
        let (ctx, log) = server(vec![("POST jobs", code, answer)]);
        let (job, decision) = first();
        assert!(!apply(&job, &decision, &ctx).await.unwrap());
        assert_eq!(writes(&log), ["PATCH rlhfjobs/demo/status", "POST events"], "nothing is made");
        let [Trouble { stage, attempt: 1, message, permanent: for_good, .. }] = &ctx.retries.troubles(&job)[..] else {
            panic!("{:?}", ctx.retries.troubles(&job))
        };
        assert_eq!((stage.as_str(), *for_good), ("prepare", permanent));
        assert!(message.starts_with("stage tune: Job "), "{message}");
        apply(&job, &decision, &ctx).await.unwrap();
        assert_eq!(dry_runs(&log).len(), 6, "it is asked again until it is let through");
    }
    let mut not_asked = denied(400, "BadRequest");
    not_asked["message"] = json!("admission webhook \"w\" does not support dry run");
    let (ctx, log) = server(vec![("POST jobs", 400, not_asked)]);
    let (job, decision) = first();
    assert!(!apply(&job, &decision, &ctx).await.unwrap());
    assert_eq!(
        ctx.retries.troubles(&job)[0].message.matches("stage tune").count(),
        0,
        "what cannot be asked is no refusal"
    );
    assert!(lines(&log).contains(&"POST configmaps".to_owned()));
}

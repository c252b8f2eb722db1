//! Which requests a decision becomes, in which order, and what answers do to the rest.

use super::*;
use crate::build::{self, Task, tests};
use crate::children::Children;
use crate::clock::Clock;
use crate::decide::{Event, Observed, Trouble, decide};
use crate::lease::Leadership;
use crate::listed::Listed;
use crate::metrics::Metrics;
use crate::observe::still_holds;
use crate::progress::ProgressReader;
use crate::retries::Retries;
use http::{Request, Response};
use http_body_util::BodyExt;
use kube::Client;
use kube::client::Body;
use kube::runtime::events::Recorder;

use serde_json::Value;
use std::sync::{Arc, Mutex};

/// A request as the API server sees it.
#[derive(Clone, Debug)]
struct Seen {
    line: String,
    query: String,
    body: Value,
}

type Log = Arc<Mutex<Vec<Seen>>>;

/// A context whose API server answers by a table of request lines (`METHOD kind/name[/status]`); anything else is created,
/// patched, deleted or not found.
fn server(answers: Vec<(&'static str, u16, Value)>) -> (Context, Log) {
    let log = Log::default();
    let seen = log.clone();
    let answers = Arc::new(answers);
    let service = tower::service_fn(move |request: Request<Body>| {
        let (seen, answers) = (seen.clone(), answers.clone());
        async move {
            let (parts, body) = request.into_parts();
            let body = body.collect().await.unwrap().to_bytes();
            let path = parts.uri.path();
            let short: Vec<_> = path.split('/').skip_while(|p| *p != "team").skip(1).collect();
            let line = format!("{} {}", parts.method, short.join("/"));
            let body: Value = serde_json::from_slice(&body).unwrap_or(Value::Null);
            let (code, answer) = match answers.iter().find(|(l, _, _)| *l == line) {
                Some((_, code, answer)) => (*code, answer.clone()),
                None if line.starts_with("GET") => (404, failure("NotFound", 404)),
                None if line.starts_with("DELETE") => (200, json!({"kind": "Status", "status": "Success"})),
                None if line.starts_with("PUT rlhfjobs") => (200, serde_json::to_value(tests::job()).unwrap()),
                None => (201, body.clone()),
            };
            seen.lock().unwrap().push(Seen { line, query: parts.uri.query().unwrap_or_default().into(), body });
            Ok::<_, tower::BoxError>(
                Response::builder().status(code).body(Body::from(answer.to_string().into_bytes())).unwrap(),
            )
        }
    });
    let client = Client::new(service, "team");
    let ctx = Context {
        recorder: Recorder::new(client.clone(), FIELD_MANAGER.into()),
        client,
        jobs: Children::default(),
        pods: Children::default(),
        listed: Listed::default(),
        settings: tests::settings(),
        metrics: Arc::new(Metrics::new().unwrap()),
        progress: ProgressReader::new().unwrap(),
        retries: Retries::default(),
        clock: Clock::default(),
        leadership: Leadership::held(),
    };
    (ctx, log)
}

fn failure(reason: &str, code: u16) -> Value {
    json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "code": code, "message": format!("it is {reason}")})
}

fn lines(log: &Log) -> Vec<String> {
    log.lock().unwrap().iter().map(|s| s.line.clone()).collect()
}

fn body(log: &Log, line: &str) -> Value {
    log.lock().unwrap().iter().find(|s| s.line == line).unwrap().body.clone()
}

/// The first pass: prepare gets its number and its children.
fn first() -> (RLHFJob, Decision) {
    let job = tests::job();
    let decision = decide(&job, &Observed::default(), &tests::settings(), Timestamp::UNIX_EPOCH);
    (job, decision)
}

/// Only the children of the first two stages, as if there might be some.
fn two_stages(job: &RLHFJob) -> Decision {
    let make = Task::all(job)
        .skip(1)
        .take(2)
        .map(|t| build::children(job, t, tests::FIRST, &tests::settings()).unwrap())
        .map(|children| build::Children { first: false, ..children })
        .collect();
    Decision { make, status: job.status.clone().unwrap(), ..Decision::default() }
}

fn started() -> RLHFJob {
    let (mut job, decision) = first();
    job.status = Some(decision.status);
    job
}

#[tokio::test]
async fn case_37_status_is_written_before_anything_is_made_and_the_job_last() {
    let (ctx, log) = server(vec![]);
    let (job, decision) = first();
    assert!(apply(&job, &decision, &ctx).await.unwrap());
    assert_eq!(
        lines(&log),
        ["PUT rlhfjobs/demo/status", "POST events", "POST networkpolicies", "POST configmaps", "POST jobs",]
    );
    let status = body(&log, "PUT rlhfjobs/demo/status");
    assert_eq!(status["metadata"]["resourceVersion"], "7", "a status decided from an old one must fail");
    assert_eq!(status["status"]["prepare"]["attempt"], 1);
    assert_eq!(body(&log, "POST events")["reason"], Event::StageStarted.reason());
}

#[tokio::test]
async fn a_stage_gets_its_service_before_its_pods() {
    let (ctx, log) = server(vec![]);
    let job = started();
    let mut decision = two_stages(&job);
    decision.make.truncate(1);
    apply(&job, &decision, &ctx).await.unwrap();
    let posts: Vec<_> = lines(&log).into_iter().filter(|l| l.starts_with("POST")).collect();
    assert_eq!(
        posts,
        ["POST networkpolicies", "POST secrets", "POST configmaps", "POST services", "POST podgroups", "POST jobs"]
    );
    assert!(!lines(&log).iter().any(|l| l.starts_with("DELETE")), "a first attempt has none before it");
    assert!(!lines(&log).iter().any(|l| l.starts_with("GET secrets")), "no Secret is read");
}

#[tokio::test]
async fn a_later_attempt_takes_the_groups_of_earlier_ones_away() {
    let (ctx, log) = server(vec![]);
    let job = started();
    let second = build::Attempt { number: 2, ..tests::FIRST };
    let children = build::children(&job, Task::all(&job).nth(1).unwrap(), second, &tests::settings()).unwrap();
    let children = build::Children { first: false, ..children };
    let decision = Decision { make: vec![children], status: job.status.clone().unwrap(), ..Decision::default() };
    apply(&job, &decision, &ctx).await.unwrap();
    let seen = lines(&log);
    let groups: Vec<_> = seen.iter().filter(|l| l.contains("podgroups")).collect();
    assert_eq!(groups, ["DELETE podgroups", "GET podgroups/demo-tune-prgzn-2", "POST podgroups"]);
    let query = log.lock().unwrap().iter().find(|s| s.line == "DELETE podgroups").unwrap().query.clone();
    let selector = "rlhf.dev%2Fjob-uid%3D0123456789-abc%2Crlhf.dev%2Fstage%3Dtune%2Crlhf.dev%2Fattempt%21%3D2";
    assert!(query.contains(selector), "{query}");
}

#[tokio::test]
async fn a_status_that_is_out_of_date_stops_every_other_write() {
    let (ctx, log) = server(vec![("PUT rlhfjobs/demo/status", 409, failure("Conflict", 409))]);
    let (job, decision) = first();
    assert!(matches!(apply(&job, &decision, &ctx).await, Err(Error::Stale)));
    assert_eq!(lines(&log), ["PUT rlhfjobs/demo/status"]);
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
async fn case_30_somebody_elses_object_is_left_alone_and_named_and_other_stages_go_on() {
    let foreign = json!({"metadata": {"name": "demo-tune-prgzn", "ownerReferences": [
        {"apiVersion": "v1", "kind": "Team", "name": "other", "uid": "another", "controller": true}]}});
    let (ctx, log) = server(vec![("GET services/demo-tune-prgzn", 200, foreign)]);
    let job = started();
    assert!(!apply(&job, &two_stages(&job), &ctx).await.unwrap());
    let [Trouble { stage, message, permanent: false, .. }] = &ctx.retries.troubles(&job)[..] else {
        panic!("{:?}", ctx.retries.troubles(&job))
    };
    assert_eq!(stage, "tune");
    assert!(message.starts_with("Service demo-tune-prgzn exists and belongs to Team other"), "{message}");
    let writes: Vec<_> = lines(&log).into_iter().filter(|l| !l.starts_with("GET")).collect();
    assert_eq!(
        writes,
        [
            ["POST networkpolicies", "POST secrets", "POST configmaps"].as_slice(),
            &[
                "POST networkpolicies",
                "POST secrets",
                "POST configmaps",
                "POST services",
                "POST podgroups",
                "POST jobs"
            ],
        ]
        .concat(),
        "no Job of the blocked stage"
    );
}

#[tokio::test]
async fn what_is_there_before_a_stages_first_attempt_is_looked_at() {
    let (job, decision) = first();
    for (owner, foreign) in [("0123456789-abc", false), ("another", true)] {
        let there = json!({"metadata": {"name": "demo-prepare-mfgjn-1", "ownerReferences": [
            {"apiVersion": "rlhf.dev/v1alpha1", "kind": "RLHFJob", "name": "demo", "uid": owner, "controller": true}]}});
        let taken = failure("AlreadyExists", 409);
        let (ctx, log) = server(vec![("POST jobs", 409, taken), ("GET jobs/demo-prepare-mfgjn-1", 200, there)]);
        assert_eq!(apply(&job, &decision, &ctx).await.unwrap(), !foreign);
        assert_eq!(lines(&log)[4..], ["POST jobs", "GET jobs/demo-prepare-mfgjn-1"]);
    }
}

#[tokio::test]
async fn case_3_a_job_that_the_api_server_calls_invalid_is_refused_for_good_and_a_forbidden_one_is_not() {
    for (reason, code, permanent) in [("Invalid", 422, true), ("Forbidden", 403, false)] {
        let (ctx, _) = server(vec![("POST jobs", code, failure(reason, code))]);
        let job = started();
        assert!(!apply(&job, &two_stages(&job), &ctx).await.unwrap());
        let troubles = ctx.retries.troubles(&job);
        assert_eq!(
            troubles.iter().map(|t| t.stage.as_str()).collect::<Vec<_>>(),
            ["judge", "tune"],
            "each stage's own"
        );
        for trouble in troubles {
            assert_eq!(trouble.permanent, permanent, "{reason}");
            assert!(trouble.message.contains(&format!("it is {reason}")) && !trouble.retry_after.is_zero());
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
        for line in ["PUT rlhfjobs/demo/status", "POST networkpolicies", "POST configmaps", "POST jobs"] {
            let (ctx, log) = server(vec![(line, code, failure(reason, code))]);
            let (job, decision) = first();
            let error = apply(&job, &decision, &ctx).await.unwrap_err();
            assert!(matches!(error, Error::Api { .. }), "{line}, {code}: {error}");
            assert_eq!(lines(&log).last().map(String::as_str), Some(line), "nothing is written after it");
        }
        // An event is no more than news.
        let (ctx, log) = server(vec![("POST events", code, failure(reason, code))]);
        let (job, decision) = first();
        assert!(apply(&job, &decision, &ctx).await.unwrap());
        assert!(lines(&log).contains(&"POST jobs".to_owned()));
    }
}

#[tokio::test]
async fn a_config_of_another_version_is_replaced() {
    let job = started();
    let mut old = serde_json::to_value(&two_stages(&job).make[0].config_map).unwrap();
    old["metadata"]["uid"] = json!("old");
    old["data"]["config.json"] = json!("{}");
    let there = ("GET configmaps/demo-tune-prgzn-dqpqb", 200, old);
    let (ctx, log) = server(vec![there.clone()]);
    let mut decision = two_stages(&job);
    decision.make.truncate(1);
    apply(&job, &decision, &ctx).await.unwrap();
    let of_config: Vec<_> = lines(&log).into_iter().filter(|l| l.contains("configmaps")).collect();
    assert_eq!(
        of_config,
        ["GET configmaps/demo-tune-prgzn-dqpqb", "DELETE configmaps/demo-tune-prgzn-dqpqb", "POST configmaps"]
    );
    assert_eq!(body(&log, "DELETE configmaps/demo-tune-prgzn-dqpqb")["preconditions"]["uid"], "old");
    for (code, reason, wanted) in
        [(404, "NotFound", Some(true)), (409, "Conflict", None), (403, "Forbidden", Some(false))]
    {
        let (ctx, log) =
            server(vec![there.clone(), ("DELETE configmaps/demo-tune-prgzn-dqpqb", code, failure(reason, code))]);
        let written = apply(&job, &decision, &ctx).await;
        assert!(
            matches!(written, Ok(_) | Err(Error::Stale)) && written.as_ref().ok().copied() == wanted,
            "{written:?}"
        );
        assert_eq!(lines(&log).contains(&"POST configmaps".to_owned()), wanted == Some(true));
    }
}

/// The first stage alone.
fn one_stage(job: &RLHFJob) -> Decision {
    let mut decision = two_stages(job);
    decision.make.truncate(1);
    decision
}

#[tokio::test]
async fn a_secret_that_is_there_is_the_jobs_own() {
    let (ctx, log) = server(vec![("POST secrets", 409, failure("AlreadyExists", 409))]);
    let job = started();
    assert!(apply(&job, &one_stage(&job), &ctx).await.unwrap());
    assert!(lines(&log).contains(&"POST jobs".to_owned()));
}

#[tokio::test]
async fn a_network_policy_of_other_settings_is_changed_and_one_of_the_same_is_not() {
    let job = started();
    let mut old = serde_json::to_value(one_stage(&job).make[0].network_policy.as_ref().unwrap()).unwrap();
    old["metadata"]["uid"] = json!("old");
    let same = old.clone();
    old["spec"]["ingress"] = json!([{}]);
    for (there, patched) in [(old, true), (same, false)] {
        let (ctx, log) = server(vec![("GET networkpolicies/demo-trainers-qz4zp", 200, there)]);
        apply(&job, &one_stage(&job), &ctx).await.unwrap();
        let patch = "PATCH networkpolicies/demo-trainers-qz4zp";
        assert_eq!(lines(&log).iter().any(|l| l == patch), patched);
        if patched {
            let patch = body(&log, patch);
            assert_eq!(patch["metadata"]["uid"], "old");
            assert_eq!(patch["spec"]["ingress"].as_array().map(Vec::len), Some(2));
        }
    }
}

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
async fn children_are_touched_only_while_the_job_is_as_it_was_seen_and_no_pod_of_the_stage_runs() {
    let labels = |attempt: &str| json!({"rlhf.dev/attempt": attempt, "rlhf.dev/stage": "tune"});
    let pod = |attempt: &str, phase: &str| {
        json!({"metadata": {"name": "p", "labels": labels(attempt), "annotations": {crate::view::INDEX_KEY: "0"}},
            "status": {"phase": phase}})
    };
    let child = |attempt: &str, condition: &str| {
        let owner = json!({"apiVersion": "rlhf.dev/v1alpha1", "kind": "RLHFJob", "name": "demo", "uid": "0123456789-abc", "controller": true});
        json!({"metadata": {"name": "j", "uid": "u", "labels": labels(attempt), "ownerReferences": [owner]},
            "status": {"conditions": [{"type": condition, "status": "True"}]}})
    };
    let list = |items: Vec<Value>| json!({"metadata": {}, "items": items});
    let current = |version: &str| json!({"metadata": {"name": "demo", "resourceVersion": version}});
    for (name, version, jobs, pods, holds) in [
        ("nothing is there", "7", vec![], vec![], true),
        ("an earlier attempt has ended", "7", vec![child("0", "Failed")], vec![pod("0", "Failed")], true),
        ("a pod of an earlier attempt runs", "7", vec![], vec![pod("0", "Running")], false),
        ("an earlier attempt's Job can make pods", "7", vec![child("0", "FailureTarget")], vec![], false),
        ("this attempt was made before", "7", vec![], vec![pod("1", "Failed")], false),
        ("this attempt has its Job", "7", vec![child("1", "Complete")], vec![], false),
        ("the job has changed", "8", vec![], vec![], false),
    ] {
        let (ctx, _) = server(vec![
            ("GET rlhfjobs/demo", 200, current(version)),
            ("GET jobs", 200, list(jobs)),
            ("GET pods", 200, list(pods)),
        ]);
        let job = started();
        assert_eq!(still_holds(&job, &two_stages(&job), &ctx).await.unwrap(), holds, "{name}");
    }
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
async fn a_job_that_another_manages_is_left_alone() {
    let (ctx, log) = server(vec![]);
    let mut job = tests::job();
    job.spec.managed_by = Some("kueue.x-k8s.io/multikueue".into());
    let guarded = Arc::new(kube::core::DeserializeGuard(Ok(job)));
    let action = crate::controller::reconcile(guarded, Arc::new(ctx)).await.unwrap();
    assert_eq!(action, kube::runtime::controller::Action::await_change());
    assert!(lines(&log).is_empty());
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

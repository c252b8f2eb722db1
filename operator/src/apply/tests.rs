//! Which requests a decision becomes, in which order, and what answers do to the rest.

use super::*;
use crate::build::{self, Task, tests};
use crate::children::Children;
use crate::classify::NODE_LOST;
use crate::clock::Clock;
use crate::decide::{Event, JobRef, Observed, PodRef, Trouble, decide};
use crate::deciding::Deciding;
use crate::known::Known;
use crate::lease::Leadership;
use crate::listed::Listed;
use crate::metrics::Metrics;
use crate::observe::still_holds;
use crate::progress::ProgressReader;
use crate::retries::Retries;
use crate::turns::Turns;
use http::{Request, Response};
use http_body_util::BodyExt;
use jiff::Timestamp;
use kube::Client;
use kube::client::Body;
use kube::runtime::events::Recorder;
use rlhf_api::names::{self, FIELD_MANAGER};
use serde_json::{Value, json};
use std::sync::{Arc, Mutex};

/// A request as the API server sees it.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    line: String,
    query: String,
    body: Value,
}

pub(crate) type Log = Arc<Mutex<Vec<Seen>>>;

/// A context whose API server answers by a table of request lines (`METHOD kind/name[/status]`); anything else is created,
/// patched, deleted or not found.
pub(crate) fn server(answers: Vec<(&'static str, u16, Value)>) -> (Context, Log) {
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
                None if line.starts_with("PATCH rlhfjobs") => (200, serde_json::to_value(tests::job()).unwrap()),
                None => (201, body.clone()),
            };
            seen.lock().unwrap().push(Seen { line, query: parts.uri.query().unwrap_or_default().into(), body });
            Ok::<_, tower::BoxError>(
                Response::builder().status(code).body(Body::from(answer.to_string().into_bytes())).unwrap(),
            )
        }
    });
    (context(Client::new(service, "team")), log)
}

/// A process that has just begun to lead.
pub(crate) fn context(client: Client) -> Context {
    Context {
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
        known: Known::default(),
        deciding: Deciding::default(),
        turns: Turns::new(16),
        leadership: Leadership::held(),
    }
}

pub(crate) fn failure(reason: &str, code: u16) -> Value {
    json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "code": code, "message": format!("it is {reason}")})
}

pub(crate) fn lines(log: &Log) -> Vec<String> {
    log.lock().unwrap().iter().map(|s| s.line.clone()).collect()
}

/// What was written, in the order of the alphabet, since what a Job needs is made all at once. Dry runs write nothing.
fn writes(log: &Log) -> Vec<String> {
    let seen = log.lock().unwrap();
    let writes = seen.iter().filter(|s| !s.line.starts_with("GET") && !s.query.contains("dryRun=All"));
    let mut lines: Vec<_> = writes.map(|s| s.line.clone()).collect();
    lines.sort();
    lines
}

pub(crate) fn body(log: &Log, line: &str) -> Value {
    log.lock().unwrap().iter().find(|s| s.line == line).unwrap().body.clone()
}

/// The first pass: prepare gets its number and its children.
pub(crate) fn first() -> (RLHFJob, Decision) {
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
    let seen = lines(&log);
    assert_eq!(seen[0], "PATCH rlhfjobs/demo/status");
    assert_eq!(seen.last().unwrap(), "POST jobs");
    assert_eq!(
        writes(&log),
        [
            "PATCH networkpolicies/demo-trainers-qz4zp",
            "PATCH rlhfjobs/demo/status",
            "POST configmaps",
            "POST events",
            "POST jobs"
        ]
    );
    let status = body(&log, "PATCH rlhfjobs/demo/status");
    let version = json!({"op": "replace", "path": "/metadata/resourceVersion", "value": "7"});
    assert_eq!(status[0], version, "a status decided from an old one must fail");
    assert_eq!((&status[1]["path"], &status[1]["value"]["prepare"]["attempt"]), (&json!("/status"), &json!(1)));
    assert_eq!(body(&log, "POST events")["reason"], Event::StageStarted.reason());
}

#[tokio::test]
async fn a_stage_gets_its_service_before_its_pods() {
    let (ctx, log) = server(vec![]);
    let job = started();
    let mut decision = two_stages(&job);
    decision.make.truncate(1);
    apply(&job, &decision, &ctx).await.unwrap();
    assert_eq!(
        writes(&log),
        [
            "PATCH networkpolicies/demo-trainers-qz4zp",
            "POST configmaps",
            "POST jobs",
            "POST podgroups",
            "POST secrets",
            "POST services"
        ]
    );
    assert_eq!(lines(&log).last().map(String::as_str), Some("POST jobs"));
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
async fn what_is_there_before_a_stages_first_attempt_is_looked_at() {
    let (job, decision) = first();
    for (owner, foreign) in [("0123456789-abc", false), ("another", true)] {
        let there = json!({"metadata": {"name": "demo-prepare-mfgjn-1", "ownerReferences": [
            {"apiVersion": "rlhf.dev/v1alpha1", "kind": "RLHFJob", "name": "demo", "uid": owner, "controller": true}]}});
        let taken = failure("AlreadyExists", 409);
        let (ctx, log) = server(vec![("POST jobs", 409, taken), ("GET jobs/demo-prepare-mfgjn-1", 200, there)]);
        assert_eq!(apply(&job, &decision, &ctx).await.unwrap(), !foreign);
        assert_eq!(lines(&log)[lines(&log).len() - 2..], ["POST jobs", "GET jobs/demo-prepare-mfgjn-1"]);
    }
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
async fn a_network_policy_of_other_settings_is_applied_and_one_of_the_same_is_not() {
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
            let query = log.lock().unwrap().iter().find(|s| s.line == patch).unwrap().query.clone();
            assert!(query.contains("force=true") && query.contains("fieldManager=rlhf-operator"), "applied: {query}");
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
        ("nothing is there", "7", vec![], vec![], Ok(())),
        ("an earlier attempt has ended", "7", vec![child("0", "Failed")], vec![pod("0", "Failed")], Ok(())),
        ("a pod of an earlier attempt runs", "7", vec![], vec![pod("0", "Running")], Err("pod p")),
        ("an earlier attempt's Job can make pods", "7", vec![child("0", "FailureTarget")], vec![], Err("Job j")),
        ("this attempt was made before", "7", vec![], vec![pod("1", "Failed")], Err("pod p")),
        ("this attempt has its Job", "7", vec![child("1", "Complete")], vec![], Err("Job j")),
        ("the job has changed", "8", vec![], vec![], Err("")),
    ] {
        let (ctx, _) = server(vec![
            ("GET rlhfjobs/demo", 200, current(version)),
            ("GET jobs", 200, list(jobs)),
            ("GET pods", 200, list(pods)),
        ]);
        let job = started();
        let held = still_holds(&job, &two_stages(&job), &ctx).await.unwrap();
        match holds {
            Ok(()) => assert!(held.is_ok(), "{name}: {held:?}"),
            Err("") => assert!(matches!(held, Err(Error::Stale)), "{name}: {held:?}"),
            Err(obstacle) => {
                let Err(Error::InTheWay { stage, what }) = held else { panic!("{name}: {held:?}") };
                assert!(stage == "tune" && what.starts_with(&format!("{obstacle} is in the way")), "{name}: {what}");
            }
        }
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
    let action = crate::pass::reconcile(guarded, Arc::new(ctx)).await.unwrap();
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

/// Writes of what all stages share, sorted.
fn shared(log: &Log) -> Vec<String> {
    let of =
        |line: &String| ["secrets", "networkpolicies", "configmaps", "services"].iter().any(|kind| line.contains(kind));
    writes(log).into_iter().filter(of).collect()
}

#[tokio::test]
async fn what_all_stages_share_is_written_once_and_made_again_where_it_is_gone() {
    let job = started();
    let first = |decision: Decision| {
        let make = decision.make.into_iter().map(|children| build::Children { first: true, ..children });
        Decision { make: make.collect(), ..decision }
    };
    let needed = one_stage(&job).make[0].needed().unwrap();
    let body = |kind: &str| needed.iter().find(|child| child.resource.plural == kind).unwrap();
    let config: &'static str = Box::leak(format!("GET configmaps/{}", body("configmaps").name).into_boxed_str());
    let there = [
        ("GET networkpolicies/demo-trainers-qz4zp", "networkpolicies"),
        (config, "configmaps"),
        ("GET services/demo-qz4zp", "services"),
    ];
    let there: Vec<_> = there.map(|(line, kind)| (line, 200, body(kind).body.clone())).into();

    let (ctx, log) = server(there);
    let once = ["POST configmaps", "POST secrets", "POST services"];
    apply(&job, &first(two_stages(&job)), &ctx).await.unwrap();
    assert_eq!(shared(&log), once, "of two stages, with a policy that is as it should be");
    log.lock().unwrap().clear();
    apply(&job, &one_stage(&job), &ctx).await.unwrap();
    assert_eq!(shared(&log), ["POST secrets"], "a later attempt looks, and may not look at a Secret");
    log.lock().unwrap().clear();
    ctx.known.forget("team", "demo");
    apply(&job, &first(one_stage(&job)), &ctx).await.unwrap();
    assert_eq!(shared(&log), once, "an operator that starts anew knows nothing");

    let (ctx, log) = server(vec![]);
    apply(&job, &first(one_stage(&job)), &ctx).await.unwrap();
    log.lock().unwrap().clear();
    apply(&job, &first(one_stage(&job)), &ctx).await.unwrap();
    let again = ["PATCH networkpolicies/demo-trainers-qz4zp", "POST configmaps", "POST services"];
    assert_eq!(shared(&log), again, "somebody has deleted it");
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

//! Which requests a decision becomes, in which order, and what answers do to the rest.

mod making;
mod refusals;
mod removals;
mod statuses;

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
use crate::observe::{leave_out_blocked, still_holds};
use crate::progress::ProgressReader;
use crate::questions::Questions;
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
        progress: ProgressReader::new().unwrap().0,
        retries: Retries::default(),
        clock: Clock::default(),
        known: Known::default(),
        questions: Questions::default(),
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

/// The first stage alone.
fn one_stage(job: &RLHFJob) -> Decision {
    let mut decision = two_stages(job);
    decision.make.truncate(1);
    decision
}

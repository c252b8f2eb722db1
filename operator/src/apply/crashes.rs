//! An operator that is killed at any of its requests, and the next that goes on where it was.
//!
//! A small API server keeps what is written. A process is killed at each of its requests in turn, once before the request
//! arrives and once before its answer does; a second process takes over with nothing in its memory. Between passes the
//! cluster has the pods of every Job run, and then brings it to its end: the first attempt at the first stage fails, all
//! others succeed.

use super::tests::context;
use crate::build::tests::job;
use crate::controller::Guarded;
use crate::listed::Watch;
use crate::pass::reconcile;
use crate::view::{CONTAINER, INDEX_KEY};
use http::{Method, Request, Response};
use http_body_util::BodyExt;
use kube::Client;
use kube::client::Body;
use kube::runtime::watcher::Event;
use rlhf_api::job::{Phase, RLHFJob, StageStatus};
use rlhf_api::names::{LABEL_ATTEMPT, LABEL_STAGE};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

/// The stage whose first attempt fails.
const UNLUCKY: &str = "tune";

/// When a process is killed.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Kill {
    /// At its request with this number.
    at: usize,
    /// Whether the request arrives.
    arrives: bool,
}

#[derive(Default)]
struct Store {
    /// By plural and name.
    objects: BTreeMap<(String, String), Value>,
    version: u64,
    requests: usize,
    /// All requests that have changed something.
    writes: Vec<String>,
    /// Whether no attempt fails.
    is_calm: bool,
    kill: Option<Kill>,
    is_dead: bool,
    /// Stage and attempt of every Job that was made.
    attempts: Vec<(String, String)>,
}

fn failure(code: u16, reason: &str) -> (u16, Value) {
    (code, json!({"kind": "Status", "status": "Failure", "reason": reason, "code": code, "message": reason}))
}

fn label<'a>(object: &'a Value, label: &str) -> &'a str {
    object["metadata"]["labels"][label].as_str().unwrap_or_default()
}

fn holds(job: &Value, condition: &str) -> bool {
    job["status"]["conditions"].as_array().is_some_and(|all| all.iter().any(|c| c["type"] == condition))
}

impl Store {
    fn of<'a>(&'a self, plural: &'a str) -> impl Iterator<Item = &'a Value> {
        self.objects.iter().filter(move |((kind, _), _)| kind == plural).map(|(_, object)| object)
    }

    fn put(&mut self, plural: &str, name: &str, mut object: Value) -> Value {
        self.version += 1;
        let before = self.objects.get(&(plural.to_owned(), name.to_owned()));
        let uid = before.map_or_else(|| json!(format!("uid-{}", self.version)), |b| b["metadata"]["uid"].clone());
        object["metadata"]["uid"] = uid;
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
        object["metadata"]["creationTimestamp"] = json!("2026-01-01T00:00:00Z");
        self.objects.insert((plural.into(), name.into()), object.clone());
        object
    }

    /// The answer to a request; `None` from a process that is dead by then.
    fn request(&mut self, method: &Method, path: &str, query: &str, body: &Value) -> Option<(u16, Value)> {
        if self.is_dead {
            return None;
        }
        let number = self.requests;
        self.requests += 1;
        let kill = self.kill.filter(|kill| kill.at == number);
        self.is_dead = kill.is_some();
        let answer = kill.is_none_or(|kill| kill.arrives).then(|| self.answer(method, path, query, body));
        answer.filter(|_| !self.is_dead)
    }

    fn answer(&mut self, method: &Method, path: &str, query: &str, body: &Value) -> (u16, Value) {
        let parts: Vec<_> = path.split('/').skip_while(|part| *part != "team").skip(1).collect();
        let (plural, name) = (parts[0], parts.get(1).copied());
        let key = |name: &str| (plural.to_owned(), name.to_owned());
        if method != Method::GET && !query.contains("dryRun=All") {
            self.writes.push(format!("{method} {}", parts.join("/")));
        }
        match (method, name) {
            (&Method::GET, None) => {
                let asked = query.split('&').find_map(|part| part.strip_prefix("labelSelector=")).unwrap_or_default();
                let wanted =
                    |o: &&Value| asked.is_empty() || asked.contains(&format!("stage%3D{}", label(o, LABEL_STAGE)));
                (200, json!({"metadata": {}, "items": self.of(plural).filter(wanted).collect::<Vec<_>>()}))
            }
            (&Method::GET, Some(name)) => match self.objects.get(&key(name)) {
                Some(object) => (200, object.clone()),
                None => failure(404, "NotFound"),
            },
            (&Method::POST, _) if query.contains("dryRun=All") => (201, body.clone()),
            (&Method::POST, _) if plural == "events" => (201, body.clone()),
            (&Method::POST, _) => self.create(plural, body),
            (&Method::PATCH, Some(name)) if parts.get(2) == Some(&"status") => self.patch_status(plural, name, body),
            (&Method::PATCH, Some(name)) => (200, self.put(plural, name, body.clone())),
            (&Method::DELETE, None) => (200, json!({"kind": "Status", "status": "Success"})),
            (&Method::DELETE, Some(name)) => {
                if let Some(job) = self.objects.remove(&key(name)) {
                    let uid = &job["metadata"]["uid"];
                    self.objects.retain(|_, other| other["metadata"]["ownerReferences"][0]["uid"] != *uid);
                }
                (200, json!({"kind": "Status", "status": "Success"}))
            }
            (method, _) => panic!("{method} {path}"),
        }
    }

    fn create(&mut self, plural: &str, body: &Value) -> (u16, Value) {
        let name = body["metadata"]["name"].as_str().unwrap();
        if self.objects.contains_key(&(plural.to_owned(), name.to_owned())) {
            return failure(409, "AlreadyExists");
        }
        if plural == "jobs" {
            let stage = label(body, LABEL_STAGE).to_owned();
            let others = self.of("jobs").filter(|other| label(other, LABEL_STAGE) == stage);
            let live = others.filter(|other| !holds(other, "Complete") && !holds(other, "Failed"));
            assert_eq!(live.count(), 0, "two live attempts at {stage}");
            self.attempts.push((stage, label(body, LABEL_ATTEMPT).to_owned()));
        }
        (201, self.put(plural, name, body.clone()))
    }

    fn patch_status(&mut self, plural: &str, name: &str, body: &Value) -> (u16, Value) {
        let mut object = self.objects[&(plural.to_owned(), name.to_owned())].clone();
        if body[0]["value"] != object["metadata"]["resourceVersion"] {
            return failure(409, "Conflict");
        }
        let patch: json_patch::Patch = serde_json::from_value(body.clone()).unwrap();
        json_patch::patch(&mut object, &patch).unwrap();
        (200, self.put(plural, name, object))
    }

    fn job(&self) -> RLHFJob {
        serde_json::from_value(self.of("rlhfjobs").next().unwrap().clone()).unwrap()
    }

    /// Job controller and kubelets move every Job on, and time passes.
    fn move_on(&mut self) {
        let open = |job: &&Value| !holds(job, "Complete") && !holds(job, "Failed");
        let jobs: Vec<_> = self.of("jobs").filter(open).cloned().collect();
        for mut job in jobs {
            let name = job["metadata"]["name"].as_str().unwrap().to_owned();
            let runs = job["status"]["startTime"].is_string();
            let fails = !self.is_calm && label(&job, LABEL_STAGE) == UNLUCKY && label(&job, LABEL_ATTEMPT) == "1";
            let pods = job["spec"]["parallelism"].as_u64().unwrap();
            for index in 0..pods {
                let code = runs.then_some(if fails { 75 } else { 0 });
                self.put("pods", &format!("{name}-{index}"), pod(&job, index, code));
            }
            job["status"] = json!({"startTime": "2026-01-01T00:00:00Z", "active": pods});
            if runs {
                let condition = json!({"type": if fails { "Failed" } else { "Complete" }, "status": "True"});
                job["status"]["conditions"] = json!([condition]);
                job["status"]["succeeded"] = json!(if fails { 0 } else { pods });
            }
            self.put("jobs", &name, job);
        }
        let mut job = self.of("rlhfjobs").next().unwrap().clone();
        for slot in job["status"]["stages"].as_array_mut().into_iter().flatten() {
            if slot["notBefore"].is_string() {
                slot["notBefore"] = json!("2026-01-01T00:00:00Z");
            }
        }
        self.put("rlhfjobs", "demo", job);
    }
}

/// A pod that runs, or has ended with a code.
fn pod(job: &Value, index: u64, code: Option<i32>) -> Value {
    let mut labels = job["spec"]["template"]["metadata"]["labels"].clone();
    labels[INDEX_KEY] = json!(index.to_string());
    let (phase, state) = match code {
        None => ("Running", json!({"running": {}})),
        Some(code) => (
            if code == 0 { "Succeeded" } else { "Failed" },
            json!({"terminated": {"exitCode": code, "finishedAt": "2026-01-01T00:00:05Z"}}),
        ),
    };
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": format!("{}-{index}", job["metadata"]["name"].as_str().unwrap()), "namespace": "team",
            "labels": labels, "annotations": {INDEX_KEY: index.to_string()},
            "ownerReferences": [{"apiVersion": "batch/v1", "kind": "Job", "name": job["metadata"]["name"],
                "uid": job["metadata"]["uid"], "controller": true}]},
        "spec": {"nodeName": "n", "containers": []},
        "status": {"phase": phase, "containerStatuses": [{
            "name": CONTAINER, "ready": false, "restartCount": 0, "image": "i", "imageID": "", "state": state}]},
    })
}

fn client(store: &Arc<Mutex<Store>>) -> Client {
    let store = store.clone();
    let service = tower::service_fn(move |request: Request<Body>| {
        let store = store.clone();
        async move {
            let (parts, body) = request.into_parts();
            let body = body.collect().await.unwrap().to_bytes();
            let body = serde_json::from_slice(&body).unwrap_or(Value::Null);
            let query = parts.uri.query().unwrap_or_default();
            let answer = store.lock().unwrap().request(&parts.method, parts.uri.path(), query, &body);
            let (code, answer) = answer.ok_or_else(|| tower::BoxError::from("the process is dead"))?;
            Ok::<_, tower::BoxError>(
                Response::builder().status(code).body(Body::from(answer.to_string().into_bytes())).unwrap(),
            )
        }
    });
    Client::new(service, "team")
}

/// All objects of a kind, as a watch first tells them.
fn listed<K: DeserializeOwned>(store: &Mutex<Store>, plural: &str) -> Vec<Event<K>> {
    let objects: Vec<_> = store.lock().unwrap().of(plural).cloned().collect();
    let applied = objects.into_iter().map(|object| Event::InitApply(serde_json::from_value(object).unwrap()));
    [Event::Init].into_iter().chain(applied).chain([Event::InitDone]).collect()
}

/// Runs a job from its creation to its end, with one process that is killed and one that is not.
async fn run(begun: Store) -> Store {
    let store = Arc::new(Mutex::new(begun));
    store.lock().unwrap().put("rlhfjobs", "demo", serde_json::to_value(job()).unwrap());
    let mut ctx = Arc::new(context(client(&store)));
    for _ in 0..100 {
        listed(&store, "jobs").iter().for_each(|event| _ = ctx.jobs.take(&None, event));
        listed(&store, "pods").iter().for_each(|event| _ = ctx.pods.take(&None, event));
        [Watch::RlhfJobs, Watch::Jobs, Watch::Pods].into_iter().for_each(|watch| ctx.listed.done(None, watch));
        let job = store.lock().unwrap().job();
        if job.status.as_ref().is_some_and(|s| s.phase == Phase::Succeeded || s.phase == Phase::Failed) {
            break;
        }
        let passed = reconcile(Arc::new(kube::core::DeserializeGuard(Ok(job))) as Arc<Guarded>, ctx.clone()).await;
        let mut now = store.lock().unwrap();
        if std::mem::take(&mut now.is_dead) {
            now.kill = None;
            drop(now);
            ctx = Arc::new(context(client(&store)));
            continue;
        }
        assert!(passed.is_ok(), "{passed:?}");
        now.move_on();
    }
    drop(ctx);
    std::mem::take(&mut *store.lock().unwrap())
}

/// What must be so at the end, whatever happened: each attempt made once, and counted once.
fn check(end: &Store, when: &str) {
    let status = end.job().status.unwrap();
    assert_eq!(status.phase, Phase::Succeeded, "{when}: {:?}", status.message);
    let mut attempts = end.attempts.clone();
    attempts.sort();
    let wanted = [("act", "1"), ("judge", "1"), ("prepare", "1"), (UNLUCKY, "1"), (UNLUCKY, "2")];
    assert_eq!(attempts, wanted.map(|(stage, attempt)| (stage.to_owned(), attempt.to_owned())), "{when}");
    let counted = |slot: &StageStatus| (slot.name.clone(), slot.attempt, slot.restarts.total);
    let counts: Vec<_> = status.slots().map(counted).collect();
    let wanted = [("prepare", 1, 0), (UNLUCKY, 2, 1), ("judge", 1, 0), ("act", 1, 0)];
    assert_eq!(counts, wanted.map(|(stage, attempt, restarts)| (stage.to_owned(), attempt, restarts)), "{when}");
}

#[tokio::test]
async fn case_11_an_operator_killed_at_any_request_doubles_no_attempt_and_loses_no_count() {
    let whole = run(Store::default()).await;
    check(&whole, "never killed");
    assert!(whole.requests > 30, "{}", whole.requests);
    for at in 0..whole.requests {
        for arrives in [false, true] {
            let end = run(Store { kill: Some(Kill { at, arrives }), ..Store::default() }).await;
            check(&end, &format!("killed at request {at} of {}, which arrived: {arrives}", whole.requests));
        }
    }
}

#[tokio::test]
async fn a_job_whose_attempts_all_succeed_takes_six_writes_an_attempt_at_most() {
    let end = run(Store { is_calm: true, ..Store::default() }).await;
    let attempts = end.attempts.len();
    assert_eq!(attempts, 4);
    assert!(end.writes.len() <= 6 * attempts, "{} writes: {:#?}", end.writes.len(), end.writes);
    for shared in ["POST configmaps", "POST services", "POST secrets"] {
        assert_eq!(end.writes.iter().filter(|write| *write == shared).count(), 1, "{shared}");
    }
}

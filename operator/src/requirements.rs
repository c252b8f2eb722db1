//! What the cluster must have before the operator works, each with an error that says what is missing. An API server that
//! does not answer lacks nothing: it is asked again until it does.

use crate::controller::Guarded;
use crate::keys;
use crate::scope::{Scope, api_of};
use axum::http::Request;
use k8s_openapi::Resource as _;
use k8s_openapi::api::scheduling::v1beta1::PodGroup;
use kube::{Api, Client, Resource as _};
use rlhf_api::job::{RLHFJob, crd};
use rlhf_api::names;
use serde_json::{Value, json};
use std::time::Duration;

/// A definition that has just been installed is in the API server's OpenAPI within seconds. It is looked for so often.
const TRIES: u32 = 8;
const POLL: Duration = Duration::from_secs(1);
/// So many missing fields are named.
const NAMED: usize = 5;

/// Between two looks while the API server does not answer.
const RETRY: Duration = Duration::from_secs(5);
/// A look that takes longer has no answer.
const LIMIT: Duration = Duration::from_secs(30);

/// A requirement that is not met, or not known to be.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Only somebody who changes something helps.
    #[error("{0}")]
    Missing(String),
    /// The operator's own secret cannot be had.
    #[error(transparent)]
    Keys(#[from] keys::Error),
    /// The API server did not answer, or not for good.
    #[error("{what}: {source}")]
    Unanswered {
        /// What it was asked.
        what: &'static str,
        /// Its answer, or what there is in place of one.
        source: kube::Error,
    },
}

impl Error {
    fn may_pass(&self) -> bool {
        match self {
            Self::Missing(_) => false,
            Self::Keys(error) => matches!(error, keys::Error::Api { source, .. } if may_pass(source)),
            Self::Unanswered { source, .. } => may_pass(source),
        }
    }
}

/// Whether the same question may be answered otherwise later. Who may do what, too, an API server that has just started
/// does not know at once.
fn may_pass(error: &kube::Error) -> bool {
    match error {
        kube::Error::Api(status) => status.code >= 500 || matches!(status.code, 401 | 403 | 408 | 429),
        _ => is_no_answer(error),
    }
}

/// Whether the API server was not reached.
fn is_no_answer(error: &kube::Error) -> bool {
    matches!(error, kube::Error::HyperError(_) | kube::Error::Service(_))
}

/// An error with what it comes from: that a connection failed, and also why.
fn whole(error: &dyn std::error::Error) -> String {
    let (mut text, mut next) = (error.to_string(), error.source());
    while let Some(source) = next {
        // Some errors say themselves what they come from.
        if !text.ends_with(&source.to_string()) {
            text += &format!(": {source}");
        }
        next = source.source();
    }
    text
}

/// Waits until `look`, done again and again, has an answer of the API server's, and returns what it found.
///
/// # Errors
/// A requirement is not met.
pub async fn answered<T>(look: impl AsyncFn() -> Result<T, Error>) -> Result<T, Error> {
    loop {
        match tokio::time::timeout(LIMIT, look()).await {
            Ok(Err(error)) if error.may_pass() => tracing::warn!("cannot start yet: {}", whole(&error)),
            Ok(found) => return found,
            Err(_) => tracing::warn!("cannot start yet: the API server does not answer in {} s", LIMIT.as_secs()),
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// Whether RLHFJobs can be listed, with an error that says what is missing. One namespace of several is enough: another may
/// be gone, and its role with it, which the watches tell and which is no reason to leave the others alone.
pub async fn check_crd(client: &Client, scope: &Scope) -> Result<(), Error> {
    let mut refused = Ok(());
    for part in scope.parts() {
        match check_crd_in(client, part).await {
            Err(error @ Error::Unanswered { .. }) => {
                if let Some(namespace) = part {
                    tracing::warn!(namespace, "{}", whole(&error));
                }
                refused = Err(error);
            }
            known => return known,
        }
    }
    refused
}

async fn check_crd_in(client: &Client, part: Option<&str>) -> Result<(), Error> {
    let api: Api<Guarded> = api_of(client, part);
    match api.list_metadata(&kube::api::ListParams::default().limit(1)).await {
        Ok(_) => Ok(()),
        // By the code: an unknown group is answered in plain text, without a reason.
        Err(kube::Error::Api(s)) if s.code == 404 => Err(Error::Missing(format!(
            "the cluster does not know {}/{} RLHFJob: install the chart with crds.enabled=true, or apply crds/rlhfjob.yaml",
            names::GROUP,
            RLHFJob::version(&())
        ))),
        Err(source) => Err(Error::Unanswered {
            what: "RLHFJobs cannot be listed (which the chart's ClusterRole or Role lets the operator)",
            source,
        }),
    }
}

/// Whether the API server stores every field, by its name, that this operator reads and writes. One that the installed definition does
/// not have it drops without a word: a setting that has no effect, or a counter that is lost.
pub async fn check_fields(client: &Client) -> Result<(), Error> {
    let wanted = wanted_schema().map_err(Error::Missing)?;
    let path = format!("/openapi/v3/apis/{}/{}", names::GROUP, RLHFJob::version(&()));
    let mut lacking = None;
    for attempt in 1..=TRIES {
        if attempt > 1 {
            tokio::time::sleep(POLL).await;
        }
        match served_schema(client, &path).await {
            Ok(Some(served)) => {
                let missing = missing_fields(&wanted, &served);
                if missing.is_empty() {
                    return Ok(());
                }
                if lacking.is_none() {
                    tracing::warn!("{}; it is looked at again", of_another_version(&missing));
                }
                lacking = Some(missing);
            }
            Ok(None) => {}
            Err(source) if attempt == TRIES && is_no_answer(&source) => {
                return Err(Error::Unanswered { what: "the definition's fields cannot be read", source });
            }
            // What nobody may read speaks against nothing.
            Err(error) if lacking.is_none() && (attempt == TRIES || is_denied(&error)) => {
                tracing::warn!(%error, "the definition's fields cannot be compared with this operator's");
                return Ok(());
            }
            Err(error) => tracing::debug!(%error, "the definition's fields cannot be read yet"),
        }
    }
    let none = || format!("the API server has no {path}");
    Err(Error::Missing(lacking.map_or_else(none, |missing| of_another_version(&missing))))
}

fn is_denied(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(s) if matches!(s.code, 401 | 403))
}

fn of_another_version(missing: &[String]) -> String {
    let more = missing.len().saturating_sub(NAMED);
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    format!(
        "the cluster's definition of RLHFJob is of another version and lacks {}{more}, which the API server would drop: \
         install the chart with crds.enabled=true, or apply this version's crds/rlhfjob.yaml",
        missing[..missing.len().min(NAMED)].join(", ")
    )
}

fn wanted_schema() -> Result<Value, String> {
    let schema = crd().spec.versions.into_iter().next().and_then(|v| v.schema?.open_api_v3_schema);
    serde_json::to_value(schema).map_err(|e| format!("the definition cannot be written: {e}"))
}

/// The schema of RLHFJobs in the API server's OpenAPI; `None` while it is not there.
async fn served_schema(client: &Client, path: &str) -> Result<Option<Value>, kube::Error> {
    let request = Request::get(path).body(Vec::new()).map_err(kube::Error::HttpError)?;
    let document: Value = match client.request(request).await {
        Err(kube::Error::Api(s)) if s.code == 404 => return Ok(None),
        other => other?,
    };
    let schemas = document.pointer("/components/schemas").and_then(Value::as_object);
    let is_ours = |schema: &&Value| {
        let kinds = schema["x-kubernetes-group-version-kind"].as_array();
        kinds.into_iter().flatten().any(|k| k["kind"] == RLHFJob::kind(&()).as_ref())
    };
    Ok(schemas.and_then(|s| s.values().find(is_ours)).cloned())
}

/// The paths of all properties of one schema that another lacks, such as `spec.stages[].seed`.
fn missing_fields(wanted: &Value, served: &Value) -> Vec<String> {
    fn walk(wanted: &Value, served: &Value, path: &str, missing: &mut Vec<String>) {
        if served["x-kubernetes-preserve-unknown-fields"] == json!(true) {
            return;
        }
        for (name, schema) in wanted["properties"].as_object().into_iter().flatten() {
            let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
            match served["properties"].get(name) {
                Some(there) => walk(schema, there, &path, missing),
                None => missing.push(path),
            }
        }
        for (key, mark) in [("items", "[]"), ("additionalProperties", ".*")] {
            if wanted[key].is_object() {
                walk(&wanted[key], &served[key], &format!("{path}{mark}"), missing);
            }
        }
    }
    let mut missing = Vec::new();
    walk(wanted, served, "", &mut missing);
    missing
}

/// Whether the cluster serves PodGroups, with an error that says what is missing.
pub async fn check_pod_groups(client: &Client) -> Result<(), Error> {
    let version = PodGroup::API_VERSION;
    let failed = |why: &str| Error::Missing(format!("--gang-scheduling needs PodGroups of {version}: {why}"));
    match client.list_api_group_resources(version).await {
        Ok(served) if served.resources.iter().any(|r| r.kind == PodGroup::KIND) => Ok(()),
        Ok(_) => Err(failed("the cluster serves that version without them")),
        Err(kube::Error::Api(s)) if s.code == 404 => Err(failed(
            "the cluster does not serve them; switch them on (Kubernetes 1.37: the feature gate GenericWorkload of API server, controller manager and scheduler, and the API server's --runtime-config), or leave out trainer.gangScheduling",
        )),
        Err(source) => Err(Error::Unanswered { what: "the API server cannot be asked for PodGroups", source }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::{Request, Response};
    use kube::client::Body;
    use std::sync::{Arc, Mutex};

    /// A client whose API server gives every request the same answer.
    fn client(code: u16, body: &'static str) -> Client {
        let service = tower::service_fn(move |_: Request<Body>| async move {
            Ok::<_, tower::BoxError>(
                Response::builder().status(code).body(Body::from(body.as_bytes().to_vec())).unwrap(),
            )
        });
        Client::new(service, "team")
    }

    #[tokio::test]
    async fn what_is_missing_at_the_start_is_named() {
        const FORBIDDEN: &str =
            r#"{"kind":"Status","status":"Failure","reason":"Forbidden","code":403,"message":"cannot list resource"}"#;
        for (code, body, start, part) in [
            (404, "404 page not found\n", "the cluster does not know rlhf.dev/v1alpha1 RLHFJob: ", "crds/rlhfjob.yaml"),
            (403, FORBIDDEN, "RLHFJobs cannot be listed (which the chart's ClusterRole", "cannot list resource"),
            (500, "{}", "RLHFJobs cannot be listed", ""),
        ] {
            let error = check_crd(&client(code, body), &Scope::default()).await.unwrap_err().to_string();
            assert!(error.starts_with(start) && error.contains(part), "{code}: {error}");
        }
        check_crd(&client(200, r#"{"metadata":{},"items":[]}"#), &Scope::default()).await.unwrap();
        let one_is_gone = tower::service_fn(|request: Request<Body>| async move {
            let gone = request.uri().path().contains("/namespaces/a/");
            let (code, body) = if gone { (403, FORBIDDEN) } else { (200, r#"{"metadata":{},"items":[]}"#) };
            Ok::<_, tower::BoxError>(
                Response::builder().status(code).body(Body::from(body.as_bytes().to_vec())).unwrap(),
            )
        });
        let two = Scope::new(&["a".into(), "b".into()], "");
        check_crd(&Client::new(one_is_gone, "team"), &two).await.unwrap();
        let error = check_crd(&client(403, FORBIDDEN), &two).await.unwrap_err();
        assert!(error.may_pass(), "a role may be on its way");

        const GROUPS: &str = r#"{"groupVersion":"scheduling.k8s.io/v1beta1","resources":[
            {"name":"podgroups","singularName":"podgroup","namespaced":true,"kind":"PodGroup","verbs":["create"]}]}"#;
        const OTHERS: &str = r#"{"groupVersion":"scheduling.k8s.io/v1beta1","resources":[]}"#;
        for (code, body, part) in [
            (404, "404 page not found\n", "the cluster does not serve them"),
            (200, OTHERS, "serves that version without them"),
        ] {
            let error = check_pod_groups(&client(code, body)).await.unwrap_err().to_string();
            assert!(
                error.starts_with("--gang-scheduling needs PodGroups of ") && error.contains(part),
                "{code}: {error}"
            );
        }
        check_pod_groups(&client(200, GROUPS)).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn an_api_server_that_is_away_is_waited_for_and_one_that_says_no_is_not() {
        let asked = Mutex::new(0);
        let later = "try again later\n";
        let known = (200, r#"{"metadata":{},"items":[]}"#);
        let answers = [(500, later), (503, later), (429, later), (401, later), (403, later), known];
        let look = async || {
            let (code, body) = answers[*asked.lock().unwrap()];
            *asked.lock().unwrap() += 1;
            check_crd(&client(code, body), &Scope::default()).await
        };
        answered(look).await.unwrap();
        assert_eq!(*asked.lock().unwrap(), answers.len());

        let refused = tower::service_fn(|_: Request<Body>| async {
            Err::<Response<Body>, _>(tower::BoxError::from("connection refused"))
        });
        let away = Client::new(refused, "team");
        for error in [check_pod_groups(&away).await.unwrap_err(), check_fields(&away).await.unwrap_err()] {
            assert!(error.may_pass() && whole(&error).ends_with("connection refused"), "{}", whole(&error));
        }
        let (hangs, started) = (Mutex::new(true), tokio::time::Instant::now());
        let look =
            async || if std::mem::take(&mut *hangs.lock().unwrap()) { std::future::pending().await } else { Ok(()) };
        answered(look).await.unwrap();
        assert_eq!(started.elapsed(), LIMIT + RETRY);

        let error = answered(async || check_crd(&client(404, "404 page not found\n"), &Scope::default()).await)
            .await
            .unwrap_err();
        assert!(matches!(error, Error::Missing(_)), "{error}");
    }

    #[test]
    fn case_8_a_field_that_the_installed_definition_lacks_is_named() {
        let wanted = wanted_schema().unwrap();
        assert!(missing_fields(&wanted, &wanted).is_empty());
        let mut served = wanted.clone();
        let spec = "/properties/spec/properties";
        let drop = |at: &str, field: &str, schema: &mut Value| {
            schema.pointer_mut(at).and_then(Value::as_object_mut).unwrap().remove(field).unwrap();
        };
        drop(spec, "ttlSecondsAfterFinished", &mut served);
        drop(&format!("{spec}/stages/items/properties"), "seed", &mut served);
        drop("/properties/status/properties/stages/items/properties", "bugs", &mut served);
        let missing = missing_fields(&wanted, &served);
        assert_eq!(missing, ["spec.stages[].seed", "spec.ttlSecondsAfterFinished", "status.stages[].bugs"]);
        let error = of_another_version(&missing);
        assert!(error.contains("lacks spec.stages[].seed, spec.ttlSecondsAfterFinished, status"), "{error}");
        let many = (0..7).map(|n| format!("f{n}")).collect::<Vec<_>>();
        assert!(of_another_version(&many).contains("f4 and 2 more"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_definition_that_is_just_being_installed_is_waited_for() {
        let served = |mut schema: Value| {
            schema["x-kubernetes-group-version-kind"] = json!([{"kind": "RLHFJob"}]);
            (200, json!({"components": {"schemas": {"dev.rlhf.v1alpha1.RLHFJob": schema}}}).to_string())
        };
        let older = served(json!({"properties": {"spec": {"properties": {}}}}));
        let unknown = || (404, "404 page not found\n".to_owned());
        let answers = vec![unknown(), older, unknown(), served(wanted_schema().unwrap())];
        let left = Arc::new(Mutex::new(answers.into_iter()));
        let asked = left.clone();
        let service = tower::service_fn(move |_: Request<Body>| {
            let (code, body) = asked.lock().unwrap().next().expect("it is asked once more after it was whole");
            let response = Response::builder().status(code).body(Body::from(body.into_bytes())).unwrap();
            async { Ok::<_, tower::BoxError>(response) }
        });
        check_fields(&Client::new(service, "team")).await.unwrap();
        assert_eq!(left.lock().unwrap().len(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_definition_without_fields_is_refused_and_one_that_cannot_be_compared_is_not() {
        const OTHER: &str = r#"{"components":{"schemas":{"dev.rlhf.v1alpha1.RLHFJob":{
            "x-kubernetes-group-version-kind":[{"group":"rlhf.dev","kind":"RLHFJob","version":"v1alpha1"}],
            "properties":{"spec":{"properties":{}}}}}}}"#;
        let error = check_fields(&client(200, OTHER)).await.unwrap_err().to_string();
        assert!(
            error.contains("lacks spec.activeDeadlineSeconds, ") && error.ends_with("crds/rlhfjob.yaml"),
            "{error}"
        );
        let error = check_fields(&client(404, "404 page not found\n")).await.unwrap_err().to_string();
        assert_eq!(error, "the API server has no /openapi/v3/apis/rlhf.dev/v1alpha1");
        check_fields(&client(403, "{}")).await.unwrap();
    }
}

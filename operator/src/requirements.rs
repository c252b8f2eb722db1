//! What the cluster must have before the operator starts, each with an error that says what is missing.

use crate::controller::{Guarded, scoped};
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

/// Whether RLHFJobs can be listed, with an error that says what is missing.
pub async fn check_crd(client: &Client, namespace: Option<&str>) -> Result<(), String> {
    let api: Api<Guarded> = scoped(client, namespace);
    match api.list_metadata(&kube::api::ListParams::default().limit(1)).await {
        Ok(_) => Ok(()),
        // By the code: an unknown group is answered in plain text, without a reason.
        Err(kube::Error::Api(s)) if s.code == 404 => Err(format!(
            "the cluster does not know {}/{} RLHFJob: install the chart with crds.enabled=true, or apply crds/rlhfjob.yaml",
            names::GROUP,
            RLHFJob::version(&())
        )),
        Err(kube::Error::Api(s)) if s.is_forbidden() => {
            Err(format!("the operator may not list RLHFJobs; see the chart's ClusterRole: {}", s.message))
        }
        Err(error) => Err(format!("the API server cannot be asked for RLHFJobs: {error}")),
    }
}

/// Whether the API server stores every field, by its name, that this operator reads and writes. One that the installed definition does
/// not have it drops without a word: a setting that has no effect, or a counter that is lost.
pub async fn check_fields(client: &Client) -> Result<(), String> {
    let wanted = wanted_schema()?;
    let path = format!("/openapi/v3/apis/{}/{}", names::GROUP, RLHFJob::version(&()));
    let mut lacking = None;
    for attempt in 1..=TRIES {
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
            // What nobody may read speaks against nothing.
            Err(error) if lacking.is_none() && (attempt == TRIES || is_denied(&error)) => {
                tracing::warn!(%error, "the definition's fields cannot be compared with this operator's");
                return Ok(());
            }
            Err(error) => tracing::debug!(%error, "the definition's fields cannot be read yet"),
        }
        tokio::time::sleep(POLL).await;
    }
    Err(lacking.map_or_else(|| format!("the API server has no {path}"), |missing| of_another_version(&missing)))
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
pub async fn check_pod_groups(client: &Client) -> Result<(), String> {
    let version = PodGroup::API_VERSION;
    let failed = |why: String| format!("--gang-scheduling needs PodGroups of {version}: {why}");
    match client.list_api_group_resources(version).await {
        Ok(served) if served.resources.iter().any(|r| r.kind == PodGroup::KIND) => Ok(()),
        Ok(_) => Err(failed("the cluster serves that version without them".into())),
        Err(kube::Error::Api(s)) if s.code == 404 => Err(failed(
            "the cluster does not serve them; switch them on (Kubernetes 1.37: the feature gate GenericWorkload of API server, controller manager and scheduler, and the API server's --runtime-config), or leave out trainer.gangScheduling".into(),
        )),
        Err(error) => Err(failed(format!("the API server cannot be asked: {error}"))),
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
        for (code, body, start, end) in [
            (404, "404 page not found\n", "the cluster does not know rlhf.dev/v1alpha1 RLHFJob: ", "crds/rlhfjob.yaml"),
            (403, FORBIDDEN, "the operator may not list RLHFJobs", "cannot list resource"),
            (500, "{}", "the API server cannot be asked for RLHFJobs: ", ""),
        ] {
            let error = check_crd(&client(code, body), None).await.unwrap_err();
            assert!(error.starts_with(start) && error.ends_with(end), "{code}: {error}");
        }
        assert_eq!(check_crd(&client(200, r#"{"metadata":{},"items":[]}"#), None).await, Ok(()));

        const GROUPS: &str = r#"{"groupVersion":"scheduling.k8s.io/v1beta1","resources":[
            {"name":"podgroups","singularName":"podgroup","namespaced":true,"kind":"PodGroup","verbs":["create"]}]}"#;
        const OTHERS: &str = r#"{"groupVersion":"scheduling.k8s.io/v1beta1","resources":[]}"#;
        for (code, body, part) in [
            (404, "404 page not found\n", "the cluster does not serve them"),
            (200, OTHERS, "serves that version without them"),
            (500, "{}", "cannot be asked"),
        ] {
            let error = check_pod_groups(&client(code, body)).await.unwrap_err();
            assert!(
                error.starts_with("--gang-scheduling needs PodGroups of ") && error.contains(part),
                "{code}: {error}"
            );
        }
        assert_eq!(check_pod_groups(&client(200, GROUPS)).await, Ok(()));
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
        assert_eq!(check_fields(&Client::new(service, "team")).await, Ok(()));
        assert_eq!(left.lock().unwrap().len(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_definition_without_fields_is_refused_and_one_that_cannot_be_compared_is_not() {
        const OTHER: &str = r#"{"components":{"schemas":{"dev.rlhf.v1alpha1.RLHFJob":{
            "x-kubernetes-group-version-kind":[{"group":"rlhf.dev","kind":"RLHFJob","version":"v1alpha1"}],
            "properties":{"spec":{"properties":{}}}}}}}"#;
        let error = check_fields(&client(200, OTHER)).await.unwrap_err();
        assert!(
            error.contains("lacks spec.activeDeadlineSeconds, ") && error.ends_with("crds/rlhfjob.yaml"),
            "{error}"
        );
        let error = check_fields(&client(404, "404 page not found\n")).await.unwrap_err();
        assert_eq!(error, "the API server has no /openapi/v3/apis/rlhf.dev/v1alpha1");
        assert_eq!(check_fields(&client(403, "{}")).await, Ok(()));
    }
}

//! What the operator's account may write, as the API server answers it: its roles, and the chart's policies on top.

use e2e::manifest::{NAME, example};
use e2e::tools::{Answer, kubeconfig, kubectl, kubectl_with};
use e2e::{Scene, eventually, on_the_cluster};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Patch, PatchParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client, Config, ResourceExt};
use rlhf_api::job::StagePhase;
use rlhf_api::names;
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// The objects that are asked for, and what is said to each.
#[derive(Deserialize)]
struct Cases {
    objects: BTreeMap<String, Value>,
    accepted: Vec<Case>,
    refused: Vec<Refused>,
}

/// One object, with fields set.
#[derive(Debug, Deserialize)]
struct Case {
    object: String,
    #[serde(default)]
    set: BTreeMap<String, Value>,
}

/// Objects that are refused with a message that has `because` in it.
#[derive(Deserialize)]
struct Refused {
    because: String,
    cases: Vec<Case>,
}

impl Case {
    fn of(&self, objects: &BTreeMap<String, Value>) -> Value {
        let mut object = objects[&self.object].clone();
        for (pointer, value) in &self.set {
            let (parent, field) = pointer.rsplit_once('/').expect("a pointer");
            match object.pointer_mut(parent).unwrap_or_else(|| panic!("{self:?}: nothing at {parent}")) {
                Value::Array(items) => items[field.parse::<usize>().expect("an index")] = value.clone(),
                map if value.is_null() => _ = map.as_object_mut().expect("a map").remove(field),
                map => map[field] = value.clone(),
            }
        }
        object
    }
}

/// Asks as the operator's account, without leaving anything.
async fn as_operator(scene: &Scene, namespace: &str, args: &[&str], manifest: &Value) -> Answer {
    let account = scene.operator.account();
    let who = ["--as", &account, "--as-group=system:serviceaccounts", "--as-group=system:authenticated"];
    kubectl_with(&[args, &["--namespace", namespace, "--dry-run=server"], &who].concat(), manifest).await
}

async fn create(scene: &Scene, object: &Value) -> Answer {
    as_operator(scene, &scene.namespace, &["create", "--filename", "-"], object).await
}

#[test]
fn the_operators_account_makes_only_what_jobs_need() {
    on_the_cluster(async |scene| {
        let cases: Cases = serde_yaml_ng::from_str(include_str!("account.yaml")).expect("the cases");
        // The API server takes note of new policies within seconds.
        let first = cases.refused[0].cases[0].of(&cases.objects);
        eventually("the policies' effect", async || !create(scene, &first).await.ok).await;
        let mut wrong = vec![];
        for case in &cases.accepted {
            let answer = create(scene, &case.of(&cases.objects)).await;
            if !answer.ok {
                wrong.push(format!("{case:?} is refused: {}", answer.errors));
            }
        }
        for refused in &cases.refused {
            for case in &refused.cases {
                let answer = create(scene, &case.of(&cases.objects)).await;
                if answer.ok || !answer.errors.contains(&refused.because) {
                    wrong.push(format!("{case:?} is to be refused with '{}': {}", refused.because, answer.errors));
                }
            }
        }
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
        // Nobody else is held to them.
        let other = cases.refused[0].cases[0].of(&cases.objects);
        let args = ["create", "--namespace", &scene.namespace, "--dry-run=server", "--filename", "-"];
        kubectl_with(&args, &other).await.good();
    });
}

/// A client that asks as the operator's account.
async fn operators_client(scene: &Scene) -> Client {
    let read = Kubeconfig::read_from(kubeconfig()).expect("the administrator's kubeconfig");
    let mut config =
        Config::from_custom_kubeconfig(read, &KubeConfigOptions::default()).await.expect("a client's config");
    config.auth_info.impersonate = Some(scene.operator.account());
    Client::try_from(config).expect("a client")
}

/// A pod that anybody may have, which never runs.
async fn foreign_pod(scene: &Scene) -> String {
    let security = json!({"allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}});
    let pod = json!({"metadata": {"name": "theirs", "labels": {"app": "theirs"}}, "spec": {
        "nodeSelector": {"nowhere": "true"},
        "securityContext": {"runAsNonRoot": true, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [{"name": "c", "image": "docker.io/rlhf/pause:dev", "securityContext": security}]}});
    let pod: Pod = serde_json::from_value(pod).expect("a pod");
    scene.api().create(&PostParams::default(), &pod).await.expect("a pod of somebody else's").name_any()
}

#[test]
fn the_operators_account_touches_only_what_is_its_own() {
    on_the_cluster(async |scene| {
        let namespace = &scene.namespace;
        let theirs = foreign_pod(scene).await;
        // Its claim does not exist, so that it stays where it is.
        scene.apply(example().set("/spec/storage/volumeClaim/claimName", json!("missing"))).await;
        let job = scene.await_stage(NAME, "prepare", StagePhase::Starting).await;
        eventually("the prepare pod", async || !scene.pods(&job, "prepare", 1).await.is_empty()).await;
        let own = scene.pods(&job, "prepare", 1).await[0].name_any();

        as_operator(scene, namespace, &["delete", "pod", &own], &Value::Null).await.good();
        for (what, because) in [
            (["delete", "pod", &theirs], "only pods of its own Jobs"),
            (["delete", "rlhfjob", NAME], "only RLHFJobs that are over"),
        ] {
            let answer = as_operator(scene, namespace, &what, &Value::Null).await;
            assert!(!answer.ok && answer.errors.contains(because), "{what:?}: {}{}", answer.output, answer.errors);
        }
        // kubectl would read the status first, which the operator may not.
        let pods: Api<Pod> = Api::namespaced(operators_client(scene).await, namespace);
        let params = PatchParams { dry_run: true, ..Default::default() };
        let failed = json!({"status": {"phase": "Failed"}});
        let label = json!({"metadata": {"labels": {names::LABEL_JOB_UID: "1"}}});
        pods.patch_status(&own, &params, &Patch::Strategic(&failed)).await.expect("a pod of its own");
        for (pod, patch, because) in [
            (&theirs, &failed, "only pods of its own Jobs"),
            (&theirs, &label, "only pods of its own Jobs"),
            (&own, &label, "changes no labels of pods"),
        ] {
            let answer = pods.patch_status(pod, &params, &Patch::Strategic(patch)).await;
            let Err(kube::Error::Api(status)) = &answer else { panic!("{pod}, {patch}: {answer:?}") };
            assert!(status.message.contains(because), "{pod}, {patch}: {}", status.message);
        }
        // Of the operator's own namespace, where its pods are.
        let operators = scene.operator.pods().await;
        let answer = as_operator(scene, e2e::SYSTEM, &["delete", "pod", &operators[0].name_any()], &Value::Null).await;
        assert!(!answer.ok && answer.errors.contains("only pods of its own Jobs"), "{}", answer.errors);
    });
}

#[test]
fn the_api_server_finds_nothing_wrong_in_the_policies() {
    on_the_cluster(async |_| {
        let selector = "app.kubernetes.io/name=rlhf-operator";
        let policies = async || {
            let args = ["get", "validatingadmissionpolicies", "--selector", selector, "--output", "json"];
            let found: Value = serde_json::from_str(&kubectl(&args).await.good()).expect("JSON");
            found["items"].as_array().expect("a list").clone()
        };
        let checked = |p: &Value| p["status"]["observedGeneration"] == p["metadata"]["generation"];
        eventually("a look at the policies", async || policies().await.iter().all(checked)).await;
        let policies = policies().await;
        // Other tests' operators have as many.
        assert!(policies.len() >= 7, "{} policies", policies.len());
        for policy in policies {
            let warnings = &policy["status"]["typeChecking"]["expressionWarnings"];
            assert!(warnings.is_null(), "{}: {warnings}", policy["metadata"]["name"]);
        }
    });
}

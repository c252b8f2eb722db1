//! Who reaches what: a job's pods and their progress, and the rights of the operator.

use e2e::audit::operators_writes;
use e2e::manifest::{ENDLESS, NAME, endless, waits};
use e2e::tools::kubectl;
use e2e::{Operator, RELEASE, Scene, eventually, on_the_cluster, on_the_cluster_with, stage, uid};
use k8s_openapi::api::authorization::v1::SubjectAccessReview;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{Namespace, Pod, Secret};
use k8s_openapi::api::networking::v1::{NetworkPolicy, NetworkPolicyPeer};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::api::{DeleteParams, ListParams, LogParams, PostParams};
use kube::core::Selector;
use kube::{Api, Resource, ResourceExt};
use rlhf_api::job::{RLHFJob, StagePhase};
use rlhf_api::names;
use serde_json::{Value, json};
use std::collections::BTreeSet;

/// Pods that are not the job's.
const STRANGERS: [&str; 2] = ["stranger", "leftover"];

#[test]
fn pods_are_fenced_and_tell_progress_to_the_operator_alone() {
    on_the_cluster(async |scene| {
        foreign_pods(scene).await;
        scene.apply(endless()).await;
        let job = scene.await_stage(NAME, "sft", StagePhase::Running).await;
        the_policy_selects_exactly_the_jobs_pods(scene, &job).await;
        for name in STRANGERS {
            scene.api::<Pod>().delete(name, &DeleteParams::default()).await.unwrap_or_else(|e| panic!("{name}: {e}"));
        }
        let told = |j: &RLHFJob| stage(j, "sft").progress.is_some_and(|p| p.step > 0);
        let job = scene.await_job(NAME, "progress, for which the operator needs the key", told).await;
        let key = key(scene, &job).await;
        progress_is_for_who_has_the_key(scene, &job, &key).await;
        the_key_is_written_nowhere_else(scene, &job, &key).await;
        the_operator_makes_secrets_and_reads_none(scene).await;
    });
}

/// A pod that has nothing to do with the job, and one that an earlier job of the same name could have left. No node
/// takes them.
async fn foreign_pods(scene: &Scene) {
    for (name, labels) in [
        (STRANGERS[0], json!({"app": "stranger"})),
        (
            STRANGERS[1],
            json!({names::LABEL_JOB: NAME, names::LABEL_JOB_UID: "another", names::LABEL_MANAGED_BY: names::FIELD_MANAGER}),
        ),
    ] {
        let security = json!({"allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}});
        let pod = json!({"metadata": {"name": name, "labels": labels}, "spec": {
            "nodeSelector": {"nowhere": "true"},
            "securityContext": {"runAsNonRoot": true, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [{"name": "c", "image": "docker.io/rlhf/pause:dev", "securityContext": security}]}});
        let pod: Pod = serde_json::from_value(pod).expect("a pod");
        scene.api().create(&PostParams::default(), &pod).await.unwrap_or_else(|e| panic!("{name}: {e}"));
    }
}

/// The objects that a selector selects, by name, as the API server evaluates it.
async fn selected<K>(api: &Api<K>, selector: &LabelSelector) -> BTreeSet<String>
where
    K: Resource<DynamicType = ()> + Clone + std::fmt::Debug + serde::de::DeserializeOwned,
{
    let selector = Selector::try_from(selector.clone()).expect("a selector of the API");
    let found = api.list(&ListParams::default().labels_from(&selector)).await.unwrap_or_else(|e| panic!("{e}"));
    found.iter().map(|o| o.name_any()).collect()
}

/// The job's pods, by their owners.
async fn owned_pods(scene: &Scene, job: &RLHFJob) -> BTreeSet<String> {
    let owned = |o: &dyn Fn() -> Vec<String>, by: &BTreeSet<String>| o().iter().any(|uid| by.contains(uid));
    let owners = |meta: &k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta| {
        meta.owner_references.iter().flatten().map(|o| o.uid.clone()).collect::<Vec<_>>()
    };
    let all = ListParams::default();
    let jobs = scene.api::<Job>().list(&all).await.expect("Jobs");
    let job_uid = BTreeSet::from([uid(job)]);
    let attempts = jobs.iter().filter(|j| owned(&|| owners(&j.metadata), &job_uid)).filter_map(|j| j.uid()).collect();
    let pods = scene.api::<Pod>().list(&all).await.expect("pods");
    pods.iter().filter(|p| owned(&|| owners(&p.metadata), &attempts)).map(|p| p.name_any()).collect()
}

async fn the_policy_selects_exactly_the_jobs_pods(scene: &Scene, job: &RLHFJob) {
    let name = names::network_policy(NAME, &uid(job));
    let policy = scene.api::<NetworkPolicy>().get(&name).await.unwrap_or_else(|e| panic!("NetworkPolicy {name}: {e}"));
    assert_eq!(policy.owner_references()[0].uid, uid(job));
    let spec = policy.spec.expect("a policy has a spec");
    let gang = spec.pod_selector.expect("a policy selects pods");
    let pods = scene.api::<Pod>();
    let of_job = owned_pods(scene, job).await;
    assert_eq!(of_job.len(), 3, "prepare's and two of sft: {of_job:?}");
    assert_eq!(selected(&pods, &gang).await, of_job);

    let [own, readers] = &spec.ingress.expect("a policy lets somebody in")[..] else { panic!("two rules") };
    let [peer] = &own.from.as_ref().expect("the gang")[..] else { panic!("the gang alone") };
    assert_eq!((&peer.namespace_selector, &own.ports), (&None, &None), "in the same namespace, on all ports");
    assert_eq!(selected(&pods, peer.pod_selector.as_ref().expect("pods")).await, of_job);
    let [operator, prometheus] = &readers.from.as_ref().expect("readers")[..] else { panic!("two readers") };
    the_peer_is_the_operator(scene, operator).await;
    let prometheus = prometheus.pod_selector.as_ref().and_then(|s| s.match_labels.as_ref()).expect("labels");
    assert_eq!(prometheus["app.kubernetes.io/name"], "prometheus");

    let [range] = &readers.ports.as_ref().expect("the workers' ports")[..] else { panic!("one range") };
    let Some(IntOrString::Int(first)) = range.port else { panic!("a number: {range:?}") };
    for pod in scene.pods(job, "sft", 1).await {
        let ports = pod.spec.expect("a pod has a spec").containers[0].ports.clone().expect("ports");
        assert!(
            ports.iter().all(|p| (first..=range.end_port.unwrap_or(first)).contains(&p.container_port)),
            "{ports:?}"
        );
    }
    let kinds: Vec<String> = operators_writes(scene).iter().map(|w| w.kind()).collect();
    let position =
        |kind: &str| kinds.iter().position(|k| k == kind).unwrap_or_else(|| panic!("no {kind} in {kinds:?}"));
    assert!(position("patch networkpolicies") < position("create jobs"), "{kinds:?}");
}

async fn the_peer_is_the_operator(scene: &Scene, peer: &NetworkPolicyPeer) {
    let namespaces = Api::<Namespace>::all(scene.client.clone());
    let namespace = peer.namespace_selector.as_ref().expect("the operator's namespace");
    assert_eq!(selected(&namespaces, namespace).await, BTreeSet::from([scene.operator.namespace.clone()]));
    let (api, pods) = (scene.operator.pods_api(), scene.operator.pods().await);
    let operators: BTreeSet<String> = pods.iter().map(|p| p.name_any()).collect();
    assert_eq!(selected(&api, peer.pod_selector.as_ref().expect("the operator's pods")).await, operators);
}

/// The job's key, which only the cluster's administrator can read here.
async fn key(scene: &Scene, job: &RLHFJob) -> String {
    let selector = format!("{}={}", names::LABEL_JOB_UID, uid(job));
    let secrets = scene.api::<Secret>().list(&ListParams::default().labels(&selector)).await.expect("Secrets").items;
    let [secret] = &secrets[..] else { panic!("one Secret, not {}", secrets.len()) };
    assert_eq!((secret.immutable, secret.owner_references().len()), (Some(true), 1));
    let key = secret.data.as_ref().and_then(|d| d.get(names::PROGRESS_SECRET_ENTRY)).expect("the key");
    let key = String::from_utf8(key.0.clone()).expect("a key is text");
    assert_eq!(key.len(), 64, "256 bits in hexadecimal");
    key
}

async fn progress_is_for_who_has_the_key(scene: &Scene, job: &RLHFJob, key: &str) {
    let client = reqwest::Client::builder().no_proxy().build().expect("an HTTP client");
    let get = async |pod: &Pod, path: &str, key: Option<&str>| {
        let ip = pod.status.as_ref().and_then(|s| s.pod_ip.clone()).expect("a pod that runs has an address");
        let request = client.get(format!("http://{ip}:9400{path}"));
        let request = if let Some(key) = key { request.bearer_auth(key) } else { request };
        request.send().await.unwrap_or_else(|e| panic!("{}{path}: {e}", pod.name_any()))
    };
    for pod in scene.pods(job, "sft", 1).await {
        assert_eq!(get(&pod, "/progress", None).await.status(), 401);
        assert_eq!(get(&pod, "/progress", Some("another")).await.status(), 401);
        let answer: Value = get(&pod, "/progress", Some(key)).await.json().await.expect("a document");
        assert_eq!(answer["totalSteps"], ENDLESS, "{answer}");
        for open in ["/metrics", "/healthz"] {
            assert_eq!(get(&pod, open, None).await.status(), 200, "{open}");
        }
    }
}

async fn the_key_is_written_nowhere_else(scene: &Scene, job: &RLHFJob, key: &str) {
    let kinds = "configmaps,services,jobs,pods,rlhfjobs,networkpolicies,events.events.k8s.io";
    let mut texts = vec![kubectl(&["get", kinds, "--namespace", &scene.namespace, "--output", "json"]).await.good()];
    for pod in scene.pods(job, "sft", 1).await {
        texts.push(scene.log(&pod).await);
    }
    for pod in scene.operator.pods().await {
        texts.push(
            scene.operator.pods_api().logs(&pod.name_any(), &LogParams::default()).await.expect("the operator's log"),
        );
    }
    let value = serde_json::to_value(k8s_openapi::ByteString(key.as_bytes().to_vec())).expect("base64");
    let encoded = value.as_str().expect("text");
    for text in texts {
        assert!(!text.is_empty() && !text.contains(key) && !text.contains(encoded), "the key stands in\n{text}");
    }
}

/// Whether an operator may do something with a resource, such as `jobs.batch`, or one object, `secrets/NAME`, in a
/// namespace.
async fn may(operator: &Operator, namespace: &str, verb: &str, resource: &str) -> bool {
    let (resource, name) = resource.split_once('/').unwrap_or((resource, ""));
    let (name, subresource) = if resource == "pods" { ("", name) } else { (name, "") };
    let (resource, group) = resource.split_once('.').unwrap_or((resource, ""));
    let groups = ["system:serviceaccounts", &format!("system:serviceaccounts:{}", operator.namespace)];
    let review = json!({"metadata": {}, "spec": {
        "user": operator.account(), "groups": groups.map(str::to_owned),
        "resourceAttributes": {"namespace": namespace, "verb": verb, "group": group, "resource": resource,
            "subresource": subresource, "name": name}}});
    let review: SubjectAccessReview = serde_json::from_value(review).expect("a review");
    let answer = Api::<SubjectAccessReview>::all(operator.client()).create(&PostParams::default(), &review).await;
    answer.expect("the API server answers").status.expect("an answer has a status").allowed
}

async fn the_operator_makes_secrets_and_reads_none(scene: &Scene) {
    let (operator, namespace, system) = (&scene.operator, &scene.namespace, &scene.operator.namespace);
    assert!(may(operator, namespace, "create", "secrets").await);
    for verb in ["get", "list", "watch", "update", "patch", "delete"] {
        assert!(!may(operator, namespace, verb, "secrets").await, "it may {verb} Secrets of {namespace}");
        assert!(!may(operator, system, verb, "secrets").await, "it may {verb} any Secret of its namespace");
    }
    assert!(may(operator, system, "get", &format!("secrets/{RELEASE}-key")).await);
    let more =
        [("create", "pods"), ("create", "pods/exec"), ("get", "nodes"), ("bind", "roles.rbac.authorization.k8s.io")];
    for (verb, resource) in more {
        assert!(!may(operator, namespace, verb, resource).await, "it may {verb} {resource}");
    }
}

#[test]
fn an_operator_of_one_namespace_has_no_right_elsewhere() {
    on_the_cluster_with(&[], async |scene| {
        let operator = &scene.operator;
        let roles = kubectl(&["get", "clusterroles,clusterrolebindings", "--output", "json"]).await.good();
        assert!(!roles.contains(&operator.namespace), "a role of the whole cluster concerns it: {roles}");
        for (verb, resource) in
            [("list", "rlhfjobs.rlhf.dev"), ("list", "pods"), ("create", "jobs.batch"), ("create", "secrets")]
        {
            assert!(may(operator, &scene.namespace, verb, resource).await, "it may not {verb} {resource}");
            assert!(!may(operator, "default", verb, resource).await, "it may {verb} {resource} in another namespace");
        }
        scene.apply(waits(NAME)).await;
        let job = scene.await_stage(NAME, "prepare", StagePhase::Starting).await;
        let pod = async || !scene.pods(&job, "prepare", 1).await.is_empty();
        eventually("the prepare pod", pod).await;
    });
}

//! What others put into a job's pods, or beside them.

use e2e::manifest::{NAME, endless, example};
use e2e::tools::{kubectl, kubectl_with};
use e2e::{Scene, attempt, condition, eventually, on_the_cluster, stage, uid};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams, PropagationPolicy};
use rlhf_api::job::{Phase, RLHFJob, StagePhase};
use rlhf_api::names;
use serde_json::{Value, json};

/// Puts a second container into the pods of the scene's stages, as a service mesh does.
async fn inject(scene: &Scene, container: &Value) {
    let name = &scene.namespace;
    let expression = format!("[JSONPatch{{op: 'add', path: '/spec/containers/-', value: {}}}]", cel(container));
    let policy = json!({
        "apiVersion": "admissionregistration.k8s.io/v1", "kind": "MutatingAdmissionPolicy", "metadata": {"name": name},
        "spec": {
            "reinvocationPolicy": "Never",
            "matchConstraints": {
                "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": name}},
                "objectSelector": {"matchExpressions": [{"key": names::LABEL_STAGE, "operator": "NotIn", "values": [names::PREPARE]}, {"key": names::LABEL_STAGE, "operator": "Exists"}]},
                "resourceRules": [{"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pods"]}]},
            "mutations": [{"patchType": "JSONPatch", "jsonPatch": {"expression": expression}}]},
    });
    let binding = json!({
        "apiVersion": "admissionregistration.k8s.io/v1", "kind": "MutatingAdmissionPolicyBinding", "metadata": {"name": name},
        "spec": {"policyName": name},
    });
    let list = json!({"apiVersion": "v1", "kind": "List", "items": [policy, binding]});
    kubectl_with(&["apply", "--filename", "-"], &list).await.good();
    // It holds from when the API server has read it.
    let pod = json!({"apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "probe", "namespace": name, "labels": {names::LABEL_STAGE: "probe"}},
        "spec": {"securityContext": {"runAsNonRoot": true, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [{"name": "c", "image": "docker.io/rlhf/pause:dev",
                "securityContext": {"allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}}}]}});
    let probe = ["create", "--dry-run=server", "--output", "jsonpath={.spec.containers[*].name}", "--filename", "-"];
    eventually("the policy", async || kubectl_with(&probe, &pod).await.output.contains("sidecar")).await;
}

async fn inject_no_more(scene: &Scene) {
    for kind in ["mutatingadmissionpolicybindings", "mutatingadmissionpolicies"] {
        kubectl(&["delete", kind, &scene.namespace, "--ignore-not-found"]).await.good();
    }
}

/// A container as an expression of the policy's language.
fn cel(container: &Value) -> String {
    let text = |key: &str| container[key].as_str().unwrap_or_default();
    let command = container["command"]
        .as_array()
        .map_or(String::new(), |words| format!(", command: {}", serde_json::to_string(words).expect("words are JSON")));
    format!(
        "Object.spec.containers{{name: '{}', image: '{}'{command}, securityContext: Object.spec.containers.securityContext{{\
         allowPrivilegeEscalation: false, capabilities: Object.spec.containers.securityContext.capabilities{{drop: ['ALL']}}}}}}",
        text("name"),
        text("image")
    )
}

#[test]
fn a_stage_succeeds_beside_a_sidecar_that_lives() {
    on_the_cluster(async |scene| {
        inject(scene, &json!({"name": "sidecar", "image": "docker.io/rlhf/pause:dev"})).await;
        let job = scene.apply(example().only(&["sft"])).await;
        let done = scene.await_phase(NAME, Phase::Succeeded).await;
        inject_no_more(scene).await;
        let sft = stage(&done, "sft");
        assert_eq!((sft.attempt, sft.restarts.total, sft.disruptions), (1, 0, 0));
        // With its Job the sidecars go, which would hold their nodes for ever.
        let jobs = scene.api::<Job>();
        scene.await_object(&jobs, &attempt(&job, "sft", 1), |j: Option<&Job>| j.is_none()).await;
        eventually("the end of its pods", async || scene.pods(&job, "sft", 1).await.is_empty()).await;
    });
}

#[test]
fn a_stage_succeeds_beside_a_sidecar_that_ends_badly() {
    on_the_cluster(async |scene| {
        // It outlasts the trainer, and does not end well.
        let command = json!(["perl", "-e", "$SIG{TERM} = sub { exit 1 }; while (1) { sleep 1 }"]);
        inject(scene, &json!({"name": "sidecar", "image": "docker.io/rlhf/trainer:dev", "command": command})).await;
        scene.apply(example().only(&["sft"])).await;
        let done = scene.await_phase(NAME, Phase::Succeeded).await;
        inject_no_more(scene).await;
        let sft = stage(&done, "sft");
        assert_eq!((sft.attempt, sft.restarts.total, sft.disruptions), (1, 0, 0));
    });
}

#[test]
fn a_pod_with_copied_labels_has_no_say() {
    on_the_cluster(async |scene| {
        let job = scene.apply(endless()).await;
        scene.await_attempt(NAME, "sft", 1).await;
        let real = scene.pods(&job, "sft", 1).await.remove(0);
        // A Job of somebody's own, and a pod of it that looks like the attempt's and has ended by a bad input.
        let foreign = json!({"metadata": {"name": "foreign"}, "spec": {"suspend": true, "template": {"spec": {
            "restartPolicy": "Never", "containers": [{"name": "trainer", "image": "docker.io/rlhf/pause:dev"}]}}}});
        let jobs = scene.api::<Job>();
        let foreign = serde_json::from_value(foreign).expect("a Job");
        let foreign = jobs.create(&PostParams::default(), &foreign).await.expect("a Job");
        let owner = json!({"apiVersion": "batch/v1", "kind": "Job", "name": "foreign", "uid": foreign.uid(), "controller": true});
        let pod = json!({
            "metadata": {"name": "forged", "labels": real.labels(), "annotations": real.annotations(), "ownerReferences": [owner]},
            "spec": {"nodeSelector": {"nowhere": "true"},
                "securityContext": {"runAsNonRoot": true, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}},
                "containers": [{"name": "trainer", "image": "docker.io/rlhf/pause:dev",
                    "securityContext": {"allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}}}]}});
        let pods = scene.api::<Pod>();
        let pod: Pod = serde_json::from_value(pod).expect("a pod");
        pods.create(&PostParams::default(), &pod).await.expect("a pod");
        let said = json!({"kind": "BadInput", "message": "said by a pod that is not the job's"}).to_string();
        let ended = json!({"status": {"phase": "Failed", "containerStatuses": [{
            "name": "trainer", "image": "x", "imageID": "x", "ready": false, "restartCount": 0,
            "state": {"terminated": {"exitCode": 65, "message": said, "finishedAt": "2026-01-01T00:00:00Z"}}}]}});
        pods.patch_status("forged", &PatchParams::default(), &Patch::Merge(ended)).await.expect("a status");

        // What is seen after it comes from the job's own pods.
        let now = stage(&scene.job(NAME).await, "sft").progress.map_or(0, |p| p.step);
        let later = |j: &RLHFJob| stage(j, "sft").progress.is_some_and(|p| p.step > now);
        let job = scene.await_job(NAME, "later progress", later).await;
        let sft = stage(&job, "sft");
        assert_eq!((sft.phase, sft.attempt, sft.last_failure), (StagePhase::Running, 1, None));
        jobs.delete("foreign", &DeleteParams::background()).await.expect("it can go");
    });
}

#[test]
fn case_28_an_orphaned_attempt_is_followed_by_another() {
    on_the_cluster(async |scene| {
        let job = scene.apply(endless()).await;
        scene.await_step(&job, "sft", 3).await;
        let orphan = DeleteParams { propagation_policy: Some(PropagationPolicy::Orphan), ..DeleteParams::default() };
        scene.api::<Job>().delete(&attempt(&job, "sft", 1), &orphan).await.expect("the Job can be deleted");
        let again = scene.await_attempt(NAME, "sft", 2).await;
        assert!(scene.pods(&job, "sft", 1).await.is_empty(), "two attempts have pods");
        let sft = stage(&again, "sft");
        assert_eq!((sft.restarts.total, sft.disruptions), (0, 1));
        let stopped = scene.resumed_at(&job, "sft", 2).await;
        scene.await_step(&job, "sft", stopped + 2).await;
        let steps: Vec<_> = scene.volume.steps(&job, "sft").iter().map(|s| s.step).collect();
        assert_eq!(steps, (1..=steps.len() as u64).collect::<Vec<_>>(), "no step was lost or made twice");
        assert_eq!(condition(&again, "Waiting").map(|(status, ..)| status).as_deref(), Some("False"));
        let children = ListParams::default().labels(&format!("{}={}", names::LABEL_JOB_UID, uid(&job)));
        let pods = scene.api::<Pod>().list(&children).await.expect("pods").items;
        assert!(pods.iter().all(|p| !p.owner_references().is_empty()), "an orphan is left");
    });
}

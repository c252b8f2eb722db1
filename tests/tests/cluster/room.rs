//! What a namespace lets in: quotas, limits, volumes, policies.

use e2e::manifest::{NAME, endless, example};
use e2e::tools::{kubectl, kubectl_with};
use e2e::{Scene, attempt, condition, eventually, on_the_cluster, stage};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{LimitRange, PersistentVolume, PersistentVolumeClaim, Pod, ResourceQuota};
use kube::api::{DeleteParams, PostParams};
use kube::{Api, ResourceExt};
use rlhf_api::job::{Phase, StagePhase};
use serde_json::{Value, json};

#[test]
fn a_quota_of_limits_lets_prepare_in_where_the_job_has_limits() {
    on_the_cluster(async |scene| {
        let hard = json!({"limits.cpu": "8", "limits.memory": "16Gi", "requests.cpu": "2", "requests.memory": "4Gi"});
        let quota: ResourceQuota =
            serde_json::from_value(json!({"metadata": {"name": "team"}, "spec": {"hard": hard}})).expect("a quota");
        scene.api().create(&PostParams::default(), &quota).await.expect("a quota");
        scene.apply(example().only(&["sft"])).await;
        scene.await_phase(NAME, Phase::Succeeded).await;
    });
}

#[test]
fn the_defaults_of_a_limit_range_let_prepare_in() {
    on_the_cluster(async |scene| {
        let limits = json!([{"type": "Container", "default": {"cpu": "200m", "memory": "512Mi"},
            "defaultRequest": {"cpu": "50m", "memory": "128Mi"}}]);
        let range: LimitRange =
            serde_json::from_value(json!({"metadata": {"name": "small"}, "spec": {"limits": limits}}))
                .expect("a range");
        scene.api().create(&PostParams::default(), &range).await.expect("a range");
        // What the job does not limit, the range does.
        scene.apply(example().only(&["sft"]).set("/spec/compute/resources", json!({"requests": {"cpu": "50m"}}))).await;
        scene.await_job(NAME, "the end of prepare", |j| stage(j, "prepare").phase == StagePhase::Succeeded).await;
    });
}

#[test]
fn what_passes_its_own_limit_of_storage_fails_by_itself() {
    on_the_cluster(async |scene| {
        let storage = json!({"cpu": "50m", "memory": "128Mi", "ephemeral-storage": "1Ki"});
        let mut manifest = endless().set("/spec/compute/resources", json!({"requests": storage, "limits": storage}));
        manifest.0["spec"]["compute"]["resources"]["limits"]["memory"] = json!("2Gi");
        manifest.0["spec"]["compute"]["resources"]["limits"]["cpu"] = json!("1");
        // The check of model and data is not what is tried.
        manifest.0["spec"]["prepare"] = json!({"resources": {"limits": {"ephemeral-storage": "1Gi"}}});
        manifest.0["spec"]["failurePolicy"] = json!({"maxRestarts": 0});
        scene.apply(manifest).await;
        let failed = scene.await_phase(NAME, Phase::Failed).await;
        let sft = stage(&failed, "sft");
        assert_eq!((sft.attempt, sft.disruptions), (1, 0));
        assert_eq!(sft.last_failure.map(|f| f.reason).as_deref(), Some("Evicted"));
    });
}

/// A claim behind which is a folder that does not exist.
async fn claim_of_nothing(scene: &Scene, claim: &str) {
    let volume = format!("{}-nothing", scene.namespace);
    kubectl(&["delete", "persistentvolume", &volume, "--ignore-not-found"]).await.good();
    let spec = json!({"accessModes": ["ReadWriteMany"], "storageClassName": "", "capacity": {"storage": "1Gi"},
        "hostPath": {"path": "/no-such-folder", "type": "Directory"},
        "claimRef": {"namespace": scene.namespace, "name": claim}});
    let persistent: PersistentVolume =
        serde_json::from_value(json!({"metadata": {"name": volume}, "spec": spec})).expect("a volume");
    let volumes = Api::<PersistentVolume>::all(scene.client.clone());
    volumes.create(&PostParams::default(), &persistent).await.expect("a volume");
    let spec = json!({"accessModes": ["ReadWriteMany"], "storageClassName": "", "volumeName": volume,
        "resources": {"requests": {"storage": "1Gi"}}});
    let object: PersistentVolumeClaim =
        serde_json::from_value(json!({"metadata": {"name": claim}, "spec": spec})).expect("a claim");
    scene.api().create(&PostParams::default(), &object).await.expect("a claim");
}

#[test]
fn a_volume_that_cannot_be_mounted_is_told_with_its_cause() {
    on_the_cluster(async |scene| {
        claim_of_nothing(scene, "nothing").await;
        scene.apply(example().set("/spec/storage/volumeClaim/claimName", json!("nothing"))).await;
        let message = scene.await_reason(NAME, "Waiting", "FailedMount").await;
        assert!(message.contains("no-such-folder"), "{message}");
        let policy = json!({"maxRestarts": 0, "startupDeadlineSeconds": 1});
        scene.patch(NAME, json!({"spec": {"failurePolicy": policy}})).await;
        let failed = scene.await_phase(NAME, Phase::Failed).await;
        let failure = stage(&failed, "prepare").last_failure.expect("the attempt's end is recorded");
        assert_eq!(failure.reason, "StartupDeadlineExceeded");
        assert!(failure.message.contains("no-such-folder"), "{}", failure.message);
        kubectl(&["delete", "persistentvolume", &format!("{}-nothing", scene.namespace), "--wait=false"]).await.good();
    });
}

/// A policy that lets no Job into the scene's namespace, in the words of `answer`.
async fn refuse_jobs(scene: &Scene, answer: Value) {
    let name = &scene.namespace;
    let mut validation = json!({"expression": "false", "message": "no Jobs today"});
    if !answer.is_null() {
        validation["reason"] = answer;
    }
    let here = json!({"matchLabels": {"kubernetes.io/metadata.name": name}});
    let rules =
        json!([{"apiGroups": ["batch"], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["jobs"]}]);
    let policy = json!({
        "apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingAdmissionPolicy", "metadata": {"name": name},
        "spec": {"failurePolicy": "Fail", "matchConstraints": {"resourceRules": rules}, "validations": [validation]},
    });
    let binding = json!({
        "apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingAdmissionPolicyBinding", "metadata": {"name": name},
        "spec": {"policyName": name, "validationActions": ["Deny"], "matchResources": {"namespaceSelector": here}},
    });
    let list = json!({"apiVersion": "v1", "kind": "List", "items": [policy, binding]});
    kubectl_with(&["apply", "--filename", "-"], &list).await.good();
    eventually("the policy", async || !makes_jobs(scene).await).await;
}

async fn makes_jobs(scene: &Scene) -> bool {
    let job = json!({"metadata": {"name": "probe"}, "spec": {"template": {"spec": {
        "restartPolicy": "Never", "containers": [{"name": "c", "image": "docker.io/rlhf/pause:dev"}]}}}});
    let job: Job = serde_json::from_value(job).expect("a Job");
    scene.api::<Job>().create(&PostParams { dry_run: true, ..PostParams::default() }, &job).await.is_ok()
}

async fn let_jobs_in(scene: &Scene) {
    for kind in ["validatingadmissionpolicybindings", "validatingadmissionpolicies"] {
        kubectl(&["delete", kind, &scene.namespace, "--ignore-not-found"]).await.good();
    }
    eventually("the end of the policy", async || makes_jobs(scene).await).await;
}

/// A policy comes while a stage runs, whose next attempt it refuses, and goes again.
async fn a_policy_comes_and_goes(scene: &Scene, answer: Value) {
    let job = scene.apply(endless()).await;
    scene.await_step(&job, "sft", 3).await;
    refuse_jobs(scene, answer).await;
    let pod = scene.pods(&job, "sft", 1).await.remove(1).name_any();
    scene.api::<Pod>().delete(&pod, &DeleteParams::default()).await.expect("the pod can be deleted");
    let told = |j: &rlhf_api::job::RLHFJob| {
        condition(j, "Waiting").is_some_and(|(status, _, text)| status == "True" && text.contains("no Jobs today"))
    };
    let waiting = scene.await_job(NAME, "word of the policy", told).await;
    assert_eq!(stage(&waiting, "sft").attempt, 2, "{:?}", waiting.status);
    let_jobs_in(scene).await;
    let again = scene.await_attempt(NAME, "sft", 2).await;
    assert_eq!((stage(&again, "sft").restarts.total, stage(&again, "sft").disruptions), (0, 1));
    assert!(scene.resumed_at(&job, "sft", 2).await >= 3);
    assert!(scene.attempts().await.iter().any(|(name, _)| *name == attempt(&job, "sft", 2)));
}

#[test]
fn case_29_a_policy_that_answers_422_does_not_end_a_run() {
    on_the_cluster(async |scene| a_policy_comes_and_goes(scene, Value::Null).await);
}

#[test]
fn case_29_a_policy_that_answers_403_does_not_end_a_run() {
    on_the_cluster(async |scene| a_policy_comes_and_goes(scene, json!("Forbidden")).await);
}

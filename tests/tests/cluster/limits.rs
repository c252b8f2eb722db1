//! What does not start, does not end, or is over.

use e2e::manifest::{NAME, example};
use e2e::{Scene, eventually, on_the_cluster, stage};
use k8s_openapi::api::core::v1::{Node, Pod, ResourceQuota};
use kube::api::{ListParams, Patch, PatchParams, PostParams};
use kube::{Api, ResourceExt};
use rlhf_api::job::{Phase, RLHFJob, StagePhase};
use serde_json::{Value, json};

/// A condition of a job, as status, reason and message.
fn condition(job: &RLHFJob, kind: &str) -> Option<(String, String, String)> {
    let conditions = &job.status.as_ref()?.conditions;
    conditions.iter().find(|c| c.type_ == kind).map(|c| (c.status.clone(), c.reason.clone(), c.message.clone()))
}

/// Waits for a condition to hold for a reason, and returns its message.
async fn await_reason(scene: &Scene, kind: &str, reason: &str, seconds: u64) -> String {
    let holds = |j: &RLHFJob| condition(j, kind).is_some_and(|(status, why, _)| status == "True" && why == reason);
    let job = scene.await_job(NAME, &format!("{kind} for {reason}"), seconds, holds).await;
    condition(&job, kind).map(|(_, _, message)| message).unwrap_or_default()
}

#[test]
fn case_16_a_missing_image_is_named_and_ends_the_attempt_in_time() {
    on_the_cluster(async |scene| {
        scene.leave_cores();
        let label = "example.com/images-are-missing";
        let mut manifest = example().only(&["sft"]);
        manifest.0["spec"]["compute"]["podTemplate"] = json!({"nodeSelector": {label: "yes"}});
        manifest.0["spec"]["failurePolicy"] = json!({"maxRestarts": 0, "startupDeadlineSeconds": 20});
        let job = scene.apply(manifest).await;
        let message = await_reason(scene, "Waiting", "Unschedulable", 30).await;
        assert!(message.contains("node selector") || message.contains("node affinity/selector"), "{message}");

        // The image is the operator's to choose; what a wrong choice of it does is tried on the pod.
        let pod = scene.pods(&job, "prepare", 1).await.remove(0).name_any();
        let image = json!({"spec": {"containers": [{"name": "trainer", "image": "docker.io/rlhf/missing:none"}]}});
        let pods = scene.api::<Pod>();
        pods.patch(&pod, &PatchParams::default(), &Patch::Strategic(image)).await.expect("a pod's image can change");
        let nodes = Api::<Node>::all(scene.client.clone());
        let mark = |value: Value| Patch::Merge(json!({"metadata": {"labels": {label: value}}}));
        let node = nodes.list(&ListParams::default()).await.expect("nodes").items.remove(0).name_any();
        nodes.patch(&node, &PatchParams::default(), &mark(json!("yes"))).await.expect("the node can be labelled");
        let message = await_reason(scene, "Waiting", "ImagePull", 30).await;
        assert!(message.contains("image docker.io/rlhf/missing:none cannot be pulled"), "{message}");

        let job = scene.await_phase(NAME, Phase::Failed, 40).await;
        nodes.patch(&node, &PatchParams::default(), &mark(Value::Null)).await.expect("the label can go");
        assert_eq!(condition(&job, "Failed").map(|(_, reason, _)| reason).as_deref(), Some("RestartsExhausted"));
        assert_eq!(condition(&job, "Waiting").map(|(status, _, _)| status).as_deref(), Some("False"));
        let failure = stage(&job, "prepare").last_failure.expect("the attempt's end is recorded");
        assert_eq!((failure.reason.as_str(), failure.pod), ("StartupDeadlineExceeded", Some(pod)));
        assert_eq!(failure.node, Some(node));
        assert!(failure.message.ends_with("ImagePull: image docker.io/rlhf/missing:none cannot be pulled"));
        let none = async || pods.list(&ListParams::default()).await.is_ok_and(|p| p.items.is_empty());
        eventually("the end of the pod that never started", 60, none).await;
    });
}

#[test]
fn a_gang_that_does_not_fit_is_explained_until_its_time_is_over() {
    on_the_cluster(async |scene| {
        let mut manifest = example().only(&["sft"]).set("/spec/compute/resources", json!({"requests": {"cpu": "900"}}));
        manifest.0["spec"]["activeDeadlineSeconds"] = json!(20);
        let job = scene.apply(manifest).await;
        scene.await_stage(NAME, "sft", StagePhase::Starting, 60).await;
        scene.leave_cores();
        let message = await_reason(scene, "Waiting", "Unschedulable", 30).await;
        assert!(message.starts_with("sft: attempt 1 waits: pod ") && message.contains("Insufficient cpu"), "{message}");

        let failed = scene.await_phase(NAME, Phase::Failed, 40).await;
        assert_eq!(condition(&failed, "Failed").map(|(_, reason, _)| reason).as_deref(), Some("DeadlineExceeded"));
        assert_eq!(stage(&failed, "sft").last_failure.map(|f| f.reason).as_deref(), Some("Stopped"));
        assert!(failed.status.is_some_and(|s| (20..40).contains(&s.active_seconds)));

        // It may be set when the job has ended.
        scene.patch(NAME, json!({"spec": {"ttlSecondsAfterFinished": 1}})).await;
        scene.await_object(&scene.api::<RLHFJob>(), NAME, 60, |j: Option<&RLHFJob>| j.is_none()).await;
        assert!(
            scene.pods(&job, "sft", 1).await.is_empty() && scene.attempts().await.is_empty(),
            "children outlive it"
        );
    });
}

#[test]
fn case_38_a_quota_that_lets_in_part_of_a_gang_is_told() {
    on_the_cluster(async |scene| {
        let quota: ResourceQuota =
            serde_json::from_value(json!({"metadata": {"name": "pods"}, "spec": {"hard": {"pods": "1"}}})).unwrap();
        let quotas = scene.api::<ResourceQuota>();
        quotas.create(&PostParams::default(), &quota).await.expect("a quota");
        let job = scene.apply(example().only(&["sft"])).await;
        let message = await_reason(scene, "QuotaExceeded", "QuotaExceeded", 90).await;
        assert!(
            message.contains("exceeded quota: pods, requested: pods=1, used: pods=1, limited: pods=1"),
            "{message}"
        );
        let now = scene.job(NAME).await;
        assert_eq!(stage(&now, "sft").phase, StagePhase::Starting, "a gang that lacks a rank does not run");
        assert_eq!(scene.pods(&job, "sft", 1).await.len(), 1);

        let more = Patch::Merge(json!({"spec": {"hard": {"pods": "9"}}}));
        quotas.patch("pods", &PatchParams::default(), &more).await.expect("the quota can be raised");
        let job = scene.await_stage(NAME, "sft", StagePhase::Running, 90).await;
        for kind in ["QuotaExceeded", "Waiting"] {
            assert_eq!(condition(&job, kind).map(|(status, _, _)| status).as_deref(), Some("False"), "{kind}");
        }
        assert_eq!(stage(&job, "sft").restarts.total, 0);
    });
}

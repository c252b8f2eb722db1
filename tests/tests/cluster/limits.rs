//! What does not start, does not end, or is over.

use e2e::manifest::{NAME, example};
use e2e::{condition, eventually, on_the_cluster, stage};
use k8s_openapi::api::core::v1::{Node, Pod, ResourceQuota};
use kube::api::{ListParams, Patch, PatchParams, PostParams};
use kube::{Api, ResourceExt};
use rlhf_api::job::{Phase, RLHFJob, StagePhase};
use serde_json::{Value, json};

#[test]
fn case_16_a_missing_image_is_named_and_ends_the_attempt_in_time() {
    on_the_cluster(async |scene| {
        let label = "example.com/images-are-missing";
        let mut manifest = example().only(&["sft"]);
        manifest.0["spec"]["prepare"] = json!({"podTemplate": {"nodeSelector": {label: "yes"}}});
        let job = scene.apply(manifest).await;
        // Before that it may wait for its volume.
        let selects = |text: &str| text.contains("node selector") || text.contains("node affinity/selector");
        let told = |j: &RLHFJob| {
            condition(j, "Waiting").is_some_and(|(_, reason, text)| reason == "Unschedulable" && selects(&text))
        };
        scene.await_job(NAME, "word of the node selector", told).await;

        // The image is the operator's to choose; what a wrong choice of it does is tried on the pod.
        let pod = scene.pods(&job, "prepare", 1).await.remove(0).name_any();
        let image = json!({"spec": {"containers": [{"name": "trainer", "image": "docker.io/rlhf/missing:none"}]}});
        let pods = scene.api::<Pod>();
        pods.patch(&pod, &PatchParams::default(), &Patch::Strategic(image)).await.expect("a pod's image can change");
        let nodes = Api::<Node>::all(scene.client.clone());
        let mark = |value: Value| Patch::Merge(json!({"metadata": {"labels": {label: value}}}));
        let node = nodes.list(&ListParams::default()).await.expect("nodes").items.remove(0).name_any();
        nodes.patch(&node, &PatchParams::default(), &mark(json!("yes"))).await.expect("the node can be labelled");
        let message = scene.await_reason(NAME, "Waiting", "ImagePull").await;
        assert!(message.contains("image docker.io/rlhf/missing:none cannot be pulled"), "{message}");

        // How long a pod may take to start may be said at any time.
        let soon = json!({"maxRestarts": 0, "startupDeadlineSeconds": 1});
        scene.patch(NAME, json!({"spec": {"failurePolicy": soon}})).await;
        let job = scene.await_phase(NAME, Phase::Failed).await;
        nodes.patch(&node, &PatchParams::default(), &mark(Value::Null)).await.expect("the label can go");
        assert_eq!(condition(&job, "Failed").map(|(_, reason, _)| reason).as_deref(), Some("RestartsExhausted"));
        assert_eq!(condition(&job, "Waiting").map(|(status, _, _)| status).as_deref(), Some("False"));
        let failure = stage(&job, "prepare").last_failure.expect("the attempt's end is recorded");
        assert_eq!((failure.reason.as_str(), failure.pod), ("StartupDeadlineExceeded", Some(pod)));
        assert_eq!(failure.node, Some(node));
        assert!(failure.message.ends_with("ImagePull: image docker.io/rlhf/missing:none cannot be pulled"));
        let none = async || pods.list(&ListParams::default()).await.is_ok_and(|p| p.items.is_empty());
        eventually("the end of the pod that never started", none).await;
    });
}

#[test]
fn a_gang_that_does_not_fit_waits_until_its_time_is_over() {
    on_the_cluster(async |scene| {
        let big = json!({"requests": {"cpu": "900"}});
        let manifest = example().only(&["sft"]).set("/spec/compute/resources", big);
        let job = scene.apply(manifest).await;
        // Prepare's pod may have waited for its volume.
        let too_big = |j: &RLHFJob| condition(j, "Waiting").is_some_and(|(.., text)| text.contains("Insufficient cpu"));
        let waiting = scene.await_job(NAME, "a gang that does not fit", too_big).await;
        let (_, reason, message) = condition(&waiting, "Waiting").expect("it waits");
        assert!(message.starts_with("sft: attempt 1 waits: pod ") && reason == "Unschedulable", "{reason}: {message}");
        let waiting = scene.await_phase(NAME, Phase::Waiting).await;
        assert_eq!((stage(&waiting, "sft").phase, stage(&waiting, "sft").restarts.total), (StagePhase::Starting, 0));

        // How long it may be about may be said at any time.
        scene.patch(NAME, json!({"spec": {"activeDeadlineSeconds": 1}})).await;
        let failed = scene.await_phase(NAME, Phase::Failed).await;
        assert_eq!(condition(&failed, "Failed").map(|(_, reason, _)| reason).as_deref(), Some("DeadlineExceeded"));
        assert_eq!(stage(&failed, "sft").last_failure.map(|f| f.reason).as_deref(), Some("Stopped"));

        // And so may what becomes of it then.
        scene.patch(NAME, json!({"spec": {"ttlSecondsAfterFinished": 1}})).await;
        scene.await_object(&scene.api::<RLHFJob>(), NAME, |j: Option<&RLHFJob>| j.is_none()).await;
        let gone = async || scene.pods(&job, "sft", 1).await.is_empty() && scene.attempts().await.is_empty();
        eventually("the end of its children", gone).await;
    });
}

#[test]
fn waiting_for_room_is_no_failure_unless_the_job_says_how_long() {
    on_the_cluster(async |scene| {
        scene.apply(example().only(&["sft"]).set("/spec/compute/resources", json!({"requests": {"cpu": "900"}}))).await;
        scene.await_stage(NAME, "sft", StagePhase::Starting).await;
        scene.await_reason(NAME, "Waiting", "Unschedulable").await;
        // Less than it has waited: it bounds only what has nodes.
        scene.patch(NAME, json!({"spec": {"failurePolicy": {"maxRestarts": 0, "startupDeadlineSeconds": 1}}})).await;
        let read = |j: &RLHFJob| j.status.as_ref().map(|s| s.observed_generation) == j.metadata.generation;
        let job = scene.await_job(NAME, "a look at the new policy", read).await;
        assert_eq!(stage(&job, "sft").phase, StagePhase::Starting);
        let policy = json!({"maxRestarts": 0, "startupDeadlineSeconds": 1, "pendingTimeoutSeconds": 1});
        scene.patch(NAME, json!({"spec": {"failurePolicy": policy}})).await;
        let failed = scene.await_phase(NAME, Phase::Failed).await;
        let reason = condition(&failed, "Failed").map(|(_, reason, _)| reason);
        assert_eq!(reason.as_deref(), Some("PendingTimeoutExceeded"));
        assert_eq!((stage(&failed, "sft").attempt, stage(&failed, "sft").restarts.total), (1, 0));
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
        let message = scene.await_reason(NAME, "QuotaExceeded", "QuotaExceeded").await;
        assert!(
            message.contains("exceeded quota: pods, requested: pods=1, used: pods=1, limited: pods=1"),
            "{message}"
        );
        let now = scene.job(NAME).await;
        assert_eq!(stage(&now, "sft").phase, StagePhase::Starting, "a gang that lacks a rank does not run");
        assert_eq!(scene.pods(&job, "sft", 1).await.len(), 1);

        let more = Patch::Merge(json!({"spec": {"hard": {"pods": "9"}}}));
        quotas.patch("pods", &PatchParams::default(), &more).await.expect("the quota can be raised");
        let job = scene.await_stage(NAME, "sft", StagePhase::Running).await;
        for kind in ["QuotaExceeded", "Waiting"] {
            assert_eq!(condition(&job, kind).map(|(status, _, _)| status).as_deref(), Some("False"), "{kind}");
        }
        assert_eq!(stage(&job, "sft").restarts.total, 0);
    });
}

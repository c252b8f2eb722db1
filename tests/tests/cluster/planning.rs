//! Strategies that are left to the operator.

use e2e::manifest::{Manifest, NAME, endless};
use e2e::{on_the_cluster, stage, starve_worker};
use k8s_openapi::api::core::v1::Node;
use kube::api::{ListParams, Patch, PatchParams};
use kube::{Api, ResourceExt};
use rlhf_api::job::{Phase, PlanSource, RLHFJob, StagePhase};
use rlhf_api::stage::Strategy;
use serde_json::{Value, json};

/// Fine-tuning alone, its strategy left open.
fn left_open() -> Manifest {
    let mut manifest = endless();
    manifest.0["spec"]["strategy"] = json!({"sharding": "auto", "offload": "auto", "recompute": "auto"});
    manifest
}

fn message(job: &RLHFJob) -> String {
    job.status.as_ref().and_then(|s| s.message.clone()).unwrap_or_default()
}

#[test]
fn a_chosen_strategy_makes_way_for_one_that_takes_less_memory() {
    on_the_cluster(async |scene| {
        let job = scene.apply(left_open()).await;
        scene.await_step(&job, "sft", 1).await;
        let first = stage(&scene.job(NAME).await, "sft").plan.expect("the stage is planned");
        assert_eq!((first.source, first.host_memory_bytes), (PlanSource::Auto, Some(2 << 30)));
        assert!(first.device_bytes > 0 && first.device_bytes < 2 << 30, "{first:?}");

        starve_worker(&scene.pods(&job, "sft", 1).await[0]);
        let again = |j: &RLHFJob| stage(j, "sft").restarts.total == 1;
        let told = stage(&scene.await_job(NAME, "a restart", again).await, "sft");
        assert_eq!(told.last_failure.map(|f| f.reason).as_deref(), Some("OOMKilled"));
        let second = told.plan.expect("the stage is planned");
        assert_eq!(second.source, PlanSource::MoreFrugal);
        assert!(
            second.strategy != first.strategy
                && second.device_bytes + second.host_bytes < first.device_bytes + first.host_bytes
        );

        scene.await_stage(NAME, "sft", StagePhase::Running).await;
        let pod = scene.pods(&job, "sft", 2).await.remove(0);
        let container = &pod.spec.as_ref().expect("a pod has a spec").containers[0];
        let told = container.env.iter().flatten().find(|e| e.name == "RLHF_STRATEGY").and_then(|e| e.value.as_deref());
        let told: Strategy = serde_json::from_str(told.expect("ranks are told")).expect("a strategy");
        assert_eq!(told, second.strategy, "the ranks follow the plan");
    });
}

#[test]
fn what_fits_nowhere_is_refused_before_a_pod_trains() {
    on_the_cluster(async |scene| {
        let limits = json!({"requests": {"cpu": "100m"}, "limits": {"memory": "256Mi"}});
        scene.apply(left_open().set("/spec/compute/resources", limits)).await;
        let job = scene.await_phase(NAME, Phase::Failed).await;
        let message = message(&job);
        assert!(
            message.starts_with("stage sft: none of ") && message.contains("of 0.25 GiB on each host"),
            "{message}"
        );
        assert_eq!((stage(&job, "prepare").phase, stage(&job, "sft").attempt), (StagePhase::Succeeded, 0));
    });
}

#[test]
fn the_memory_of_devices_is_read_from_the_nodes_that_have_them() {
    on_the_cluster(async |scene| {
        let label = "nvidia.com/gpu.memory";
        let compute = json!({"nodes": 2, "devicesPerNode": 1, "resources": {"limits": {"memory": "8Gi"}}});
        let manifest = left_open().set("/spec/compute", compute);
        scene.apply(manifest).await;
        let unknown = |j: &RLHFJob| message(j).contains(label);
        let why = message(&scene.await_job(NAME, "word of the devices", unknown).await);
        assert!(why.ends_with("write compute.deviceMemory"), "{why}");
        // Such a node may yet come.
        let job = scene.await_phase(NAME, Phase::Waiting).await;
        assert_eq!(stage(&job, "sft").attempt, 0);

        let nodes = Api::<Node>::all(scene.client.clone());
        let node = nodes.list(&ListParams::default()).await.expect("nodes").items.remove(0).name_any();
        let mark = |value: Value| Patch::Merge(json!({"metadata": {"labels": {label: value}}}));
        let give = |value: Value| Patch::Merge(json!({"status": {"capacity": {"nvidia.com/gpu": value}}}));
        let params = PatchParams::default();
        nodes.patch(&node, &params, &mark(json!("40960"))).await.expect("the node can be labelled");
        nodes.patch_status(&node, &params, &give(json!("1"))).await.expect("the node can have a device");
        let planned = |j: &RLHFJob| stage(j, "sft").plan.is_some();
        let job = scene.await_job(NAME, "a plan", planned).await;
        nodes.patch(&node, &params, &mark(Value::Null)).await.expect("the label can go");
        nodes.patch_status(&node, &params, &give(Value::Null)).await.expect("the device can go");
        assert_eq!(stage(&job, "sft").plan.and_then(|p| p.device_memory_bytes), Some(40 << 30));
    });
}

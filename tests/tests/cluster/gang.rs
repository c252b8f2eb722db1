//! All pods of a stage get nodes, or none: with PodGroups and the cluster's own scheduler.

use e2e::manifest::{ENDLESS, Manifest, NAME, endless};
use e2e::{Scene, attempt, eventually, kill_worker, on_the_cluster_with, stage};
use k8s_openapi::api::core::v1::{Node, Pod};
use k8s_openapi::api::scheduling::v1beta1::PodGroup;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::{Api, ResourceExt};
use rlhf_api::job::{Phase, StagePhase};
use serde_json::{Value, json};

/// What every pod of a stage takes one of; the node has room for one gang and a half.
const SLOT: &str = "example.com/slot";
const SECOND: &str = "second";
const SINGLE: &str = "single";

/// Fine-tuning on two pods.
fn gang(steps: u64) -> Manifest {
    let slot = json!({SLOT: "1"});
    endless()
        .stage("sft", "sft/maxSteps", json!(steps))
        .stage("sft", "checkpoint", json!({"everySteps": 5}))
        .set("/spec/compute/nodes", json!(2))
        .set("/spec/compute/resources", json!({"requests": slot, "limits": slot}))
}

/// A pod that takes a slot for itself.
fn single() -> Pod {
    let container = json!({
        "name": "pause", "image": "docker.io/rlhf/pause:dev", "imagePullPolicy": "Never",
        "resources": {"limits": {SLOT: "1"}},
        "securityContext": {"allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}},
    });
    let pod = json!({"metadata": {"name": SINGLE}, "spec": {
        "securityContext": {"runAsNonRoot": true, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [container]}});
    serde_json::from_value(pod).expect("the test writes a valid pod")
}

/// Sets how many slots the node has, as a device plugin would.
async fn slots(scene: &Scene, count: Value) {
    let nodes = Api::<Node>::all(scene.client.clone());
    let node = nodes.list(&ListParams::default()).await.expect("nodes").items.remove(0).name_any();
    let change = json!({"status": {"capacity": {SLOT: count}, "allocatable": {SLOT: count}}});
    nodes.patch_status(&node, &PatchParams::default(), &Patch::Merge(change)).await.expect("a node's slots can change");
}

async fn groups(scene: &Scene) -> Vec<String> {
    let mut names: Vec<_> = scene
        .api::<PodGroup>()
        .list(&ListParams::default())
        .await
        .expect("PodGroups")
        .iter()
        .map(|g| g.name_any())
        .collect();
    names.sort();
    names
}

fn placed(pods: &[Pod]) -> usize {
    pods.iter().filter(|p| p.spec.as_ref().is_some_and(|s| s.node_name.is_some())).count()
}

#[test]
fn a_gang_with_room_for_a_part_of_it_takes_nothing() {
    on_the_cluster_with(&["trainer.gangScheduling=true"], async |scene| {
        slots(scene, json!("3")).await;
        let first = scene.apply(gang(ENDLESS)).await;
        scene.await_step(&first, "sft", 6).await;
        assert_eq!(groups(scene).await, [attempt(&first, "sft", 1)], "prepare is a pod alone");

        // Another attempt is another gang.
        kill_worker(&scene.pods(&first, "sft", 1).await[1]);
        scene.await_attempt(NAME, "sft", 2).await;
        eventually("the end of the first gang's group", async || groups(scene).await == [attempt(&first, "sft", 2)])
            .await;

        let second = scene.apply(gang(4).set("/metadata/name", json!(SECOND))).await;
        scene.await_stage(SECOND, "sft", StagePhase::Starting).await;
        scene.await_reason(SECOND, "Waiting", "Unschedulable").await;
        // There is room for one of them: a pod alone, which comes later, takes it.
        let pods = scene.api::<Pod>();
        pods.create(&PostParams::default(), &single()).await.expect("a pod");
        let has_node = |pod: Option<&Pod>| pod.is_some_and(|p| p.spec.as_ref().is_some_and(|s| s.node_name.is_some()));
        scene.await_object(&pods, SINGLE, has_node).await;
        pods.delete(SINGLE, &DeleteParams::default().grace_period(0)).await.expect("it can go");
        let waiting = scene.pods(&second, "sft", 1).await;
        assert_eq!((waiting.len(), placed(&waiting)), (2, 0), "no pod of a gang is placed alone");

        scene.patch(NAME, json!({"spec": {"suspend": true}})).await;
        let done = scene.await_phase(SECOND, Phase::Succeeded).await;
        assert_eq!((stage(&done, "sft").attempt, stage(&done, "sft").restarts.total), (1, 0));
        scene.patch(NAME, json!({"spec": {"suspend": false}})).await;
        scene.await_stage(NAME, "sft", StagePhase::Running).await;
        assert_eq!(placed(&scene.pods(&first, "sft", 2).await), 2, "the same attempt goes on as the same gang");
        slots(scene, Value::Null).await;
    });
}

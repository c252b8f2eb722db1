//! All pods of a stage get nodes, or none: with PodGroups and the cluster's own scheduler.

use e2e::manifest::{Manifest, NAME, example};
use e2e::{Scene, eventually, install_with, kill_worker, on_the_cluster_alone, stage};
use k8s_openapi::api::core::v1::{Node, Pod};
use k8s_openapi::api::scheduling::v1beta1::PodGroup;
use kube::api::{ListParams, Patch, PatchParams};
use kube::{Api, ResourceExt};
use rlhf_api::job::{Phase, StagePhase};
use serde_json::{Value, json};
use std::time::Duration;

/// What every pod of a stage takes one of; the node has room for one gang and a half.
const SLOT: &str = "example.com/slot";
const SECOND: &str = "second";

/// Fine-tuning on two pods.
fn gang(steps: u32) -> Manifest {
    let slot = json!({SLOT: "1"});
    example()
        .only(&["sft"])
        .stage("sft", "sft/epochs", json!(100))
        .stage("sft", "sft/maxSteps", json!(steps))
        .stage("sft", "checkpoint", json!({"everySteps": 5}))
        .set("/spec/compute/nodes", json!(2))
        .set("/spec/compute/resources", json!({"requests": slot, "limits": slot}))
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
    on_the_cluster_alone(async |scene| {
        install_with(true, &["trainer.gangScheduling=true"]).await;
        slots(scene, json!("3")).await;
        let first = scene.apply(gang(1000)).await;
        scene.await_step(&first, "sft", 6, 120).await;
        assert_eq!(groups(scene).await, ["sentiment-sft-1"], "prepare is a pod alone");

        // Another attempt is another gang.
        kill_worker(&scene.pods(&first, "sft", 1).await[1]);
        scene
            .await_job(NAME, "a second attempt", 120, |j| {
                let sft = stage(j, "sft");
                sft.attempt == 2 && sft.phase == StagePhase::Running
            })
            .await;
        eventually("the end of the first gang's group", 30, async || groups(scene).await == ["sentiment-sft-2"]).await;

        let second = scene.apply(gang(4).set("/metadata/name", json!(SECOND))).await;
        scene.await_stage(SECOND, "sft", StagePhase::Starting, 90).await;
        let explained = |j: &rlhf_api::job::RLHFJob| {
            let conditions = j.status.iter().flat_map(|s| &s.conditions);
            conditions.into_iter().any(|c| c.type_ == "Waiting" && c.status == "True" && c.reason == "Unschedulable")
        };
        scene.await_job(SECOND, "why the second gang waits", 60, explained).await;
        // A scheduler that looks at pods one by one has placed one by now.
        tokio::time::sleep(Duration::from_secs(5)).await;
        let waiting = scene.pods(&second, "sft", 1).await;
        assert_eq!((waiting.len(), placed(&waiting)), (2, 0), "no pod of a gang is placed alone");

        scene.patch(NAME, json!({"spec": {"suspend": true}})).await;
        let done = scene.await_phase(SECOND, Phase::Succeeded, 180).await;
        assert_eq!((stage(&done, "sft").attempt, stage(&done, "sft").restarts.total), (1, 0));
        scene.patch(NAME, json!({"spec": {"suspend": false}})).await;
        scene.await_stage(NAME, "sft", StagePhase::Running, 120).await;
        assert_eq!(placed(&scene.pods(&first, "sft", 2).await), 2, "the same attempt goes on as the same gang");
        slots(scene, Value::Null).await;
    });
}

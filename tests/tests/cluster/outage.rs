//! The control plane's own faults.

use e2e::manifest::{NAME, example};
use e2e::{Part, Scene, eventually, install, on_the_cluster_alone, operator_pods, stage, uninstall};
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use rlhf_api::job::StagePhase;
use serde_json::json;
use std::time::Duration;

/// The API server is away for so long: the operator, which cannot renew its lease, ends meanwhile and starts anew.
const AWAY: Duration = Duration::from_secs(20);
/// How often etcd stands still, for how long, and how long it runs between.
const PAUSES: (u32, Duration, Duration) = (20, Duration::from_millis(500), Duration::from_millis(150));

/// Enough to outlast all of it.
const STEPS: u64 = 300;

/// Whether the API server answers.
async fn answers(scene: &Scene) -> bool {
    scene.client.apiserver_version().await.is_ok()
}

fn uids(pods: &[Pod]) -> Vec<Option<String>> {
    pods.iter().map(ResourceExt::uid).collect()
}

#[test]
fn a_run_outlives_a_restarted_api_server_and_a_slow_etcd() {
    on_the_cluster_alone(async |scene| {
        install(true).await;
        let long =
            example().only(&["sft"]).stage("sft", "sft/epochs", json!(20)).stage("sft", "sft/maxSteps", json!(STEPS));
        let job = scene.apply(long).await;
        scene.await_step(&job, "sft", 2, 120).await;
        let pods = uids(&scene.pods(&job, "sft", 1).await);

        Part::API_SERVER.kill_and_start(|| std::thread::sleep(AWAY));
        eventually("the API server", 60, async || answers(scene).await).await;
        let (times, still, between) = PAUSES;
        for _ in 0..times {
            Part::ETCD.pause();
            tokio::time::sleep(still).await;
            Part::ETCD.go_on();
            tokio::time::sleep(between).await;
        }
        eventually("the API server", 60, async || answers(scene).await).await;
        assert_eq!(uids(&scene.pods(&job, "sft", 1).await), pods, "no pod was replaced");
        let restarts = async || {
            let (_, operators) = operator_pods(scene).await;
            let statuses = operators.into_iter().filter_map(|pod| pod.status?.container_statuses).flatten();
            statuses.fold((0, true), |(times, ready), s| (times + s.restart_count, ready && s.ready))
        };
        eventually("an operator that started anew", 60, async || matches!(restarts().await, (1.., true))).await;
        assert_eq!(restarts().await.0, 1, "the new one waited for the API server");

        let done = stage(&scene.await_stage(NAME, "sft", StagePhase::Succeeded, 180).await, "sft");
        assert_eq!((done.attempt, done.restarts.total, done.disruptions), (1, 0, 0));
        assert!(done.progress.is_some_and(|p| (p.step, p.total_steps) == (STEPS, STEPS)), "every step was told");
        uninstall().await;
    });
}

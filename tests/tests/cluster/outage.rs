//! The control plane's own faults.

use e2e::manifest::{NAME, endless};
use e2e::{Part, Scene, eventually, on_the_cluster_at_last, stage};
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use rlhf_api::job::{RLHFJob, StagePhase};
use std::time::Duration;

/// The API server is away for so long: the operator, which cannot renew its lease, ends meanwhile and starts anew.
const AWAY: Duration = Duration::from_secs(20);
/// How often etcd stands still, for how long, and how long it runs between.
const PAUSES: (u32, Duration, Duration) = (20, Duration::from_millis(500), Duration::from_millis(150));

/// Whether the API server answers.
async fn answers(scene: &Scene) -> bool {
    scene.client.apiserver_version().await.is_ok()
}

fn uids(pods: &[Pod]) -> Vec<Option<String>> {
    pods.iter().map(ResourceExt::uid).collect()
}

#[test]
fn a_run_outlives_a_restarted_api_server_and_a_slow_etcd() {
    on_the_cluster_at_last(async |scene| {
        scene.operator.install(&[]).await;
        let job = scene.apply(endless()).await;
        scene.await_step(&job, "sft", 2).await;
        let pods = uids(&scene.pods(&job, "sft", 1).await);

        Part::API_SERVER.kill_and_start(|| std::thread::sleep(AWAY));
        eventually("the API server", async || answers(scene).await).await;
        let (times, still, between) = PAUSES;
        for _ in 0..times {
            Part::ETCD.pause();
            tokio::time::sleep(still).await;
            Part::ETCD.go_on();
            tokio::time::sleep(between).await;
        }
        eventually("the API server", async || answers(scene).await).await;
        assert_eq!(uids(&scene.pods(&job, "sft", 1).await), pods, "no pod was replaced");
        let restarts = async || {
            let statuses =
                scene.operator.pods().await.into_iter().filter_map(|pod| pod.status?.container_statuses).flatten();
            statuses.fold((0, true), |(times, ready), s| (times + s.restart_count, ready && s.ready))
        };
        eventually("an operator that started anew", async || matches!(restarts().await, (1.., true))).await;

        let now = scene.volume.steps(&job, "sft").last().expect("steps were made").step;
        let told = |j: &RLHFJob| stage(j, "sft").progress.is_some_and(|p| p.step > now);
        let sft = stage(&scene.await_job(NAME, "later progress", told).await, "sft");
        assert_eq!((sft.phase, sft.attempt, sft.restarts.total, sft.disruptions), (StagePhase::Running, 1, 0, 0));
        assert_eq!(uids(&scene.pods(&job, "sft", 1).await), pods, "no pod was replaced");
    });
}

//! A run outlives its job, and changes between two parts of it.

use e2e::manifest::{Manifest, NAME, endless};
use e2e::{Scene, on_the_cluster, stage};
use kube::ResourceExt;
use kube::api::DeleteParams;
use rlhf_api::job::{Phase, RLHFJob};
use serde_json::json;

const RUN: &str = "runs/reviews";

fn on_path() -> Manifest {
    let mut manifest = endless();
    manifest.0["spec"]["storage"]["runPath"] = json!(RUN);
    manifest
}

/// Stops a job where it is, and gives the step.
async fn suspend(scene: &Scene, job: &RLHFJob) -> u64 {
    let name = job.name_any();
    scene.patch(&name, json!({"spec": {"suspend": true}})).await;
    scene.await_phase(&name, Phase::Suspended).await;
    scene.volume.steps(job, "sft").last().expect("steps were made").step
}

#[test]
fn a_job_that_is_created_anew_goes_on_with_its_run() {
    on_the_cluster(async |scene| {
        let first = scene.apply(on_path()).await;
        scene.await_step(&first, "sft", 5).await;
        let stopped = suspend(scene, &first).await;
        let jobs = scene.api::<RLHFJob>();
        jobs.delete(NAME, &DeleteParams::foreground()).await.expect("the job can be deleted");
        scene.await_object(&jobs, NAME, |j: Option<&RLHFJob>| j.is_none()).await;

        // Whatever its name is.
        let second = scene.apply(on_path().set("/metadata/name", json!("again"))).await;
        scene.await_step(&second, "sft", stopped + 3).await;
        assert_eq!(scene.resumed_at(&second, "sft", 1).await, stopped);
        let steps: Vec<_> = scene.volume.steps(&second, "sft").iter().map(|s| s.step).collect();
        assert_eq!(steps, (1..=steps.len() as u64).collect::<Vec<_>>(), "no step was lost or made twice");
    });
}

#[test]
fn a_suspended_job_may_go_on_with_other_nodes() {
    on_the_cluster(async |scene| {
        let job = scene.apply(endless()).await;
        scene.await_step(&job, "sft", 5).await;
        assert_eq!(scene.pods(&job, "sft", 1).await.len(), 2);
        let stopped = suspend(scene, &job).await;
        let change = json!({"spec": {"compute": {"nodes": 1}, "strategy": {"recompute": "block"}, "suspend": false}});
        scene.patch(NAME, change).await;
        scene.await_step(&job, "sft", stopped + 3).await;
        let sft = stage(&scene.job(NAME).await, "sft");
        assert_eq!((sft.restarts.total, sft.disruptions), (0, 0), "{sft:?}");
        let pods = scene.pods(&job, "sft", sft.attempt).await;
        assert_eq!(pods.len(), 1, "it goes on with the nodes that it asks for now");
        assert_eq!(scene.resumed_at(&job, "sft", sft.attempt).await, stopped);
        let steps: Vec<_> = scene.volume.steps(&job, "sft").iter().map(|s| s.step).collect();
        assert_eq!(steps, (1..=steps.len() as u64).collect::<Vec<_>>(), "no step was lost or made twice");
    });
}

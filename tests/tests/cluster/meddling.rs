//! What people do to a job that runs.

use e2e::manifest::{NAME, example};
use e2e::tools::kubectl;
use e2e::{eventually, on_the_cluster, stage};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Service};
use kube::api::DeleteParams;
use kube::{Api, ResourceExt};
use rlhf_api::job::StagePhase;
use serde_json::json;

#[test]
fn case_9_22_and_29_edits_and_deletions_do_no_harm() {
    on_the_cluster(async |scene| {
        let long =
            example().only(&["sft"]).stage("sft", "sft/epochs", json!(100)).stage("sft", "sft/maxSteps", json!(1000));
        let job = scene.apply(long).await;
        scene.await_step(&job, "sft", 3, 120).await;
        for (change, field) in [
            (r#"{"spec": {"compute": {"nodes": 3}}}"#, "compute"),
            (r#"{"spec": {"failurePolicy": {"maxRestarts": 9}}}"#, "failurePolicy"),
            (r#"{"spec": {"activeDeadlineSeconds": 60}}"#, "activeDeadlineSeconds"),
            (r#"{"spec": {"model": {"source": "volume://models/other"}}}"#, "model"),
        ] {
            let namespace = &scene.namespace;
            let answer =
                kubectl(&["patch", "rlhf", NAME, "--namespace", namespace, "--type=merge", "--patch", change]).await;
            let refused = format!("{field} cannot change once the job exists");
            assert!(!answer.ok && answer.errors.contains(&refused), "{change}: {}", answer.errors);
        }

        let config = format!("{NAME}-sft");
        let background = DeleteParams::background();
        scene.api::<ConfigMap>().delete(&config, &background).await.expect("the config can be deleted");
        scene.api::<Service>().delete(&config, &background).await.expect("the Service can be deleted");
        scene.api::<Job>().delete(&format!("{NAME}-sft-1"), &background).await.expect("the attempt can be deleted");
        let again = scene
            .await_job(NAME, "a second attempt", 90, |j| {
                let sft = stage(j, "sft");
                (sft.attempt, sft.phase) == (2, StagePhase::Running)
            })
            .await;
        let sft = stage(&again, "sft");
        assert_eq!((sft.restarts, sft.disruptions), (0, 1));
        assert_eq!(sft.last_failure.map(|f| f.reason).as_deref(), Some("PodDeleted"));
        scene.api::<ConfigMap>().get(&config).await.expect("the config is there again");
        scene.api::<Service>().get(&config).await.expect("the Service is there again");
        let goes_on = async || scene.volume.steps(&job, "sft").iter().any(|s| s.attempt == 2);
        eventually("a step of the second attempt", 60, goes_on).await;
        let resumed = scene.resumed_at(&job, "sft", 2).await;
        assert!(resumed >= 3, "the deleted attempt's last step was lost: resumed at {resumed}");

        let namespaces = Api::<Namespace>::all(scene.client.clone());
        namespaces.delete(&scene.namespace, &DeleteParams::default()).await.expect("the namespace can be deleted");
        scene.await_object(&namespaces, &scene.namespace, 120, |n: Option<&Namespace>| n.is_none()).await;
        assert_eq!(again.uid(), job.uid());
    });
}

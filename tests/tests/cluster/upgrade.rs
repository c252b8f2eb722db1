//! The chart is installed over another version, or beside one.

use e2e::manifest::{NAME, endless, example};
use e2e::tools::{kubectl, kubectl_with, root};
use e2e::{RELEASE, change_definition, eventually, on_the_cluster_alone, on_the_cluster_with, stage};
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use kube::api::DeleteParams;
use rlhf_api::job::RLHFJob;
use serde_json::json;

const FIELD: &str = "/spec/versions/0/schema/openAPIV3Schema/properties/spec/properties/ttlSecondsAfterFinished";

#[test]
fn case_8_no_field_is_dropped_without_a_word() {
    on_the_cluster_alone(async |scene| {
        scene.operator.install(&[]).await;
        let system = scene.operator.namespace.as_str();
        let mut misspelt = example();
        misspelt.0["spec"]["ttlSecondsAfterFinish"] = json!(60);
        let args = ["apply", "--namespace", &scene.namespace, "--filename", "-"];
        let refused = kubectl_with(&args, &misspelt.0).await;
        assert!(
            !refused.ok && refused.errors.contains("unknown field \"spec.ttlSecondsAfterFinish\""),
            "{}",
            refused.errors
        );

        change_definition(json!({"op": "remove", "path": FIELD})).await;
        kubectl(&["delete", "pods", "--all", "--namespace", system]).await.good();
        let told = async || {
            let pods = scene.operator.pods().await;
            for pod in pods.iter().map(ResourceExt::name_any) {
                for run in [["logs", &pod].as_slice(), &["logs", &pod, "--previous"]] {
                    let logs = kubectl(&[run, &["--namespace", system]].concat()).await.output;
                    if logs.contains("lacks spec.ttlSecondsAfterFinished, which the API server would drop") {
                        return true;
                    }
                }
            }
            false
        };
        eventually("the operator's word on the definition", told).await;

        let current = root().join("crds/rlhfjob.yaml").display().to_string();
        kubectl(&["apply", "--server-side", "--force-conflicts", "--filename", &current]).await.good();
        let deployment = format!("deployment/{RELEASE}");
        kubectl(&["rollout", "status", &deployment, "--namespace", system, "--timeout", "300s"]).await.good();
    });
}

#[test]
fn case_43_an_upgrade_keeps_the_key_of_running_trainers() {
    on_the_cluster_with(&[], async |scene| {
        let system = scene.operator.namespace.as_str();
        let secret = format!("{RELEASE}-key");
        let key = async || {
            kubectl(&["get", "secret", &secret, "--namespace", system, "--output", "jsonpath={.data}"]).await.good()
        };
        let first = key().await;
        assert!(!first.is_empty(), "the first operator makes a key");
        scene.operator.install(&[]).await;
        assert!(key().await == first, "an upgrade has changed the key");
    });
}

#[test]
fn an_upgrade_changes_no_job_that_runs() {
    on_the_cluster_with(&[], async |scene| {
        let job = scene.apply(endless()).await;
        scene.await_step(&job, "sft", 3).await;
        let image = scene.job(NAME).await.status.and_then(|s| s.images).expect("the images are pinned").trainer;
        let before = scene.attempts().await;
        scene.operator.install(&["trainer.image.tag=another", "logFormat=json"]).await;
        let now = scene.volume.steps(&job, "sft").last().expect("steps were made").step;
        let told = |j: &RLHFJob| stage(j, "sft").progress.is_some_and(|p| p.step > now);
        scene.await_job(NAME, "progress, told by the new operator", told).await;
        assert_eq!(scene.attempts().await, before, "nothing was made anew");

        // Nor do the attempts that follow run another image, or a job's half would be another trainer's.
        let pod = scene.pods(&job, "sft", 1).await.remove(0).name_any();
        scene.api::<Pod>().delete(&pod, &DeleteParams::default()).await.expect("the pod can be deleted");
        scene.await_attempt(NAME, "sft", 2).await;
        let pods = scene.pods(&job, "sft", 2).await;
        let runs = |pod: &Pod| pod.spec.as_ref().and_then(|s| s.containers[0].image.clone());
        assert!(
            pods.iter().all(|p| runs(p).as_ref() == Some(&image)),
            "{:?}",
            pods.iter().map(runs).collect::<Vec<_>>()
        );
    });
}

#[test]
fn a_job_outlives_its_operator() {
    on_the_cluster_with(&[], async |scene| {
        let job = scene.apply(endless()).await;
        scene.await_step(&job, "sft", 3).await;
        let before = scene.attempts().await;
        scene.operator.uninstall().await;
        scene.await_more_steps(&job, "sft", 5).await;
        scene.operator.install(&[]).await;
        let now = scene.volume.steps(&job, "sft").last().expect("steps were made").step;
        let told = |j: &RLHFJob| stage(j, "sft").progress.is_some_and(|p| p.step > now);
        let again = scene.await_job(NAME, "progress, told by the next operator", told).await;
        let sft = stage(&again, "sft");
        assert_eq!((sft.attempt, sft.restarts.total, sft.disruptions), (1, 0, 0));
        assert_eq!(scene.attempts().await, before, "nothing was made anew");
    });
}

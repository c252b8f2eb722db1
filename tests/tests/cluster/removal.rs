//! What is deleted leaves nothing.

use e2e::manifest::{NAME, example};
use e2e::{Uninstalled, eventually, install, labelled, on_the_cluster, on_the_cluster_alone, stage, uninstall};
use kube::ResourceExt;
use kube::api::DeleteParams;
use rlhf_api::job::{RLHFJob, StagePhase};
use rlhf_api::names;
use serde_json::json;

#[test]
fn a_deleted_job_leaves_no_child() {
    on_the_cluster(async |scene| {
        let long =
            example().only(&["sft"]).stage("sft", "sft/epochs", json!(100)).stage("sft", "sft/maxSteps", json!(1000));
        scene.apply(long).await;
        let job = scene.await_stage(NAME, "sft", StagePhase::Running, 90).await;
        let children = format!("{}={}", names::LABEL_JOB_UID, job.uid().expect("a stored job has a UID"));
        let there = labelled(&children).await;
        for kind in ["configmap/", "service/", "secret/", "networkpolicy.networking.k8s.io/", "job.batch/", "pod/"] {
            assert!(there.iter().any(|child| child.starts_with(kind)), "no {kind} among {there:?}");
        }
        scene.api::<RLHFJob>().delete(NAME, &DeleteParams::default()).await.expect("the job can be deleted");
        eventually("the end of the job's children", 90, async || labelled(&children).await.is_empty()).await;
    });
}

#[test]
fn an_uninstalled_chart_leaves_the_definition_only_where_kept() {
    on_the_cluster_alone(async |scene| {
        install(true).await;
        // Its claim does not exist, so it stays where it is.
        let manifest = example().set("/spec/storage/volumeClaim/claimName", json!("missing"));
        scene.apply(manifest).await;
        let job = scene.await_stage(NAME, "prepare", StagePhase::Starting, 60).await;
        let children = format!("{}={}", names::LABEL_JOB_UID, job.uid().expect("a stored job has a UID"));
        eventually("the prepare pod", 60, async || labelled(&children).await.iter().any(|c| c.starts_with("pod/")))
            .await;

        let Uninstalled { labelled: left, records } = uninstall().await;
        assert_eq!(left, ["customresourcedefinition.apiextensions.k8s.io/rlhfjobs.rlhf.dev"]);
        assert_eq!(records, "");
        assert_eq!(scene.job(NAME).await.uid(), job.uid(), "a kept definition keeps its jobs");

        install(false).await;
        scene.await_job(NAME, "the same attempt", 60, |j| stage(j, "prepare").attempt == 1).await;
        let Uninstalled { labelled: left, records } = uninstall().await;
        assert_eq!((left, records), (vec![], String::new()));
        eventually("the end of the jobs' children", 90, async || labelled(&children).await.is_empty()).await;
    });
}

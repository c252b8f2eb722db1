//! What is deleted leaves nothing.

use e2e::manifest::{NAME, endless, waits};
use e2e::{RELEASE, Uninstalled, eventually, labelled, on_the_cluster, on_the_cluster_alone, stage, uid};
use kube::ResourceExt;
use kube::api::DeleteParams;
use rlhf_api::job::{RLHFJob, StagePhase};
use rlhf_api::names;

#[test]
fn a_deleted_job_leaves_no_child() {
    on_the_cluster(async |scene| {
        scene.apply(endless()).await;
        let job = scene.await_stage(NAME, "sft", StagePhase::Running).await;
        let children = format!("{}={}", names::LABEL_JOB_UID, uid(&job));
        let there = labelled(&children).await;
        for kind in ["configmap/", "service/", "secret/", "networkpolicy.networking.k8s.io/", "job.batch/", "pod/"] {
            assert!(there.iter().any(|child| child.starts_with(kind)), "no {kind} among {there:?}");
        }
        scene.api::<RLHFJob>().delete(NAME, &DeleteParams::default()).await.expect("the job can be deleted");
        eventually("the end of the job's children", async || labelled(&children).await.is_empty()).await;
    });
}

#[test]
fn an_uninstalled_chart_leaves_the_definition_only_where_kept() {
    on_the_cluster_alone(async |scene| {
        scene.operator.install(&["crds.keep=true"]).await;
        scene.apply(waits(NAME)).await;
        let job = scene.await_stage(NAME, "prepare", StagePhase::Starting).await;
        let children = format!("{}={}", names::LABEL_JOB_UID, uid(&job));
        eventually("the prepare pod", async || labelled(&children).await.iter().any(|c| c.starts_with("pod/"))).await;

        let Uninstalled { labelled: left, records } = scene.operator.uninstall_and_look().await;
        let key = format!("secret/{RELEASE}-key");
        assert_eq!(left, [&key, "customresourcedefinition.apiextensions.k8s.io/rlhfjobs.rlhf.dev"]);
        assert_eq!(records, "");
        assert_eq!(scene.job(NAME).await.uid(), job.uid(), "a kept definition keeps its jobs");

        scene.operator.install(&["crds.keep=false"]).await;
        scene.await_job(NAME, "the same attempt", |j| stage(j, "prepare").attempt == 1).await;
        let Uninstalled { labelled: left, records } = scene.operator.uninstall_and_look().await;
        assert_eq!((left, records), (vec![], String::new()));
        eventually("the end of the jobs' children", async || labelled(&children).await.is_empty()).await;
    });
}

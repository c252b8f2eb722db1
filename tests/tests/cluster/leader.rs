//! Two operators, of which one works.

use e2e::audit::{operators_writes, writes_without_lease};
use e2e::manifest::waits;
use e2e::{eventually, kill_operator, on_the_cluster_with};
use kube::ResourceExt;
use rlhf_api::job::{RLHFJob, StagePhase};

#[test]
fn case_45_a_killed_leader_is_succeeded_and_only_one_writes() {
    on_the_cluster_with(&["replicas=2"], async |scene| {
        scene.apply(waits("before")).await;
        scene.await_stage("before", "prepare", StagePhase::Starting).await;
        let first = scene.operator.leader().await.expect("an operator leads");
        kill_operator(&first);
        let other = async || scene.operator.leader().await.is_some_and(|pod| pod.uid() != first.uid());
        eventually("another leader", other).await;

        scene.apply(waits("after")).await;
        let job: RLHFJob = scene.await_stage("after", "prepare", StagePhase::Starting).await;
        assert_eq!(job.status.map(|s| s.restarts), Some(0));
        assert!(
            operators_writes(scene).iter().any(|w| w.pod() == Some(&first.name_any())),
            "the log knows them by their pods"
        );
        let alone = writes_without_lease(scene);
        assert!(alone.is_empty(), "each wrote while the lease was its own: {alone:?}");
    });
}

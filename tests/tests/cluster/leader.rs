//! Two operators, of which one works.

use e2e::audit::operators_writes;
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
        let second = scene.operator.leader().await.expect("an operator leads").name_any();

        scene.apply(waits("after")).await;
        let job: RLHFJob = scene.await_stage("after", "prepare", StagePhase::Starting).await;
        assert_eq!(job.status.map(|s| s.restarts), Some(0));
        let writes = operators_writes(scene);
        let mut writers: Vec<_> = writes.iter().filter_map(|w| w.pod()).collect();
        assert_eq!(writers.len(), writes.len(), "a write without a pod's token: {writes:?}");
        writers.dedup();
        assert_eq!(writers, [first.name_any(), second], "each wrote alone, one after the other");
    });
}

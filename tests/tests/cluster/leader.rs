//! Two operators, of which one works.

use e2e::audit::operators_writes;
use e2e::manifest::waits;
use e2e::{eventually, kill_operator, leader, on_the_cluster};
use kube::ResourceExt;
use rlhf_api::job::{RLHFJob, StagePhase};

#[test]
fn case_45_a_killed_leader_is_succeeded_and_only_one_writes() {
    on_the_cluster(async |scene| {
        scene.apply(waits("before")).await;
        scene.await_stage("before", "prepare", StagePhase::Starting, 60).await;
        let first = leader(scene).await.expect("an operator leads");
        kill_operator(&first);
        // The lease lasts 15 seconds, and is looked at every two.
        let other = async || leader(scene).await.is_some_and(|pod| pod.uid() != first.uid());
        eventually("another leader", 20, other).await;
        let second = leader(scene).await.expect("an operator leads").name_any();

        scene.apply(waits("after")).await;
        let job: RLHFJob = scene.await_stage("after", "prepare", StagePhase::Starting, 60).await;
        assert_eq!(job.status.map(|s| s.restarts), Some(0));
        let writes = operators_writes(&scene.namespace);
        let mut writers: Vec<_> = writes.iter().filter_map(|w| w.pod()).collect();
        assert_eq!(writers.len(), writes.len(), "a write without a pod's token: {writes:?}");
        writers.dedup();
        assert_eq!(writers, [first.name_any(), second], "each wrote alone, one after the other");
    });
}

//! The order of stages.

use e2e::manifest::{NAME, example};
use e2e::{on_the_cluster, stage};
use rlhf_api::job::{Phase, RLHFJob, RLHFJobStatus, StagePhase};
use serde_json::json;

#[test]
fn stages_without_an_edge_between_them_run_side_by_side() {
    on_the_cluster(async |scene| {
        let history = scene.follow(NAME);
        let manifest = example()
            .only(&["sft", "reward"])
            .reward_from_base()
            .set("/spec/compute/resources/requests", json!({"cpu": "100m", "memory": "256Mi"}));
        scene.apply(manifest).await;
        let succeeded = |j: &RLHFJob| j.status.as_ref().is_some_and(|s| s.phase == Phase::Succeeded);
        let job = scene.await_job(NAME, "success", succeeded).await;
        let running =
            |s: &RLHFJobStatus, name| s.stages.iter().any(|s| s.name == name && s.phase == StagePhase::Running);
        assert!(history.had(|s| running(s, "sft") && running(s, "reward")), "they never ran at the same time");
        assert!(history.had(|s| s.stage.as_deref() == Some("sft,reward")), "the Stage column never named both");
        let reward =
            scene.volume.model(&stage(&job, "reward").output.expect("a stage that succeeded has an output").path);
        assert!(reward.shapes.contains_key("score.weight"), "{:?}", reward.shapes.keys());
    });
}

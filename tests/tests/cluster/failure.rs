//! What a user can get wrong, found before any training pod is made.

use e2e::audit::writes;
use e2e::manifest::{NAME, example};
use e2e::on_the_cluster;
use rlhf_api::job::Phase;

#[test]
fn a_bad_line_of_data_fails_in_prepare_and_no_training_pod_is_made() {
    on_the_cluster(async |scene| {
        let manifest = example();
        let file = manifest.dataset("reward", "rewardModel/dataset");
        scene.volume.replace_line(&file, 7, r#"{"prompt": "The film", "chosen": " was good.", "rejected": 3}"#);
        scene.apply(manifest).await;
        let failed = |s: Phase| s == Phase::Failed;
        let job = scene.await_job(NAME, "failure", 90, |j| j.status.as_ref().is_some_and(|s| failed(s.phase))).await;
        let status = job.status.expect("a failed job has a status");
        let message = status.message.unwrap_or_default();
        assert!(message.contains(&format!("{file}:7: field 'rejected' is a number")), "{message}");
        let condition = status.conditions.iter().find(|c| c.type_ == "Failed").expect("a failed job has the condition");
        assert_eq!((condition.status.as_str(), condition.reason.as_str()), ("True", "BadInput"));
        let prepare = status.prepare.expect("prepare has a status");
        assert_eq!((prepare.attempt, prepare.last_failure.and_then(|f| f.code)), (1, Some(65)));
        assert!(status.stages.iter().all(|s| s.attempt == 0), "a stage was started: {:?}", status.stages);
        let made: Vec<_> =
            writes(&scene.namespace).iter().map(|w| w.describe()).filter(|w| w.starts_with("create jobs ")).collect();
        assert_eq!(made, [format!("create jobs {NAME}-prepare-1")]);
    });
}

//! What a user can get wrong, found before any training pod is made.

use e2e::audit::writes;
use e2e::manifest::{NAME, example};
use e2e::{attempt, condition, on_the_cluster};
use rlhf_api::job::Phase;

#[test]
fn a_bad_line_of_data_fails_in_prepare_and_no_training_pod_is_made() {
    on_the_cluster(async |scene| {
        let manifest = example();
        let file = manifest.dataset("reward", "rewardModel/dataset");
        scene.volume.replace_line(&file, 7, r#"{"prompt": "The film", "chosen": " was good.", "rejected": 3}"#);
        scene.apply(manifest).await;
        let job = scene.await_phase(NAME, Phase::Failed).await;
        let status = job.status.clone().expect("a failed job has a status");
        let message = status.message.unwrap_or_default();
        assert!(message.contains(&format!("{file}:7: field 'rejected' is a number")), "{message}");
        // The last is how kstatus finds out.
        for kind in ["Failed", "Stalled"] {
            let (holds, reason, _) = condition(&job, kind).expect("a failed job has the condition");
            assert_eq!((holds.as_str(), reason.as_str()), ("True", "BadInput"), "{kind}");
        }
        let prepare = status.prepare.expect("prepare has a status");
        assert_eq!((prepare.attempt, prepare.last_failure.and_then(|f| f.code)), (1, Some(65)));
        assert!(status.stages.iter().all(|s| s.attempt == 0), "a stage was started: {:?}", status.stages);
        let made: Vec<_> =
            writes(&scene.namespace).iter().map(|w| w.describe()).filter(|w| w.starts_with("create jobs ")).collect();
        assert_eq!(made, [format!("create jobs {}", attempt(&job, "prepare", 1))]);
    });
}

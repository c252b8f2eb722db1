//! Whatever is killed, deleted or suspended in the middle, the job goes on where it was.

use e2e::manifest::{ENDLESS, NAME, endless, example};
use e2e::{Step, attempt, eventually, kill_worker, lose_container, on_the_cluster, on_the_cluster_with, stage};
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use kube::api::DeleteParams;
use rlhf_api::job::{Phase, RLHFJob, StagePhase};
use serde_json::json;

/// More than are made before the worker is killed, however fast the machine is, and yet few: the job succeeds.
const PPO_ITERATIONS: u64 = 20;
const SFT_STEPS: u64 = 300;

/// The steps of an attempt, of which there must be some.
fn of_attempt(steps: &[Step], attempt: u64) -> Vec<u64> {
    let of: Vec<u64> = steps.iter().filter(|s| s.attempt == attempt).map(|s| s.step).collect();
    assert!(!of.is_empty(), "no step of attempt {attempt} in {steps:?}");
    of
}

fn range(from: u64, to: u64) -> Vec<u64> {
    (from..=to).collect()
}

#[test]
fn a_worker_killed_in_the_middle_of_ppo_is_resumed_and_counted() {
    on_the_cluster(async |scene| {
        let manifest =
            example().stage("sft", "sft/maxSteps", json!(4)).stage("reward", "rewardModel/maxSteps", json!(4));
        let manifest = manifest.stage("ppo", "ppo/iterations", json!(PPO_ITERATIONS)).stage(
            "ppo",
            "ppo/evalEveryIterations",
            json!(PPO_ITERATIONS),
        );
        let job = scene.apply(manifest).await;
        scene.await_stage(NAME, "ppo", StagePhase::Running).await;
        let pods = scene.pods(&job, "ppo", 1).await;
        // Iteration 2 is saved while the next ones go on.
        eventually("a checkpoint", async || !scene.volume.checkpoints(&job, "ppo").is_empty()).await;
        kill_worker(&pods[1]);

        let restarted = scene.await_job(NAME, "a second attempt", |j| stage(j, "ppo").attempt == 2).await;
        let ppo = stage(&restarted, "ppo");
        let ends: Vec<_> = ppo.attempts.iter().map(|a| (a.number, a.reason.as_str())).collect();
        assert_eq!(ends, [(1, "Killed")]);
        let failure = ppo.last_failure.expect("the first attempt's end is recorded");
        assert_eq!((failure.attempt, failure.reason.as_str(), failure.rank), (1, "Killed", Some(1)), "{failure:?}");
        assert_eq!(failure.pod, Some(pods[1].name_any()));

        let job = scene.await_phase(NAME, Phase::Succeeded).await;
        let ppo = stage(&job, "ppo");
        assert_eq!((ppo.attempt, ppo.restarts.total, ppo.disruptions), (2, 1, 0));
        assert_eq!(job.status.as_ref().map(|s| s.restarts), Some(1));
        let checkpoint = scene.resumed_at(&job, "ppo", 2).await;
        assert!(
            checkpoint >= 2 && checkpoint.is_multiple_of(2),
            "checkpoints are due every 2 iterations, not at {checkpoint}"
        );
        let steps = scene.volume.steps(&job, "ppo");
        let before = of_attempt(&steps, 1);
        assert_eq!(before, range(1, before.len() as u64));
        assert!(before.len() as u64 >= checkpoint, "{steps:?} and a checkpoint at {checkpoint}");
        assert_eq!(of_attempt(&steps, 2), range(checkpoint + 1, PPO_ITERATIONS));
        assert_eq!(scene.volume.checkpoints(&job, "ppo"), [0; 0], "they are kept while the stage runs");
    });
}

#[test]
fn a_deleted_pod_is_a_disruption_and_its_last_step_is_not_lost() {
    on_the_cluster(async |scene| {
        let job = scene.apply(endless()).await;
        scene.await_step(&job, "sft", 5).await;
        let pods = scene.pods(&job, "sft", 1).await;
        scene.api::<Pod>().delete(&pods[1].name_any(), &DeleteParams::default()).await.expect("the pod can be deleted");

        let again = scene.await_job(NAME, "a second attempt", |j| stage(j, "sft").attempt == 2).await;
        let failure = stage(&again, "sft").last_failure.expect("the first attempt's end is recorded");
        assert_eq!((failure.attempt, failure.reason.as_str()), (1, "PodDeleted"), "{failure:?}");
        let checkpoint = stage(&again, "sft").checkpoint.expect("the stopped attempt told of its checkpoint").step;
        assert!((5..ENDLESS).contains(&checkpoint), "{checkpoint}");

        scene.await_step(&job, "sft", checkpoint + 3).await;
        let sft = stage(&scene.job(NAME).await, "sft");
        assert_eq!((sft.attempt, sft.restarts.total, sft.disruptions), (2, 0, 1));
        assert_eq!(scene.resumed_at(&job, "sft", 2).await, checkpoint);
        let steps = scene.volume.steps(&job, "sft");
        assert_eq!(of_attempt(&steps, 1), range(1, checkpoint), "the checkpoint is of the last step");
        let after = of_attempt(&steps, 2);
        assert_eq!(after, range(checkpoint + 1, checkpoint + after.len() as u64));
    });
}

#[test]
fn the_operator_killed_in_the_middle_changes_nothing() {
    on_the_cluster_with(&["replicas=2"], async |scene| {
        let manifest = example()
            .only(&["sft", "reward"])
            .stage("sft", "sft/epochs", json!(10))
            .stage("sft", "sft/maxSteps", json!(SFT_STEPS))
            .stage("reward", "rewardModel/maxSteps", json!(4));
        let job = scene.apply(manifest).await;
        scene.await_step(&job, "sft", 3).await;
        let before = scene.attempts().await;
        assert_eq!(before.len(), 2, "prepare and sft: {before:?}");
        let killed = scene.operator.leader().await.expect("an operator leads").name_any();
        let operators = scene.operator.pods_api();
        operators
            .delete(&killed, &DeleteParams::default().grace_period(0))
            .await
            .expect("the operator's pod can be deleted");

        let job_done = scene.await_phase(NAME, Phase::Succeeded).await;
        for name in ["prepare", "sft", "reward"] {
            let stage = stage(&job_done, name);
            assert_eq!((stage.attempt, stage.restarts.total, stage.disruptions), (1, 0, 0), "{name}");
        }
        let after = scene.attempts().await;
        let names: Vec<_> = after.iter().map(|(name, _)| name.clone()).collect();
        let made = ["prepare", "reward", "sft"].map(|of| attempt(&job, of, 1));
        assert_eq!(names, made);
        assert!(before.iter().all(|job| after.contains(job)), "a Job was made anew: {before:?}, {after:?}");
        assert_eq!(of_attempt(&scene.volume.steps(&job, "sft"), 1), range(1, SFT_STEPS));
        let pods = scene.operator.pods().await;
        assert!(pods.iter().all(|p| p.name_any() != killed), "the operator was not killed");
    });
}

#[test]
fn a_suspended_job_has_no_pods_and_goes_on_from_its_checkpoint() {
    on_the_cluster(async |scene| {
        let job = scene.apply(endless()).await;
        scene.await_step(&job, "sft", 5).await;
        scene.patch(NAME, json!({"spec": {"suspend": true}})).await;

        let is = |j: &RLHFJob, phase| j.status.as_ref().is_some_and(|s| s.phase == phase);
        let suspended = scene.await_job(NAME, "suspension", |j| is(j, Phase::Suspended)).await;
        assert!(scene.pods(&job, "sft", 1).await.iter().all(ended), "a pod of a suspended job runs");
        let status = suspended.status.expect("a suspended job has a status");
        let condition =
            status.conditions.iter().find(|c| c.type_ == "Suspended").expect("a suspended job has the condition");
        assert_eq!(condition.status, "True");
        let stopped = scene.volume.steps(&job, "sft").last().expect("steps were made").step;
        assert_eq!(scene.volume.checkpoints(&job, "sft"), [stopped]);

        scene.patch(NAME, json!({"spec": {"suspend": false}})).await;
        scene.await_job(NAME, "the resumed job", |j| is(j, Phase::Running)).await;
        scene.await_step(&job, "sft", stopped + 3).await;
        let sft = stage(&scene.job(NAME).await, "sft");
        assert_eq!((sft.restarts.total, sft.disruptions), (0, 0), "suspending is neither");
        assert_eq!(scene.resumed_at(&job, "sft", sft.attempt).await, stopped);
        let steps: Vec<_> = scene.volume.steps(&job, "sft").iter().map(|s| s.step).collect();
        assert_eq!(steps, range(1, steps.len() as u64), "no step was lost or made twice");
        let reasons: Vec<_> = scene.told(NAME).await.into_iter().map(|t| t.reason).collect();
        for reason in ["Suspended", "Resumed"] {
            assert_eq!(reasons.iter().filter(|r| *r == reason).count(), 1, "{reasons:?}");
        }
    });
}

fn ended(pod: &Pod) -> bool {
    pod.status.as_ref().and_then(|s| s.phase.as_deref()).is_some_and(|phase| ["Succeeded", "Failed"].contains(&phase))
}

#[test]
fn a_container_that_its_node_has_lost_is_a_disruption() {
    on_the_cluster(async |scene| {
        let mut manifest = endless().set("/spec/compute/nodes", json!(1));
        manifest.0["spec"]["failurePolicy"] = json!({"maxRestarts": 0});
        let job = scene.apply(manifest).await;
        scene.await_step(&job, "sft", 3).await;
        lose_container(&scene.pods(&job, "sft", 1).await[0]);
        let again = scene.await_attempt(NAME, "sft", 2).await;
        let sft = stage(&again, "sft");
        assert_eq!((sft.restarts.total, sft.disruptions), (0, 1), "{:?}", sft.last_failure);
    });
}

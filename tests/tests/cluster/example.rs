//! The example from its manifest to a trained model, with everything that a user sees of it on the way.

use e2e::audit::operators_writes;
use e2e::manifest::{Manifest, NAME, example};
use e2e::tools::{cache, kubeconfig, kubectl, root, row};
use e2e::{History, SavedModel, Scene, Told, attempt, condition, eventually, on_the_cluster, stage};
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use rlhf_api::job::{Phase, RLHFJob, StagePhase};
use serde_json::json;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs::File;
use std::process::{Child, Command};
use std::time::Duration;

const STAGES: [&str; 3] = ["sft", "reward", "ppo"];
/// Prometheus looks for new pods every five seconds and the operator asks for progress every ten: each stage goes on for
/// longer than that, also where the machine is faster than those that ran this before.
const SFT_STEPS: u64 = 300;
const REWARD_STEPS: u64 = 200;
const PPO_ITERATIONS: u64 = 40;
/// Children and events of one attempt, and the states that it goes through; above it something writes without need.
const MOST_WRITES: usize = 10;
/// How often progress is written at most.
const PROGRESS_SECONDS: i64 = 10;
/// How long the job is kept at last.
const TTL: Duration = Duration::from_secs(1);
/// More than the job takes.
const DASHBOARD_SECONDS: u64 = 400;

#[test]
fn the_example_succeeds_as_people_and_prometheus_see_it() {
    on_the_cluster(async |scene| {
        let manifest = example()
            .stage("sft", "sft/epochs", json!(100))
            .stage("sft", "sft/maxSteps", json!(SFT_STEPS))
            .stage("reward", "rewardModel/epochs", json!(100))
            .stage("reward", "rewardModel/maxSteps", json!(REWARD_STEPS))
            .stage("ppo", "ppo/iterations", json!(PPO_ITERATIONS));
        let dashboard = Dashboard::watch(&scene.namespace);
        let history = scene.follow(NAME);
        scene.apply(manifest.clone()).await;
        let ppo_reports = |j: &RLHFJob| stage(j, "ppo").progress.is_some_and(|p| p.step > 0);
        let running = scene.await_job(NAME, "progress of ppo", ppo_reports).await;
        let figures = stage(&running, "ppo").progress.expect("ppo reports").metrics;
        assert!(["reward", "kl", "tokensPerSecond"].iter().all(|f| figures.contains_key(*f)), "{figures:?}");
        columns_of_a_running_job(&scene.namespace).await;
        let succeeded = |j: &RLHFJob| j.status.as_ref().is_some_and(|s| s.phase == Phase::Succeeded);
        let job = scene.await_job(NAME, "success", succeeded).await;

        columns_of_a_finished_job(&scene.namespace).await;
        status_is_complete(&job);
        pods_are_restricted_and_hold_no_token(scene, &job).await;
        models_are_in_hugging_face_layout(scene, &job, &manifest);
        learning_curves_and_samples_are_there(scene, &job);
        each_transition_is_told_once(scene, &job).await;
        writes_are_few(scene, &job, &history);
        dashboard.every_expression_has_had_data().await;
        a_finished_job_costs_no_writes(scene, &job).await;
    });
}

async fn columns(namespace: &str) -> BTreeMap<String, String> {
    row(&kubectl(&["get", "rlhf", "--namespace", namespace]).await.good())
}

async fn columns_of_a_running_job(namespace: &str) {
    let row = columns(namespace).await;
    assert_eq!(
        (row["NAME"].as_str(), row["PHASE"].as_str(), row["STAGE"].as_str(), row["RESTARTS"].as_str()),
        (NAME, "Running", "ppo", "0")
    );
    let (step, total) = row["PROGRESS"].split_once('/').unwrap_or_else(|| panic!("{row:?}"));
    assert!((1..=PPO_ITERATIONS).contains(&step.parse().unwrap()) && total == PPO_ITERATIONS.to_string(), "{row:?}");
}

async fn columns_of_a_finished_job(namespace: &str) {
    let row = columns(namespace).await;
    let cells = ["PHASE", "STAGE", "PROGRESS", "RESTARTS"].map(|head| row[head].as_str());
    assert_eq!(cells, ["Succeeded", "", "", "0"]);
    assert!(!row["AGE"].is_empty());
}

fn status_is_complete(job: &RLHFJob) {
    let status = job.status.as_ref().expect("a finished job has a status");
    assert!(status.start_time.is_some() && status.completion_time >= status.start_time, "{status:?}");
    for (kind, holds) in [
        ("Complete", "True"),
        ("Failed", "False"),
        ("Suspended", "False"),
        ("Waiting", "False"),
        // As kstatus reads them: it is done, and well.
        ("Reconciling", "False"),
        ("Stalled", "False"),
    ] {
        assert_eq!(condition(job, kind).map(|(status, ..)| status).as_deref(), Some(holds), "{kind}");
    }
    assert!(status.images.as_ref().is_some_and(|i| i.trainer.contains("rlhf/trainer")), "{:?}", status.images);
    let figures = [
        ("sft", &["evalLoss", "evalPerplexity"][..]),
        ("reward", &["evalAccuracy"]),
        ("ppo", &["evalReward", "evalKl", "evalRewardBefore"]),
    ];
    for (name, wanted) in figures {
        let stage = stage(job, name);
        assert_eq!(
            (stage.phase, stage.attempt, stage.restarts.total, stage.disruptions),
            (StagePhase::Succeeded, 1, 0, 0),
            "{name}"
        );
        assert!(stage.start_time.is_some() && stage.completion_time >= stage.start_time, "{name}");
        let ends: Vec<_> = stage.attempts.iter().map(|a| (a.number, a.reason.as_str())).collect();
        assert_eq!(ends, [(1, "Done")], "{name}");
        let output = stage.output.expect("a stage that succeeded has an output");
        for figure in wanted {
            assert!(
                output.metrics.get(*figure).is_some_and(|v| v.is_finite()),
                "{name} has no {figure}: {:?}",
                output.metrics
            );
        }
    }
    let ppo = stage(job, "ppo");
    let progress = ppo.progress.expect("ppo ran long enough to be asked");
    assert_eq!((progress.step, progress.total_steps), (PPO_ITERATIONS, PPO_ITERATIONS));
    assert!(progress.metrics.contains_key("evalReward"), "{:?}", progress.metrics);
    assert_eq!(ppo.checkpoint, None, "none is kept after its success");
}

/// The namespace lets nothing else in, and what was let in holds no credentials of the API server.
async fn pods_are_restricted_and_hold_no_token(scene: &Scene, job: &RLHFJob) {
    for (name, count) in [("prepare", 1), ("sft", 2), ("reward", 2), ("ppo", 2)] {
        let pods = scene.pods(job, name, 1).await;
        assert_eq!(pods.len(), count, "{name}");
        pods.iter().for_each(holds_no_token);
    }
}

fn holds_no_token(pod: &Pod) {
    let (name, spec) = (pod.name_any(), pod.spec.as_ref().expect("a pod has a spec"));
    assert_eq!(spec.automount_service_account_token, Some(false), "{name}");
    let projects_token = spec.volumes.iter().flatten().filter_map(|v| v.projected.as_ref()?.sources.as_ref());
    assert!(!projects_token.flatten().any(|s| s.service_account_token.is_some()), "{name} mounts a token");
    for container in &spec.containers {
        let security = container.security_context.as_ref().expect("a container has a security context");
        assert_eq!(security.read_only_root_filesystem, Some(true), "{name}");
        let mounts = container.volume_mounts.iter().flatten();
        assert!(mounts.filter(|m| m.mount_path.contains("serviceaccount")).count() == 0, "{name}");
    }
}

fn models_are_in_hugging_face_layout(scene: &Scene, job: &RLHFJob, manifest: &Manifest) {
    let base = scene.volume.model(&manifest.model());
    let [sft, reward, ppo] = STAGES.map(|name| scene.volume.model(&stage(job, name).output.expect("an output").path));
    for model in [&sft, &ppo] {
        assert_eq!(model.config["architectures"], base.config["architectures"]);
        assert_eq!(model.shapes, base.shapes);
        trained(model, &base);
    }
    assert_eq!(reward.config["architectures"], json!(["LlamaForSequenceClassification"]));
    assert_eq!(reward.shapes["score.weight"], [1, base.config["hidden_size"].as_u64().unwrap() as usize]);
    assert!(
        base.shapes
            .iter()
            .filter(|(name, _)| *name != "lm_head.weight")
            .all(|(name, shape)| reward.shapes[name] == *shape)
    );
    trained(&reward, &base);
    assert!(ppo.weights != sft.weights, "ppo changed nothing");
}

fn trained(model: &SavedModel, base: &SavedModel) {
    assert!(model.weights != base.weights, "training changed nothing");
    assert!(model.tokenizer == base.tokenizer, "the tokenizer is another");
    assert_eq!(model.config["model_type"], base.config["model_type"]);
}

fn learning_curves_and_samples_are_there(scene: &Scene, job: &RLHFJob) {
    for (name, last) in [("sft", SFT_STEPS), ("reward", REWARD_STEPS), ("ppo", PPO_ITERATIONS)] {
        let steps = scene.volume.steps(job, name);
        assert!(steps.iter().all(|s| s.attempt == 1), "{steps:?}");
        assert_eq!(steps.iter().map(|s| s.step).collect::<Vec<_>>(), (1..=last).collect::<Vec<_>>(), "{name}");
    }
    let [before, after] = ["eval-before", "eval-after"].map(|evaluation| scene.volume.samples(job, "ppo", evaluation));
    assert!(!before.is_empty() && before.len() == after.len());
    for (before, after) in before.iter().zip(&after) {
        assert_eq!(before["prompt"], after["prompt"], "both answer the same prompts");
        assert!(after["response"].is_string() && after["reward"].is_number(), "{after}");
    }
}

async fn each_transition_is_told_once(scene: &Scene, job: &RLHFJob) {
    let told = |reason: &str, about: Option<String>| Told { reason: reason.into(), about, times: 1 };
    let attempt = |name: &str| Some(attempt(job, name, 1));
    let mut expected = vec![told("JobSucceeded", None), told("StageStarted", attempt("prepare"))];
    // The last stage's success is the job's.
    let before = ["prepare"].into_iter().chain(STAGES).take(STAGES.len());
    expected.extend(before.map(|name| told("StageSucceeded", attempt(name))));
    expected.sort();
    // The last event follows the status that tells of it.
    eventually("the last event", async || scene.told(NAME).await.iter().any(|t| t.reason == "JobSucceeded")).await;
    assert_eq!(scene.told(NAME).await, expected);
}

/// The operator's writes, which the audit log has all.
fn writes_are_few(scene: &Scene, job: &RLHFJob, history: &History) {
    let writes = operators_writes(scene);
    let mut kinds = BTreeMap::<String, usize>::new();
    writes.iter().for_each(|w| *kinds.entry(w.kind()).or_default() += 1);
    let attempts = STAGES.len() + 1;
    println!("{} writes of the operator for {attempts} attempts: {kinds:?}", writes.len());
    assert!(kinds.get("create jobs") == Some(&attempts), "{kinds:?}");
    assert!(history.each_differs_from_the_one_before(), "the status was written without need");
    // What tells of progress alone grows with the time that a machine takes.
    let status = job.status.clone().unwrap_or_default();
    let (start, end) = status.start_time.zip(status.completion_time).expect("a finished job has both");
    let progress = usize::try_from(end.duration_since(start).as_secs() / PROGRESS_SECONDS).expect("time goes forward");
    let most = MOST_WRITES * attempts + progress;
    assert!(writes.len() <= most, "{} writes for {attempts} attempts, not {most}: {kinds:?}", writes.len());
}

/// Whoever touches it: the next that the operator writes is what is asked for at last, its deletion.
async fn a_finished_job_costs_no_writes(scene: &Scene, job: &RLHFJob) {
    let before = operators_writes(scene).len();
    for touched in ["once", "twice"] {
        scene.patch(NAME, json!({"metadata": {"annotations": {"example.com/touched": touched}}})).await;
    }
    // A change that does not end the job at once is taken note of in status.
    let over = job.status.as_ref().and_then(|s| s.completion_time).expect("a finished job has it") + TTL;
    eventually("the end of the time that it is kept", async || jiff::Timestamp::now() > over).await;
    scene.patch(NAME, json!({"spec": {"ttlSecondsAfterFinished": TTL.as_secs()}})).await;
    scene.await_object(&scene.api::<RLHFJob>(), NAME, |j: Option<&RLHFJob>| j.is_none()).await;
    let since = || -> Vec<_> { operators_writes(scene)[before..].iter().map(|w| w.describe()).collect() };
    // The audit log tells of a write once it is answered, which is after watches do.
    eventually("word of the deletion", async || !since().is_empty()).await;
    assert_eq!(since(), [format!("delete rlhfjobs {NAME}")]);
}

/// A real Prometheus with every expression of the chart's dashboard.
struct Dashboard {
    check: Child,
    log: std::path::PathBuf,
}

impl Dashboard {
    fn watch(namespace: &str) -> Self {
        let log = cache().join("logs/dashboard-check.log");
        std::fs::create_dir_all(log.parent().unwrap()).unwrap();
        let output = File::create(&log).unwrap();
        let check = Command::new("python3")
            .arg(root().join("tests/prometheus/dashboard_check.py"))
            .arg("--kubeconfig")
            .arg(kubeconfig())
            .args(["--namespace", namespace, "--job", NAME, "--timeout", &DASHBOARD_SECONDS.to_string()])
            .stdout(output.try_clone().unwrap())
            .stderr(output)
            .spawn();
        Self { check: check.expect("python3 is there"), log }
    }

    async fn every_expression_has_had_data(mut self) {
        // When its time is over it names what is missing.
        let check = RefCell::new(&mut self.check);
        eventually("the end of the dashboard check", async || check.borrow_mut().try_wait().unwrap().is_some()).await;
        let done = self.check.wait().unwrap();
        assert!(done.success(), "{}", std::fs::read_to_string(&self.log).unwrap_or_default());
    }
}

impl Drop for Dashboard {
    fn drop(&mut self) {
        if let Ok(None) = self.check.try_wait() {
            let pid = rustix::process::Pid::from_child(&self.check);
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::INT);
            let _ = self.check.wait();
        }
    }
}

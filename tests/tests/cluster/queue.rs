//! A job in a queue of Kueue's, which decides when each of its stages runs and where, and when it makes way.

use e2e::audit::{operators_writes, writes};
use e2e::kueue::{FLAVORS, Queue};
use e2e::manifest::{Manifest, NAME, endless};
use e2e::{Scene, attempt, eventually, on_the_cluster, stage};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use kube::api::{DeleteParams, ListParams, PostParams};
use rlhf_api::job::{Phase, RLHFJob, StagePhase};
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// More than are made before the stage is interrupted, however fast the machine is.
const STEPS: u64 = 600;

/// Fine-tuning alone, in the queue.
fn queued() -> Manifest {
    let mut manifest = endless().stage("sft", "sft/maxSteps", json!(STEPS));
    let labels = json!({"kueue.x-k8s.io/queue-name": Queue::NAME, "kueue.x-k8s.io/priority-class": "rlhf-low"});
    manifest.0["metadata"]["labels"] = labels;
    manifest
}

/// Waits until the job says that a stage is in the queue for a reason like one of these.
async fn await_queued(scene: &Scene, of: &str, why: &[&str]) -> RLHFJob {
    let start = format!("{of}: attempt 1 waits: Queued: in queue {}: ", Queue::NAME);
    let told = |j: &RLHFJob| {
        let conditions = j.status.iter().flat_map(|s| &s.conditions);
        conditions.into_iter().any(|c| {
            c.type_ == "Waiting"
                && c.status == "True"
                && c.reason == "Queued"
                && c.message.starts_with(&start)
                && why.iter().any(|w| c.message.contains(w))
        })
    };
    let job = scene.await_job(NAME, &format!("{of} in the queue for {why:?}"), told).await;
    let slot = stage(&job, of);
    assert_eq!((slot.phase, slot.starting_since), (StagePhase::Starting, None), "no deadline runs in a queue");
    job
}

async fn success(scene: &Scene) -> RLHFJob {
    let job = scene.await_phase(NAME, Phase::Succeeded).await;
    for name in ["prepare", "sft"] {
        let slot = stage(&job, name);
        assert_eq!((slot.attempt, slot.restarts.total, slot.disruptions), (1, 0, 0), "{name}: a queue is neither");
        assert_eq!(slot.last_failure, None, "{name}");
    }
    job
}

/// The steps are those of one run that was never stopped, and the last part went on from the checkpoint.
async fn assert_whole(scene: &Scene, job: &RLHFJob, stopped: u64) {
    assert_eq!(scene.resumed_at(job, "sft", 1).await, stopped);
    let steps: Vec<_> = scene.volume.steps(job, "sft").iter().map(|s| s.step).collect();
    assert_eq!(steps, (1..=STEPS).collect::<Vec<_>>(), "no step was lost or made twice");
}

async fn no_pods(scene: &Scene) {
    let pods = scene.api::<Pod>();
    eventually("the end of the pods", async || {
        pods.list(&ListParams::default()).await.is_ok_and(|p| p.items.is_empty())
    })
    .await;
}

/// How often each kind of write was made to Jobs, by the operator and by all. What the API server refused is left out: a pass
/// that comes before the watch has told of the last one's deletion asks for it once more, under the version that is gone.
fn writes_to_jobs(scene: &Scene) -> [BTreeMap<String, usize>; 2] {
    [operators_writes(scene), writes(&scene.namespace)].map(|all| {
        let done = all.iter().filter(|w| w.is_done());
        let kinds = done.map(|w| w.kind()).filter(|k| k.ends_with(" jobs") || k.ends_with(" jobs/status"));
        kinds.fold(BTreeMap::new(), |mut count, kind| {
            *count.entry(kind).or_default() += 1;
            count
        })
    })
}

#[test]
fn a_queued_job_takes_quota_only_while_a_stage_of_it_runs() {
    on_the_cluster(async |scene| {
        let queue = Queue::new(scene, [0, 0]).await;
        queue.priority("rlhf-low", 10).await;
        let job = scene.apply(queued()).await;
        let waiting = await_queued(scene, "prepare", &["insufficient"]).await;
        assert_eq!(waiting.status.as_ref().map(|s| (s.phase, s.active_since)), Some((Phase::Waiting, None)));
        assert!(scene.pods(&job, "prepare", 1).await.is_empty(), "a job in a queue has no pods");

        queue.allow([1, 0]).await;
        await_queued(scene, "sft", &["insufficient"]).await;
        queue.await_used([0, 0]).await;
        let low = || Some("rlhf-low".to_owned());
        let expected = [(attempt(&job, "prepare", 1), 1, low()), (attempt(&job, "sft", 1), 2, low())];
        assert_eq!(queue.workloads().await, expected);

        queue.allow([2, 0]).await;
        scene.await_step(&job, "sft", 5).await;
        assert_eq!(queue.used().await, [2, 0]);
        scene.patch(NAME, json!({"spec": {"suspend": true}})).await;
        scene.await_phase(NAME, Phase::Suspended).await;
        queue.await_used([0, 0]).await;
        let stopped = scene.volume.steps(&job, "sft").last().expect("steps were made").step;
        assert_eq!(scene.volume.checkpoints(&job, "sft"), [stopped]);

        queue.allow([0, 0]).await;
        scene.patch(NAME, json!({"spec": {"suspend": false}})).await;
        await_queued(scene, "sft", &["insufficient"]).await;
        queue.allow([0, 2]).await;
        let job = success(scene).await;
        assert_whole(scene, &job, stopped).await;
        queue.await_used([0, 0]).await;
        let [own, all] = writes_to_jobs(scene);
        let expected = [("create jobs".to_owned(), 3), ("delete jobs".to_owned(), 1)];
        assert_eq!(own, expected.into(), "the operator makes Jobs and takes them away: {all:?}");
    });
}

/// A workload of two pods that wants nodes of flavor `a`.
fn urgent(queue: &Queue) -> Job {
    let container = json!({
        "name": "pause", "image": "docker.io/rlhf/pause:dev", "imagePullPolicy": "Never",
        "resources": {"requests": {"cpu": "10m", "memory": "10Mi"}},
        "securityContext": {"allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}},
    });
    let labels = json!({"kueue.x-k8s.io/queue-name": Queue::NAME, "kueue.x-k8s.io/priority-class": "rlhf-high"});
    serde_json::from_value(json!({
        "metadata": {"name": "urgent", "labels": labels},
        "spec": {"suspend": true, "parallelism": 2, "completions": 2, "template": {"spec": {
            "restartPolicy": "Never",
            "nodeSelector": {queue.label("a"): "a"},
            "securityContext": {"runAsNonRoot": true, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [container],
        }}},
    }))
    .expect("the test writes a valid Job")
}

async fn selectors(scene: &Scene, job: &RLHFJob, queue: &Queue<'_>) -> Vec<Value> {
    let job = scene.api::<Job>().get(&attempt(job, "sft", 1)).await.expect("the stage's Job");
    let pod = job.spec.and_then(|s| s.template.spec).expect("a Job has a template");
    let selector = json!(pod.node_selector);
    assert_eq!(selector["kubernetes.io/os"], "linux", "the user's own stays: {selector}");
    FLAVORS.map(|f| selector[queue.label(f)].clone()).to_vec()
}

#[test]
fn case_32_33_a_preempted_stage_resumes_on_its_new_nodes() {
    on_the_cluster(async |scene| {
        let queue = Queue::new(scene, [2, 0]).await;
        queue.priority("rlhf-low", 10).await;
        queue.priority("rlhf-high", 1000).await;
        let mut manifest = queued();
        manifest.0["spec"]["compute"]["podTemplate"] = json!({"nodeSelector": {"kubernetes.io/os": "linux"}});
        let job = scene.apply(manifest).await;
        scene.await_step(&job, "sft", 5).await;
        assert_eq!(selectors(scene, &job, &queue).await, [json!("a"), Value::Null]);

        let jobs = scene.api::<Job>();
        jobs.create(&PostParams::default(), &urgent(&queue)).await.expect("a Job");
        let waiting = await_queued(scene, "sft", &["Preempted", "insufficient"]).await;
        assert_eq!(stage(&waiting, "sft").last_failure, None, "to make way is no failure");
        queue.await_used([2, 0]).await;
        eventually("the end of the stage's pods", async || scene.pods(&job, "sft", 1).await.is_empty()).await;
        assert_eq!(
            selectors(scene, &job, &queue).await,
            [Value::Null, Value::Null],
            "the first admission leaves nothing"
        );
        let stopped = scene.volume.steps(&job, "sft").last().expect("steps were made").step;
        assert!(stopped < STEPS, "the stage was over before it was preempted");
        assert_eq!(scene.volume.checkpoints(&job, "sft"), [stopped]);

        queue.allow([2, 2]).await;
        scene.await_stage(NAME, "sft", StagePhase::Running).await;
        assert_eq!(selectors(scene, &job, &queue).await, [Value::Null, json!("b")], "of the new admission only");
        let job = success(scene).await;
        assert_whole(scene, &job, stopped).await;
        queue.await_used([2, 0]).await;
        let [own, all] = writes_to_jobs(scene);
        assert_eq!(own, [("create jobs".to_owned(), 2)].into(), "the operator leaves Jobs to Kueue: {all:?}");

        jobs.delete("urgent", &DeleteParams::foreground()).await.expect("the other Job can go");
        queue.await_used([0, 0]).await;
        scene.api::<RLHFJob>().delete(&job.name_any(), &DeleteParams::default()).await.expect("the job can go");
        no_pods(scene).await;
    });
}

//! What people do to a job that runs.

use e2e::audit::operators_writes;
use e2e::manifest::{NAME, endless, example, waits};
use e2e::tools::{kubectl, kubectl_with};
use e2e::{attempt, change_definition, eventually, on_the_cluster, on_the_cluster_with, operator_memory, stage, uid};
use futures::{StreamExt, TryStreamExt, stream};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Pod, Service};
use kube::api::{DeleteParams, ListParams, PostParams, PropagationPolicy};
use kube::{Api, ResourceExt};
use rlhf_api::job::{RLHFJob, StagePhase};
use rlhf_api::names;
use serde_json::json;

#[test]
fn case_7_an_object_that_cannot_be_read_holds_up_no_other() {
    on_the_cluster(async |scene| {
        // What the definition of a later version might let through.
        let values =
            "/spec/versions/0/schema/openAPIV3Schema/properties/spec/properties/strategy/properties/sharding/enum";
        change_definition(json!({"op": "add", "path": format!("{values}/0"), "value": "zero9"})).await;
        let mut unknown = waits("unknown");
        unknown.0["spec"]["strategy"] = json!({"sharding": "zero9"});
        let apply = ["apply", "--namespace", &scene.namespace, "--filename", "-"];
        let stored = async || kubectl_with(&apply, &unknown.0).await.ok;
        eventually("a definition that knows zero9", stored).await;
        change_definition(json!({"op": "remove", "path": format!("{values}/0")})).await;

        let told = async || scene.told("unknown").await.iter().any(|event| event.reason == "Undecodable");
        eventually("an event about the job that cannot be read", told).await;
        scene.apply(waits("known")).await;
        scene.await_stage("known", "prepare", StagePhase::Starting).await;
        assert_eq!(scene.told("unknown").await.len(), 1, "it is told once");
        kubectl(&["delete", "rlhf", "unknown", "--namespace", &scene.namespace]).await.good();
    });
}

#[test]
fn case_41_pods_of_others_take_no_memory_of_the_operator() {
    const PODS: usize = 500;
    const BYTES: usize = 16 << 10;
    on_the_cluster_with(&[], async |scene| {
        let operator = scene.operator.leader().await.expect("an operator leads");
        // Nobody schedules them.
        let text = "x".repeat(BYTES);
        let pod = |n: usize| -> Pod {
            serde_json::from_value(json!({
                "metadata": {"name": format!("other-{n}"), "labels": {"app.kubernetes.io/managed-by": "rlhf-operator"},
                    "annotations": {"text": text}},
                "spec": {"schedulerName": "nobody",
                    "securityContext": {"runAsNonRoot": true, "seccompProfile": {"type": "RuntimeDefault"}},
                    "containers": [{"name": "trainer", "image": "example.com/other:1",
                        "securityContext": {"allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}}}]},
            }))
            .expect("a pod")
        };
        let pods = scene.api::<Pod>();
        let create = async |n: usize| pods.create(&PostParams::default(), &pod(n)).await.map(drop);
        // The first pods may take what the operator needs to read any; those that are added to them take nothing.
        let mut memory = vec![];
        for (from, job) in [(0, "before"), (PODS, "after")] {
            let all = stream::iter((from..from + PODS).map(create)).buffer_unordered(16).try_collect::<()>().await;
            all.expect("the pods can be made");
            // A watch brings things in their order: by the time that it has brought a pod made after them, it has brought all.
            scene.apply(waits(job)).await;
            scene.await_reason(job, "Waiting", "Unschedulable").await;
            memory.push(operator_memory(&operator));
        }
        let growth = memory[1].saturating_sub(memory[0]);
        assert!(growth < (PODS * BYTES / 4) as u64, "{growth} bytes more for {PODS} pods of {BYTES} bytes");
        pods.delete_collection(&DeleteParams::default().grace_period(0), &ListParams::default())
            .await
            .expect("they go");
    });
}

#[test]
fn case_28_a_job_of_the_same_name_takes_no_child_of_the_one_before() {
    on_the_cluster(async |scene| {
        let first = scene.apply(waits(NAME)).await;
        scene.await_stage(NAME, "prepare", StagePhase::Starting).await;
        let jobs = scene.api::<Job>();
        let prepare = attempt(&first, "prepare", 1);
        scene.await_object(&jobs, &prepare, |job: Option<&Job>| job.is_some()).await;
        let orphan = DeleteParams { propagation_policy: Some(PropagationPolicy::Orphan), ..DeleteParams::default() };
        scene.api::<RLHFJob>().delete(NAME, &orphan).await.expect("the job can be deleted");
        scene.await_object(&scene.api::<RLHFJob>(), NAME, |job: Option<&RLHFJob>| job.is_none()).await;

        let second = scene.apply(waits(NAME)).await;
        scene.await_reason(NAME, "Waiting", "Unschedulable").await;
        let own = jobs.get(&attempt(&second, "prepare", 1)).await.expect("the second job's own attempt");
        assert_eq!(own.owner_references()[0].uid, uid(&second));
        let left = jobs.get(&prepare).await.expect("the orphan is left alone");
        assert!(left.owner_references().is_empty(), "nobody adopts it");
        assert_eq!(left.labels().get(names::LABEL_JOB_UID), first.uid().as_ref());
        scene.api::<RLHFJob>().delete(NAME, &DeleteParams::default()).await.expect("the job can be deleted");
        eventually("the end of its own attempt", async || {
            jobs.get_opt(&own.name_any()).await.is_ok_and(|j| j.is_none())
        })
        .await;
        jobs.get(&prepare).await.expect("the orphan outlives it");
        jobs.delete(&prepare, &DeleteParams::background()).await.expect("it can go");
    });
}

#[test]
fn case_30_two_stages_whose_names_are_taken_wait_quietly() {
    on_the_cluster(async |scene| {
        let jobs = scene.api::<Job>();
        // The names follow from the job's UID: it is there first, and does nothing.
        let mut manifest = example().only(&["sft", "reward"]).reward_from_base();
        manifest.0["spec"]["suspend"] = json!(true);
        let job = scene.apply(manifest).await;
        let taken = ["sft", "reward"].map(|of| attempt(&job, of, 1));
        for name in &taken {
            let pod =
                json!({"restartPolicy": "Never", "containers": [{"name": "other", "image": "example.com/other:1"}]});
            let other = json!({"metadata": {"name": name}, "spec": {"suspend": true, "template": {"spec": pod}}});
            let other = serde_json::from_value(other).expect("a Job");
            jobs.create(&PostParams::default(), &other).await.expect("the name is free");
        }
        scene.patch(NAME, json!({"spec": {"suspend": false}})).await;
        let named = |j: &RLHFJob| {
            let message = j.status.as_ref().and_then(|s| s.message.clone()).unwrap_or_default();
            taken.iter().all(|name| message.contains(&format!("Job {name} exists and belongs to somebody else")))
        };
        scene.await_job(NAME, "word of both Jobs", named).await;
        // What is told is told by now: the audit log has a write only once it is answered.
        eventually("both events", async || scene.told(NAME).await.iter().filter(|t| t.reason == "Blocked").count() > 1)
            .await;
        let told = operators_writes(scene).len();
        // Each is tried again, and later each time. A try begins with what the attempt needs and may not be read.
        let tries = || -> Vec<_> {
            operators_writes(scene).iter().filter(|w| w.kind() == "create secrets").map(|w| w.at).collect()
        };
        eventually("more tries", async || tries().len() > 3 * taken.len()).await;
        let rounds: Vec<_> = tries()[1..].chunks(taken.len()).map(|round| round[0]).collect();
        let waits: Vec<_> = rounds.windows(2).map(|w| w[1].duration_since(w[0]).as_secs_f64()).collect();
        assert!(waits.last() > waits.first(), "they are tried again after {waits:?} seconds");
        let kinds: Vec<_> = operators_writes(scene)[told..].iter().map(|w| w.kind()).collect();
        assert!(!kinds.iter().any(|kind| kind.contains("rlhfjobs")), "{kinds:?}");
        let mut events = scene.told(NAME).await;
        events.retain(|event| event.reason == "Blocked");
        let told: Vec<_> = events.iter().map(|event| (event.about.clone().unwrap_or_default(), event.times)).collect();
        assert_eq!(told, ["reward", "sft"].map(|of| (attempt(&job, of, 1), 1)));

        for name in &taken {
            jobs.delete(name, &DeleteParams::background()).await.expect("it can be deleted");
        }
        let run = |j: &RLHFJob| {
            ["sft", "reward"]
                .iter()
                .all(|name| matches!(stage(j, name).phase, StagePhase::Running | StagePhase::Succeeded))
        };
        let job = scene.await_job(NAME, "both stages", run).await;
        assert_eq!(["sft", "reward"].map(|name| stage(&job, name).attempt), [1, 1]);
    });
}

#[test]
fn case_9_19_22_and_29_edits_and_deletions_do_no_harm() {
    on_the_cluster(async |scene| {
        let job = scene.apply(endless()).await;
        scene.await_step(&job, "sft", 3).await;
        // Case 19: somebody else writes to the object all the time.
        for round in 0..30 {
            scene.patch(NAME, json!({"metadata": {"annotations": {"round": round.to_string()}}})).await;
        }
        for (change, refused) in [
            (r#"{"spec": {"compute": {"nodes": 3}}}"#, "can change only while the job is suspended"),
            (r#"{"spec": {"model": {"source": "volume://models/other"}}}"#, "model cannot change once the job exists"),
        ] {
            let namespace = &scene.namespace;
            let answer =
                kubectl(&["patch", "rlhf", NAME, "--namespace", namespace, "--type=merge", "--patch", change]).await;
            assert!(!answer.ok && answer.errors.contains(refused), "{change}: {}", answer.errors);
        }

        let service = names::service(NAME, &uid(&job));
        let background = DeleteParams::background();
        let of_job = format!("{}={}", names::LABEL_JOB_UID, uid(&job));
        let configs = ListParams::default().labels(&of_job);
        let all = scene.api::<ConfigMap>().delete_collection(&background, &configs).await;
        all.expect("the config can be deleted");
        scene.api::<Service>().delete(&service, &background).await.expect("the Service can be deleted");
        scene.api::<Job>().delete(&attempt(&job, "sft", 1), &background).await.expect("the attempt can be deleted");
        let again = scene.await_attempt(NAME, "sft", 2).await;
        let sft = stage(&again, "sft");
        assert_eq!((sft.restarts.total, sft.disruptions), (0, 1));
        assert_eq!(sft.last_failure.map(|f| f.reason).as_deref(), Some("PodDeleted"));
        let leader = scene.operator.leader().await.expect("an operator leads").name_any();
        let log = kubectl(&["logs", &leader, "--namespace", &scene.operator.namespace]).await.good();
        let failed = log.lines().filter(|l| l.contains(&scene.namespace) && l.contains("a pass failed"));
        assert_eq!(failed.collect::<Vec<_>>(), Vec::<&str>::new());
        assert_eq!(
            scene.api::<ConfigMap>().list(&configs).await.expect("ConfigMaps").items.len(),
            1,
            "it is there again"
        );
        scene.api::<Service>().get(&service).await.expect("the Service is there again");
        let goes_on = async || scene.volume.steps(&job, "sft").iter().any(|s| s.attempt == 2);
        eventually("a step of the second attempt", goes_on).await;
        let resumed = scene.resumed_at(&job, "sft", 2).await;
        assert!(resumed >= 3, "the deleted attempt's last step was lost: resumed at {resumed}");

        let namespaces = Api::<Namespace>::all(scene.client.clone());
        namespaces.delete(&scene.namespace, &DeleteParams::default()).await.expect("the namespace can be deleted");
        scene.await_object(&namespaces, &scene.namespace, |n: Option<&Namespace>| n.is_none()).await;
        assert_eq!(again.uid(), job.uid());
    });
}

//! What people do to a job that runs.

use e2e::audit::{Write, operators_writes};
use e2e::manifest::{NAME, example, waits};
use e2e::tools::{kubectl, kubectl_with};
use e2e::{SYSTEM, change_definition, eventually, leader, on_the_cluster, operator_memory, stage};
use futures::{StreamExt, TryStreamExt, stream};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Pod, Service};
use kube::api::{DeleteParams, ListParams, PostParams, PropagationPolicy};
use kube::{Api, ResourceExt};
use rlhf_api::job::{RLHFJob, StagePhase};
use rlhf_api::names;
use serde_json::json;
use std::time::Duration;

#[test]
fn case_7_an_object_that_cannot_be_read_holds_up_no_other() {
    on_the_cluster(async |scene| {
        scene.leave_cores();
        // What the definition of a later version might let through.
        let values =
            "/spec/versions/0/schema/openAPIV3Schema/properties/spec/properties/strategy/properties/sharding/enum";
        change_definition(json!({"op": "add", "path": format!("{values}/0"), "value": "zero9"})).await;
        let mut unknown = waits("unknown");
        unknown.0["spec"]["strategy"] = json!({"sharding": "zero9"});
        let apply = ["apply", "--namespace", &scene.namespace, "--filename", "-"];
        let stored = async || kubectl_with(&apply, &unknown.0).await.ok;
        eventually("a definition that knows zero9", 30, stored).await;
        change_definition(json!({"op": "remove", "path": format!("{values}/0")})).await;

        let told = async || scene.told("unknown").await.iter().any(|event| event.reason == "Undecodable");
        eventually("an event about the job that cannot be read", 60, told).await;
        scene.apply(waits("known")).await;
        scene.await_stage("known", "prepare", StagePhase::Starting, 60).await;
        assert_eq!(scene.told("unknown").await.len(), 1, "it is told once");
        kubectl(&["delete", "rlhf", "unknown", "--namespace", &scene.namespace]).await.good();
    });
}

#[test]
fn case_41_pods_of_others_take_no_memory_of_the_operator() {
    const PODS: usize = 1000;
    const BYTES: usize = 16 << 10;
    on_the_cluster(async |scene| {
        let operator = leader(scene).await.expect("an operator leads");
        let before = operator_memory(&operator);
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
        let all = stream::iter((0..PODS).map(create)).buffer_unordered(16).try_collect::<()>().await;
        all.expect("the pods can be made");
        // What a watch brings comes within seconds.
        tokio::time::sleep(Duration::from_secs(5)).await;
        let growth = operator_memory(&operator).saturating_sub(before);
        assert!(growth < (PODS * BYTES / 4) as u64, "{growth} bytes more for {PODS} pods of {BYTES} bytes");
        pods.delete_collection(&DeleteParams::default().grace_period(0), &ListParams::default())
            .await
            .expect("they go");
    });
}

#[test]
fn case_28_a_job_of_the_same_name_takes_no_child_of_the_one_before() {
    on_the_cluster(async |scene| {
        scene.leave_cores();
        let first = scene.apply(waits(NAME)).await;
        scene.await_stage(NAME, "prepare", StagePhase::Starting, 60).await;
        let attempt = format!("{NAME}-prepare-1");
        let jobs = scene.api::<Job>();
        let made = async || jobs.get_opt(&attempt).await.is_ok_and(|job| job.is_some());
        eventually("the attempt", 60, made).await;
        let orphan = DeleteParams { propagation_policy: Some(PropagationPolicy::Orphan), ..DeleteParams::default() };
        scene.api::<RLHFJob>().delete(NAME, &orphan).await.expect("the job can be deleted");
        let gone = async || scene.api::<RLHFJob>().get_opt(NAME).await.is_ok_and(|job| job.is_none());
        eventually("the end of the job", 60, gone).await;

        let second = scene.apply(waits(NAME)).await;
        let blocked = |j: &RLHFJob| {
            let message = j.status.as_ref().and_then(|s| s.message.clone()).unwrap_or_default();
            message.contains("exists and belongs to somebody else")
        };
        scene.await_job(NAME, "word of the other's children", 60, blocked).await;
        let left = jobs.get(&attempt).await.expect("the orphan is left alone");
        assert!(left.owner_references().is_empty(), "nobody adopts it");
        assert_eq!(left.labels().get(names::LABEL_JOB_UID), first.uid().as_ref());

        let orphans = format!("{}={}", names::LABEL_JOB_UID, first.uid().expect("a stored job has a UID"));
        let kinds = "jobs,configmaps,networkpolicies";
        kubectl(&["delete", kinds, "--namespace", &scene.namespace, "--selector", &orphans]).await.good();
        let own = async || {
            let job = jobs.get_opt(&attempt).await.ok().flatten();
            job.is_some_and(|job| job.owner_references().iter().any(|o| Some(&o.uid) == second.uid().as_ref()))
        };
        eventually("a Job of the second job's own", 120, own).await;
    });
}

#[test]
fn case_30_two_stages_whose_names_are_taken_wait_quietly() {
    on_the_cluster(async |scene| {
        let services = scene.api::<Service>();
        let taken = ["sft", "reward"].map(|stage| format!("{NAME}-{stage}"));
        for name in &taken {
            let service = json!({"metadata": {"name": name}, "spec": {"ports": [{"port": 80}]}});
            let service = serde_json::from_value(service).expect("a Service");
            services.create(&PostParams::default(), &service).await.expect("the name is free");
        }
        let requests = json!({"cpu": "100m", "memory": "256Mi"});
        let side_by_side = example().only(&["sft", "reward"]).reward_from_base();
        scene.apply(side_by_side.set("/spec/compute/resources/requests", requests)).await;
        let named = |j: &RLHFJob| {
            let message = j.status.as_ref().and_then(|s| s.message.clone()).unwrap_or_default();
            taken.iter().all(|name| message.contains(&format!("Service {name} exists and belongs to somebody else")))
        };
        scene.await_job(NAME, "word of both Services", 90, named).await;
        let before = operators_writes(&scene.namespace).len();
        // By then each is tried twice more, after 5 seconds and after 10.
        tokio::time::sleep(Duration::from_secs(20)).await;
        let kinds: Vec<_> = operators_writes(&scene.namespace)[before..].iter().map(Write::kind).collect();
        let tries = kinds.iter().filter(|kind| *kind == "create secrets").count();
        assert!((2..=6).contains(&tries), "{kinds:?}");
        assert!(!kinds.iter().any(|kind| kind.contains("rlhfjobs")), "{kinds:?}");
        let mut events = scene.told(NAME).await;
        events.retain(|event| event.reason == "Blocked");
        let told: Vec<_> = events.iter().map(|event| (event.about.clone().unwrap_or_default(), event.times)).collect();
        assert_eq!(told, ["reward", "sft"].map(|stage| (format!("{NAME}-{stage}-1"), 1)));

        for name in &taken {
            services.delete(name, &DeleteParams::default()).await.expect("it can be deleted");
        }
        let run = |j: &RLHFJob| {
            ["sft", "reward"]
                .iter()
                .all(|name| matches!(stage(j, name).phase, StagePhase::Running | StagePhase::Succeeded))
        };
        let job = scene.await_job(NAME, "both stages", 120, run).await;
        assert_eq!(["sft", "reward"].map(|name| stage(&job, name).attempt), [1, 1]);
    });
}

#[test]
fn case_9_19_22_and_29_edits_and_deletions_do_no_harm() {
    on_the_cluster(async |scene| {
        let long =
            example().only(&["sft"]).stage("sft", "sft/epochs", json!(100)).stage("sft", "sft/maxSteps", json!(1000));
        let job = scene.apply(long).await;
        scene.await_step(&job, "sft", 3, 120).await;
        // Case 19: somebody else writes to the object all the time.
        for round in 0..30 {
            scene.patch(NAME, json!({"metadata": {"annotations": {"round": round.to_string()}}})).await;
        }
        for (change, field) in [
            (r#"{"spec": {"compute": {"nodes": 3}}}"#, "compute"),
            (r#"{"spec": {"failurePolicy": {"maxRestarts": 9}}}"#, "failurePolicy"),
            (r#"{"spec": {"activeDeadlineSeconds": 60}}"#, "activeDeadlineSeconds"),
            (r#"{"spec": {"model": {"source": "volume://models/other"}}}"#, "model"),
        ] {
            let namespace = &scene.namespace;
            let answer =
                kubectl(&["patch", "rlhf", NAME, "--namespace", namespace, "--type=merge", "--patch", change]).await;
            let refused = format!("{field} cannot change once the job exists");
            assert!(!answer.ok && answer.errors.contains(&refused), "{change}: {}", answer.errors);
        }

        let config = format!("{NAME}-sft");
        let background = DeleteParams::background();
        scene.api::<ConfigMap>().delete(&config, &background).await.expect("the config can be deleted");
        scene.api::<Service>().delete(&config, &background).await.expect("the Service can be deleted");
        scene.api::<Job>().delete(&format!("{NAME}-sft-1"), &background).await.expect("the attempt can be deleted");
        let again = scene
            .await_job(NAME, "a second attempt", 90, |j| {
                let sft = stage(j, "sft");
                (sft.attempt, sft.phase) == (2, StagePhase::Running)
            })
            .await;
        let sft = stage(&again, "sft");
        assert_eq!((sft.restarts.total, sft.disruptions), (0, 1));
        assert_eq!(sft.last_failure.map(|f| f.reason).as_deref(), Some("PodDeleted"));
        let leader = leader(scene).await.expect("an operator leads").name_any();
        let log = kubectl(&["logs", &leader, "--namespace", SYSTEM]).await.good();
        let failed = log.lines().filter(|l| l.contains(&scene.namespace) && l.contains("a pass failed"));
        assert_eq!(failed.collect::<Vec<_>>(), Vec::<&str>::new());
        scene.api::<ConfigMap>().get(&config).await.expect("the config is there again");
        scene.api::<Service>().get(&config).await.expect("the Service is there again");
        let goes_on = async || scene.volume.steps(&job, "sft").iter().any(|s| s.attempt == 2);
        eventually("a step of the second attempt", 60, goes_on).await;
        let resumed = scene.resumed_at(&job, "sft", 2).await;
        assert!(resumed >= 3, "the deleted attempt's last step was lost: resumed at {resumed}");

        let namespaces = Api::<Namespace>::all(scene.client.clone());
        namespaces.delete(&scene.namespace, &DeleteParams::default()).await.expect("the namespace can be deleted");
        scene.await_object(&namespaces, &scene.namespace, 120, |n: Option<&Namespace>| n.is_none()).await;
        assert_eq!(again.uid(), job.uid());
    });
}

//! The children of an attempt: in which order they are made, and what becomes of those that are there.

use super::*;

#[tokio::test]
async fn case_37_status_is_written_before_anything_is_made_and_the_job_last() {
    let (ctx, log) = server(vec![]);
    let (job, decision) = first();
    assert!(apply(&job, &decision, &ctx).await.unwrap());
    let seen = lines(&log);
    assert_eq!(seen[0], "PATCH rlhfjobs/demo/status");
    assert_eq!(seen.last().unwrap(), "POST jobs");
    assert_eq!(
        writes(&log),
        [
            "PATCH networkpolicies/demo-trainers-qz4zp",
            "PATCH rlhfjobs/demo/status",
            "POST configmaps",
            "POST events",
            "POST jobs"
        ]
    );
    let status = body(&log, "PATCH rlhfjobs/demo/status");
    let version = json!({"op": "replace", "path": "/metadata/resourceVersion", "value": "7"});
    assert_eq!(status[0], version, "a status decided from an old one must fail");
    assert_eq!((&status[1]["path"], &status[1]["value"]["prepare"]["attempt"]), (&json!("/status"), &json!(1)));
    assert_eq!(body(&log, "POST events")["reason"], Event::StageStarted.reason());
}

#[tokio::test]
async fn a_stage_gets_its_service_before_its_pods() {
    let (ctx, log) = server(vec![]);
    let job = started();
    let mut decision = two_stages(&job);
    decision.make.truncate(1);
    apply(&job, &decision, &ctx).await.unwrap();
    assert_eq!(
        writes(&log),
        [
            "PATCH networkpolicies/demo-trainers-qz4zp",
            "POST configmaps",
            "POST jobs",
            "POST podgroups",
            "POST secrets",
            "POST services"
        ]
    );
    assert_eq!(lines(&log).last().map(String::as_str), Some("POST jobs"));
    assert!(!lines(&log).iter().any(|l| l.starts_with("DELETE")), "a first attempt has none before it");
    assert!(!lines(&log).iter().any(|l| l.starts_with("GET secrets")), "no Secret is read");
}

#[tokio::test]
async fn a_later_attempt_takes_the_groups_of_earlier_ones_away() {
    let (ctx, log) = server(vec![]);
    let job = started();
    let second = build::Attempt { number: 2, ..tests::FIRST };
    let children = build::children(&job, Task::all(&job).nth(1).unwrap(), second, &tests::settings()).unwrap();
    let children = build::Children { first: false, ..children };
    let decision = Decision { make: vec![children], status: job.status.clone().unwrap(), ..Decision::default() };
    apply(&job, &decision, &ctx).await.unwrap();
    let seen = lines(&log);
    let groups: Vec<_> = seen.iter().filter(|l| l.contains("podgroups")).collect();
    assert_eq!(groups, ["DELETE podgroups", "GET podgroups/demo-tune-prgzn-2", "POST podgroups"]);
    let query = log.lock().unwrap().iter().find(|s| s.line == "DELETE podgroups").unwrap().query.clone();
    let selector = "rlhf.dev%2Fjob-uid%3D0123456789-abc%2Crlhf.dev%2Fstage%3Dtune%2Crlhf.dev%2Fattempt%21%3D2";
    assert!(query.contains(selector), "{query}");
}

#[tokio::test]
async fn what_is_there_before_a_stages_first_attempt_is_looked_at() {
    let (job, decision) = first();
    for (owner, foreign) in [("0123456789-abc", false), ("another", true)] {
        let there = json!({"metadata": {"name": "demo-prepare-mfgjn-1", "ownerReferences": [
            {"apiVersion": "rlhf.dev/v1alpha1", "kind": "RLHFJob", "name": "demo", "uid": owner, "controller": true}]}});
        let taken = failure("AlreadyExists", 409);
        let (ctx, log) = server(vec![("POST jobs", 409, taken), ("GET jobs/demo-prepare-mfgjn-1", 200, there)]);
        assert_eq!(apply(&job, &decision, &ctx).await.unwrap(), !foreign);
        assert_eq!(lines(&log)[lines(&log).len() - 2..], ["POST jobs", "GET jobs/demo-prepare-mfgjn-1"]);
    }
}

#[tokio::test]
async fn a_secret_that_is_there_is_the_jobs_own() {
    let (ctx, log) = server(vec![("POST secrets", 409, failure("AlreadyExists", 409))]);
    let job = started();
    assert!(apply(&job, &one_stage(&job), &ctx).await.unwrap());
    assert!(lines(&log).contains(&"POST jobs".to_owned()));
}

#[tokio::test]
async fn a_network_policy_of_other_settings_is_applied_and_one_of_the_same_is_not() {
    let job = started();
    let mut old = serde_json::to_value(one_stage(&job).make[0].network_policy.as_ref().unwrap()).unwrap();
    old["metadata"]["uid"] = json!("old");
    let same = old.clone();
    old["spec"]["ingress"] = json!([{}]);
    for (there, patched) in [(old, true), (same, false)] {
        let (ctx, log) = server(vec![("GET networkpolicies/demo-trainers-qz4zp", 200, there)]);
        apply(&job, &one_stage(&job), &ctx).await.unwrap();
        let patch = "PATCH networkpolicies/demo-trainers-qz4zp";
        assert_eq!(lines(&log).iter().any(|l| l == patch), patched);
        if patched {
            let query = log.lock().unwrap().iter().find(|s| s.line == patch).unwrap().query.clone();
            assert!(query.contains("force=true") && query.contains("fieldManager=rlhf-operator"), "applied: {query}");
            let patch = body(&log, patch);
            assert_eq!(patch["metadata"]["uid"], "old");
            assert_eq!(patch["spec"]["ingress"].as_array().map(Vec::len), Some(2));
        }
    }
}

#[tokio::test]
async fn children_are_touched_only_while_the_job_is_as_it_was_seen_and_no_pod_of_the_stage_runs() {
    let labels = |attempt: &str| json!({"rlhf.dev/attempt": attempt, "rlhf.dev/stage": "tune"});
    let pod = |attempt: &str, phase: &str| {
        json!({"metadata": {"name": "p", "labels": labels(attempt), "annotations": {crate::view::INDEX_KEY: "0"}},
            "status": {"phase": phase}})
    };
    let child = |attempt: &str, condition: &str| {
        let owner = json!({"apiVersion": "rlhf.dev/v1alpha1", "kind": "RLHFJob", "name": "demo", "uid": "0123456789-abc", "controller": true});
        json!({"metadata": {"name": "j", "uid": "u", "labels": labels(attempt), "ownerReferences": [owner]},
            "status": {"conditions": [{"type": condition, "status": "True"}]}})
    };
    let list = |items: Vec<Value>| json!({"metadata": {}, "items": items});
    let current = |version: &str| json!({"metadata": {"name": "demo", "resourceVersion": version}});
    for (name, version, jobs, pods, holds) in [
        ("nothing is there", "7", vec![], vec![], Ok(())),
        ("an earlier attempt has ended", "7", vec![child("0", "Failed")], vec![pod("0", "Failed")], Ok(())),
        ("a pod of an earlier attempt runs", "7", vec![], vec![pod("0", "Running")], Err("pod p")),
        ("an earlier attempt's Job can make pods", "7", vec![child("0", "FailureTarget")], vec![], Err("Job j")),
        ("this attempt was made before", "7", vec![], vec![pod("1", "Failed")], Err("pod p")),
        ("this attempt has its Job", "7", vec![child("1", "Complete")], vec![], Err("Job j")),
        ("the job has changed", "8", vec![], vec![], Err("")),
    ] {
        let (ctx, _) = server(vec![
            ("GET rlhfjobs/demo", 200, current(version)),
            ("GET jobs", 200, list(jobs)),
            ("GET pods", 200, list(pods)),
        ]);
        let job = started();
        let mut decision = two_stages(&job);
        assert_eq!(still_holds(&job, &decision, &ctx).await.unwrap(), holds != Err(""), "{name}");
        let blocked = leave_out_blocked(&job, &mut decision, &ctx).await.unwrap();
        let left: Vec<_> = decision.make.iter().map(|children| children.stage.as_str()).collect();
        match holds {
            Ok(()) | Err("") => {
                assert!(blocked.is_none() && left == ["tune", "judge"], "{name}: {blocked:?}, {left:?}")
            }
            Err(obstacle) => {
                let Some(Error::InTheWay { stage, what }) = blocked else { panic!("{name}: {blocked:?}") };
                assert!(stage == "tune" && what.starts_with(&format!("{obstacle} is in the way")), "{name}: {what}");
                assert_eq!(left, ["judge"], "{name}: another stage goes on");
            }
        }
    }
}

/// Writes of what all stages share, sorted.
fn shared(log: &Log) -> Vec<String> {
    let of =
        |line: &String| ["secrets", "networkpolicies", "configmaps", "services"].iter().any(|kind| line.contains(kind));
    writes(log).into_iter().filter(of).collect()
}

#[tokio::test]
async fn what_all_stages_share_is_written_once_and_made_again_where_it_is_gone() {
    let job = started();
    let first = |decision: Decision| {
        let make = decision.make.into_iter().map(|children| build::Children { first: true, ..children });
        Decision { make: make.collect(), ..decision }
    };
    let needed = one_stage(&job).make[0].needed().unwrap();
    let body = |kind: &str| needed.iter().find(|child| child.resource.plural == kind).unwrap();
    let config: &'static str = Box::leak(format!("GET configmaps/{}", body("configmaps").name).into_boxed_str());
    let there = [
        ("GET networkpolicies/demo-trainers-qz4zp", "networkpolicies"),
        (config, "configmaps"),
        ("GET services/demo-qz4zp", "services"),
    ];
    let there: Vec<_> = there.map(|(line, kind)| (line, 200, body(kind).body.clone())).into();

    let (ctx, log) = server(there);
    let once = ["POST configmaps", "POST secrets", "POST services"];
    apply(&job, &first(two_stages(&job)), &ctx).await.unwrap();
    assert_eq!(shared(&log), once, "of two stages, with a policy that is as it should be");
    log.lock().unwrap().clear();
    apply(&job, &one_stage(&job), &ctx).await.unwrap();
    assert_eq!(shared(&log), ["POST secrets"], "a later attempt looks, and may not look at a Secret");
    log.lock().unwrap().clear();
    ctx.known.forget("team", "demo");
    apply(&job, &first(one_stage(&job)), &ctx).await.unwrap();
    assert_eq!(shared(&log), once, "an operator that starts anew knows nothing");

    let (ctx, log) = server(vec![]);
    apply(&job, &first(one_stage(&job)), &ctx).await.unwrap();
    log.lock().unwrap().clear();
    apply(&job, &first(one_stage(&job)), &ctx).await.unwrap();
    let again = ["PATCH networkpolicies/demo-trainers-qz4zp", "POST configmaps", "POST services"];
    assert_eq!(shared(&log), again, "somebody has deleted it");
}

//! The Job of an attempt, its gang, and what all children have in common.

use super::*;

#[test]
fn a_job_with_a_queue_makes_suspended_jobs_that_carry_what_the_queue_reads_and_pods_that_do_not() {
    let mut job = job();
    let given = [("kueue.x-k8s.io/queue-name", "team-a"), ("kueue.x-k8s.io/priority-class", "low"), ("team", "a")];
    job.metadata.labels = Some(given.map(|(k, v)| (k.into(), v.into())).into());
    for index in 0..4 {
        let children = build(&job, index, 1);
        let labels = children.job.metadata.labels.clone().unwrap();
        assert_eq!(labels["kueue.x-k8s.io/queue-name"], "team-a");
        assert_eq!(labels["kueue.x-k8s.io/priority-class"], "low");
        assert!(!labels.contains_key("team"));
        let spec = children.job.spec.as_ref().unwrap();
        assert_eq!(spec.suspend, Some(true));
        let pods = spec.template.metadata.as_ref().unwrap().labels.as_ref().unwrap();
        assert!(pods.keys().all(|k| !k.starts_with("kueue.x-k8s.io/")), "{pods:?}");
    }
    job.metadata.labels = Some([("kueue.x-k8s.io/queue-name".into(), String::new())].into());
    assert_eq!(build(&job, 1, 1).job.spec.unwrap().suspend, Some(false), "an empty name is no queue");
}

#[test]
fn an_attempt_is_an_indexed_job_that_never_restarts_a_pod() {
    let children = build(&job(), 1, 3);
    let spec = children.job.spec.as_ref().unwrap();
    assert_eq!(children.job.metadata.name, Some(format!("{TUNE}-3")));
    assert_eq!((spec.completions, spec.parallelism, spec.backoff_limit), (Some(2), Some(2), Some(0)));
    assert_eq!(spec.completion_mode.as_deref(), Some("Indexed"));
    assert_eq!(spec.pod_replacement_policy.as_deref(), Some("Failed"));
    assert_eq!(spec.suspend, Some(false));
    assert_eq!(pod(&children).restart_policy.as_deref(), Some("Never"));
    assert_eq!(container(&children).args, Some(vec!["launch".to_owned()]));
}

#[test]
fn all_pods_of_an_attempt_are_one_gang_and_a_pod_alone_is_none() {
    for attempt in [1, 2] {
        let children = build(&job(), 1, attempt);
        let group = children.pod_group.as_ref().unwrap();
        let name = format!("{TUNE}-{attempt}");
        assert_eq!(group.metadata.name.as_ref(), Some(&name));
        assert_eq!(group.spec.scheduling_policy.gang.as_ref().unwrap().min_count, 2);
        assert!(group.spec.disruption_mode.as_ref().unwrap().all.is_some());
        assert_eq!(pod(&children).scheduling_group.unwrap().pod_group_name, Some(name));
    }
    let priority = with_compute(json!({"nodes": 2, "podTemplate": {"priorityClassName": "high"}}));
    assert_eq!(build(&priority, 1, 1).pod_group.unwrap().spec.priority_class_name.as_deref(), Some("high"));
    let off = Settings { gang_scheduling: false, ..settings() };
    let without = children(&job(), Task::all(&job()).nth(1).unwrap(), FIRST, &off).unwrap();
    for alone in [build(&job(), 0, 1), build(&with_compute(json!({"nodes": 1})), 1, 1), without] {
        assert!(alone.pod_group.is_none() && pod(&alone).scheduling_group.is_none());
    }
}

#[test]
fn every_child_is_owned_by_its_job_and_goes_with_it() {
    for (index, _) in Task::all(&job()).enumerate() {
        let c = build(&job(), index, 1);
        let policy = &c.network_policy.as_ref().unwrap().metadata;
        let optional = [
            c.service.as_ref().map(|s| &s.metadata),
            c.secret.as_ref().map(|s| &s.0.metadata),
            c.pod_group.as_ref().map(|g| &g.metadata),
        ];
        for meta in [policy, &c.config_map.metadata, &c.job.metadata].into_iter().chain(optional.into_iter().flatten())
        {
            let owners = meta.owner_references.as_ref().unwrap();
            assert_eq!(
                (owners.len(), owners[0].uid.as_str(), owners[0].kind.as_str()),
                (1, "0123456789-abc", "RLHFJob")
            );
            assert_eq!((owners[0].controller, owners[0].block_owner_deletion), (Some(true), Some(true)));
            assert_eq!(meta.namespace.as_deref(), Some("team"));
            assert_eq!(meta.labels.as_ref().unwrap()[names::LABEL_JOB_UID], "0123456789-abc");
        }
    }
}

#[test]
fn prepare_runs_once_on_cpu_without_a_service() {
    let job = with_compute(json!({"nodes": 4, "devicesPerNode": 8, "podTemplate": {"tolerations": [{"key": "gpu"}]}}));
    let children = build(&job, 0, 1);
    assert!(children.service.is_none());
    assert_eq!(container(&children).args, Some(vec!["prepare".to_owned()]));
    assert_eq!(children.job.spec.as_ref().unwrap().parallelism, Some(1));
    assert_eq!(container(&children).resources.unwrap().limits, None);
    assert_eq!(pod(&children).tolerations.unwrap().len(), 1);
}

#[test]
fn case_1_and_2_names_fit_for_the_longest_names_that_admission_lets_through() {
    let mut job = job();
    job.metadata.name = Some("j".repeat(63));
    job.spec.stages = vec![Stage { name: "s".repeat(40), ..job.spec.stages[0].clone() }];
    job.spec.compute.nodes = 1024;
    for index in 0..2 {
        let c = build(&job, index, 901);
        let name = c.job.metadata.name.unwrap();
        assert!(format!("{name}-1023").len() <= 63, "host name of {name}");
        assert!(c.config_map.metadata.name.unwrap().len() <= 63);
        let labels = c.job.metadata.labels.unwrap();
        assert!(labels.values().all(|v| v.len() <= 63), "{labels:?}");
    }
}

#[test]
fn stages_of_two_jobs_whose_names_look_alike_have_children_apart() {
    let named = |job_name: &str, uid: &str, stage: &str| {
        let mut job = job();
        (job.metadata.name, job.metadata.uid) = (Some(job_name.into()), Some(uid.into()));
        job.spec.stages = vec![Stage { name: stage.into(), ..job.spec.stages[0].clone() }];
        let c = build(&job, 1, 1);
        [c.job.metadata.name, c.config_map.metadata.name, c.service.unwrap().metadata.name].map(Option::unwrap)
    };
    let (one, other) = (named("demo", "a", "x-sft"), named("demo-x", "b", "sft"));
    assert!(one.iter().all(|name| !other.contains(name)), "{one:?} {other:?}");
}

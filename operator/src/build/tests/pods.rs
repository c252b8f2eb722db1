//! The pods of an attempt.

use super::*;

#[test]
fn pods_meet_the_restricted_standard() {
    for index in 0..4 {
        let children = build(&job(), index, 1);
        let spec = pod(&children);
        let security = spec.security_context.clone().unwrap();
        assert_eq!(security.run_as_non_root, Some(true));
        assert_eq!(
            (security.run_as_user, security.run_as_group, security.fs_group),
            (Some(65532), Some(65532), Some(65532))
        );
        assert_eq!(security.seccomp_profile.unwrap().type_, "RuntimeDefault");
        assert_eq!((spec.automount_service_account_token, spec.enable_service_links), (Some(false), Some(false)));
        let own = container(&children).security_context.unwrap();
        assert_eq!((own.allow_privilege_escalation, own.read_only_root_filesystem), (Some(false), Some(true)));
        assert_eq!(own.capabilities.unwrap().drop, Some(vec!["ALL".to_owned()]));
        assert!(spec.volumes.unwrap().iter().all(|v| v.host_path.is_none()));
    }
}

#[test]
fn volumes_are_the_claim_the_config_and_two_scratch_folders() {
    let children = build(&job(), 1, 1);
    let mounts: BTreeMap<_, _> =
        container(&children).volume_mounts.unwrap().into_iter().map(|m| (m.mount_path, m.name)).collect();
    let paths: Vec<_> = mounts.keys().map(String::as_str).collect();
    assert_eq!(paths, ["/data", "/dev/shm", "/etc/rlhf", "/tmp"]);
    let volumes: BTreeMap<_, _> = pod(&children).volumes.unwrap().into_iter().map(|v| (v.name.clone(), v)).collect();
    assert_eq!(volumes[&mounts["/data"]].persistent_volume_claim.as_ref().unwrap().claim_name, "claim");
    let config = volumes[&mounts["/etc/rlhf"]].config_map.as_ref().unwrap();
    assert_eq!(config.name, children.config_map.metadata.name.clone().unwrap());
    let entries: Vec<_> = config.items.iter().flatten().map(|i| (i.key.as_str(), i.path.as_str())).collect();
    assert_eq!(entries, [("tune.json", "config.json")], "a pod sees its own config");
    assert_eq!(volumes[&mounts["/dev/shm"]].empty_dir.as_ref().unwrap().medium.as_deref(), Some("Memory"));
}

#[test]
fn the_environment_leads_every_rank_to_rank_0_of_its_own_attempt() {
    let children = build(&job(), 1, 2);
    assert_eq!(
        env_value(&children, env::MASTER_ADDR).as_deref(),
        Some(format!("{TUNE}-2-0.{}.team.svc", service_name()).as_str())
    );
    assert_eq!(env_value(&children, env::MASTER_PORT).as_deref(), Some("29500"));
    assert_eq!(env_value(&children, env::NNODES).as_deref(), Some("2"));
    assert_eq!(env_value(&children, env::NPROC_PER_NODE).as_deref(), Some("2"));
    assert_eq!(env_value(&children, env::ATTEMPT).as_deref(), Some("2"));
    let strategy = r#"{"sharding":"zero3","offload":"none","recompute":"block","precision":"bf16"}"#;
    assert_eq!(
        serde_json::from_str::<Value>(&env_value(&children, env::STRATEGY).unwrap()).unwrap(),
        serde_json::from_str::<Value>(strategy).unwrap()
    );
    assert_eq!(env_value(&children, env::VOLUME).as_deref(), Some("/data"));
    assert_eq!(env_value(&children, env::LOG_FORMAT).as_deref(), Some("json"));
    let rank = container(&children).env.unwrap().into_iter().find(|e| e.name == env::NODE_RANK).unwrap();
    let path = rank.value_from.unwrap().field_ref.unwrap().field_path;
    assert_eq!(path, format!("metadata.annotations['{INDEX_KEY}']"));
    assert_eq!(pod(&children).subdomain, Some(service_name()));
    let set: Vec<_> = container(&children).env.unwrap().into_iter().map(|e| e.name).collect();
    assert_eq!(set.len(), env::RESERVED.len(), "each of the contract's variables, once: {set:?}");
}

#[test]
fn devices_are_added_to_requests_and_limits() {
    let job = with_compute(
        json!({"devicesPerNode": 4, "deviceResource": "example.com/npu", "resources": {"requests": {"cpu": "3"}}}),
    );
    let children = build(&job, 1, 1);
    let resources = container(&children).resources.unwrap();
    let requests = resources.requests.unwrap();
    assert_eq!((requests["cpu"].0.as_str(), requests["example.com/npu"].0.as_str()), ("3", "4"));
    assert_eq!(resources.limits.unwrap()["example.com/npu"].0, "4");
    assert_eq!(env_value(&children, env::NPROC_PER_NODE).as_deref(), Some("4"));
    let ports: Vec<_> =
        container(&children).ports.unwrap().into_iter().map(|p| (p.name.unwrap(), p.container_port)).collect();
    assert_eq!(ports[0], ("metrics".to_owned(), 9400));
    assert_eq!(ports[3], ("metrics-3".to_owned(), 9403));
}

#[test]
fn a_pod_template_is_merged_but_cannot_take_the_operators_own_fields() {
    let job = with_compute(json!({"podTemplate": {
        "labels": {"team": "a", "rlhf.dev/job": "other", "app.kubernetes.io/managed-by": "me"},
        "annotations": {"note": "x"},
        "nodeSelector": {"zone": "z"},
        "tolerations": [{"key": "gpu", "operator": "Exists"}],
        "priorityClassName": "high", "runtimeClassName": "nvidia",
        "env": [{"name": "NCCL_DEBUG", "value": "INFO"}, {"name": "MASTER_ADDR", "value": "elsewhere"}],
    }}));
    let children = build(&job, 1, 1);
    let meta = children.job.spec.as_ref().unwrap().template.metadata.clone().unwrap();
    let labels = meta.labels.unwrap();
    assert_eq!((labels["team"].as_str(), labels[names::LABEL_JOB].as_str()), ("a", "demo"));
    assert_eq!(labels[names::LABEL_MANAGED_BY], names::FIELD_MANAGER);
    assert_eq!(meta.annotations.unwrap()["note"], "x");
    let spec = pod(&children);
    assert_eq!(spec.node_selector.unwrap()["zone"], "z");
    assert_eq!(
        (spec.priority_class_name.as_deref(), spec.runtime_class_name.as_deref()),
        (Some("high"), Some("nvidia"))
    );
    assert_eq!(env_value(&children, "NCCL_DEBUG").as_deref(), Some("INFO"));
    assert_eq!(env_value(&children, env::MASTER_ADDR), Some(format!("{TUNE}-1-0.{}.team.svc", service_name())));
    let (labels, annotations) = (children.job.metadata.labels.unwrap(), children.job.metadata.annotations.unwrap());
    assert_eq!((labels["team"].as_str(), annotations["note"].as_str()), ("a", "x"));
}

#[test]
fn a_pod_template_reaches_the_pod() {
    let all = Allowances { service_accounts: true, volumes: true, ipc_lock: true };
    let job = with_compute(json!({"nodes": 2, "gracePeriodSeconds": 900, "podTemplate": {
        "schedulerName": "volcano", "serviceAccountName": "trainer", "ipcLock": true,
        "imagePullSecrets": [{"name": "own"}], "resourceClaims": [{"name": "imex", "resourceClaimName": "imex"}],
        "affinity": {"nodeAffinity": {}}, "topologySpreadConstraints": [{"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule"}],
        "securityContext": {"runAsUser": 1000, "supplementalGroups": [7]},
        "volumes": [{"name": "scratch", "emptyDir": {}}], "volumeMounts": [{"name": "scratch", "mountPath": "/scratch"}]}}));
    let settings = Settings { allow: all, image_pull_secrets: vec!["chart".into()], ..settings() };
    let children = children(&job, Task::all(&job).nth(1).unwrap(), FIRST, &settings).unwrap();
    let (pod, container) = (pod(&children), container(&children));
    assert_eq!(
        (pod.scheduler_name.as_deref(), pod.service_account_name.as_deref()),
        (Some("volcano"), Some("trainer"))
    );
    assert_eq!((pod.automount_service_account_token, pod.termination_grace_period_seconds), (Some(false), Some(900)));
    let secrets: Vec<_> = pod.image_pull_secrets.unwrap().into_iter().map(|s| s.name).collect();
    assert_eq!(secrets, ["chart", "own"]);
    assert_eq!(container.resources.unwrap().claims.unwrap()[0].name, pod.resource_claims.unwrap()[0].name);
    let affinity = pod.affinity.unwrap();
    assert!(affinity.node_affinity.is_some() && affinity.pod_anti_affinity.is_some(), "a gang's own is added");
    assert_eq!(pod.topology_spread_constraints.unwrap().len(), 1);
    let user = pod.security_context.unwrap();
    assert_eq!(
        (user.run_as_user, user.run_as_group, user.supplemental_groups),
        (Some(1000), Some(65532), Some(vec![7]))
    );
    assert!(pod.volumes.unwrap().iter().any(|v| v.name == "scratch"));
    assert!(container.volume_mounts.unwrap().iter().any(|m| m.mount_path == "/scratch"));
    assert_eq!(container.security_context.unwrap().capabilities.unwrap().add, Some(vec!["IPC_LOCK".to_owned()]));
}

#[test]
fn where_the_cluster_gives_users_pods_name_none() {
    let settings = Settings { omit_user_ids: true, ..settings() };
    let children = children(&job(), Task::all(&job()).nth(1).unwrap(), FIRST, &settings).unwrap();
    let user = pod(&children).security_context.unwrap();
    assert_eq!((user.run_as_user, user.run_as_group, user.fs_group), (None, None, None));
    assert_eq!(user.run_as_non_root, Some(true));
}

#[test]
fn a_job_that_runs_keeps_the_image_that_it_started_with() {
    let mut job = job();
    let images = rlhf_api::job::Images { trainer: "docker.io/rlhf/trainer@sha256:0".into() };
    job.status = Some(rlhf_api::job::RLHFJobStatus { images: Some(images), ..Default::default() });
    assert_eq!(container(&build(&job, 1, 1)).image.as_deref(), Some("docker.io/rlhf/trainer@sha256:0"));
}

#[test]
fn kubelets_ask_trainers_whether_they_live() {
    let container = container(&build(&job(), 1, 1));
    for probe in [container.startup_probe.unwrap(), container.liveness_probe.unwrap()] {
        assert_eq!(probe.http_get.unwrap().path.as_deref(), Some("/healthz"));
    }
}

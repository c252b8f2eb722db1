//! Pure builders: from a job's spec to the objects of one attempt.
//!
//! Nothing here reads, writes or knows the time. Every object carries the labels by which it is found again and
//! an owner reference by which it is deleted with its job. Names come from [`rlhf_api::names`].

mod allowances;
mod child;
mod config;
mod job;
mod network_policy;
mod pod;
mod pod_group;
mod prepare;
mod secret;
mod service;

pub use allowances::Allowances;
pub use child::{Child, Upgrade};
pub use config::SpecError;
pub use config::check;
pub(crate) use config::existing_models;
pub use network_policy::{Egress, NetworkRules};
pub use secret::KeySecret;

use crate::keys::ProgressKeys;
use allowances::allowed;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{ConfigMap, Service};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::scheduling::v1beta1::PodGroup;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use kube::{Resource, ResourceExt};
use rlhf_api::job::{Compute, PodTemplate, RLHFJob, Stage};
use rlhf_api::names;
use rlhf_api::stage::Strategy;
use std::collections::BTreeMap;

/// What the operator's flags say about trainer pods.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The image of prepare and trainer pods.
    pub trainer_image: String,
    /// Its pull policy.
    pub trainer_image_pull_policy: String,
    /// `text` or `json`: how trainers log.
    pub log_format: String,
    /// Guard the progress of trainers.
    pub keys: ProgressKeys,
    /// Who reaches trainer pods and whom they reach; `None` leaves it to the cluster.
    pub network: Option<NetworkRules>,
    /// Whether the scheduler gives nodes to all pods of a stage or to none.
    pub gang_scheduling: bool,
    /// What a job's pod template may have.
    pub allow: Allowances,
    /// Whether pods name no users and groups, which the cluster gives them then, as OpenShift does.
    pub omit_user_ids: bool,
    /// Secrets by which every trainer's image is pulled, in each job's own namespace.
    pub image_pull_secrets: Vec<String>,
}

/// What an attempt runs: the check of model and data, or a stage.
#[derive(Clone, Copy, Debug)]
pub enum Task<'a> {
    /// `rlhf-trainer prepare`.
    Prepare,
    /// `rlhf-trainer launch`.
    Stage(&'a Stage),
}

impl<'a> Task<'a> {
    /// Everything that a job runs, prepare first, then the stages in the spec's order.
    pub fn all(job: &'a RLHFJob) -> impl Iterator<Item = Task<'a>> {
        std::iter::once(Task::Prepare).chain(job.spec.stages.iter().map(Task::Stage))
    }

    /// The stage's name, or [`names::PREPARE`].
    pub fn name(self) -> &'a str {
        match self {
            Task::Prepare => names::PREPARE,
            Task::Stage(stage) => &stage.name,
        }
    }

    /// Where it runs.
    fn compute(self, job: &RLHFJob) -> Compute {
        match self {
            Task::Prepare => prepare::compute(job),
            Task::Stage(stage) => job.compute(stage),
        }
    }
}

/// Which attempt at a task it is, and what differs by that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attempt {
    /// From 1.
    pub number: u32,
    /// How a stage's ranks place models.
    pub strategy: Strategy,
}

/// The objects of one attempt, in the order in which they are made.
#[derive(Clone, Debug)]
pub struct Children {
    /// The stage (or prepare) to which they belong.
    pub stage: String,
    /// Whether none of the stage was made before, as the status has it that was looked at: attempts are counted there first.
    pub first: bool,
    /// The rules for the network of the job's pods, the same for all of its stages.
    pub network_policy: Option<NetworkPolicy>,
    /// The key to the progress of the job's trainers, the same for all of its stages.
    pub secret: Option<KeySecret>,
    /// The configs, the same for all of the job's stages.
    pub config_map: ConfigMap,
    /// The names of first pods in DNS, the same for all of the job's stages. Before the Job, so that it is there when pods look.
    pub service: Option<Service>,
    /// What makes a gang of the attempt's pods. Before the Job, since pods wait for it.
    pub pod_group: Option<PodGroup>,
    /// The attempt.
    pub job: Job,
}

/// Builds the objects of an attempt.
///
/// # Errors
/// The spec says what admission should have refused.
pub fn children(job: &RLHFJob, task: Task<'_>, attempt: Attempt, settings: &Settings) -> Result<Children, SpecError> {
    let service = matches!(task, Task::Stage(_)).then(|| service::build(job));
    let config_map = config::build(job)?;
    Ok(Children {
        stage: task.name().to_owned(),
        first: never_made(job, task),
        network_policy: settings.network.as_ref().map(|rules| network_policy::build(job, rules)),
        secret: matches!(task, Task::Stage(_)).then(|| secret::build(job, &settings.keys)),
        service,
        pod_group: pod_group::build(job, task, attempt, settings),
        job: job::build(job, task, attempt, &config_map.name_any(), settings),
        config_map,
    })
}

fn never_made(job: &RLHFJob, task: Task<'_>) -> bool {
    job.status.as_ref().and_then(|s| s.slot(task.name())).is_none_or(|slot| slot.attempt == 0)
}

/// Labels that all of a stage's objects carry, and by which its pods are selected.
fn labels(job: &RLHFJob, task: Task<'_>) -> BTreeMap<String, String> {
    let mut labels = job_labels(job);
    labels.insert(names::LABEL_STAGE.to_owned(), task.name().to_owned());
    labels
}

/// Labels that an attempt's own objects carry.
fn attempt_labels(job: &RLHFJob, task: Task<'_>, attempt: Attempt) -> BTreeMap<String, String> {
    let mut labels = labels(job, task);
    labels.insert(names::LABEL_ATTEMPT.to_owned(), attempt.number.to_string());
    labels
}

/// Labels that all of a job's objects carry, and by which all of its pods are selected.
fn job_labels(job: &RLHFJob) -> BTreeMap<String, String> {
    [
        (names::LABEL_MANAGED_BY, names::FIELD_MANAGER.to_owned()),
        (names::LABEL_JOB, job.name_any()),
        (names::LABEL_JOB_UID, job.uid().unwrap_or_default()),
    ]
    .map(|(k, v)| (k.to_owned(), v))
    .into()
}

/// What a pod template says of labels, in so far as they are not the operator's own.
fn user_labels(template: &PodTemplate) -> BTreeMap<String, String> {
    let own = |key: &str| key.starts_with(names::LABEL_PREFIX) || key == names::LABEL_MANAGED_BY;
    template.labels.iter().filter(|(k, _)| !own(k)).map(|(k, v)| (k.clone(), v.clone())).collect()
}

fn attempt_name(job: &RLHFJob, task: Task<'_>, attempt: u32) -> String {
    names::attempt(&job.name_any(), &job.uid().unwrap_or_default(), task.name(), attempt)
}

fn metadata(job: &RLHFJob, name: String, labels: BTreeMap<String, String>) -> ObjectMeta {
    ObjectMeta {
        name: Some(name),
        namespace: job.namespace(),
        labels: Some(labels),
        owner_references: owner(job).map(|o| vec![o]),
        ..Default::default()
    }
}

fn owner(job: &RLHFJob) -> Option<OwnerReference> {
    Some(OwnerReference { block_owner_deletion: Some(true), ..job.controller_owner_ref(&())? })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::view::INDEX_KEY;
    use k8s_openapi::api::core::v1::{Container, PodSpec};
    use rlhf_api::config::{PrepareConfig, StageConfig, env};
    use rlhf_api::job::RLHFJob;
    use rlhf_api::stage::{Offload, Precision, Recompute, Sharding};
    use serde_json::{Value, json};

    pub(crate) const FIRST: Attempt = Attempt { number: 1, strategy: STRATEGY };
    const STRATEGY: Strategy = Strategy {
        sharding: Sharding::Zero3,
        offload: Offload::None,
        recompute: Recompute::Block,
        precision: Precision::Bf16,
    };

    pub(crate) fn settings() -> Settings {
        Settings {
            trainer_image: "docker.io/rlhf/trainer:test".into(),
            trainer_image_pull_policy: "IfNotPresent".into(),
            log_format: "json".into(),
            keys: ProgressKeys::new([7; 32]),
            network: Some(rules("All")),
            gang_scheduling: true,
            allow: Allowances::default(),
            omit_user_ids: false,
            image_pull_secrets: vec![],
        }
    }

    pub(crate) fn rules(egress: &str) -> NetworkRules {
        serde_json::from_value(json!({
            "operator": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "sys"}},
                          "podSelector": {"matchLabels": {"app.kubernetes.io/name": "rlhf-operator"}}}],
            "prometheus": [{"namespaceSelector": {}, "podSelector": {"matchLabels": {"app.kubernetes.io/name": "prometheus"}}}],
            "egress": egress,
        }))
        .unwrap()
    }

    /// SFT, a reward model from the base model, and PPO of both. Names differ from every label's and kind's own.
    pub(crate) fn job() -> RLHFJob {
        let optimizer = json!({"learningRate": 1e-4});
        let batch = json!({"globalSize": 8});
        let supervised = json!({"dataset": {"source": "volume://data/d.jsonl"}, "epochs": 1, "batch": batch, "maxLength": 64, "optimizer": optimizer});
        serde_json::from_value(json!({
            "apiVersion": "rlhf.dev/v1alpha1", "kind": "RLHFJob",
            "metadata": {"name": "demo", "namespace": "team", "uid": "0123456789-abc", "generation": 1, "resourceVersion": "7"},
            "spec": {
                "model": {"source": "volume://models/base"},
                "storage": {"volumeClaim": {"claimName": "claim"}},
                "compute": {"nodes": 2, "cpuWorkersPerNode": 2},
                "stages": [
                    {"name": "tune", "sft": supervised},
                    {"name": "judge", "rewardModel": supervised},
                    {"name": "act", "seed": 7, "ppo": {
                        "start": {"stage": "tune"}, "rewards": [{"name": "liked", "model": {"stage": "judge"}}], "prompts": {"source": "volume://data/p.jsonl"},
                        "iterations": 2, "rolloutBatchSize": 8, "batch": batch, "maxPromptLength": 8, "maxNewTokens": 8,
                        "kl": {"coefficient": 0.1}, "actorOptimizer": optimizer, "criticOptimizer": optimizer}},
                ],
            },
        }))
        .unwrap()
    }

    fn service_name() -> String {
        names::service("demo", "0123456789-abc")
    }

    /// The name of what belongs to the stage `tune`.
    const TUNE: &str = "demo-tune-prgzn";

    fn with_compute(compute: Value) -> RLHFJob {
        let mut job = job();
        job.spec.compute = serde_json::from_value(compute).unwrap();
        job
    }

    fn build(job: &RLHFJob, index: usize, attempt: u32) -> Children {
        children(job, Task::all(job).nth(index).unwrap(), Attempt { number: attempt, strategy: STRATEGY }, &settings())
            .unwrap()
    }

    fn pod(children: &Children) -> PodSpec {
        children.job.spec.clone().unwrap().template.spec.unwrap()
    }

    fn container(children: &Children) -> Container {
        pod(children).containers[0].clone()
    }

    fn env_value(children: &Children, name: &str) -> Option<String> {
        container(children).env.unwrap().into_iter().find(|e| e.name == name)?.value
    }

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
            for meta in
                [policy, &c.config_map.metadata, &c.job.metadata].into_iter().chain(optional.into_iter().flatten())
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
        let volumes: BTreeMap<_, _> =
            pod(&children).volumes.unwrap().into_iter().map(|v| (v.name.clone(), v)).collect();
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
    fn the_key_to_the_progress_is_in_the_jobs_secret_and_nowhere_else() {
        let children = build(&job(), 1, 2);
        let secret = children.secret.clone().unwrap().0;
        let key = settings().keys.of("0123456789-abc");
        assert_eq!((secret.immutable, &secret.data.unwrap()["key"].0), (Some(true), &key.clone().into_bytes()));
        let reference = container(&children).env.unwrap().into_iter().find(|e| e.name == env::PROGRESS_KEY).unwrap();
        let reference = reference.value_from.unwrap().secret_key_ref.unwrap();
        assert_eq!((Some(reference.name), reference.key.as_str()), (secret.metadata.name.clone(), "key"));
        assert_eq!(reference.optional, None, "a pod without the key does not start");
        assert!(build(&job(), 0, 1).secret.is_none(), "prepare tells of no progress");
        let Children { network_policy, config_map, service, job: made, .. } = &children;
        let rest = serde_json::to_string(&(network_policy, config_map, service, made)).unwrap();
        assert!(!rest.contains(&key) && !format!("{children:?}{:?}", settings()).contains(&key));
        let mut other = job();
        other.metadata.uid = Some("another".into());
        assert_ne!(build(&other, 1, 1).secret.unwrap().0.metadata.name, secret.metadata.name);
    }

    fn policy(job: &RLHFJob, rules: NetworkRules) -> Value {
        let settings = Settings { network: Some(rules), ..settings() };
        let children = children(job, Task::all(job).nth(1).unwrap(), FIRST, &settings).unwrap();
        serde_json::to_value(children.network_policy.unwrap().spec.unwrap()).unwrap()
    }

    #[test]
    fn case_46_the_network_lets_in_the_gang_everywhere_and_readers_at_the_workers_ports() {
        let own = json!({"matchLabels": {"app.kubernetes.io/managed-by": "rlhf-operator", "rlhf.dev/job": "demo", "rlhf.dev/job-uid": "0123456789-abc"}});
        let spec = policy(&job(), rules("All"));
        assert_eq!((&spec["podSelector"], &spec["policyTypes"]), (&own, &json!(["Ingress", "Egress"])));
        assert_eq!(spec["ingress"][0], json!({"from": [{"podSelector": own}]}));
        assert_eq!(spec["ingress"][1]["ports"], json!([{"protocol": "TCP", "port": 9400, "endPort": 9401}]));
        let readers = spec["ingress"][1]["from"].as_array().unwrap();
        let names = readers.iter().map(|r| &r["podSelector"]["matchLabels"]["app.kubernetes.io/name"]);
        assert_eq!(names.collect::<Vec<_>>(), ["rlhf-operator", "prometheus"]);
        assert_eq!(spec["ingress"].as_array().unwrap().len(), 2);
        assert_eq!(spec["egress"], json!([{}]), "to everybody, also where another policy denies all");
        for index in 0..4 {
            let labels = build(&job(), index, 3).job.spec.unwrap().template.metadata.unwrap().labels.unwrap();
            let wanted: BTreeMap<String, String> = serde_json::from_value(own["matchLabels"].clone()).unwrap();
            assert!(wanted.iter().all(|(k, v)| labels.get(k) == Some(v)), "{labels:?}");
        }
    }

    #[test]
    fn a_restricted_network_lets_out_to_the_gang_and_to_dns_and_without_readers_nobody_reads() {
        let spec = policy(&job(), NetworkRules { operator: vec![], prometheus: vec![], ..rules("Restricted") });
        assert_eq!(spec["policyTypes"], json!(["Ingress", "Egress"]));
        assert_eq!(spec["egress"][0]["to"][0]["podSelector"], spec["podSelector"]);
        let dns = [53, 5353].map(|port| ["UDP", "TCP"].map(|protocol| json!({"protocol": protocol, "port": port})));
        assert_eq!(spec["egress"][1], json!({"ports": dns.concat()}));
        assert_eq!((spec["egress"].as_array().unwrap().len(), spec["ingress"].as_array().unwrap().len()), (2, 1));
        let without = Settings { network: None, ..settings() };
        assert!(children(&job(), Task::Prepare, FIRST, &without).unwrap().network_policy.is_none());
    }

    #[test]
    fn the_service_names_this_jobs_first_pod_before_it_is_ready() {
        let service = build(&job(), 1, 1).service.unwrap();
        let spec = service.spec.unwrap();
        assert_eq!(service.metadata.name, Some(service_name()));
        assert_eq!(build(&job(), 2, 1).service.unwrap().metadata.name, Some(service_name()), "one for all stages");
        assert_eq!((spec.cluster_ip.as_deref(), spec.publish_not_ready_addresses), (Some("None"), Some(true)));
        assert_eq!(spec.ports.unwrap()[0].port, 29500);
        let mut selector = spec.selector.unwrap();
        assert_eq!(selector.remove(INDEX_KEY).as_deref(), Some("0"));
        for (stage, attempt) in [(1, 5), (3, 1)] {
            let pod = build(&job(), stage, attempt).job.spec.unwrap().template;
            let labels = pod.metadata.unwrap().labels.unwrap();
            assert!(selector.iter().all(|(k, v)| labels.get(k) == Some(v)), "{selector:?}");
            assert_eq!(pod.spec.unwrap().subdomain, Some(service_name()));
        }
        assert_eq!(selector[names::LABEL_JOB_UID], "0123456789-abc");
        let of_some = |label| selector.contains_key(label);
        assert!(
            !of_some(names::LABEL_ATTEMPT) && !of_some(names::LABEL_STAGE),
            "one serves every attempt at all stages"
        );
    }

    #[test]
    fn prepare_runs_once_on_cpu_without_a_service() {
        let job =
            with_compute(json!({"nodes": 4, "devicesPerNode": 8, "podTemplate": {"tolerations": [{"key": "gpu"}]}}));
        let children = build(&job, 0, 1);
        assert!(children.service.is_none());
        assert_eq!(container(&children).args, Some(vec!["prepare".to_owned()]));
        assert_eq!(children.job.spec.as_ref().unwrap().parallelism, Some(1));
        assert_eq!(container(&children).resources.unwrap().limits, None);
        assert_eq!(pod(&children).tolerations.unwrap().len(), 1);
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
    fn configs_say_where_each_stage_starts_and_writes() {
        let config = |index| -> StageConfig {
            let job = job();
            let data = build(&job, index, 1).config_map.data.unwrap();
            serde_json::from_str(&data[&config::entry(Task::all(&job).nth(index).unwrap())]).unwrap()
        };
        let (tune, judge, act) = (config(1), config(2), config(3));
        assert_eq!(tune.paths.start_model, "models/base");
        assert_eq!(tune.paths.output, "jobs/demo-01234567/tune/model");
        assert_eq!(judge.paths.start_model, "models/base");
        assert_eq!(act.paths.start_model, tune.paths.output);
        assert_eq!(act.paths.reward_models, [("liked".to_owned(), judge.paths.output.clone())].into());
        assert_eq!(act.paths.critic_model, Some(judge.paths.output));
        assert_eq!(act.paths.reference_model, Some(tune.paths.output.clone()));
        assert_eq!(act.paths.base_model, "models/base");
        assert_eq!(act.paths.checkpoints, "jobs/demo-01234567/act/checkpoints");
        assert_eq!((tune.seed, act.seed), (42, 7));
        assert_eq!(act.job.namespace, "team");
    }

    #[test]
    fn prepare_is_told_every_stage_in_order() {
        let children = build(&job(), 0, 1);
        assert_eq!(children.config_map.immutable, Some(true));
        let config: PrepareConfig = serde_json::from_str(&children.config_map.data.unwrap()["prepare.json"]).unwrap();
        assert_eq!(config.stages.iter().map(|s| s.stage.as_str()).collect::<Vec<_>>(), ["tune", "judge", "act"]);
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
        assert_eq!(
            (pod.automount_service_account_token, pod.termination_grace_period_seconds),
            (Some(false), Some(900))
        );
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

    #[test]
    fn another_config_has_another_name() {
        let mut changed = job();
        changed.spec.stages[0].checkpoint.every_steps += 1;
        let name = |job: &RLHFJob| build(job, 1, 1).config_map.metadata.name;
        assert_ne!(name(&job()), name(&changed));
        assert_eq!(name(&job()), name(&job()));
    }

    #[test]
    fn what_the_chart_has_to_allow_is_refused_by_the_switchs_name() {
        let account = with_compute(json!({"podTemplate": {"serviceAccountName": "trainer"}}));
        let message = check(&account, &settings()).unwrap_err().to_string();
        assert!(
            message.contains("serviceAccountName") && message.contains("trainer.allow.serviceAccountName"),
            "{message}"
        );
        let volumes =
            with_compute(json!({"podTemplate": {"volumes": [{"name": "x", "emptyDir": {}}], "ipcLock": true}}));
        let all = Allowances { service_accounts: true, volumes: true, ipc_lock: true };
        for job in [account, volumes] {
            assert!(check(&job, &settings()).is_err());
            assert!(check(&job, &Settings { allow: all, ..settings() }).is_ok());
        }
    }

    #[test]
    fn references_that_do_not_fit_are_errors_that_name_the_field() {
        let mut later = job();
        later.spec.stages.swap(0, 2);
        let message = check(&later, &settings()).unwrap_err().to_string();
        assert!(message.starts_with("spec.stages[act].ppo.start must be a policy"), "{message}");
        let mut dropout = job();
        let lora = serde_json::from_value(json!({"dropout": 0.1})).unwrap();
        dropout.spec.stages[2].ppo.as_mut().unwrap().lora = Some(lora);
        assert!(check(&dropout, &settings()).unwrap_err().to_string().contains("dropout must be 0"));
        let mut range = job();
        range.spec.stages[0].sft.as_mut().unwrap().optimizer.learning_rate = 2.0;
        assert!(check(&range, &settings()).unwrap_err().to_string().contains("learningRate is 2"));
    }

    #[test]
    fn a_spec_that_admission_would_have_refused_is_an_error_that_names_the_field() {
        let mut no_kind = job();
        no_kind.spec.stages[0].sft = None;
        assert_eq!(
            check(&no_kind, &settings()).unwrap_err().to_string(),
            "spec.stages[tune] must have exactly one of sft, rewardModel and ppo"
        );
        let mut bad_path = job();
        bad_path.spec.model.source = Some("hf://a/b".into());
        let message = check(&bad_path, &settings()).unwrap_err().to_string();
        assert!(message.starts_with("spec.model.source `hf://a/b` is not a location on the volume"), "{message}");
        assert!(check(&job(), &settings()).is_ok());
    }
}

//! The pod of prepare and of a stage's attempts.
//!
//! It meets the `restricted` Pod Security Standard and holds no credentials of the API server. What a user's pod
//! template says is merged first, so that the operator's own fields win.

use super::{Attempt, Settings, Task, attempt_name, config, pod_group, secret, service, sources, user_labels};
use crate::view::{CONTAINER, INDEX_KEY};
use k8s_openapi::api::core::v1::{
    Affinity, Capabilities, ConfigMapVolumeSource, Container, ContainerPort, EmptyDirVolumeSource, EnvVar,
    EnvVarSource, HTTPGetAction, KeyToPath, LocalObjectReference, ObjectFieldSelector,
    PersistentVolumeClaimVolumeSource, PodAffinityTerm, PodAntiAffinity, PodSecurityContext, PodSpec, PodTemplateSpec,
    Probe, ResourceClaim, ResourceRequirements, SeccompProfile, SecretKeySelector, SecurityContext, Volume,
    VolumeMount, WeightedPodAffinityTerm,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::ResourceExt;
use rlhf_api::config::{CONFIG_DIR, CONFIG_FILE, HTTP_PORT, RENDEZVOUS_PORT, VOLUME_DIR, env};
use rlhf_api::job::{Compute, PodIdentity, RLHFJob};
use rlhf_api::names;
use std::collections::BTreeMap;

/// The user and group of the images (`nonroot`, as distroless numbers it).
const UID: i64 = 65532;
pub(super) fn build(
    job: &RLHFJob,
    task: Task<'_>,
    attempt: Attempt,
    compute: &Compute,
    own_labels: BTreeMap<String, String>,
    config_map: &str,
    settings: &Settings,
) -> PodTemplateSpec {
    let given = compute.pod_template.clone();
    let secrets: (Vec<_>, Vec<_>) = match task {
        Task::Prepare => sources::secrets(job).into_iter().unzip(),
        Task::Stage(_) => Default::default(),
    };
    let labels = user_labels(&given).into_iter().chain(own_labels.clone()).collect();
    PodTemplateSpec {
        metadata: Some(ObjectMeta { labels: Some(labels), annotations: Some(given.annotations), ..Default::default() }),
        spec: Some(PodSpec {
            restart_policy: Some("Never".into()),
            subdomain: matches!(task, Task::Stage(_)).then(|| service::name(job)),
            termination_grace_period_seconds: Some(compute.grace_period_seconds.into()),
            automount_service_account_token: Some(false),
            enable_service_links: Some(false),
            security_context: Some(pod_security(given.security_context.as_ref(), settings)),
            affinity: affinity(given.affinity, compute, own_labels),
            topology_spread_constraints: some(given.topology_spread_constraints),
            node_selector: Some(given.node_selector),
            tolerations: Some(given.tolerations),
            priority_class_name: given.priority_class_name,
            runtime_class_name: given.runtime_class_name,
            scheduler_name: given.scheduler_name,
            service_account_name: given.service_account_name,
            image_pull_secrets: some(pull_secrets(given.image_pull_secrets, settings)),
            resource_claims: some(given.resource_claims),
            scheduling_group: pod_group::membership(job, task, attempt, compute, settings),
            volumes: Some(volumes(job, task, config_map).into_iter().chain(secrets.0).chain(given.volumes).collect()),
            containers: vec![container(job, task, attempt, compute, secrets.1, settings)],
            ..Default::default()
        }),
    }
}

fn some<T>(list: Vec<T>) -> Option<Vec<T>> {
    (!list.is_empty()).then_some(list)
}

/// Those of the chart, and those of the job.
fn pull_secrets(given: Vec<LocalObjectReference>, settings: &Settings) -> Vec<LocalObjectReference> {
    let of_chart = settings.image_pull_secrets.iter().map(|name| LocalObjectReference { name: name.clone() });
    of_chart.filter(|secret| !given.contains(secret)).chain(given.iter().cloned()).collect()
}

fn container(
    job: &RLHFJob,
    task: Task<'_>,
    attempt: Attempt,
    compute: &Compute,
    secrets: Vec<VolumeMount>,
    settings: &Settings,
) -> Container {
    let given = &compute.pod_template;
    let mut all_env: Vec<_> = given.env.iter().filter(|e| !env::RESERVED.contains(&e.name.as_str())).cloned().collect();
    all_env.extend(own_env(job, task, attempt, compute, settings));
    let command = match task {
        Task::Prepare => "prepare",
        Task::Stage(_) => "launch",
    };
    Container {
        name: CONTAINER.into(),
        image: Some(image(job, settings)),
        image_pull_policy: Some(settings.trainer_image_pull_policy.clone()),
        args: Some(vec![command.into()]),
        env: Some(all_env),
        ports: Some(ports(compute)),
        startup_probe: matches!(task, Task::Stage(_)).then(|| probe(STARTUP)),
        liveness_probe: matches!(task, Task::Stage(_)).then(|| probe(LIVENESS)),
        resources: Some(resources(compute)),
        volume_mounts: Some(mounts().into_iter().chain(secrets).chain(given.volume_mounts.clone()).collect()),
        termination_message_policy: Some("File".into()),
        security_context: Some(SecurityContext {
            allow_privilege_escalation: Some(false),
            read_only_root_filesystem: Some(true),
            capabilities: Some(Capabilities {
                drop: Some(vec!["ALL".into()]),
                add: given.ipc_lock.then(|| vec!["IPC_LOCK".into()]),
            }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// The image that was pinned when the job started, so that another version of the operator changes no job that runs.
fn image(job: &RLHFJob, settings: &Settings) -> String {
    let pinned = job.status.as_ref().and_then(|status| status.images.as_ref()).map(|images| images.trainer.clone());
    pinned.unwrap_or_else(|| settings.trainer_image.clone())
}

/// How often a kubelet asks a trainer whether it lives, in seconds, and how many times it may stay without an answer. A node
/// whose cores are all taken answers late, and a loss of a step is worse than one of a minute.
struct Patience {
    period: i32,
    tries: i32,
}

/// Until the process has begun to serve; it does so before it loads anything.
const STARTUP: Patience = Patience { period: 5, tries: 120 };
/// From then on.
const LIVENESS: Patience = Patience { period: 20, tries: 15 };

fn probe(patience: Patience) -> Probe {
    Probe {
        http_get: Some(HTTPGetAction {
            path: Some("/healthz".into()),
            port: IntOrString::Int(HTTP_PORT.into()),
            ..Default::default()
        }),
        period_seconds: Some(patience.period),
        timeout_seconds: Some(10),
        failure_threshold: Some(patience.tries),
        ..Default::default()
    }
}

fn own_env(job: &RLHFJob, task: Task<'_>, attempt: Attempt, compute: &Compute, settings: &Settings) -> Vec<EnvVar> {
    let mut values = vec![
        (env::ATTEMPT, attempt.number.to_string()),
        (env::VOLUME, VOLUME_DIR.into()),
        (env::LOG_FORMAT, settings.log_format.clone()),
    ];
    let Task::Stage(_) = task else { return values.into_iter().map(plain).collect() };
    values.extend([
        (env::MASTER_ADDR, master(job, task, attempt.number)),
        (env::MASTER_PORT, RENDEZVOUS_PORT.to_string()),
        (env::NNODES, compute.nodes.to_string()),
        (env::NPROC_PER_NODE, compute.workers_per_node().to_string()),
        (env::DEVICES, compute.devices_per_node.to_string()),
        (env::STRATEGY, serde_json::json!(attempt.strategy).to_string()),
    ]);
    values.into_iter().map(plain).chain([node_rank(), progress_key(job, settings)]).collect()
}

fn plain((name, value): (&str, String)) -> EnvVar {
    EnvVar { name: name.into(), value: Some(value), ..Default::default() }
}

fn node_rank() -> EnvVar {
    let index =
        ObjectFieldSelector { field_path: format!("metadata.annotations['{INDEX_KEY}']"), ..Default::default() };
    EnvVar {
        name: env::NODE_RANK.into(),
        value_from: Some(EnvVarSource { field_ref: Some(index), ..Default::default() }),
        ..Default::default()
    }
}

/// By reference, so that the key is in no Job and no pod.
fn progress_key(job: &RLHFJob, settings: &Settings) -> EnvVar {
    let key = SecretKeySelector {
        name: secret::name(job, &settings.keys),
        key: names::PROGRESS_SECRET_ENTRY.into(),
        ..Default::default()
    };
    EnvVar {
        name: env::PROGRESS_KEY.into(),
        value_from: Some(EnvVarSource { secret_key_ref: Some(key), ..Default::default() }),
        ..Default::default()
    }
}

/// The DNS name of the attempt's first pod. It carries the attempt's number, so that no rank ever meets rank 0 of
/// another attempt. The cluster's domain is left to the resolver's search list.
fn master(job: &RLHFJob, task: Task<'_>, attempt: u32) -> String {
    let (host, service) = (attempt_name(job, task, attempt), service::name(job));
    format!("{host}-0.{service}.{}.svc", job.namespace().unwrap_or_default())
}

fn ports(compute: &Compute) -> Vec<ContainerPort> {
    let port = |rank: u32| ContainerPort {
        name: Some(if rank == 0 { "metrics".into() } else { format!("metrics-{rank}") }),
        container_port: i32::from(HTTP_PORT) + i32::try_from(rank).unwrap_or(0),
        ..Default::default()
    };
    (0..compute.workers_per_node()).map(port).collect()
}

fn resources(compute: &Compute) -> ResourceRequirements {
    let mut all = compute.resources.clone();
    let given = compute.pod_template.resource_claims.iter();
    let every = given.map(|claim| ResourceClaim { name: claim.name.clone(), ..Default::default() });
    all.claims = all.claims.or_else(|| some(every.collect()));
    if compute.devices_per_node > 0 {
        let count = Quantity(compute.devices_per_node.to_string());
        for side in [&mut all.requests, &mut all.limits] {
            side.get_or_insert_default().insert(compute.device_resource.clone(), count.clone());
        }
    }
    all
}

/// By the images' user, or by the job's, or by whatever the cluster gives.
fn pod_security(given: Option<&PodIdentity>, settings: &Settings) -> PodSecurityContext {
    let given = given.cloned().unwrap_or_default();
    let or_own = |id: Option<i64>| id.or((!settings.omit_user_ids).then_some(UID));
    PodSecurityContext {
        run_as_non_root: Some(true),
        run_as_user: or_own(given.run_as_user),
        run_as_group: or_own(given.run_as_group),
        fs_group: or_own(given.fs_group),
        supplemental_groups: some(given.supplemental_groups),
        // A volume of models holds many files; they are not walked again for every pod.
        fs_group_change_policy: Some("OnRootMismatch".into()),
        seccomp_profile: Some(SeccompProfile { type_: "RuntimeDefault".into(), ..Default::default() }),
        ..Default::default()
    }
}

/// What the job says; where that has no word on the pods' distance from each other, a gang's own.
fn affinity(given: Option<Affinity>, compute: &Compute, gang: BTreeMap<String, String>) -> Option<Affinity> {
    if compute.nodes == 1 {
        return given;
    }
    let given = given.unwrap_or_default();
    let pod_anti_affinity = given.pod_anti_affinity.or_else(|| spread(gang).pod_anti_affinity);
    Some(Affinity { pod_anti_affinity, ..given })
}

/// A gang's pods spread over nodes where they can, and share one where they must.
fn spread(gang: BTreeMap<String, String>) -> Affinity {
    Affinity {
        pod_anti_affinity: Some(PodAntiAffinity {
            preferred_during_scheduling_ignored_during_execution: Some(vec![WeightedPodAffinityTerm {
                weight: 100,
                pod_affinity_term: PodAffinityTerm {
                    label_selector: Some(LabelSelector { match_labels: Some(gang), ..Default::default() }),
                    topology_key: "kubernetes.io/hostname".into(),
                    ..Default::default()
                },
            }]),
            ..Default::default()
        }),
        ..Default::default()
    }
}

const DATA: &str = "data";
const CONFIG: &str = "config";
const TMP: &str = "tmp";
const SHM: &str = "shm";

fn volumes(job: &RLHFJob, task: Task<'_>, config_map: &str) -> Vec<Volume> {
    let claim = PersistentVolumeClaimVolumeSource {
        claim_name: job.spec.storage.volume_claim.claim_name.clone(),
        ..Default::default()
    };
    let own = KeyToPath { key: config::entry(task), path: CONFIG_FILE.into(), ..Default::default() };
    let config = ConfigMapVolumeSource { name: config_map.into(), items: Some(vec![own]), ..Default::default() };
    let memory = EmptyDirVolumeSource { medium: Some("Memory".into()), ..Default::default() };
    vec![
        Volume { name: DATA.into(), persistent_volume_claim: Some(claim), ..Default::default() },
        Volume { name: CONFIG.into(), config_map: Some(config), ..Default::default() },
        Volume { name: TMP.into(), empty_dir: Some(EmptyDirVolumeSource::default()), ..Default::default() },
        Volume { name: SHM.into(), empty_dir: Some(memory), ..Default::default() },
    ]
}

fn mounts() -> Vec<VolumeMount> {
    let mount = |name: &str, path: &str, read_only: bool| VolumeMount {
        name: name.into(),
        mount_path: path.into(),
        read_only: read_only.then_some(true),
        ..Default::default()
    };
    vec![
        mount(DATA, VOLUME_DIR, false),
        mount(CONFIG, CONFIG_DIR, true),
        mount(TMP, "/tmp", false),
        mount(SHM, "/dev/shm", false),
    ]
}

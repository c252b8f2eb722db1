//! The pod of prepare and of a stage's attempts.
//!
//! It meets the `restricted` Pod Security Standard and holds no credentials of the API server. What a user's pod
//! template says is merged first, so that the operator's own fields win.

use super::{Attempt, Settings, Task, pod_group, secret};
use crate::view::{CONTAINER, INDEX_KEY};
use k8s_openapi::api::core::v1::{
    Affinity, Capabilities, ConfigMapVolumeSource, Container, ContainerPort, EmptyDirVolumeSource, EnvVar,
    EnvVarSource, ObjectFieldSelector, PersistentVolumeClaimVolumeSource, PodAffinityTerm, PodAntiAffinity,
    PodSecurityContext, PodSpec, PodTemplateSpec, ResourceRequirements, SeccompProfile, SecretKeySelector,
    SecurityContext, Volume, VolumeMount, WeightedPodAffinityTerm,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta};
use kube::ResourceExt;
use rlhf_api::config::{CONFIG_DIR, HTTP_PORT, RENDEZVOUS_PORT, VOLUME_DIR, env};
use rlhf_api::job::{Compute, PodTemplate, RLHFJob};
use rlhf_api::names;
use std::collections::BTreeMap;

/// The user and group of the images (`nonroot`, as distroless numbers it).
const UID: i64 = 65532;
/// Long enough to finish a step and write a checkpoint after SIGTERM.
pub(crate) const GRACE_SECONDS: i64 = 120;

pub(super) fn build(
    job: &RLHFJob,
    task: Task<'_>,
    attempt: Attempt,
    compute: &Compute,
    own_labels: BTreeMap<String, String>,
    settings: &Settings,
) -> PodTemplateSpec {
    let PodTemplate {
        labels,
        annotations,
        node_selector,
        tolerations,
        priority_class_name,
        runtime_class_name,
        env: user_env,
    } = compute.pod_template.clone();
    let mut merged: BTreeMap<_, _> = labels.into_iter().filter(|(k, _)| !k.starts_with(names::LABEL_PREFIX)).collect();
    merged.extend(own_labels.clone());
    PodTemplateSpec {
        metadata: Some(ObjectMeta { labels: Some(merged), annotations: Some(annotations), ..Default::default() }),
        spec: Some(PodSpec {
            restart_policy: Some("Never".into()),
            subdomain: matches!(task, Task::Stage(_)).then(|| names::stage(&job.name_any(), task.name())),
            termination_grace_period_seconds: Some(GRACE_SECONDS),
            automount_service_account_token: Some(false),
            enable_service_links: Some(false),
            security_context: Some(pod_security()),
            affinity: (compute.nodes > 1).then(|| spread(own_labels)),
            node_selector: Some(node_selector),
            tolerations: Some(tolerations),
            priority_class_name,
            runtime_class_name,
            scheduling_group: pod_group::membership(job, task, attempt, compute, settings),
            volumes: Some(volumes(job, task)),
            containers: vec![container(job, task, attempt, compute, user_env, settings)],
            ..Default::default()
        }),
    }
}

fn container(
    job: &RLHFJob,
    task: Task<'_>,
    attempt: Attempt,
    compute: &Compute,
    user_env: Vec<EnvVar>,
    settings: &Settings,
) -> Container {
    let mut all_env: Vec<_> = user_env.into_iter().filter(|e| !env::RESERVED.contains(&e.name.as_str())).collect();
    all_env.extend(own_env(job, task, attempt, compute, settings));
    let command = match task {
        Task::Prepare => "prepare",
        Task::Stage(_) => "launch",
    };
    Container {
        name: CONTAINER.into(),
        image: Some(settings.trainer_image.clone()),
        image_pull_policy: Some(settings.trainer_image_pull_policy.clone()),
        args: Some(vec![command.into()]),
        env: Some(all_env),
        ports: matches!(task, Task::Stage(_)).then(|| ports(compute)),
        resources: Some(resources(compute)),
        volume_mounts: Some(mounts()),
        termination_message_policy: Some("File".into()),
        security_context: Some(SecurityContext {
            allow_privilege_escalation: Some(false),
            read_only_root_filesystem: Some(true),
            capabilities: Some(Capabilities { drop: Some(vec!["ALL".into()]), ..Default::default() }),
            ..Default::default()
        }),
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
    let (name, namespace) = (job.name_any(), job.namespace().unwrap_or_default());
    let (host, service) = (names::attempt(&name, task.name(), attempt), names::stage(&name, task.name()));
    format!("{host}-0.{service}.{namespace}.svc")
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
    if compute.devices_per_node > 0 {
        let count = Quantity(compute.devices_per_node.to_string());
        for side in [&mut all.requests, &mut all.limits] {
            side.get_or_insert_default().insert(compute.device_resource.clone(), count.clone());
        }
    }
    all
}

fn pod_security() -> PodSecurityContext {
    PodSecurityContext {
        run_as_non_root: Some(true),
        run_as_user: Some(UID),
        run_as_group: Some(UID),
        fs_group: Some(UID),
        // A volume of models holds many files; they are not walked again for every pod.
        fs_group_change_policy: Some("OnRootMismatch".into()),
        seccomp_profile: Some(SeccompProfile { type_: "RuntimeDefault".into(), ..Default::default() }),
        ..Default::default()
    }
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

fn volumes(job: &RLHFJob, task: Task<'_>) -> Vec<Volume> {
    let claim = PersistentVolumeClaimVolumeSource {
        claim_name: job.spec.storage.volume_claim.claim_name.clone(),
        ..Default::default()
    };
    let config = ConfigMapVolumeSource { name: names::stage(&job.name_any(), task.name()), ..Default::default() };
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

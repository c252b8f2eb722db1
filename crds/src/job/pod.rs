//! What a user may add to a job's pods.

use crate::config::env::{ALLOWED, LOADING, PLUGIN, RESERVED};
use crate::names;
use k8s_openapi::api::core::v1::{
    Affinity, EnvVar, LocalObjectReference, PodResourceClaim, Toleration, TopologySpreadConstraint, Volume, VolumeMount,
};
use kube::KubeSchema;
use kube::core::{ListMerge, Rule};
use schemars::{JsonSchema, Schema, json_schema};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What a user may add to the pods. It cannot weaken their security context or reach the operator's own fields. What would
/// give a job something that its author need not have (a service account, further volumes, locked memory) is refused unless
/// the operator's chart allows it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct PodTemplate {
    /// Labels of the pods and their Jobs, except those that the operator sets.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 64, "additionalProperties" = label_value()))]
    #[x_kube(validation = unreserved_labels())]
    pub labels: BTreeMap<String, String>,
    /// Annotations of the pods and their Jobs.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 64, "additionalProperties" = annotation_value()))]
    pub annotations: BTreeMap<String, String>,
    /// Nodes on which the pods may run.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 64, "additionalProperties" = label_value()))]
    pub node_selector: BTreeMap<String, String>,
    /// Rules for the nodes of the pods. Where it has none for pods' distance from each other, a stage's pods prefer nodes
    /// of their own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub affinity: Option<Affinity>,
    /// How the pods spread over the cluster.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub topology_spread_constraints: Vec<TopologySpreadConstraint>,
    /// Taints that the pods tolerate.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32))]
    pub tolerations: Vec<Toleration>,
    /// The pods' priority class.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub priority_class_name: Option<String>,
    /// The pods' runtime class.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub runtime_class_name: Option<String>,
    /// The scheduler that gives the pods their nodes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub scheduler_name: Option<String>,
    /// Secrets of the job's namespace by which images are pulled.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub image_pull_secrets: Vec<LocalObjectReference>,
    /// Claims of devices by dynamic resource allocation; the trainer container gets all of them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[x_kube(merge_strategy = by_name())]
    pub resource_claims: Vec<PodResourceClaim>,
    /// By which users and groups the pods run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub security_context: Option<PodIdentity>,
    /// Environment variables that tune libraries, or name proxies. By value, or from fields of the pod.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    #[x_kube(
        merge_strategy = by_name(),
        validation = unreserved_env(),
        validation = allowed_env(),
        validation = plugins_of_the_image(),
        validation = no_borrowed_env(),
    )]
    pub env: Vec<EnvVar>,
    /// The pods' service account, whose token they are not given. Where the chart allows it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub service_account_name: Option<String>,
    /// Further volumes. Where the chart allows them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[x_kube(merge_strategy = by_name())]
    pub volumes: Vec<Volume>,
    /// Where the trainer container mounts them. Where the chart allows them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub volume_mounts: Vec<VolumeMount>,
    /// Lets the trainer lock memory (the capability IPC_LOCK), as RDMA wants it. Where the chart allows it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub ipc_lock: bool,
}

impl PodTemplate {
    /// This over another: entries of maps and variables of `env` go before the other's, and so does every list that is not
    /// empty.
    pub fn over(&self, other: &Self) -> Self {
        Self {
            labels: map_over(&self.labels, &other.labels),
            annotations: map_over(&self.annotations, &other.annotations),
            node_selector: map_over(&self.node_selector, &other.node_selector),
            affinity: self.affinity.clone().or_else(|| other.affinity.clone()),
            topology_spread_constraints: list_over(
                &self.topology_spread_constraints,
                &other.topology_spread_constraints,
            ),
            tolerations: list_over(&self.tolerations, &other.tolerations),
            priority_class_name: self.priority_class_name.clone().or_else(|| other.priority_class_name.clone()),
            runtime_class_name: self.runtime_class_name.clone().or_else(|| other.runtime_class_name.clone()),
            scheduler_name: self.scheduler_name.clone().or_else(|| other.scheduler_name.clone()),
            image_pull_secrets: list_over(&self.image_pull_secrets, &other.image_pull_secrets),
            resource_claims: list_over(&self.resource_claims, &other.resource_claims),
            security_context: self.security_context.clone().or_else(|| other.security_context.clone()),
            env: env_over(&self.env, &other.env),
            service_account_name: self.service_account_name.clone().or_else(|| other.service_account_name.clone()),
            volumes: list_over(&self.volumes, &other.volumes),
            volume_mounts: list_over(&self.volume_mounts, &other.volume_mounts),
            ipc_lock: self.ipc_lock || other.ipc_lock,
        }
    }
}

fn map_over(own: &BTreeMap<String, String>, other: &BTreeMap<String, String>) -> BTreeMap<String, String> {
    other.iter().chain(own).map(|(k, v)| (k.clone(), v.clone())).collect()
}

fn list_over<T: Clone>(own: &[T], other: &[T]) -> Vec<T> {
    if own.is_empty() { other.to_vec() } else { own.to_vec() }
}

fn env_over(own: &[EnvVar], other: &[EnvVar]) -> Vec<EnvVar> {
    let kept = other.iter().filter(|e| own.iter().all(|o| o.name != e.name));
    own.iter().chain(kept).cloned().collect()
}

/// By which users and groups pods run; none of them is root.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PodIdentity {
    /// The user of the processes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 2_147_483_647))]
    pub run_as_user: Option<i64>,
    /// Their group.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 2_147_483_647))]
    pub run_as_group: Option<i64>,
    /// The group that owns the files of volumes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 2_147_483_647))]
    pub fs_group: Option<i64>,
    /// Further groups of the processes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32), inner(range(min = 1, max = 2_147_483_647)))]
    pub supplemental_groups: Vec<i64>,
}

fn by_name() -> ListMerge {
    ListMerge::Map(vec!["name".into()])
}

/// What Kubernetes takes for the value of a label: what is not, it would refuse only in the pods.
fn label_value() -> Schema {
    json_schema!({"type": "string", "maxLength": 63, "pattern": "^([A-Za-z0-9]([-._A-Za-z0-9]*[A-Za-z0-9])?)?$"})
}

fn annotation_value() -> Schema {
    json_schema!({"type": "string", "maxLength": 4096})
}

/// Keeps the operator's own labels for the operator.
fn unreserved_labels() -> Rule {
    let (prefix, label) = (names::LABEL_PREFIX, names::LABEL_MANAGED_BY);
    let message = format!("the operator sets {label} and labels under {prefix}; choose other labels");
    Rule::new(format!("self.all(key, key != '{label}' && !key.startsWith('{prefix}'))")).message(message.as_str())
}

/// Keeps the environment variables of [`RESERVED`] for the operator.
fn unreserved_env() -> Rule {
    let list = RESERVED.map(|name| format!("'{name}'")).join(", ");
    let message = format!("the operator sets {}; leave them out of env", RESERVED.join(", "));
    Rule::new(format!("self.all(e, !(e.name in [{list}]))")).message(message.as_str())
}

/// A variable can make a loader or a library run a file of the volume with the pods' secrets in reach, so those that may
/// be set are listed, and not those that may not.
fn allowed_env() -> Rule {
    let reserved = RESERVED.map(|name| format!("'{name}'")).join(", ");
    Rule::new(format!("self.all(e, e.name in [{reserved}] || (e.name.matches('{ALLOWED}') && !e.name.matches('{LOADING}')))")).message(
        "env takes settings of the libraries that train (NCCL_*, GLOO_*, UCX_*, FI_*, OMP_*, MKL_*, TOKENIZERS_*, TORCH_NCCL_*), RUST_LOG, RUST_BACKTRACE and proxies, and none that names files to load; leave out the others",
    )
}

/// A plugin is named by the library's name, which the loader finds in the image; a path could lead to the volume.
fn plugins_of_the_image() -> Rule {
    Rule::new(format!("self.all(e, !e.name.matches('{PLUGIN}') || (has(e.value) && !e.value.contains('/')))"))
        .message("env names plugins by the name of a library in the image; write the name without a path")
}

/// A program tells of a variable that it cannot use, and a job's status shows what its pods tell: so a reference would
/// let the author of a job read a Secret that is closed to them.
fn no_borrowed_env() -> Rule {
    Rule::new("self.all(e, !has(e.valueFrom) || has(e.valueFrom.fieldRef) || has(e.valueFrom.resourceFieldRef))").message(
        "env takes values, and none from Secrets or ConfigMaps, which the author of a job need not be allowed to read; write the value",
    )
}

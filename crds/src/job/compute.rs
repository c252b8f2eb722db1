//! Where a stage runs: pods, devices, and what each pod may use; and how a stage's own words are merged over the job's.

use super::pod::PodTemplate;
use k8s_openapi::api::core::v1::ResourceRequirements;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use kube::KubeSchema;
use kube::core::Rule;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Where a stage runs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new(
        "!(has(self.resources.limits) && self.deviceResource in self.resources.limits) && !(has(self.resources.requests) && self.deviceResource in self.resources.requests)"
    )
    .message("resources must not count devices; set devicesPerNode, from which their requests and limits are made"),
    validation = Rule::new("!has(self.deviceMemory) || self.devicesPerNode > 0").message(
        "deviceMemory is the memory of each device, and there is none; set devicesPerNode, or leave out deviceMemory"
    ),
    validation = Rule::new("self.devicesPerNode == 0 || self.cpuWorkersPerNode == 1").message(
        "cpuWorkersPerNode is for training on CPU, with devices there is one worker each; leave out cpuWorkersPerNode, or devicesPerNode"
    ),
)]
pub struct Compute {
    /// Pods, one a node.
    #[serde(default = "one")]
    #[schemars(range(min = 1, max = 1024))]
    pub nodes: u32,
    /// Devices in each pod, one worker process each; 0 trains on CPU.
    #[serde(default)]
    #[schemars(range(min = 0, max = 64))]
    pub devices_per_node: u32,
    /// The extended resource that counts devices.
    #[serde(default = "default_device_resource")]
    #[schemars(length(min = 1, max = 253))]
    #[x_kube(validation = extended_resource())]
    pub device_resource: String,
    /// The memory of each device, such as `80Gi`, for the plan of a stage. By default the least that the label
    /// `nvidia.com/gpu.memory` tells of the nodes on which the pods may run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32), regex(pattern = BYTES))]
    pub device_memory: Option<String>,
    /// Worker processes in each pod when training on CPU.
    #[serde(default = "one")]
    #[schemars(range(min = 1, max = 64))]
    pub cpu_workers_per_node: u32,
    /// Requests and limits of the trainer container; devices are added to them.
    #[serde(default)]
    #[schemars(schema_with = "resources_schema")]
    pub resources: ResourceRequirements,
    /// Merged into the pods.
    #[serde(default)]
    pub pod_template: PodTemplate,
    /// How long pods may take to save a checkpoint once they are told to stop.
    #[serde(default = "default_grace")]
    #[schemars(range(min = 1, max = 86_400))]
    pub grace_period_seconds: u32,
    /// A rank that waits longer for its peers gives them up as lost. More than the slowest thing that one rank does alone,
    /// such as writing a checkpoint to a network volume.
    #[serde(default = "default_collective_timeout")]
    #[schemars(range(min = 1, max = 86_400))]
    pub collective_timeout_seconds: u32,
}

impl Default for Compute {
    fn default() -> Self {
        Self {
            nodes: one(),
            devices_per_node: 0,
            device_resource: default_device_resource(),
            device_memory: None,
            cpu_workers_per_node: one(),
            resources: ResourceRequirements::default(),
            pod_template: PodTemplate::default(),
            grace_period_seconds: default_grace(),
            collective_timeout_seconds: default_collective_timeout(),
        }
    }
}

impl Compute {
    /// Worker processes in each pod: one a device, or [`Compute::cpu_workers_per_node`] on CPU.
    pub fn workers_per_node(&self) -> u32 {
        if self.devices_per_node > 0 { self.devices_per_node } else { self.cpu_workers_per_node }
    }
}

/// Where a stage runs, in so far as it is not where every stage does: each field that is written goes before the job's.
/// Of `resources` and of the maps of `podTemplate` each entry does, and each variable of `env`; other lists are replaced.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct ComputeOverride {
    /// Pods, one a node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1024))]
    pub nodes: Option<u32>,
    /// Devices in each pod, one worker process each; 0 trains on CPU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 64))]
    pub devices_per_node: Option<u32>,
    /// The extended resource that counts devices.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    #[x_kube(validation = extended_resource())]
    pub device_resource: Option<String>,
    /// The memory of each device, such as `80Gi`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32), regex(pattern = BYTES))]
    pub device_memory: Option<String>,
    /// Worker processes in each pod when training on CPU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 64))]
    pub cpu_workers_per_node: Option<u32>,
    /// Requests and limits of the trainer container, each over the job's.
    #[serde(default)]
    #[schemars(schema_with = "resources_schema")]
    pub resources: ResourceRequirements,
    /// Merged into the pods, over the job's.
    #[serde(default)]
    pub pod_template: PodTemplate,
    /// How long pods may take to save a checkpoint once they are told to stop.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 86_400))]
    pub grace_period_seconds: Option<u32>,
    /// A rank that waits longer for its peers gives them up as lost.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 86_400))]
    pub collective_timeout_seconds: Option<u32>,
}

impl ComputeOverride {
    /// This over the job's. What the stage's own devices, or their absence, leave without a meaning is not inherited: the
    /// memory of devices where there are none, and the number of CPU workers where there are devices.
    pub fn over(&self, job: &Compute) -> Compute {
        let devices_per_node = self.devices_per_node.unwrap_or(job.devices_per_node);
        let inherited_memory = || job.device_memory.clone().filter(|_| devices_per_node > 0);
        let inherited_workers = if devices_per_node > 0 { 1 } else { job.cpu_workers_per_node };
        Compute {
            nodes: self.nodes.unwrap_or(job.nodes),
            devices_per_node,
            device_resource: self.device_resource.clone().unwrap_or_else(|| job.device_resource.clone()),
            device_memory: self.device_memory.clone().or_else(inherited_memory),
            cpu_workers_per_node: self.cpu_workers_per_node.unwrap_or(inherited_workers),
            resources: resources_over(&self.resources, &job.resources),
            pod_template: self.pod_template.over(&job.pod_template),
            grace_period_seconds: self.grace_period_seconds.unwrap_or(job.grace_period_seconds),
            collective_timeout_seconds: self.collective_timeout_seconds.unwrap_or(job.collective_timeout_seconds),
        }
    }
}

fn resources_over(own: &ResourceRequirements, job: &ResourceRequirements) -> ResourceRequirements {
    let merged = |own: &Option<BTreeMap<String, Quantity>>, job: &Option<BTreeMap<String, Quantity>>| {
        let all: BTreeMap<_, _> = job.iter().chain(own).flatten().map(|(k, v)| (k.clone(), v.clone())).collect();
        (!all.is_empty()).then_some(all)
    };
    ResourceRequirements {
        requests: merged(&own.requests, &job.requests),
        limits: merged(&own.limits, &job.limits),
        claims: own.claims.clone().or_else(|| job.claims.clone()),
    }
}

/// How prepare runs, which needs no devices.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Prepare {
    /// Requests and limits of its container. Limits are by default those of `compute`; requests a tenth of a CPU and
    /// 128Mi of memory, or what the limits are where that is less.
    #[serde(default)]
    #[schemars(schema_with = "resources_schema")]
    pub resources: ResourceRequirements,
    /// Merged into its pod, over that of `compute`, of which it takes neither node selector nor affinity.
    #[serde(default)]
    pub pod_template: PodTemplate,
    /// Prepare fails once its pod has run for so long.
    #[serde(default = "default_prepare_deadline")]
    #[schemars(range(min = 1, max = 31_536_000))]
    pub deadline_seconds: u32,
}

impl Default for Prepare {
    fn default() -> Self {
        Self {
            resources: ResourceRequirements::default(),
            pod_template: PodTemplate::default(),
            deadline_seconds: default_prepare_deadline(),
        }
    }
}

fn one() -> u32 {
    1
}
fn default_grace() -> u32 {
    600
}
fn default_collective_timeout() -> u32 {
    300
}
fn default_prepare_deadline() -> u32 {
    7200
}
fn default_device_resource() -> String {
    "nvidia.com/gpu".into()
}

/// An amount of memory.
const BYTES: &str = r"^[1-9][0-9]*(\.[0-9]+)?(Ki|Mi|Gi|Ti|k|M|G|T)?$";

fn extended_resource() -> Rule {
    Rule::new("self.matches('^[a-z0-9]([-.a-z0-9]*[a-z0-9])?/[A-Za-z0-9]([-._A-Za-z0-9]*[A-Za-z0-9])?$')")
        .message("deviceResource must be an extended resource's name, such as nvidia.com/gpu or amd.com/gpu")
}

/// Requests, limits and claims. The pattern is the one of Kubernetes' own schema tools, without amounts below zero.
pub(super) fn resources_schema(_: &mut SchemaGenerator) -> Schema {
    let amounts = |description: &str| {
        json_schema!({
            "description": description,
            "type": "object",
            "maxProperties": 32,
            "additionalProperties": {
                "x-kubernetes-int-or-string": true,
                "maxLength": 64,
                "pattern": r"^\+?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))(([KMGTPE]i)|[numkMGTPE]|([eE](\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))))?$",
            },
        })
    };
    json_schema!({
        "type": "object",
        "properties": {
            "requests": amounts("What is set aside for the container; by default as much as its limits."),
            "limits": amounts("The most that the container may use."),
            "claims": {
                "description": "Which of podTemplate.resourceClaims the container gets; by default all of them.",
                "type": "array",
                "maxItems": 16,
                "items": {
                    "type": "object",
                    "required": ["name"],
                    "properties": {
                        "name": {"type": "string", "minLength": 1, "maxLength": 63, "description": "The name of the claim."},
                        "request": {
                            "type": "string",
                            "maxLength": 63,
                            "description": "Which of the claim's requests; by default all of them.",
                        },
                    },
                },
            },
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn merged(own: serde_json::Value, job: serde_json::Value) -> Compute {
        let own: ComputeOverride = serde_json::from_value(own).unwrap();
        own.over(&serde_json::from_value(job).unwrap())
    }

    #[test]
    fn a_stage_that_says_how_many_nodes_keeps_all_else() {
        let job = json!({"nodes": 2, "devicesPerNode": 8, "deviceMemory": "80Gi", "gracePeriodSeconds": 7,
            "resources": {"requests": {"cpu": "4"}, "limits": {"memory": "64Gi"}},
            "podTemplate": {"nodeSelector": {"a": "b"}, "env": [{"name": "NCCL_DEBUG", "value": "INFO"}]}});
        let expected = Compute { nodes: 8, ..serde_json::from_value(job.clone()).unwrap() };
        assert_eq!(merged(json!({"nodes": 8}), job), expected);
    }

    #[test]
    fn maps_are_merged_by_entry_and_lists_replaced() {
        let job = json!({"resources": {"requests": {"cpu": "4", "memory": "1Gi"}, "limits": {"memory": "64Gi"}},
            "podTemplate": {"nodeSelector": {"a": "b", "c": "d"}, "tolerations": [{"key": "x"}],
                "env": [{"name": "NCCL_DEBUG", "value": "INFO"}, {"name": "OMP_NUM_THREADS", "value": "1"}]}});
        let stage = json!({"resources": {"requests": {"cpu": "1"}},
            "podTemplate": {"nodeSelector": {"c": "e"}, "tolerations": [{"key": "y"}],
                "env": [{"name": "NCCL_DEBUG", "value": "WARN"}]}});
        let all = merged(stage, job);
        let requests = all.resources.requests.unwrap();
        assert_eq!((requests["cpu"].0.as_str(), requests["memory"].0.as_str()), ("1", "1Gi"));
        assert_eq!(all.resources.limits.unwrap()["memory"].0, "64Gi");
        assert_eq!(
            (all.pod_template.node_selector["a"].as_str(), all.pod_template.node_selector["c"].as_str()),
            ("b", "e")
        );
        assert_eq!(all.pod_template.tolerations.len(), 1);
        let env: Vec<_> = all.pod_template.env.iter().map(|e| (e.name.as_str(), e.value.as_deref())).collect();
        assert_eq!(env, [("NCCL_DEBUG", Some("WARN")), ("OMP_NUM_THREADS", Some("1"))]);
    }

    #[test]
    fn what_has_no_meaning_in_the_stage_is_not_inherited() {
        let on_cpu = merged(json!({"devicesPerNode": 0}), json!({"devicesPerNode": 8, "deviceMemory": "80Gi"}));
        assert_eq!((on_cpu.device_memory.as_deref(), on_cpu.workers_per_node()), (None, 1));
        let on_devices = merged(json!({"devicesPerNode": 8}), json!({"cpuWorkersPerNode": 4}));
        assert_eq!((on_devices.cpu_workers_per_node, on_devices.workers_per_node()), (1, 8));
    }
}

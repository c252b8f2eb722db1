//! The RLHFJob resource.
//!
//! Everything that can be refused at admission is refused there, by CEL rules whose messages say what to
//! write instead; there is no webhook. Each rule stands at the field of which it speaks, so that the API
//! server's answer names the path. Only fields that do something exist. A job is one run: nothing but
//! `suspend` and `ttlSecondsAfterFinished` can change.

use crate::choice::StrategySpec;
use crate::config::env::RESERVED;
use crate::names;
use crate::report::{Checkpoint, Output, Prepared, Progress};
use crate::stage::{CheckpointPolicy, Ppo, RewardModel, Sft, StageKind, Strategy, VOLUME_URI_PATTERN};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{EnvVar, ResourceRequirements, Toleration};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceDefinition, JSONSchemaProps, JSONSchemaPropsOrArray, JSONSchemaPropsOrBool,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::core::Rule;
use kube::{CustomResource, CustomResourceExt, KubeSchema};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// A run of reinforcement learning from human feedback: a graph of stages on one volume.
#[derive(CustomResource, Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "rlhf.dev",
    version = "v1alpha1",
    kind = "RLHFJob",
    plural = "rlhfjobs",
    shortname = "rlhf",
    category = "all",
    namespaced,
    status = "RLHFJobStatus",
    doc = "A run of reinforcement learning from human feedback: supervised fine-tuning, reward-model training and PPO as a graph of stages on one volume.",
    printcolumn(name = "Phase", type_ = "string", json_path = ".status.phase"),
    printcolumn(name = "Stage", type_ = "string", json_path = ".status.stage"),
    printcolumn(name = "Progress", type_ = "string", json_path = ".status.progress"),
    printcolumn(name = "Restarts", type_ = "integer", json_path = ".status.restarts"),
    printcolumn(name = "Message", type_ = "string", json_path = ".status.message", priority = 1),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    validation = Rule::new("self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')").message(
        "metadata.name must be a DNS label: lower-case letters, digits and dashes, beginning with a letter"
    ),
    validation = names_fit(),
)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[x_kube(
    validation = immutable_option("activeDeadlineSeconds"),
    validation = immutable_option("managedBy"),
    validation = memory_is_known(),
)]
pub struct RLHFJobSpec {
    /// The pretrained model from which stages start.
    #[x_kube(validation = immutable("model"))]
    pub model: Model,
    /// The volume for models, data, checkpoints and outputs.
    #[x_kube(validation = immutable("storage"))]
    pub storage: Storage,
    /// Where every stage runs, unless it says otherwise.
    #[serde(default)]
    #[x_kube(validation = immutable("compute"))]
    pub compute: Compute,
    /// How models are placed and run, for every stage.
    #[serde(default)]
    #[x_kube(validation = immutable("strategy"))]
    pub strategy: StrategySpec,
    /// The stages. An edge is a reference by name; stages without an edge between them run side by side.
    #[schemars(length(min = 1, max = 16))]
    #[x_kube(
        validation = Rule::new("self.all(s, self.exists_one(o, o.name == s.name))").message(
            "two stages have the same name; give each stage a name of its own"
        ),
        validation = reference("rewardModel.from", "has(s.rewardModel) && has(s.rewardModel.from)", "sft")
            .message("rewardModel.from names no sft stage of this job; name one, or leave it out to start from the job's model"),
        validation = reference("ppo.actor", "has(s.ppo) && has(s.ppo.actor)", "sft")
            .message("ppo.actor names no sft stage of this job; name one, or leave it out to start from the job's model"),
        validation = reference("ppo.reward", "has(s.ppo)", "rewardModel")
            .message("ppo.reward names no rewardModel stage of this job; name one, and add such a stage if there is none"),
        validation = immutable("stages"),
    )]
    pub stages: Vec<Stage>,
    /// Stops all pods after they have written a checkpoint; set back to false, the job goes on from there.
    #[serde(default)]
    pub suspend: bool,
    /// What is done about an attempt that ends badly.
    #[serde(default)]
    #[x_kube(validation = immutable("failurePolicy"))]
    pub failure_policy: FailurePolicy,
    /// Fails the job once it has been active for so long, in all. The time runs from the first pod's making on,
    /// back-offs and waiting for nodes included, and stands still while the job is suspended or only waits in a queue.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 315_360_000))]
    pub active_deadline_seconds: Option<u32>,
    /// Deletes the job with its Jobs and pods so long after it succeeded or failed. What it wrote to the volume
    /// stays. May change at any time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 315_360_000))]
    pub ttl_seconds_after_finished: Option<u32>,
    /// Who runs the job. This operator leaves a job alone whose field names another, such as
    /// `kueue.x-k8s.io/multikueue`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(
        length(max = 63),
        regex(pattern = r"^[a-z0-9]([-.a-z0-9]*[a-z0-9])?/[A-Za-z0-9]([-._A-Za-z0-9]*[A-Za-z0-9])?$")
    )]
    pub managed_by: Option<String>,
}

/// Bounds the names of which the children's names are made.
fn names_fit() -> Rule {
    let most = names::MAX_JOB_AND_STAGE;
    let message = format!(
        "metadata.name and a stage's name may have at most {most} characters together, so that pod names fit; shorten one of them"
    );
    Rule::new(format!("self.spec.stages.all(s, size(self.metadata.name) + size(s.name) <= {most})"))
        .message(message.as_str())
}

/// What is to fit has to fit into something: a container's limit of memory, and not what its node happens to have.
fn memory_is_known() -> Rule {
    let limited = |compute: &str| format!("has({compute}.resources.limits) && 'memory' in {compute}.resources.limits");
    Rule::new(format!(
        "![self.strategy.sharding, self.strategy.offload, self.strategy.recompute].exists(c, c == 'auto') || self.stages.all(s, has(s.compute) ? {} : {})",
        limited("s.compute"),
        limited("self.compute")
    ))
    .message("strategy has a setting that is auto, which needs compute.resources.limits.memory, in each stage's own compute too; write how much memory a pod may use, or write the setting")
}

/// Keeps a field as it was when the job was created.
fn immutable(field: &str) -> Rule {
    Rule::new("self == oldSelf").message(fixed(field).as_str())
}

/// As [`immutable`], for a field of the spec that may be absent: a rule that stands at such a field itself is not
/// asked when it is added or taken away.
fn immutable_option(field: &str) -> Rule {
    let has = format!("has(self.{field})");
    let rule = format!("{has} == has(oldSelf.{field}) && (!{has} || self.{field} == oldSelf.{field})");
    Rule::new(rule).message(fixed(field).as_str())
}

fn fixed(field: &str) -> String {
    format!(
        "{field} cannot change once the job exists, only suspend and ttlSecondsAfterFinished can; delete the job and create it again with the new {field}"
    )
}

/// Wherever the condition holds of a stage `s`, the field names a stage of the given kind. The references of
/// each kind of stage lead to another kind only, so the stages cannot form a circle.
fn reference(field: &str, condition: &str, kind: &str) -> Rule {
    Rule::new(format!("self.all(s, !({condition}) || self.exists(o, o.name == s.{field} && has(o.{kind})))"))
}

/// A pretrained model in Hugging Face layout: `config.json`, `model.safetensors` and tokenizer files.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Model {
    /// The model's folder on the job's volume, as `volume://path`.
    #[schemars(regex(pattern = VOLUME_URI_PATTERN), length(max = 512))]
    pub source: String,
}

/// The job's volume.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Storage {
    /// An existing claim that all of the job's pods can mount for writing.
    pub volume_claim: VolumeClaim,
}

/// An existing PersistentVolumeClaim in the job's namespace.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct VolumeClaim {
    /// Its name.
    #[schemars(length(min = 1, max = 253))]
    #[x_kube(validation = Rule::new("!format.dns1123Subdomain().validate(self).hasValue()").message(
        "claimName must be the name of a PersistentVolumeClaim: lower-case letters, digits, '-' and '.', with a letter or digit at each end"
    ))]
    pub claim_name: String,
}

/// Where a stage runs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
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
    #[x_kube(validation = Rule::new("self.matches('^[a-z0-9]([-.a-z0-9]*[a-z0-9])?/[A-Za-z0-9]([-._A-Za-z0-9]*[A-Za-z0-9])?$')").message(
        "deviceResource must be an extended resource's name, such as nvidia.com/gpu or amd.com/gpu"
    ))]
    pub device_resource: String,
    /// The memory of each device, such as `80Gi`, for the plan of a stage. By default the least that the label
    /// `nvidia.com/gpu.memory` tells of the nodes on which the pods may run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32), regex(pattern = r"^[1-9][0-9]*(\.[0-9]+)?(Ki|Mi|Gi|Ti|k|M|G|T)?$"))]
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
        }
    }
}

impl Compute {
    /// Worker processes in each pod: one a device, or [`Compute::cpu_workers_per_node`] on CPU.
    pub fn workers_per_node(&self) -> u32 {
        if self.devices_per_node > 0 { self.devices_per_node } else { self.cpu_workers_per_node }
    }
}

fn one() -> u32 {
    1
}
fn default_device_resource() -> String {
    "nvidia.com/gpu".into()
}

/// Requests and limits, without the claims that would need fields of the pod. The pattern is the one of
/// Kubernetes' own schema tools.
fn resources_schema(_: &mut SchemaGenerator) -> Schema {
    let amounts = |description: &str| {
        json_schema!({
            "description": description,
            "type": "object",
            "maxProperties": 32,
            "additionalProperties": {
                "x-kubernetes-int-or-string": true,
                "maxLength": 64,
                "pattern": r"^(\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))(([KMGTPE]i)|[numkMGTPE]|([eE](\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))))?$",
            },
        })
    };
    json_schema!({
        "type": "object",
        "properties": {
            "requests": amounts("What is set aside for the container; by default as much as its limits."),
            "limits": amounts("The most that the container may use."),
        },
    })
}

/// What a user may add to the pods. It cannot weaken their security context or reach the operator's own fields, and it
/// has no field by which a job would get what its author could not have: no service account, no volumes, no host.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PodTemplate {
    /// Labels, except those that the operator sets.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 64, "additionalProperties" = label_value()))]
    #[x_kube(validation = unreserved_labels())]
    pub labels: BTreeMap<String, String>,
    /// Annotations.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
    /// Nodes on which the pods may run.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 64, "additionalProperties" = label_value()))]
    pub node_selector: BTreeMap<String, String>,
    /// Taints that the pods tolerate.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32))]
    pub tolerations: Vec<Toleration>,
    /// The pods' priority class.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub priority_class_name: Option<String>,
    /// The pods' runtime class.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub runtime_class_name: Option<String>,
    /// Environment variables, except those that the operator sets. By value, or from fields of the pod.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]), validation = unreserved_env(), validation = no_borrowed_env())]
    pub env: Vec<EnvVar>,
}

/// What Kubernetes takes for the value of a label: what is not, it would refuse only in the pods.
fn label_value() -> Schema {
    json_schema!({"type": "string", "maxLength": 63, "pattern": "^([A-Za-z0-9]([-._A-Za-z0-9]*[A-Za-z0-9])?)?$"})
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

/// A program tells of a variable that it cannot use, and a job's status shows what its pods tell: so a reference would
/// let the author of a job read a Secret that is closed to them.
fn no_borrowed_env() -> Rule {
    Rule::new("self.all(e, !has(e.valueFrom) || has(e.valueFrom.fieldRef) || has(e.valueFrom.resourceFieldRef))").message(
        "env takes values, and none from Secrets or ConfigMaps, which the author of a job need not be allowed to read; write the value",
    )
}

/// One stage: a name and exactly one of `sft`, `rewardModel` and `ppo`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[x_kube(
    validation = Rule::new("[has(self.sft), has(self.rewardModel), has(self.ppo)].filter(x, x).size() == 1").message(
        "a stage has exactly one of sft, rewardModel and ppo; make a stage of each"
    ),
    validation = Rule::new("!has(self.ppo) || self.ppo.rolloutBatchSize % self.ppo.batch.globalSize == 0").message(
        "ppo.rolloutBatchSize must be a multiple of ppo.batch.globalSize, the mini-batch; change one of them"
    ),
    validation = Rule::new("!has(self.ppo) || !has(self.ppo.lora) || self.ppo.lora.dropout == 0.0").message(
        "ppo.lora.dropout must be 0: PPO compares probabilities of one policy; leave it out"
    ),
)]
pub struct Stage {
    /// Unique in the job; part of the names of the stage's pods.
    #[schemars(length(min = 1, max = 20), regex(pattern = r"^[a-z]([-a-z0-9]*[a-z0-9])?$"))]
    #[x_kube(validation = Rule::new("self != 'prepare'").message(
        "a stage may not be called prepare, which is the check before the stages; choose another name"
    ))]
    pub name: String,
    /// Supervised fine-tuning.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sft: Option<Sft>,
    /// Reward-model training.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reward_model: Option<RewardModel>,
    /// Proximal policy optimisation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ppo: Option<Ppo>,
    /// Where this stage runs, in place of the job's `compute`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compute: Option<Compute>,
    /// When checkpoints are written.
    #[serde(default)]
    pub checkpoint: CheckpointPolicy,
    /// Seeds every random choice of the stage.
    #[serde(default = "default_seed")]
    #[schemars(range(min = 0, max = 4_294_967_295u32))]
    pub seed: u32,
}

fn default_seed() -> u32 {
    42
}

impl Stage {
    /// The stage's one kind, or `None` for a stage that admission would have refused.
    pub fn kind(&self) -> Option<StageKind> {
        match (&self.sft, &self.reward_model, &self.ppo) {
            (Some(s), None, None) => Some(StageKind::Sft(s.clone())),
            (None, Some(s), None) => Some(StageKind::RewardModel(s.clone())),
            (None, None, Some(s)) => Some(StageKind::Ppo(Box::new(s.clone()))),
            _ => None,
        }
    }
}

/// How many bad ends a stage survives, and what counts as one although no pod has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct FailurePolicy {
    /// Attempts that may follow a failure, for each stage.
    #[serde(default = "default_max_restarts")]
    #[schemars(range(min = 0, max = 100))]
    pub max_restarts: u32,
    /// Attempts that may follow a disruption (preemption, drain, eviction), for each stage.
    #[serde(default = "default_max_disruptions")]
    #[schemars(range(min = 0, max = 800))]
    pub max_disruptions: u32,
    /// An attempt whose pods have not all started after so long is ended as a failure that names what they wait
    /// for: a node, an image, a Secret, quota.
    #[serde(default = "default_startup_deadline")]
    #[schemars(range(min = 1, max = 31_536_000))]
    pub startup_deadline_seconds: u32,
    /// An attempt at a stage that shows no sign of life for so long is restarted; 0: never. Each micro-batch and each token of
    /// a rollout is one. Choose more than what a checkpoint takes. Before an attempt's first figures, while it loads models, the
    /// longer of this and `startupDeadlineSeconds` holds. Prepare makes no steps and is not watched.
    #[serde(default = "default_stall")]
    #[schemars(range(min = 0, max = 31_536_000))]
    pub stall_seconds: u32,
}

fn default_startup_deadline() -> u32 {
    1800
}
fn default_stall() -> u32 {
    900
}
fn default_max_restarts() -> u32 {
    3
}
fn default_max_disruptions() -> u32 {
    100
}

impl Default for FailurePolicy {
    fn default() -> Self {
        Self {
            max_restarts: default_max_restarts(),
            max_disruptions: default_max_disruptions(),
            startup_deadline_seconds: default_startup_deadline(),
            stall_seconds: default_stall(),
        }
    }
}

/// What the job as a whole is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum Phase {
    /// Nothing has been made yet.
    #[default]
    Pending,
    /// Model and data are being checked on CPU.
    Preparing,
    /// Stages run.
    Running,
    /// `spec.suspend` is set and all pods are gone.
    Suspended,
    /// Every stage succeeded. Final.
    Succeeded,
    /// The job gave up. Final.
    Failed,
}

impl Phase {
    /// Whether the phase is final.
    pub fn is_terminal(self) -> bool {
        matches!(self, Phase::Succeeded | Phase::Failed)
    }
}

/// What one stage is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum StagePhase {
    /// Waits for other stages, or for its back-off to end.
    #[default]
    Pending,
    /// An attempt's pods are wanted but not all run yet.
    Starting,
    /// An attempt runs.
    Running,
    /// Finished. Final.
    Succeeded,
    /// Given up. Final.
    Failed,
}

/// What is known about the job.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct RLHFJobStatus {
    /// The generation of the spec that this status speaks of.
    #[serde(default)]
    pub observed_generation: i64,
    /// What the job is doing: one phase at a time.
    #[serde(default)]
    pub phase: Phase,
    /// The stages that run now, by name, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stage: Option<String>,
    /// Progress of the stages that run now, for people, such as `84/200`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<String>,
    /// Restarts of all stages together.
    #[serde(default)]
    pub restarts: u32,
    /// One sentence on where the job is or why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// `Complete`, `Failed` and `Suspended`; `Waiting` while pods cannot start, with the reason, and `QuotaExceeded`
    /// beside it while the reason is a quota; `Stalled` from an attempt's stall until the next makes a step.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
    /// When the first child was made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>", extend("format" = "date-time"))]
    pub start_time: Option<Timestamp>,
    /// When the job succeeded or failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>", extend("format" = "date-time"))]
    pub completion_time: Option<Timestamp>,
    /// Seconds during which the job was active before [`RLHFJobStatus::active_since`].
    #[serde(default, skip_serializing_if = "is_zero")]
    pub active_seconds: u32,
    /// Since when the job is active without a suspension; absent while it is suspended and after its end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>", extend("format" = "date-time"))]
    pub active_since: Option<Timestamp>,
    /// The check of model and data.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prepare: Option<StageStatus>,
    /// What the check found, with which the stages are planned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prepared: Option<Prepared>,
    /// The stages, in the spec's order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub stages: Vec<StageStatus>,
}

impl RLHFJobStatus {
    /// What is known of prepare and of each stage, in this order.
    pub fn slots(&self) -> impl Iterator<Item = &StageStatus> {
        self.prepare.iter().chain(&self.stages)
    }

    /// What is known of the stage with this name, or of prepare.
    pub fn slot(&self, name: &str) -> Option<&StageStatus> {
        self.slots().find(|slot| slot.name == name)
    }
}

/// What is known about one stage (or about prepare).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct StageStatus {
    /// The stage's name.
    pub name: String,
    /// What the stage is doing.
    #[serde(default)]
    pub phase: StagePhase,
    /// The current attempt, from 1; 0 before the first. Written before the attempt's children are made.
    #[serde(default)]
    pub attempt: u32,
    /// Attempts that followed a failure.
    #[serde(default)]
    pub restarts: u32,
    /// Attempts that followed a disruption.
    #[serde(default)]
    pub disruptions: u32,
    /// Attempts that ended by a bug (exit code 70), of which only the first is followed by another attempt.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub bugs: u32,
    /// The next attempt is not made before this time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>", extend("format" = "date-time"))]
    pub not_before: Option<Timestamp>,
    /// Since when the current attempt's pods are to start; absent once all run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>", extend("format" = "date-time"))]
    pub starting_since: Option<Timestamp>,
    /// When the current attempt began to run, or last made a step or told new figures.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>", extend("format" = "date-time"))]
    pub advanced_at: Option<Timestamp>,
    /// How the stage's models are placed, and what that takes: of the current attempt, or of the next.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub plan: Option<StagePlan>,
    /// How far the current attempt is, as rank 0 last told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<Progress>,
    /// The last checkpoint that is whole.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoint: Option<Checkpoint>,
    /// Why the last attempt ended that did not succeed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_failure: Option<Failure>,
    /// At success: where the model is, and the final figures.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output: Option<Output>,
}

/// How a stage's models are placed, and what that takes.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct StagePlan {
    /// The strategy that the attempt's ranks are given.
    pub strategy: Strategy,
    /// Where it comes from.
    pub source: PlanSource,
    /// Bytes that it takes on each device at its peak; where the CPU computes, of each rank beside `hostBytes`.
    pub device_bytes: u64,
    /// Bytes of tensors that it takes on each host.
    pub host_bytes: u64,
    /// Bytes that each device has, where it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device_memory_bytes: Option<u64>,
    /// Bytes that a pod may use on each host, where it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_memory_bytes: Option<u64>,
}

/// Where a strategy comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum PlanSource {
    /// It is written in the spec.
    Spec,
    /// It is the fastest that fits of what the spec leaves open.
    Auto,
    /// Memory ran out in spite of the plan before, so it is the next that takes less.
    MoreFrugal,
}

fn is_zero(n: &u32) -> bool {
    *n == 0
}

/// Why an attempt ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Failure {
    /// The attempt that ended.
    pub attempt: u32,
    /// The container's exit code, where there was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub code: Option<i32>,
    /// One CamelCase word: an exit code's reason, or such as `OOMKilled`, `Killed`, `Disrupted`, `NodeLost`,
    /// `StartupDeadlineExceeded` and `Stalled`.
    pub reason: String,
    /// The pod whose end decided.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<String>,
    /// The node on which it ran.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// The rank that ended first with an error.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rank: Option<u32>,
    /// What was wrong, where, and what to do.
    #[serde(default)]
    pub message: String,
    /// When it was seen.
    #[schemars(with = "String", extend("format" = "date-time"))]
    pub at: Timestamp,
}

/// The custom resource definition as it is installed.
pub fn crd() -> CustomResourceDefinition {
    let mut crd = RLHFJob::crd();
    let schemas = crd.spec.versions.iter_mut().filter_map(|v| v.schema.as_mut()?.open_api_v3_schema.as_mut());
    schemas.for_each(tidy);
    crd
}

/// Takes out of a schema what the API server should not see: the formats of unsigned integers, which it warns
/// of (`minimum` says as much), and `nullable`, without which a null counts as absent, so that a stage with
/// `sft: null` has no `sft`.
fn tidy(schema: &mut JSONSchemaProps) {
    schema.format.take_if(|format| format.starts_with("uint"));
    schema.nullable = None;
    schema.properties.iter_mut().flat_map(|p| p.values_mut()).for_each(tidy);
    if let Some(JSONSchemaPropsOrArray::Schema(items)) = &mut schema.items {
        tidy(items);
    }
    if let Some(JSONSchemaPropsOrBool::Schema(values)) = &mut schema.additional_properties {
        tidy(values);
    }
}

impl RLHFJob {
    /// Where a stage runs: where it says itself, or where every stage does.
    pub fn compute<'a>(&'a self, stage: &'a Stage) -> &'a Compute {
        stage.compute.as_ref().unwrap_or(&self.spec.compute)
    }

    /// The names of the stages whose outputs `stage` needs.
    pub fn needs(stage: &Stage) -> Vec<String> {
        stage.kind().map(|k| names::needs(&k).into_iter().map(String::from).collect()).unwrap_or_default()
    }
}

//! What is known about a job, written by the operator alone.

use crate::report::{Checkpoint, Output, Prepared, Progress};
use crate::stage::Strategy;
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What the job as a whole is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum Phase {
    /// Nothing has been made yet.
    #[default]
    Pending,
    /// Model and data are being checked on CPU.
    Preparing,
    /// An attempt is to run, and waits: for nodes, a queue, a quota, its back-off.
    Waiting,
    /// An attempt at a stage runs.
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
    /// Stopped, or never begun, because the job failed elsewhere. Final.
    Stopped,
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
    /// The figure by which people judge the stage that runs, such as `loss 2.31` or `reward 0.84`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub figure: Option<String>,
    /// Tokens a second of the stage that runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens_per_second: Option<u64>,
    /// How long the stage that runs still takes at its present pace, such as `1h20m`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eta: Option<String>,
    /// Restarts of all stages together.
    #[serde(default)]
    pub restarts: u32,
    /// Disruptions of all stages together.
    #[serde(default)]
    pub disruptions: u32,
    /// One sentence on where the job is or why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// From the first write on: `Complete`, `Failed` and `Suspended`; `Waiting` while an attempt cannot start, with the reason,
    /// and `QuotaExceeded` beside it while the reason is a quota; `AttemptStalled` from an attempt's stall until the next makes
    /// a step; `Unsupported` where the operator does not know what the job asks for; and for tools that know no RLHFJobs
    /// `Reconciling` until the job's end, and `Stalled` exactly where it failed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
    /// The images that the job's pods run, pinned when it starts, so that another version of the operator changes no job
    /// that runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub images: Option<Images>,
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
    /// When its first attempt was made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>", extend("format" = "date-time"))]
    pub start_time: Option<Timestamp>,
    /// When it succeeded or failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>", extend("format" = "date-time"))]
    pub completion_time: Option<Timestamp>,
    /// Attempts that followed a failure.
    #[serde(default)]
    pub restarts: Restarts,
    /// Attempts that followed a disruption.
    #[serde(default)]
    pub disruptions: u32,
    /// The last attempts in a row that made no step beyond `furthestStep`: each doubles the wait after a disruption.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub fruitless: u32,
    /// The furthest step that an attempt which has ended had made, but for steps whose checkpoint was lost since.
    #[serde(default, skip_serializing_if = "is_zero_step")]
    pub furthest_step: u64,
    /// Attempts that ended by a bug (exit code 70), of which only the first is followed by another attempt.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub bugs: u32,
    /// The next attempt is not made before this time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>", extend("format" = "date-time"))]
    pub not_before: Option<Timestamp>,
    /// When the current attempt was given its number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>", extend("format" = "date-time"))]
    pub attempt_start: Option<Timestamp>,
    /// Since when the current attempt waits for what others have to give: nodes, a quota, a permission, its turn in a queue.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>", extend("format" = "date-time"))]
    pub pending_since: Option<Timestamp>,
    /// Since when the current attempt's pods are to start and could; absent once all run.
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
    /// The last attempts that ended, at most [`MAX_ATTEMPTS`], the latest last.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub attempts: Vec<AttemptRecord>,
    /// Why the last attempt ended that did not succeed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_failure: Option<Failure>,
    /// At success: where the model is, and the final figures.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output: Option<Output>,
}

/// How many attempts that ended a status tells of.
pub const MAX_ATTEMPTS: usize = 5;

/// The images of a job's pods.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Images {
    /// Of prepare and the trainers: with its digest where the registry gave one.
    pub trainer: String,
}

/// Attempts that followed a failure.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Restarts {
    /// Since the stage last made `failurePolicy.progressSteps` steps; `failurePolicy.maxRestarts` bounds these.
    #[serde(default)]
    pub since_progress: u32,
    /// Of the whole stage.
    #[serde(default)]
    pub total: u32,
    /// The step from which the progress of `failurePolicy.progressSteps` is counted.
    #[serde(default, skip_serializing_if = "is_zero_step")]
    pub from_step: u64,
}

fn is_zero_step(n: &u64) -> bool {
    *n == 0
}

/// An attempt that ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AttemptRecord {
    /// Its number, from 1.
    pub number: u32,
    /// When it was made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>", extend("format" = "date-time"))]
    pub start: Option<Timestamp>,
    /// When its end was seen.
    #[schemars(with = "String", extend("format" = "date-time"))]
    pub end: Timestamp,
    /// `Done`, or the reason of its failure or disruption.
    pub reason: String,
    /// The node of the pod whose end decided.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// The last step that it is known to have finished.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub step: Option<u64>,
    /// With what it ran.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub strategy: Option<Strategy>,
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

//! What is done about an attempt that ends badly, or does not go on.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How many bad ends a stage survives, and what counts as one although no pod has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct FailurePolicy {
    /// Attempts that may follow a failure, for each stage, since it last made `progressSteps` steps.
    #[serde(default = "default_max_restarts")]
    #[schemars(range(min = 0, max = 100))]
    pub max_restarts: u32,
    /// After so many steps (PPO: iterations) beyond those of the attempts before, restarts are counted anew.
    #[serde(default = "default_progress_steps")]
    #[schemars(range(min = 1, max = 1_000_000_000))]
    pub progress_steps: u32,
    /// Attempts that may follow a disruption (preemption, drain, eviction), for each stage.
    #[serde(default = "default_max_disruptions")]
    #[schemars(range(min = 0, max = 800))]
    pub max_disruptions: u32,
    /// An attempt whose pods have nodes and have not all started after so long is ended as a failure that names what they
    /// wait for: an image, a Secret, a volume.
    #[serde(default = "default_startup_deadline")]
    #[schemars(range(min = 1, max = 31_536_000))]
    pub startup_deadline_seconds: u32,
    /// An attempt whose pods wait so long for nodes, a queue, a quota or a policy fails the job. By default it waits for ever, since
    /// waiting for room is no failure.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 315_360_000))]
    pub pending_timeout_seconds: Option<u32>,
    /// An attempt whose trainer answers but has not gone on for so long is restarted; 0: never. Each micro-batch and each token
    /// of a rollout is a sign of life. Choose more than what a checkpoint takes. Before an attempt's first figures, while it
    /// loads models, the longer of this and `startupDeadlineSeconds` holds. A trainer that does not answer is its kubelet's
    /// to restart.
    #[serde(default = "default_stall")]
    #[schemars(range(min = 0, max = 31_536_000))]
    pub stall_seconds: u32,
    /// Gives up pods that their node does not end, although nothing proves that they have: the next attempt starts beside what
    /// may still run on a node that is cut off. Without it that waits until the node is gone, or has the taint
    /// `node.kubernetes.io/out-of-service`.
    #[serde(default)]
    pub force_delete_lost_pods: bool,
}

fn default_startup_deadline() -> u32 {
    1800
}
fn default_progress_steps() -> u32 {
    10
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
            progress_steps: default_progress_steps(),
            startup_deadline_seconds: default_startup_deadline(),
            pending_timeout_seconds: None,
            stall_seconds: default_stall(),
            force_delete_lost_pods: false,
        }
    }
}

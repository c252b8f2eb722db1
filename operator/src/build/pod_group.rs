//! The PodGroup of one attempt (KEP-4671): the scheduler gives nodes to all pods of a gang or to none.
//!
//! Without it two gangs that both have a part of their pods placed wait for each other for ever, and hold the devices
//! of the pods that are placed. It is of use only where the cluster's scheduler knows groups, so it is off by default.

use super::{Attempt, Task, attempt_labels, metadata};
use k8s_openapi::api::core::v1::PodSchedulingGroup;
use k8s_openapi::api::scheduling::v1beta1::{
    AllDisruptionMode, DisruptionMode, GangSchedulingPolicy, PodGroup, PodGroupSchedulingPolicy, PodGroupSpec,
};
use kube::ResourceExt;
use rlhf_api::job::{Compute, RLHFJob};
use rlhf_api::names;

/// A pod alone is no gang.
pub(super) fn build(job: &RLHFJob, task: Task<'_>, attempt: Attempt) -> Option<PodGroup> {
    let compute = task.compute(job);
    (compute.nodes > 1).then(|| PodGroup {
        metadata: metadata(job, name(job, task, attempt.number), attempt_labels(job, task, attempt)),
        spec: PodGroupSpec {
            scheduling_policy: PodGroupSchedulingPolicy {
                gang: Some(GangSchedulingPolicy { min_count: i32::try_from(compute.nodes).unwrap_or(i32::MAX) }),
                ..Default::default()
            },
            // A gang that loses a pod is lost, so that preempting one is preempting all.
            disruption_mode: Some(DisruptionMode {
                all: Some(AllDisruptionMode(serde_json::json!({}))),
                ..Default::default()
            }),
            priority_class_name: compute.pod_template.priority_class_name,
            ..Default::default()
        },
        ..Default::default()
    })
}

/// The name is the attempt's own: pods of a later attempt are no part of an earlier one's gang.
fn name(job: &RLHFJob, task: Task<'_>, attempt: u32) -> String {
    names::attempt(&job.name_any(), task.name(), attempt)
}

/// What a pod of the group says.
pub(super) fn membership(
    job: &RLHFJob,
    task: Task<'_>,
    attempt: Attempt,
    compute: &Compute,
) -> Option<PodSchedulingGroup> {
    let member = || PodSchedulingGroup { pod_group_name: Some(name(job, task, attempt.number)) };
    (compute.nodes > 1).then(member)
}

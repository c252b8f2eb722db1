//! The PodGroup of one attempt (KEP-4671): the scheduler gives nodes to all pods of a gang or to none.
//!
//! Without it two gangs that both have a part of their pods placed wait for each other for ever, and hold the devices
//! of the pods that are placed. It is of use only where the cluster's scheduler knows groups, so it is off by default.

use super::{Attempt, Settings, Task, attempt_labels, attempt_name, metadata};
use k8s_openapi::api::core::v1::PodSchedulingGroup;
use k8s_openapi::api::scheduling::v1beta1::{
    AllDisruptionMode, DisruptionMode, GangSchedulingPolicy, PodGroup, PodGroupSchedulingPolicy, PodGroupSpec,
};
use rlhf_api::job::{Compute, RLHFJob};

/// The group that an attempt has, if any.
pub(super) fn build(job: &RLHFJob, task: Task<'_>, attempt: Attempt, settings: &Settings) -> Option<PodGroup> {
    let compute = task.compute(job);
    let name = gang(job, task, attempt, &compute, settings)?;
    Some(PodGroup {
        metadata: metadata(job, name, attempt_labels(job, task, attempt)),
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

/// What a pod of the group says.
pub(super) fn membership(
    job: &RLHFJob,
    task: Task<'_>,
    attempt: Attempt,
    compute: &Compute,
    settings: &Settings,
) -> Option<PodSchedulingGroup> {
    let pod_group_name = Some(gang(job, task, attempt, compute, settings)?);
    Some(PodSchedulingGroup { pod_group_name })
}

/// The name of the attempt's gang; a pod alone is none. It is the attempt's own: pods of a later attempt are no part of an
/// earlier one's gang.
fn gang(job: &RLHFJob, task: Task<'_>, attempt: Attempt, compute: &Compute, settings: &Settings) -> Option<String> {
    let is_gang = settings.gang_scheduling && compute.nodes > 1;
    is_gang.then(|| attempt_name(job, task, attempt.number))
}

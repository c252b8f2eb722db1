//! Deletions, each of the very object that was seen.

use super::error::Error;
use crate::classify::NODE_LOST;
use crate::context::Context;
use crate::decide::{JobRef, PodRef};
use jiff::Timestamp;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::api::{DeleteParams, Patch, PatchParams, Preconditions};
use kube::{Api, ResourceExt};
use rlhf_api::job::RLHFJob;
use rlhf_api::names::FIELD_MANAGER;
use serde_json::json;

/// Deletes the job itself as it was looked at, and not one whose `ttlSecondsAfterFinished` was raised meanwhile or
/// that has only its name. It stays until its children are gone.
pub(super) async fn expired(job: &RLHFJob, ctx: &Context) -> Result<(), Error> {
    let name = job.name_any();
    let only_this = Preconditions { uid: job.uid(), resource_version: job.resource_version() };
    let api: Api<RLHFJob> = ctx.api(job);
    match ctx.metrics.api("delete", api.delete(&name, &DeleteParams::foreground().preconditions(only_this)).await) {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(s)) if s.is_conflict() => Err(Error::Stale),
        Err(kube::Error::Api(s)) if s.is_not_found() => Err(Error::Gone),
        Err(source) => Err(Error::Api { what: format!("the deletion of RLHFJob {name}"), source }),
    }
}

/// Deletes a Job in the foreground: it stays until its pods are gone, and so stands for them. Whether it was as the
/// decision wants it; one that was not stays.
pub(super) async fn attempt(job: &RLHFJob, child: &JobRef, ctx: &Context) -> Result<bool, Error> {
    let JobRef { name, uid, version } = child;
    let only_this = Preconditions { uid: Some(uid.clone()), resource_version: version.clone() };
    let api: Api<Job> = ctx.api(job);
    match ctx.metrics.api("delete", api.delete(name, &DeleteParams::foreground().preconditions(only_this)).await) {
        Ok(_) => Ok(true),
        Err(kube::Error::Api(s)) if s.is_not_found() => Ok(true),
        Err(kube::Error::Api(s)) if s.is_conflict() => Ok(false),
        Err(source) => Err(Error::Api { what: format!("the deletion of Job {name}"), source }),
    }
}

/// Declares a pod failed and removes it, as Kubernetes' pod garbage collector does with those of nodes that it knows
/// to be gone: a pod that has not failed the Job controller would go on waiting for.
pub(super) async fn lost(job: &RLHFJob, pod: &PodRef, ctx: &Context) -> Result<(), Error> {
    let PodRef { name, uid, node } = pod;
    let message = format!("node {} did not end the pod in time", node.as_deref().unwrap_or("-"));
    let condition = json!({"type": "DisruptionTarget", "status": "True", "reason": NODE_LOST, "message": message,
        "lastTransitionTime": Time(Timestamp::now())});
    let failed = json!({"metadata": {"uid": uid}, "status": {"phase": "Failed", "conditions": [condition]}});
    let api: Api<Pod> = ctx.api(job);
    let params = PatchParams { field_manager: Some(FIELD_MANAGER.into()), ..Default::default() };
    match ctx.metrics.api("patch", api.patch_status(name, &params, &Patch::Strategic(failed)).await) {
        Ok(_) => {}
        Err(kube::Error::Api(s)) if s.is_not_found() || s.is_conflict() => return Ok(()),
        Err(source) => return Err(Error::Api { what: format!("the status of pod {name}"), source }),
    }
    self::pod(job, pod, DeleteParams::default().grace_period(0), ctx).await
}

/// Deletes a pod that no Job stands for, and no other of its name.
pub(super) async fn pod(job: &RLHFJob, pod: &PodRef, how: DeleteParams, ctx: &Context) -> Result<(), Error> {
    let PodRef { name, uid, .. } = pod;
    let only_this = Preconditions { uid: Some(uid.clone()), ..Default::default() };
    let api: Api<Pod> = ctx.api(job);
    match ctx.metrics.api("delete", api.delete(name, &how.preconditions(only_this)).await) {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(s)) if s.is_not_found() || s.is_conflict() => Ok(()),
        Err(source) => Err(Error::Api { what: format!("the removal of pod {name}"), source }),
    }
}

//! All writes of a pass, in the one order that survives a crash between any two: status first, under the resource
//! version that was looked at, then the events that tell of it, then deletions, and last what is made.
//!
//! The status, which has one writer, is replaced. Children are created, not applied over: creation is the one write that
//! cannot touch an object that somebody else has put under the same name. But for the rules of a NetworkPolicy, which are
//! applied with the object's UID as precondition, a child is never changed. A Job least of all: whoever queues Jobs
//! writes to them.

#[cfg(test)]
mod tests;

use crate::build::{Children, KeySecret};
use crate::classify::NODE_LOST;
use crate::context::Context;
use crate::decide::{Decision, JobRef, Notice, PodRef};
use crate::metrics::Reason;
use crate::observe::is_owned;
use jiff::Timestamp;
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{ConfigMap, ObjectReference, Pod, Secret};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::scheduling::v1beta1::PodGroup;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams, Preconditions};
use kube::core::Status;
use kube::runtime::events::{self, EventType, Recorder};
use kube::{Api, Resource, ResourceExt};
use rlhf_api::job::{RLHFJob, StageStatus};
use rlhf_api::names::{self, FIELD_MANAGER};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::json;

/// A write that failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// What was decided is out of date; the next pass decides anew.
    #[error("the job or a child of it changed meanwhile")]
    Stale,
    /// The RLHFJob is gone.
    #[error("the job is gone")]
    Gone,
    /// Somebody else's object has a child's name.
    #[error("{what} exists and belongs to {owner}; delete or rename it, or give this RLHFJob another name")]
    Foreign {
        /// The object.
        what: String,
        /// Its owner.
        owner: String,
    },
    /// The API server refuses a child.
    #[error("{what} is refused by the API server: {}", status.message)]
    Refused {
        /// The child.
        what: String,
        /// The answer.
        status: Box<Status>,
    },
    /// Any other answer, or none.
    #[error("cannot write {what}: {source}")]
    Api {
        /// What was written.
        what: String,
        /// The answer.
        source: kube::Error,
    },
}

impl Error {
    /// Whether the write cannot succeed for what the job says.
    pub fn is_permanent(&self) -> bool {
        matches!(self, Error::Refused { status, .. } if status.is_invalid())
    }
}

/// Writes a decision. `Ok(false)` means that all was written but what the API server refused, which the context's
/// [`Retries`](crate::retries::Retries) know.
pub async fn apply(job: &RLHFJob, decision: &Decision, ctx: &Context) -> Result<bool, Error> {
    let Decision { status: _, delete, orphans, lost, make, notices, outcomes, expired, requeue: _ } = decision;
    write_status(job, decision, ctx).await?;
    ctx.metrics.status_written(job, &decision.status);
    for outcome in outcomes {
        ctx.metrics.attempt_ended(*outcome);
    }
    for notice in notices {
        publish(job, notice, ctx).await;
    }
    let mut all_as_seen = true;
    for child in delete {
        still_leads(ctx)?;
        all_as_seen &= delete_job(job, child, ctx).await?;
    }
    for pod in orphans {
        still_leads(ctx)?;
        delete_pod(job, pod, DeleteParams::default(), ctx).await?;
    }
    for pod in lost {
        still_leads(ctx)?;
        remove_lost(job, pod, ctx).await?;
    }
    let mut all_taken = true;
    for children in make {
        still_leads(ctx)?;
        let Some(slot) = decision.status.slot(&children.stage) else { continue };
        match make_children(job, children, ctx).await {
            Err(error @ (Error::Foreign { .. } | Error::Refused { .. })) => {
                all_taken = false;
                refused(job, slot, &error, ctx);
            }
            other => {
                other?;
                ctx.retries.made(job, &children.stage);
                ctx.metrics.attempt_made(job, slot);
            }
        }
    }
    if *expired {
        still_leads(ctx)?;
        delete_expired(job, ctx).await?;
    }
    if all_as_seen { Ok(all_taken) } else { Err(Error::Stale) }
}

/// Keeps why a stage's children could not be made for the next pass, which tells it in status.
fn refused(job: &RLHFJob, slot: &StageStatus, error: &Error, ctx: &Context) {
    ctx.metrics.failed(Reason::Blocked);
    ctx.retries.refused(job, slot, error.to_string(), error.is_permanent());
}

/// Another may lead by now where this process was stopped, or the API server was slow, in the middle of a decision.
fn still_leads(ctx: &Context) -> Result<(), Error> {
    if ctx.leadership.holds() { Ok(()) } else { Err(Error::Stale) }
}

/// Deletes the job itself as it was looked at, and not one whose `ttlSecondsAfterFinished` was raised meanwhile or
/// that has only its name. It stays until its children are gone.
async fn delete_expired(job: &RLHFJob, ctx: &Context) -> Result<(), Error> {
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

async fn write_status(job: &RLHFJob, decision: &Decision, ctx: &Context) -> Result<(), Error> {
    if job.status.as_ref() == Some(&decision.status) {
        return Ok(());
    }
    let name = job.name_any();
    let body = json!({
        "apiVersion": RLHFJob::api_version(&()),
        "kind": RLHFJob::kind(&()),
        // The resource version makes a status that was decided from an old one fail.
        "metadata": {"name": name, "namespace": job.namespace(), "resourceVersion": job.resource_version()},
        "status": decision.status,
    });
    let api: Api<RLHFJob> = ctx.api(job);
    // An apply would be more work: who owns which field is of no use where there is one writer.
    match ctx.metrics.api("update", api.replace_subresource("status", &name, &written(), &body).await) {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(s)) if s.is_conflict() => Err(Error::Stale),
        Err(kube::Error::Api(s)) if s.is_not_found() => Err(Error::Gone),
        Err(source) => Err(Error::Api { what: format!("the status of RLHFJob {name}"), source }),
    }
}

/// Deletes a Job in the foreground: it stays until its pods are gone, and so stands for them. Whether it was as the
/// decision wants it; one that was not stays.
async fn delete_job(job: &RLHFJob, child: &JobRef, ctx: &Context) -> Result<bool, Error> {
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
async fn remove_lost(job: &RLHFJob, pod: &PodRef, ctx: &Context) -> Result<(), Error> {
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
    delete_pod(job, pod, DeleteParams::default().grace_period(0), ctx).await
}

/// Deletes a pod that no Job stands for, and no other of its name.
async fn delete_pod(job: &RLHFJob, pod: &PodRef, how: DeleteParams, ctx: &Context) -> Result<(), Error> {
    let PodRef { name, uid, .. } = pod;
    let only_this = Preconditions { uid: Some(uid.clone()), ..Default::default() };
    let api: Api<Pod> = ctx.api(job);
    match ctx.metrics.api("delete", api.delete(name, &how.preconditions(only_this)).await) {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(s)) if s.is_not_found() || s.is_conflict() => Ok(()),
        Err(source) => Err(Error::Api { what: format!("the removal of pod {name}"), source }),
    }
}

/// Makes an attempt: what its pods need first, the Job last.
async fn make_children(job: &RLHFJob, children: &Children, ctx: &Context) -> Result<(), Error> {
    let Children { stage, first, network_policy, secret, config_map, service, pod_group, job: attempt } = children;
    if let Some(policy) = network_policy
        && let Some(old) = ensure(job, policy, *first && stage == names::PREPARE, ctx).await?
        && old.spec != policy.spec
    {
        change_policy(job, &old, policy, ctx).await?;
    }
    if let Some(KeySecret(secret)) = secret {
        make_secret(job, secret, ctx).await?;
    }
    if let Some(old) = ensure(job, config_map, *first, ctx).await?
        && old.data != config_map.data
    {
        replace_config(job, &old, config_map, ctx).await?;
    }
    if let Some(service) = service {
        ensure(job, service, *first, ctx).await?;
    }
    if let Some(group) = pod_group {
        remove_other_groups(job, group, ctx).await?;
        ensure(job, group, *first, ctx).await?;
    }
    ensure(job, attempt, *first, ctx).await?;
    Ok(())
}

/// Removes the groups of a stage's other attempts: no pod of theirs runs when one is made.
async fn remove_other_groups(job: &RLHFJob, group: &PodGroup, ctx: &Context) -> Result<(), Error> {
    let own = |label: &str| group.labels().get(label).cloned().unwrap_or_default();
    let attempt = own(names::LABEL_ATTEMPT);
    if attempt == "1" {
        return Ok(());
    }
    let of_stage = [names::LABEL_JOB_UID, names::LABEL_STAGE].map(|label| format!("{label}={}", own(label))).join(",");
    let others = ListParams::default().labels(&format!("{of_stage},{}!={attempt}", names::LABEL_ATTEMPT));
    let api: Api<PodGroup> = ctx.api(job);
    let deleted =
        ctx.metrics.api("deletecollection", api.delete_collection(&DeleteParams::background(), &others).await);
    deleted.map(drop).map_err(|error| failed("the deletion of other attempts' PodGroups".into(), error))
}

/// The operator's settings were others when the policy was made.
async fn change_policy(job: &RLHFJob, old: &NetworkPolicy, new: &NetworkPolicy, ctx: &Context) -> Result<(), Error> {
    let name = old.name_any();
    let body = json!({
        "apiVersion": NetworkPolicy::api_version(&()),
        "kind": NetworkPolicy::kind(&()),
        "metadata": {"name": name, "uid": old.uid()},
        "spec": new.spec,
    });
    let api: Api<NetworkPolicy> = ctx.api(job);
    let params = PatchParams::apply(FIELD_MANAGER).force();
    match ctx.metrics.api("patch", api.patch(&name, &params, &Patch::Apply(body)).await) {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(s)) if s.is_not_found() || s.is_conflict() => Err(Error::Stale),
        Err(error) => Err(failed(title(new), error)),
    }
}

/// The operator may create Secrets and read none. One that is there is the job's own: nobody else knows its name
/// before it is made.
async fn make_secret(job: &RLHFJob, secret: &Secret, ctx: &Context) -> Result<(), Error> {
    match create(job, secret, ctx).await {
        Err(Error::Stale) => Ok(()),
        other => other,
    }
}

/// A config that another version of the operator wrote. It is immutable, and no pod of the stage reads it now.
async fn replace_config(job: &RLHFJob, old: &ConfigMap, new: &ConfigMap, ctx: &Context) -> Result<(), Error> {
    let name = old.name_any();
    let only_this = Preconditions { uid: old.uid(), ..Default::default() };
    let api: Api<ConfigMap> = ctx.api(job);
    let deleted =
        ctx.metrics.api("delete", api.delete(&name, &DeleteParams::background().preconditions(only_this)).await);
    match deleted {
        Ok(_) => create(job, new, ctx).await,
        Err(kube::Error::Api(s)) if s.is_not_found() => create(job, new, ctx).await,
        Err(kube::Error::Api(s)) if s.is_conflict() => Err(Error::Stale),
        Err(error) => Err(failed(format!("the deletion of ConfigMap {name}"), error)),
    }
}

/// Creates a child unless it is there, and returns the one that was; it is looked for before, unless it is `new`. One of
/// somebody else is left alone.
async fn ensure<K>(job: &RLHFJob, child: &K, new: bool, ctx: &Context) -> Result<Option<K>, Error>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
        + Serialize
        + DeserializeOwned
        + Clone
        + std::fmt::Debug,
{
    if new {
        match create(job, child, ctx).await {
            Err(Error::Stale) => {}
            other => return other.map(|()| None),
        }
    }
    let api: Api<K> = ctx.api(job);
    let found = ctx.metrics.api("get", api.get_opt(&child.name_any()).await);
    match found.map_err(|source| Error::Api { what: title(child), source })? {
        None => create(job, child, ctx).await.map(|()| None),
        // It will be made anew once it is gone.
        Some(there) if there.meta().deletion_timestamp.is_some() => Err(Error::Stale),
        Some(there) if is_owned(&there, job) => Ok(Some(there)),
        Some(there) => Err(Error::Foreign { what: title(child), owner: owner(&there) }),
    }
}

async fn create<K>(job: &RLHFJob, child: &K, ctx: &Context) -> Result<(), Error>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
        + Serialize
        + DeserializeOwned
        + Clone
        + std::fmt::Debug,
{
    let api: Api<K> = ctx.api(job);
    match ctx.metrics.api("create", api.create(&written(), child).await) {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(s)) if s.is_already_exists() => Err(Error::Stale),
        Err(error) => Err(failed(title(child), error)),
    }
}

/// What could not be written of a stage's objects.
fn failed(what: String, error: kube::Error) -> Error {
    match error {
        kube::Error::Api(status) if is_refusal(&status) => Error::Refused { what, status },
        source => Error::Api { what, source },
    }
}

/// Says who writes.
fn written() -> PostParams {
    PostParams { field_manager: Some(FIELD_MANAGER.into()), ..Default::default() }
}

/// Answers that stay the same until somebody changes something: invalid, forbidden, denied by a policy or a quota, or an
/// admission webhook that cannot be called.
fn is_refusal(status: &Status) -> bool {
    let no_webhook = status.code == 500 && status.message.contains("failed calling webhook");
    no_webhook || matches!(status.code, 400..500) && !matches!(status.code, 401 | 404 | 408 | 409 | 429)
}

fn title<K: Resource<DynamicType = ()>>(object: &K) -> String {
    format!("{} {}", K::kind(&()), object.name_any())
}

fn owner(object: &impl Resource) -> String {
    let owners = object.meta().owner_references.iter().flatten();
    owners.map(|o| format!("{} {}", o.kind, o.name)).next().unwrap_or_else(|| "somebody else".into())
}

/// Logs what happened and publishes it. An event that is lost is logged and no more: status is the truth.
async fn publish(job: &RLHFJob, notice: &Notice, ctx: &Context) {
    let Notice { event, note, about } = notice;
    tracing::info!(job = job.name_any(), namespace = job.namespace(), event = event.reason(), "{note}");
    let secondary = about.as_ref().map(|name| ObjectReference {
        api_version: Some(Job::api_version(&()).into_owned()),
        kind: Some(Job::kind(&()).into_owned()),
        name: Some(name.clone()),
        namespace: job.namespace(),
        ..Default::default()
    });
    let is_warning = event.is_warning();
    let event = events::Event {
        type_: if is_warning { EventType::Warning } else { EventType::Normal },
        reason: event.reason().into(),
        note: Some(note.clone()),
        action: "Reconcile".into(),
        secondary,
    };
    // A recorder keeps for minutes what it has sent, to count repetitions. What goes well is told once anyhow.
    let recorder =
        if is_warning { ctx.recorder.clone() } else { Recorder::new(ctx.client.clone(), FIELD_MANAGER.into()) };
    if let Err(error) = ctx.metrics.api("create", recorder.publish(&event, &job.object_ref(&())).await) {
        tracing::warn!(%error, reason = event.reason, "an event was lost");
    }
}

//! Makes what does not exist yet: of an attempt what its pods need, all at once, and last its Job.
//!
//! What is there already is the job's own by its owner, or is left alone. What becomes of the job's own, each child says
//! itself ([`Upgrade`]).

use super::error::Error;
use crate::build::{Child, Children, Upgrade};
use crate::context::Context;
use axum::http::Request;
use futures::future::join_all;
use k8s_openapi::api::scheduling::v1beta1::PodGroup;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{DeleteParams, DynamicObject, GetParams, ListParams, Patch, PatchParams, PostParams};
use kube::core::{Request as Requests, Resource};
use kube::{Api, ResourceExt};
use rlhf_api::job::RLHFJob;
use rlhf_api::names::{self, FIELD_MANAGER};
use serde::Deserialize;
use serde_json::Value;

/// What is looked at of a child that is there.
#[derive(Debug, Default, Deserialize)]
struct There {
    #[serde(default)]
    metadata: ObjectMeta,
    #[serde(default)]
    spec: Value,
}

impl There {
    fn is_of(&self, job: &RLHFJob) -> bool {
        let owners = self.metadata.owner_references.iter().flatten();
        owners.into_iter().any(|owner| owner.controller == Some(true) && Some(&owner.uid) == job.metadata.uid.as_ref())
    }

    fn owner(&self) -> String {
        let mut owners = self.metadata.owner_references.iter().flatten();
        owners.next().map_or_else(|| "somebody else".into(), |owner| format!("{} {}", owner.kind, owner.name))
    }
}

/// Makes an attempt.
pub(super) async fn make(job: &RLHFJob, children: &Children, ctx: &Context) -> Result<(), Error> {
    let first = children.first;
    if let Some(group) = &children.pod_group {
        remove_other_groups(job, group, ctx).await?;
    }
    let needed = children.needed().map_err(|source| json("what the attempt needs", source))?;
    let made = join_all(needed.iter().map(|child| Writer { job, child, ctx }.ensure(first))).await;
    made.into_iter().collect::<Result<(), _>>()?;
    let attempt = children.attempt().map_err(|source| json("the attempt", source))?;
    Writer { job, child: &attempt, ctx }.ensure(first).await
}

fn json(what: &str, source: serde_json::Error) -> Error {
    Error::Json { what: what.into(), source }
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
    deleted.map(drop).map_err(|error| Error::of("the deletion of other attempts' PodGroups".into(), error))
}

/// Writes one child. Of answers no more is decoded than what is looked at.
#[derive(Clone, Copy)]
pub(super) struct Writer<'a> {
    pub job: &'a RLHFJob,
    pub child: &'a Child,
    pub ctx: &'a Context,
}

impl Writer<'_> {
    /// Sees to it that the child is there. It is looked for before it is made, unless it is the `first` of its stage and not
    /// known to be made for another.
    async fn ensure(self, first: bool) -> Result<(), Error> {
        let Self { job, child, ctx } = self;
        let tag = child.shared.then(|| child.tag());
        let known = first && tag.is_some_and(|tag| ctx.known.is_made(job, tag));
        if known && child.upgrade == Upgrade::Unread {
            return Ok(());
        }
        let blindly = match child.upgrade {
            Upgrade::Unread => true,
            Upgrade::Apply => false,
            Upgrade::Keep => first && !known,
        };
        let made = blindly && self.create(false).await?;
        if !made && child.upgrade != Upgrade::Unread {
            self.look_and_write().await?;
        }
        if let Some(tag) = tag {
            ctx.known.made(job, tag);
        }
        Ok(())
    }

    async fn look_and_write(&self) -> Result<(), Error> {
        let Self { job, child, .. } = *self;
        let there = self.look().await?;
        match (there, child.upgrade) {
            (Some(there), _) if there.metadata.deletion_timestamp.is_some() => Err(Error::Leaving(child.title())),
            (Some(there), _) if !there.is_of(job) => Err(Error::Foreign { what: child.title(), owner: there.owner() }),
            (Some(there), Upgrade::Apply) if there.spec != child.body["spec"] => self.apply(there.metadata.uid).await,
            (Some(_), _) => Ok(()),
            (None, Upgrade::Apply) => self.apply(None).await,
            (None, _) => self.must_create().await,
        }
    }

    async fn must_create(&self) -> Result<(), Error> {
        // Somebody was faster than between a look and a write; it will be looked at anew.
        if self.create(false).await? { Ok(()) } else { Err(Error::Stale) }
    }

    /// Whether it was made; where it was not, there is one of its name.
    pub(super) async fn create(&self, dry_run: bool) -> Result<bool, Error> {
        let params = PostParams { field_manager: Some(FIELD_MANAGER.into()), dry_run };
        let body = self.child.body.to_string().into_bytes();
        let request = self.requests().create(&params, body);
        match self.send(if dry_run { "dryrun" } else { "create" }, request).await {
            Ok(_) => Ok(true),
            Err(kube::Error::Api(s)) if s.is_already_exists() => Ok(false),
            Err(error) => Err(Error::of(self.child.title(), error)),
        }
    }

    async fn look(&self) -> Result<Option<There>, Error> {
        match self.send("get", self.requests().get(&self.child.name, &GetParams::default())).await {
            Ok(there) => Ok(Some(there)),
            Err(kube::Error::Api(s)) if s.code == 404 => Ok(None),
            Err(source) => Err(Error::Api { what: self.child.title(), source }),
        }
    }

    /// Of the object with this UID, or of one that is not there.
    async fn apply(&self, uid: Option<String>) -> Result<(), Error> {
        let mut body = self.child.body.clone();
        if let Some(uid) = uid {
            body["metadata"]["uid"] = uid.into();
        }
        let params = PatchParams::apply(FIELD_MANAGER).force();
        let request = self.requests().patch(&self.child.name, &params, &Patch::Apply(body));
        match self.send("patch", request).await {
            Ok(_) => Ok(()),
            Err(kube::Error::Api(s)) if s.is_not_found() || s.is_conflict() => Err(Error::Stale),
            Err(error) => Err(Error::of(self.child.title(), error)),
        }
    }

    fn requests(&self) -> Requests {
        Requests::new(DynamicObject::url_path(&self.child.resource, self.job.metadata.namespace.as_deref()))
    }

    async fn send(
        &self,
        verb: &'static str,
        request: Result<Request<Vec<u8>>, kube::core::request::Error>,
    ) -> kube::Result<There> {
        let request = request.map_err(kube::Error::BuildRequest)?;
        self.ctx.metrics.api(verb, self.ctx.client.request(request).await)
    }
}

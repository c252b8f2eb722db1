//! Writes status: no more than what has changed, under the version that was looked at.

use super::changes::{changes, same};
use super::error::Error;
use crate::context::Context;
use crate::decide::Decision;
use kube::api::{ApiResource, DynamicObject, Patch, PatchParams};
use kube::core::{Request, Resource};
use kube::{Api, ResourceExt};
use rlhf_api::job::RLHFJob;
use rlhf_api::names::FIELD_MANAGER;
use serde::de::IgnoredAny;
use serde_json::{Value, json};

/// Writes the status of a decision, if it is another.
pub(super) async fn write(job: &RLHFJob, decision: &Decision, ctx: &Context) -> Result<(), Error> {
    if job.status.as_ref() == Some(&decision.status) {
        return Ok(());
    }
    let what = || format!("the status of RLHFJob {}", job.name_any());
    let json = |status| serde_json::to_value(status).map_err(|source| Error::Json { what: what(), source });
    let (old, new) = (json(job.status.as_ref())?, json(Some(&decision.status))?);
    let mut written = patch(job, &changes(&old, &new, "/status"), ctx).await;
    if let Err(kube::Error::Api(refusal)) = &written
        && matches!(refusal.code, 400 | 422)
    {
        // What this operator takes for written, such as a default, may not stand there.
        let there = as_it_is(job, ctx).await.map_err(|source| Error::Api { what: what(), source })?;
        let there = there.ok_or(Error::Gone)?;
        if there.resource_version() != job.resource_version() {
            return Err(Error::Stale);
        }
        let there = there.data.get("status").cloned().unwrap_or_default();
        written = patch(job, &changes(&there, &over(&there, &old, &new), "/status"), ctx).await;
    }
    match written {
        Ok(()) => {
            ctx.known.wrote_over(job);
            Ok(())
        }
        Err(kube::Error::Api(s)) if s.is_conflict() => Err(Error::Stale),
        Err(kube::Error::Api(s)) if s.is_not_found() => Err(Error::Gone),
        Err(source) => Err(Error::Api { what: what(), source }),
    }
}

/// An RLHFJob whatever it has in it.
pub(super) async fn as_it_is(job: &impl Resource, ctx: &Context) -> kube::Result<Option<DynamicObject>> {
    let kind = ApiResource::erase::<RLHFJob>(&());
    let namespace = job.meta().namespace.as_deref().unwrap_or_default();
    let api = Api::<DynamicObject>::namespaced_with(ctx.client.clone(), namespace, &kind);
    ctx.metrics.api("get", api.get_opt(job.meta().name.as_deref().unwrap_or_default()).await)
}

/// Makes changes to the status of the job as it was looked at: of one that has changed since it is a conflict.
pub(super) async fn patch(job: &impl Resource, changes: &[Value], ctx: &Context) -> kube::Result<()> {
    let meta = job.meta();
    let version = meta.resource_version.as_ref();
    let unchanged = version.map(|v| json!({"op": "replace", "path": "/metadata/resourceVersion", "value": v}));
    let operations: Vec<_> = unchanged.into_iter().chain(changes.iter().cloned()).collect();
    let patch = Patch::<()>::Json(serde_json::from_value(operations.into()).map_err(kube::Error::SerdeError)?);
    let params = PatchParams { field_manager: Some(FIELD_MANAGER.into()), ..Default::default() };
    let requests = Request::new(RLHFJob::url_path(&(), meta.namespace.as_deref()));
    let name = meta.name.as_deref().unwrap_or_default();
    let request = requests.patch_subresource("status", name, &params, &patch).map_err(kube::Error::BuildRequest)?;
    ctx.metrics.api("patch", ctx.client.request::<IgnoredAny>(request).await).map(drop)
}

/// `there` with the changes that make `new` of `old`.
fn over(there: &Value, old: &Value, new: &Value) -> Value {
    const NONE: &Value = &Value::Null;
    match (there, new) {
        (Value::Object(there), Value::Object(new)) => {
            let gone = |key: &String| old.get(key).is_some() && !new.contains_key(key);
            let kept = there.iter().filter(|(key, _)| !gone(key)).map(|(key, value)| (key.clone(), value.clone()));
            let mut all: serde_json::Map<_, _> = kept.collect();
            for (key, value) in new {
                let value = over(there.get(key).unwrap_or(NONE), old.get(key).unwrap_or(NONE), value);
                all.insert(key.clone(), value);
            }
            all.into()
        }
        (Value::Array(there), Value::Array(new)) => {
            let of =
                |all: &[Value], element| all.iter().find(|other| same(other, element)).cloned().unwrap_or_default();
            let old = old.as_array().map(Vec::as_slice).unwrap_or_default();
            new.iter().map(|element| over(&of(there, element), &of(old, element), element)).collect()
        }
        _ => new.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_old_and_the_new_do_not_speak_of_is_kept() {
        let there = json!({"a": 1, "newer": 2, "gone": 3, "list": [{"name": "x", "newer": 1}, {"name": "y"}]});
        let old = json!({"a": 1, "gone": 3, "restarts": {"total": 0}, "list": [{"name": "x", "n": 0}, {"name": "y"}]});
        let new = json!({"a": 2, "restarts": {"total": 1}, "list": [{"name": "x", "n": 1}]});
        let wanted = json!({"a": 2, "newer": 2, "restarts": {"total": 1}, "list": [{"name": "x", "newer": 1, "n": 1}]});
        assert_eq!(over(&there, &old, &new), wanted);
    }
}

//! What is said in events alone: why the Job controller cannot make pods, and why a kubelet cannot mount their volumes.
//!
//! Events are read while something waits, and not watched: a cluster has many, and few are about this.

use super::{Error, failed};
use crate::context::Context;
use crate::view::{JobView, PodView, Wait};
use k8s_openapi::api::events::v1::Event;
use kube::Api;
use kube::api::ListParams;
use rlhf_api::job::RLHFJob;

/// Reasons of events about a volume that is not there. (A selector of fields has no "or".)
const MOUNTS: [&str; 2] = ["FailedMount", "FailedAttachVolume"];
/// As many events of one reason about one object as are looked at.
const MOST: u32 = 50;
/// How the kubelet begins when it only says that it has waited for what another event tells.
const SUMMARY: &str = "Unable to attach or mount volumes";

/// Why a Job's pods are not made.
pub(super) async fn refusal(job: &RLHFJob, child: &JobView, ctx: &Context) -> Result<Option<Wait>, Error> {
    let ask = async {
        let found = about(job, &child.uid, "FailedCreate", ctx).await?;
        Ok(latest(found, |_| true).map(|note| Wait::refusal(&note)))
    };
    of(&child.uid, ask, ctx).await
}

/// Why a pod's volumes are not there, with the pod's name.
pub(super) async fn mount(job: &RLHFJob, pod: &PodView, ctx: &Context) -> Result<Option<(String, Wait)>, Error> {
    let ask = async {
        for reason in MOUNTS {
            let found = about(job, &pod.uid, reason, ctx).await?;
            let cause = latest(found.clone(), |note| !note.starts_with(SUMMARY));
            if let Some(note) = cause.or_else(|| latest(found, |_| true)) {
                return Ok(Some(Wait::new(reason, note)));
            }
        }
        Ok(None)
    };
    Ok(of(&pod.uid, ask, ctx).await?.map(|wait| (pod.name.clone(), wait)))
}

/// What events tell of an object: what they last told, or tell now.
async fn of(
    uid: &str,
    ask: impl Future<Output = Result<Option<Wait>, Error>>,
    ctx: &Context,
) -> Result<Option<Wait>, Error> {
    if let Some(last) = ctx.questions.last(uid) {
        return Ok(last);
    }
    let answer = ask.await?;
    ctx.questions.answered(uid, answer.clone());
    Ok(answer)
}

/// The events of one reason about one object.
async fn about(job: &RLHFJob, uid: &str, reason: &str, ctx: &Context) -> Result<Vec<Event>, Error> {
    let api: Api<Event> = ctx.api(job);
    let selector = format!("regarding.uid={uid},reason={reason}");
    let found = ctx.metrics.api("list", api.list(&ListParams::default().fields(&selector).limit(MOST)).await);
    found.map(|l| l.items).map_err(|e| failed(format!("events about {uid}"), e))
}

/// What the last of them says that says something of the kind.
fn latest(events: Vec<Event>, kind: impl Fn(&str) -> bool) -> Option<String> {
    let of_kind = events.into_iter().filter(|e| e.note.as_deref().is_some_and(&kind));
    let last = of_kind.max_by_key(|e| (e.deprecated_last_timestamp.clone(), e.event_time.clone()));
    last.and_then(|e| e.note).map(|note| note.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_last_event_that_names_a_cause_counts() {
        let event = |note: &str, second: u32| -> Event {
            serde_json::from_value(json!({
                "metadata": {"name": "e"}, "note": note, "eventTime": null,
                "deprecatedLastTimestamp": format!("2026-01-01T00:00:{second:02}Z"),
            }))
            .unwrap()
        };
        let events = vec![
            event("MountVolume.SetUp failed for volume \"a\"", 1),
            event("MountVolume.SetUp failed for volume \"data\": no-such-folder is not a directory ", 2),
            event("Unable to attach or mount volumes: unmounted volumes=[data]", 3),
        ];
        let cause = latest(events.clone(), |note| !note.starts_with(SUMMARY)).unwrap();
        assert_eq!(cause, "MountVolume.SetUp failed for volume \"data\": no-such-folder is not a directory");
        assert!(latest(events, |_| true).unwrap().starts_with(SUMMARY));
        assert_eq!(latest(vec![], |_| true), None);
    }
}

//! Tells people what happened: the log, and events. What goes well in one pass is one event.

use crate::context::Context;
use crate::decide::Notice;
use futures::future::join_all;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::ObjectReference;
use kube::runtime::events::{self, EventType, Recorder};
use kube::{Resource, ResourceExt};
use rlhf_api::job::RLHFJob;
use rlhf_api::names::FIELD_MANAGER;

/// Logs what happened and publishes it. An event that is lost is logged and no more: status is the truth.
pub(super) async fn publish(job: &RLHFJob, notices: &[Notice], ctx: &Context) {
    for Notice { event, note, .. } in notices {
        tracing::info!(job = job.name_any(), namespace = job.namespace(), event = event.reason(), "{note}");
    }
    join_all(merged(notices).into_iter().map(|notice| publish_one(job, notice, ctx))).await;
}

/// Warnings one by one, and one notice of all that went well: with the reason and the object of what came last, to which
/// the rest has led.
fn merged(notices: &[Notice]) -> Vec<Notice> {
    let (mut all, good): (Vec<_>, Vec<_>) = notices.iter().cloned().partition(|n| n.event.is_warning());
    let note = good.iter().map(|n| n.note.as_str()).collect::<Vec<_>>().join("; ");
    all.extend(good.last().map(|last| Notice { note, ..last.clone() }));
    all
}

async fn publish_one(job: &RLHFJob, notice: Notice, ctx: &Context) {
    let Notice { event, note, about } = notice;
    let secondary = about.map(|name| ObjectReference {
        api_version: Some(Job::api_version(&()).into_owned()),
        kind: Some(Job::kind(&()).into_owned()),
        name: Some(name),
        namespace: job.namespace(),
        ..Default::default()
    });
    let is_warning = event.is_warning();
    let event = events::Event {
        type_: if is_warning { EventType::Warning } else { EventType::Normal },
        reason: event.reason().into(),
        note: Some(crate::classify::bounded(note)),
        action: "Reconcile".into(),
        secondary,
    };
    // A recorder keeps for minutes what it has sent, to count repetitions. What goes well is told once anyhow.
    let recorder =
        if is_warning { ctx.recorder.clone() } else { Recorder::new(ctx.client.clone(), FIELD_MANAGER.into()) };
    send(job, event, &recorder, ctx).await;
}

/// Publishes an event about an object.
pub(super) async fn send(
    about: &impl Resource<DynamicType = ()>,
    event: events::Event,
    recorder: &Recorder,
    ctx: &Context,
) {
    if let Err(error) = ctx.metrics.api("create", recorder.publish(&event, &about.object_ref(&())).await) {
        tracing::warn!(%error, reason = event.reason, "an event was lost");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decide::Event;

    #[test]
    fn what_goes_well_is_told_in_one_event_and_each_warning_in_its_own() {
        let notice =
            |event, note: &str, about: Option<&str>| Notice { event, note: note.into(), about: about.map(Into::into) };
        let warned = notice(Event::AttemptFailed, "b failed", Some("b-1"));
        let told = merged(&[
            notice(Event::StageSucceeded, "a succeeded", Some("a-1")),
            warned.clone(),
            notice(Event::JobSucceeded, "every stage succeeded", None),
        ]);
        assert_eq!(told, [warned, notice(Event::JobSucceeded, "a succeeded; every stage succeeded", None)]);
        assert!(merged(&[]).is_empty());
    }
}

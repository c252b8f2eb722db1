//! All writes of a pass, in the one order that survives a crash between any two: status first, under the resource
//! version that was looked at, then deletions, and last what is made; events tell of it beside.
//!
//! Of status, which has one writer, what has changed is written. Children are created, not applied over: creation is the
//! one write that cannot touch an object that somebody else has put under the same name. But for those that say otherwise
//! ([`Upgrade`](crate::build::Upgrade)), a child is never changed. A Job least of all: whoever queues Jobs writes to them.

mod changes;
#[cfg(test)]
mod crashes;
mod dry_run;
mod error;
mod events;
mod make;
mod remove;
mod status;
#[cfg(test)]
pub(crate) mod tests;
pub mod unsupported;

pub use error::Error;

use crate::build::Children;
use crate::context::Context;
use crate::decide::Decision;
use crate::metrics::Reason;
use futures::future::OptionFuture;
use futures::{StreamExt, stream};
use kube::api::DeleteParams;
use kube::runtime::events::{Event, EventType};
use rlhf_api::job::{RLHFJob, StageStatus};

/// Stages that are written or asked about at the same time.
const STAGES_AT_ONCE: usize = 4;

/// Writes a decision. `Ok(false)` means that all was written but what the API server refused, which the context's
/// [`Retries`](crate::retries::Retries) know.
///
/// # Errors
/// Something has changed since it was looked at, or the API server does not take it.
pub async fn apply(job: &RLHFJob, decision: &Decision, ctx: &Context) -> Result<bool, Error> {
    // The last status of what goes now has been there since its end, and a write would only make its deletion out of date.
    let goes = decision.expired && job.status.as_ref().is_some_and(|s| s.completion_time.is_some());
    if !goes {
        status::write(job, decision, ctx).await?;
        ctx.metrics.status_written(job, &decision.status);
    }
    for outcome in &decision.outcomes {
        ctx.metrics.attempt_ended(*outcome);
    }
    let told = events::publish(job, &decision.notices, ctx);
    let ((), written) = tokio::join!(told, write_children(job, decision, ctx));
    written
}

async fn write_children(job: &RLHFJob, decision: &Decision, ctx: &Context) -> Result<bool, Error> {
    let mut all_as_seen = true;
    for child in &decision.delete {
        still_leads(ctx)?;
        all_as_seen &= remove::attempt(job, child, ctx).await?;
    }
    for pod in &decision.orphans {
        still_leads(ctx)?;
        remove::pod(job, pod, DeleteParams::default(), ctx).await?;
    }
    for pod in &decision.lost {
        still_leads(ctx)?;
        remove::lost(job, pod, ctx).await?;
    }
    let all_taken = make_all(job, decision, ctx).await?;
    if decision.expired {
        still_leads(ctx)?;
        remove::expired(job, ctx).await?;
    }
    if all_as_seen { Ok(all_taken) } else { Err(Error::Stale) }
}

/// Makes the attempts that are to be made. Those of other stages are made where one is refused, or something is in its way,
/// which is given back at the end.
async fn make_all(job: &RLHFJob, decision: &Decision, ctx: &Context) -> Result<bool, Error> {
    let slots = decision.make.iter().map(|children| (children, decision.status.slot(&children.stage)));
    let slots: Vec<_> = slots.filter_map(|(children, slot)| Some((children, slot?))).collect();
    if dry_run::is_due(job, decision, ctx) {
        still_leads(ctx)?;
        if let (Err(error), Some((_, first))) = (dry_run::check(job, decision, ctx).await, slots.first()) {
            return hold(job, first, error, ctx).map(|()| false);
        }
    }
    let each: Vec<_> = slots.iter().map(|(children, slot)| make_one(job, children, slot, ctx)).collect();
    let mut each = each.into_iter();
    // What all stages share is written with the first, and known to the others.
    let first = OptionFuture::from(each.next()).await;
    let others = stream::iter(each).buffered(STAGES_AT_ONCE).collect::<Vec<_>>().await;
    let (mut all_taken, mut in_the_way) = (true, None);
    for taken in first.into_iter().chain(others) {
        match taken {
            Ok(taken) => all_taken &= taken,
            Err(error @ Error::InTheWay { .. }) => _ = in_the_way.get_or_insert(error),
            Err(error) => return Err(error),
        }
    }
    in_the_way.map_or(Ok(all_taken), Err)
}

/// Makes an attempt. `Ok(false)` means that the API server refused it.
async fn make_one(job: &RLHFJob, children: &Children, slot: &StageStatus, ctx: &Context) -> Result<bool, Error> {
    still_leads(ctx)?;
    if let Err(error) = make::make(job, children, ctx).await {
        return hold(job, slot, error, ctx).map(|()| false);
    }
    ctx.retries.made(job, &children.stage);
    ctx.metrics.attempt_made(job, slot);
    Ok(true)
}

/// Keeps why a stage's children could not be made for the next pass, which tells it in status. Any other error is given
/// back.
fn hold(job: &RLHFJob, slot: &StageStatus, error: Error, ctx: &Context) -> Result<(), Error> {
    if let Error::Leaving(_) = error {
        return Err(Error::InTheWay { stage: slot.name.clone(), what: error.to_string() });
    }
    if !matches!(error, Error::Foreign { .. } | Error::Refused { .. }) {
        return Err(error);
    }
    ctx.metrics.failed(Reason::Blocked);
    // What has run once was valid, and whoever has changed that may change it again.
    let has_run = slot.attempt > 1 || slot.progress.is_some() || slot.checkpoint.is_some();
    ctx.retries.refused(job, slot, error.to_string(), error.is_of_the_spec() && !has_run);
    Ok(())
}

/// Tells something that no status tells.
pub async fn warn(job: &RLHFJob, reason: &str, note: String, ctx: &Context) {
    let (type_, action) = (EventType::Warning, "Reconcile".into());
    let event = Event { type_, reason: reason.into(), note: Some(note), action, secondary: None };
    events::send(job, event, &ctx.recorder, ctx).await;
}

/// Another may lead by now where this process was stopped, or the API server was slow, in the middle of a decision.
fn still_leads(ctx: &Context) -> Result<(), Error> {
    if ctx.leadership.holds() { Ok(()) } else { Err(Error::Stale) }
}

//! All reads of a pass.
//!
//! Jobs and pods come from label-selected watches, which lag behind the API server. Where a lag could mislead the rules, or a
//! watch cannot tell, the API server is asked: [`crate::decide::ask`] says what. Right before children are touched
//! [`still_holds`] asks for the job itself, and [`leave_out_blocked`] for a stage's children.

mod events;
mod nodes;
mod queue;

use crate::apply;
use crate::build::Children;
use crate::context::Context;
use crate::decide::{Decision, Observed, ask};
use crate::progress::{Heard, JobName, Trainer};
use crate::view::{self, JobView, PodState, PodView, StageView, controller};
use futures::future::{try_join, try_join_all};
use jiff::Timestamp;
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::Pod;
use kube::api::ListParams;
use kube::{Api, Resource, ResourceExt};
use rlhf_api::job::{RLHFJob, StagePhase, StageStatus};
use rlhf_api::names;
use serde::de::DeserializeOwned;
use std::collections::BTreeMap;
use std::fmt::Debug;

/// A read that failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot read {what}: {source}")]
pub struct Error {
    /// What was asked for.
    what: String,
    /// The API server's answer.
    source: kube::Error,
}

/// Everything that is known of a job's children, once the watches have [listed](crate::listed) them.
pub async fn observe(job: &RLHFJob, ctx: &Context, now: Timestamp) -> Result<Observed, Error> {
    let status = job.status.clone().unwrap_or_default();
    let live: Vec<_> = ask::live(&status).collect();
    let mut stages = children(job, &live, ctx).await?;
    read_progress(job, &live, &mut stages, ctx);
    for slot in &live {
        let Some(view) = stages.get_mut(&slot.name) else { continue };
        view.refused = match ask::for_lack(job, slot, view, now) {
            Some(ask::Lack::Queue(child)) => queue::wait(job, child, ctx).await?,
            Some(ask::Lack::JobController(child)) => events::refusal(job, child, ctx).await?,
            None => None,
        };
        view.mount = match ask::for_mount(slot, view, now) {
            Some(pod) => events::mount(job, pod, ctx).await?,
            None => None,
        };
    }
    // A Job that is there was made after all, whatever the API server answered.
    let waits = |stage: &str, attempt: u32| {
        live.iter().any(|s| s.name == stage && s.attempt == attempt && s.phase == StagePhase::Starting)
            && stages.get(stage).is_none_or(|view| view.job(attempt).is_none())
    };
    let troubles = ctx.retries.troubles(job).into_iter().filter(|t| waits(&t.stage, t.attempt)).collect();
    let device_memory = nodes::device_memory(job, &stages, ctx).await?;
    let nodes = nodes::states(ask::for_nodes(&stages), ctx).await?;
    Ok(Observed { stages, troubles, device_memory, nodes })
}

/// Children that the watches have told of, with the current attempts' Jobs as they are now where that is not enough.
async fn children(job: &RLHFJob, live: &[&StageStatus], ctx: &Context) -> Result<BTreeMap<String, StageView>, Error> {
    let told = |jobs| view::stages(job, jobs, ctx.pods.of(job));
    let mut stages = told(ctx.jobs.of(job));
    let unclear = live.iter().filter(|slot| ask::for_job(slot, stages.entry(slot.name.clone()).or_default()));
    let asked = unclear.map(|slot| job_now(job, slot, ctx)).collect::<Vec<_>>();
    let learned: Vec<_> = try_join_all(asked).await?.into_iter().flatten().collect();
    if !learned.is_empty() {
        let mut jobs = ctx.jobs.of(job);
        jobs.retain(|j| learned.iter().all(|l| l.uid != j.uid));
        jobs.extend(learned);
        stages = told(jobs);
    }
    Ok(stages)
}

/// Whether the object's controller is this very job.
pub fn is_owned(object: &impl Resource, job: &RLHFJob) -> bool {
    controller(object).is_some_and(|o| Some(&o.uid) == job.metadata.uid.as_ref())
}

async fn job_now(job: &RLHFJob, slot: &StageStatus, ctx: &Context) -> Result<Option<JobView>, Error> {
    let name = view::attempt(job, &slot.name, slot.attempt);
    let api: Api<Job> = ctx.api(job);
    let found = ctx.metrics.api("get", api.get_opt(&name).await).map_err(|e| failed(format!("Job {name}"), e))?;
    Ok(found.and_then(|j| JobView::parse(&j)))
}

fn read_progress(job: &RLHFJob, live: &[&StageStatus], stages: &mut BTreeMap<String, StageView>, ctx: &Context) {
    for slot in live {
        let Some(view) = stages.get_mut(&slot.name) else { continue };
        let first = view.pods_of(slot.attempt).find(|p| p.index == 0 && p.state == PodState::Running);
        let Some((pod, ip)) = first.and_then(|p| Some((p.name.clone(), p.ip.clone()?))) else { continue };
        let of = JobName { namespace: job.namespace().unwrap_or_default(), name: job.name_any() };
        let key = ctx.settings.keys.of(&job.uid().unwrap_or_default());
        let Heard { progress, silent_for, unchanged_for, ask_again } =
            ctx.progress.heard(&Trainer { of, pod, ip, key });
        view.progress = progress;
        view.silent_for = silent_for.and_then(|s| s.try_into().ok());
        view.unchanged_for = unchanged_for.try_into().ok();
        view.ask_again = ask_again.try_into().ok();
    }
}

/// Whether what was decided still holds at the API server: the job is the one that was looked at.
///
/// A new status needs no question: it is written under the version that was looked at before anything is touched.
///
/// # Errors
/// A read failed.
pub async fn still_holds(job: &RLHFJob, decision: &Decision, ctx: &Context) -> Result<bool, Error> {
    Ok(job.status.as_ref() != Some(&decision.status) || is_current(job, ctx).await?)
}

/// Leaves out of the decision the attempts whose stages are not clear at the API server; those of other stages are made.
/// Returns what is in the way of the first. With it, neither a lagging store nor a second operator can make two attempts
/// live at once. Of a stage that has had no attempt there is nothing.
///
/// # Errors
/// A read failed.
pub async fn leave_out_blocked(
    job: &RLHFJob,
    decision: &mut Decision,
    ctx: &Context,
) -> Result<Option<apply::Error>, Error> {
    let wanted = std::mem::take(&mut decision.make);
    let obstacles = try_join_all(wanted.iter().map(|children| in_the_way(job, children, ctx))).await?;
    let mut first = None;
    for (children, obstacle) in wanted.into_iter().zip(obstacles) {
        match obstacle {
            None => decision.make.push(children),
            Some(what) => {
                first.get_or_insert(apply::Error::InTheWay { stage: children.stage, what });
            }
        }
    }
    Ok(first)
}

/// What keeps a stage's attempt from being made, as the API server has it now.
async fn in_the_way(job: &RLHFJob, children: &Children, ctx: &Context) -> Result<Option<String>, Error> {
    if children.first {
        return Ok(None);
    }
    let attempt = children.job.labels().get(names::LABEL_ATTEMPT).and_then(|a| a.parse().ok()).unwrap_or_default();
    let (jobs, pods) = try_join(list::<Job>(job, &children.stage, ctx), list::<Pod>(job, &children.stage, ctx)).await?;
    let jobs = jobs.iter().filter_map(JobView::parse).collect();
    let pods = pods.iter().filter_map(PodView::parse).collect();
    let seen = view::stages(job, jobs, pods);
    let obstacle = seen.get(&children.stage).and_then(|view| view.in_the_way(attempt));
    Ok(obstacle.map(|o| format!("{o} is in the way, and no watch tells of it; remove it if it has no owner")))
}

/// Whether the job is the one that was looked at.
async fn is_current(job: &RLHFJob, ctx: &Context) -> Result<bool, Error> {
    let name = job.name_any();
    let api: Api<RLHFJob> = ctx.api(job);
    let current = ctx.metrics.api("get", api.get_metadata_opt(&name).await);
    let current = current.map_err(|e| failed(format!("RLHFJob {name}"), e))?;
    Ok(current.and_then(|c| c.resource_version()) == job.resource_version())
}

/// One kind of a stage's children, as the API server has them now.
async fn list<K>(job: &RLHFJob, stage: &str, ctx: &Context) -> Result<Vec<K>, Error>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + DeserializeOwned + Debug,
{
    let uid = job.uid().unwrap_or_default();
    let selector = format!("{}={uid},{}={stage}", names::LABEL_JOB_UID, names::LABEL_STAGE);
    let api: Api<K> = ctx.api(job);
    let found = ctx.metrics.api("list", api.list(&ListParams::default().labels(&selector)).await);
    found.map(|l| l.items).map_err(|e| failed(format!("{} of {stage}", K::plural(&())), e))
}

fn failed(what: String, source: kube::Error) -> Error {
    Error { what, source }
}

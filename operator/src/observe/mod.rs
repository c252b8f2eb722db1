//! All reads of a pass.
//!
//! Jobs and pods come from label-selected watches, which lag behind the API server. Where a lag could mislead the rules, the
//! API server is asked: for a current attempt's Job that no watch has told of or that may have been stopped, and, in
//! [`still_holds`], for the job itself and a stage's pods right before children are touched.

mod nodes;
mod queue;

use crate::children::controller;
use crate::context::Context;
use crate::decide::{Decision, Observed};
use crate::progress::Heard;
use crate::view::{JobState, JobView, PodState, PodView, StageView, Wait};
use futures::future::join_all;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::events::v1::Event;
use kube::api::ListParams;
use kube::{Api, Resource, ResourceExt};
use rlhf_api::job::{RLHFJob, StagePhase, StageStatus};
use rlhf_api::names;
use serde::de::DeserializeOwned;
use std::collections::BTreeMap;
use std::fmt::Debug;

/// The Job controller has a Job's pods made by then, and it would have said what keeps it from it.
const PODS_ARE_MADE: SignedDuration = SignedDuration::from_secs(3);

/// A read that failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot read {what}: {source}")]
pub struct Error {
    /// What was asked for.
    what: String,
    /// The API server's answer.
    source: kube::Error,
}

/// Everything that is known of a job's children.
pub async fn observe(job: &RLHFJob, ctx: &Context) -> Result<Observed, Error> {
    ctx.listed.wait(&job.namespace().unwrap_or_default()).await;
    let mut stages = from_watches(job, ctx);
    let status = job.status.clone().unwrap_or_default();
    let is_live = |s: &&StageStatus| matches!(s.phase, StagePhase::Starting | StagePhase::Running);
    let live: Vec<_> = status.slots().filter(is_live).collect();
    for slot in &live {
        let view = stages.entry(slot.name.clone()).or_default();
        if view.lacks_word_of(slot) {
            view.learn(job_now(job, slot, ctx).await?);
        }
    }
    read_progress(job, &live, &mut stages, ctx).await;
    for slot in live.iter().filter(|s| s.phase == StagePhase::Starting) {
        let view = stages.entry(slot.name.clone()).or_default();
        view.refused = refusal(job, slot.attempt, view, ctx).await?;
    }
    // A Job that is there was made after all, whatever the API server answered.
    let waits = |stage: &str, attempt: u32| {
        live.iter().any(|s| s.name == stage && s.attempt == attempt && s.phase == StagePhase::Starting)
            && stages.get(stage).is_none_or(|view| view.job(attempt).is_none())
    };
    let troubles = ctx.retries.troubles(job).into_iter().filter(|t| waits(&t.stage, t.attempt)).collect();
    let device_memory = nodes::device_memory(job, &stages, ctx).await?;
    Ok(Observed { stages, troubles, device_memory })
}

/// Children that the watches have told of.
fn from_watches(job: &RLHFJob, ctx: &Context) -> BTreeMap<String, StageView> {
    let mut stages: BTreeMap<String, StageView> = BTreeMap::new();
    for (stage, view) in ctx.jobs.of(job) {
        stages.entry(stage).or_default().jobs.push(view);
    }
    for (stage, view) in ctx.pods.of(job) {
        stages.entry(stage).or_default().pods.push(view);
    }
    stages
}

/// Whether the object's controller is this very job.
pub fn is_owned(object: &impl Resource, job: &RLHFJob) -> bool {
    controller(object).is_some_and(|o| Some(&o.uid) == job.metadata.uid.as_ref())
}

async fn job_now(job: &RLHFJob, slot: &StageStatus, ctx: &Context) -> Result<Option<JobView>, Error> {
    let name = names::attempt(&job.name_any(), &job.uid().unwrap_or_default(), &slot.name, slot.attempt);
    let api: Api<Job> = ctx.api(job);
    let found = ctx.metrics.api("get", api.get_opt(&name).await).map_err(|e| failed(format!("Job {name}"), e))?;
    Ok(found.filter(|j| is_owned(j, job)).and_then(|j| JobView::parse(&j)))
}

/// Why an attempt lacks pods: its queue does not let it run yet, or its Job controller cannot make them, which says so in
/// events alone.
async fn refusal(job: &RLHFJob, attempt: u32, view: &StageView, ctx: &Context) -> Result<Option<Wait>, Error> {
    let Some(child) = view.job(attempt).filter(|j| j.state == JobState::Active && !job.spec.suspend) else {
        return Ok(None);
    };
    if child.suspended {
        return queue::wait(job, child, ctx).await;
    }
    let late = child.started.is_some_and(|started| Timestamp::now().duration_since(started) >= PODS_ARE_MADE);
    if !late || view.pods_of(attempt).count() >= child.pods as usize {
        return Ok(None);
    }
    let api: Api<Event> = ctx.api(job);
    let selector = format!("regarding.uid={},reason=FailedCreate", child.uid);
    let found = ctx.metrics.api("list", api.list(&ListParams::default().fields(&selector)).await);
    let events = found.map_err(|e| failed(format!("events about Job {}", child.name), e))?.items;
    let last = events.into_iter().max_by_key(|e| (e.deprecated_last_timestamp.clone(), e.event_time.clone()));
    Ok(last.and_then(|e| e.note).map(|note| Wait::refusal(&note)))
}

async fn read_progress(job: &RLHFJob, live: &[&StageStatus], stages: &mut BTreeMap<String, StageView>, ctx: &Context) {
    let stages_of_interest = live.iter().filter(|s| s.name != names::PREPARE);
    let asked = stages_of_interest.filter_map(|slot| {
        let view = stages.get(&slot.name)?;
        let pod = view.pods_of(slot.attempt).find(|p| p.index == 0 && p.state == PodState::Running)?;
        let (pod, ip) = (pod.name.clone(), pod.ip.clone()?);
        let guard = ctx.settings.keys.of(&job.uid().unwrap_or_default());
        Some(async move {
            (slot.name.clone(), ctx.progress.read(&job.namespace().unwrap_or_default(), &pod, &ip, &guard).await)
        })
    });
    for (stage, Heard { progress, silent_for, unchanged_for, ask_again }) in join_all(asked.collect::<Vec<_>>()).await {
        let view = stages.entry(stage).or_default();
        view.progress = progress;
        view.silent_for = silent_for.and_then(|s| s.try_into().ok());
        view.unchanged_for = unchanged_for.try_into().ok();
        view.ask_again = ask_again.try_into().ok();
    }
}

/// Whether what was decided still holds at the API server: the job is the one that was looked at, and every stage
/// whose next attempt is to be made is clear. With it, neither a lagging store nor a second operator can make two
/// attempts live at once.
///
/// What follows from the status needs no question: a new status is written under the version that was looked at before
/// anything is touched, and of a stage that has had no attempt there is nothing.
pub async fn still_holds(job: &RLHFJob, decision: &Decision, ctx: &Context) -> Result<bool, Error> {
    if job.status.as_ref() == Some(&decision.status) && !is_current(job, ctx).await? {
        return Ok(false);
    }
    for children in decision.make.iter().filter(|c| !c.first) {
        let attempt = children.job.labels().get(names::LABEL_ATTEMPT).and_then(|a| a.parse().ok()).unwrap_or_default();
        let jobs: Vec<Job> = list(job, &children.stage, ctx).await?;
        let pods: Vec<Pod> = list(job, &children.stage, ctx).await?;
        let jobs = jobs.iter().filter_map(JobView::parse).collect();
        let pods = pods.iter().filter_map(PodView::parse).collect();
        if !(StageView { jobs, pods, ..Default::default() }).is_clear_for(attempt) {
            return Ok(false);
        }
    }
    Ok(true)
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

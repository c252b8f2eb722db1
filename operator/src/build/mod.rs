//! Pure builders: from a job's spec to the objects of one attempt.
//!
//! Nothing here reads, writes or knows the time. Every object carries the labels by which it is found again and
//! an owner reference by which it is deleted with its job. Names come from [`rlhf_api::names`].

mod allowances;
mod child;
mod config;
mod job;
mod network_policy;
mod pod;
mod pod_group;
mod prepare;
mod secret;
mod service;
mod sources;

pub use allowances::Allowances;
pub use child::{Child, Upgrade};
pub use config::SpecError;
pub use config::check;
pub(crate) use config::existing_models;
pub use network_policy::{Egress, NetworkRules};
pub use secret::KeySecret;

use crate::keys::ProgressKeys;
use allowances::allowed;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{ConfigMap, Service};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::scheduling::v1beta1::PodGroup;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use kube::{Resource, ResourceExt};
use rlhf_api::job::{Compute, PodTemplate, RLHFJob, Stage};
use rlhf_api::names;
use rlhf_api::stage::Strategy;
use std::collections::BTreeMap;

/// What the operator's flags say about trainer pods.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The image of prepare and trainer pods.
    pub trainer_image: String,
    /// Its pull policy.
    pub trainer_image_pull_policy: String,
    /// `text` or `json`: how trainers log.
    pub log_format: String,
    /// Guard the progress of trainers.
    pub keys: ProgressKeys,
    /// Who reaches trainer pods and whom they reach; `None` leaves it to the cluster.
    pub network: Option<NetworkRules>,
    /// Whether the scheduler gives nodes to all pods of a stage or to none.
    pub gang_scheduling: bool,
    /// What a job's pod template may have.
    pub allow: Allowances,
    /// Whether pods name no users and groups, which the cluster gives them then, as OpenShift does.
    pub omit_user_ids: bool,
    /// Secrets by which every trainer's image is pulled, in each job's own namespace.
    pub image_pull_secrets: Vec<String>,
}

/// What an attempt runs: the check of model and data, or a stage.
#[derive(Clone, Copy, Debug)]
pub enum Task<'a> {
    /// `rlhf-trainer prepare`.
    Prepare,
    /// `rlhf-trainer launch`.
    Stage(&'a Stage),
}

impl<'a> Task<'a> {
    /// Everything that a job runs, prepare first, then the stages in the spec's order.
    pub fn all(job: &'a RLHFJob) -> impl Iterator<Item = Task<'a>> {
        std::iter::once(Task::Prepare).chain(job.spec.stages.iter().map(Task::Stage))
    }

    /// The stage's name, or [`names::PREPARE`].
    pub fn name(self) -> &'a str {
        match self {
            Task::Prepare => names::PREPARE,
            Task::Stage(stage) => &stage.name,
        }
    }

    /// Where it runs.
    fn compute(self, job: &RLHFJob) -> Compute {
        match self {
            Task::Prepare => prepare::compute(job),
            Task::Stage(stage) => job.compute(stage),
        }
    }
}

/// Which attempt at a task it is, and what differs by that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attempt {
    /// From 1.
    pub number: u32,
    /// How a stage's ranks place models.
    pub strategy: Strategy,
}

/// The objects of one attempt, in the order in which they are made.
#[derive(Clone, Debug)]
pub struct Children {
    /// The stage (or prepare) to which they belong.
    pub stage: String,
    /// Whether none of the stage was made before, as the status has it that was looked at: attempts are counted there first.
    pub first: bool,
    /// The rules for the network of the job's pods, the same for all of its stages.
    pub network_policy: Option<NetworkPolicy>,
    /// What lets prepare out to the places from which it fetches, where the rules above would not.
    pub outside: Option<NetworkPolicy>,
    /// The key to the progress of the job's trainers, the same for all of its stages.
    pub secret: Option<KeySecret>,
    /// The configs, the same for all of the job's stages.
    pub config_map: ConfigMap,
    /// The names of first pods in DNS, the same for all of the job's stages. Before the Job, so that it is there when pods look.
    pub service: Option<Service>,
    /// What makes a gang of the attempt's pods. Before the Job, since pods wait for it.
    pub pod_group: Option<PodGroup>,
    /// The attempt.
    pub job: Job,
}

/// Builds the objects of an attempt.
///
/// # Errors
/// The spec says what admission should have refused.
pub fn children(job: &RLHFJob, task: Task<'_>, attempt: Attempt, settings: &Settings) -> Result<Children, SpecError> {
    let is_prepare = matches!(task, Task::Prepare);
    let service = (!is_prepare).then(|| service::build(job));
    let config_map = config::build(job)?;
    Ok(Children {
        stage: task.name().to_owned(),
        first: never_made(job, task),
        network_policy: settings.network.as_ref().map(|rules| network_policy::build(job, rules)),
        outside: settings.network.as_ref().filter(|_| is_prepare).and_then(|rules| network_policy::outside(job, rules)),
        secret: (!is_prepare).then(|| secret::build(job, &settings.keys)),
        service,
        pod_group: pod_group::build(job, task, attempt, settings),
        job: job::build(job, task, attempt, &config_map.name_any(), settings),
        config_map,
    })
}

fn never_made(job: &RLHFJob, task: Task<'_>) -> bool {
    job.status.as_ref().and_then(|s| s.slot(task.name())).is_none_or(|slot| slot.attempt == 0)
}

/// Labels that all of a stage's objects carry, and by which its pods are selected.
fn labels(job: &RLHFJob, task: Task<'_>) -> BTreeMap<String, String> {
    let mut labels = job_labels(job);
    labels.insert(names::LABEL_STAGE.to_owned(), task.name().to_owned());
    labels
}

/// Labels that an attempt's own objects carry.
fn attempt_labels(job: &RLHFJob, task: Task<'_>, attempt: Attempt) -> BTreeMap<String, String> {
    let mut labels = labels(job, task);
    labels.insert(names::LABEL_ATTEMPT.to_owned(), attempt.number.to_string());
    labels
}

/// Labels that all of a job's objects carry, and by which all of its pods are selected.
fn job_labels(job: &RLHFJob) -> BTreeMap<String, String> {
    [
        (names::LABEL_MANAGED_BY, names::FIELD_MANAGER.to_owned()),
        (names::LABEL_JOB, job.name_any()),
        (names::LABEL_JOB_UID, job.uid().unwrap_or_default()),
    ]
    .map(|(k, v)| (k.to_owned(), v))
    .into()
}

/// What a pod template says of labels, in so far as they are not the operator's own.
fn user_labels(template: &PodTemplate) -> BTreeMap<String, String> {
    let own = |key: &str| key.starts_with(names::LABEL_PREFIX) || key == names::LABEL_MANAGED_BY;
    template.labels.iter().filter(|(k, _)| !own(k)).map(|(k, v)| (k.clone(), v.clone())).collect()
}

fn attempt_name(job: &RLHFJob, task: Task<'_>, attempt: u32) -> String {
    names::attempt(&job.name_any(), &job.uid().unwrap_or_default(), task.name(), attempt)
}

fn metadata(job: &RLHFJob, name: String, labels: BTreeMap<String, String>) -> ObjectMeta {
    ObjectMeta {
        name: Some(name),
        namespace: job.namespace(),
        labels: Some(labels),
        owner_references: owner(job).map(|o| vec![o]),
        ..Default::default()
    }
}

fn owner(job: &RLHFJob) -> Option<OwnerReference> {
    Some(OwnerReference { block_owner_deletion: Some(true), ..job.controller_owner_ref(&())? })
}

#[cfg(test)]
pub(crate) mod tests;

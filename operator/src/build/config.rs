//! What a trainer is told: the stage config and its ConfigMap.
//!
//! The config is the same for every attempt of a stage, so one immutable ConfigMap serves them all.

use super::{Task, labels, metadata};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::ResourceExt;
use rlhf_api::config::{CONFIG_FILE, JobRef, PrepareConfig, StageConfig, StagePaths, volume_path};
use rlhf_api::job::{RLHFJob, Stage};
use rlhf_api::names;
use rlhf_api::stage::StageKind;
use serde::Serialize;

/// A rank that waits longer for its peers gives them up as lost. Well above the slowest thing that one rank does
/// alone (writing a checkpoint to a network volume), and no more than a few minutes of idle devices.
pub(crate) const COLLECTIVE_TIMEOUT_SECONDS: u32 = 300;

/// A spec that admission should have refused.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// No kind or several.
    #[error("spec.stages[{0}] must have exactly one of sft, rewardModel and ppo")]
    Kind(String),
    /// Not a `volume://` location.
    #[error(
        "{field} `{value}` is not a location on the volume; write volume://path, without parts that begin with a dot"
    )]
    Location {
        /// The field's path.
        field: String,
        /// What stands there.
        value: String,
    },
    /// The config could not be written as JSON.
    #[error("the config of {stage} cannot be written: {source}")]
    Json {
        /// The stage.
        stage: String,
        /// Why.
        source: serde_json::Error,
    },
}

/// Whether configs can be made of a spec.
pub fn check(job: &RLHFJob) -> Result<(), SpecError> {
    prepare_config(job).map(|_| ())
}

pub(super) fn build(job: &RLHFJob, task: Task<'_>) -> Result<ConfigMap, SpecError> {
    let text = match task {
        Task::Prepare => json(task.name(), &prepare_config(job)?),
        Task::Stage(stage) => json(task.name(), &stage_config(job, stage)?),
    }?;
    let name = names::stage(&job.name_any(), task.name());
    Ok(ConfigMap {
        metadata: metadata(job, name, labels(job, task)),
        immutable: Some(true),
        data: Some([(CONFIG_FILE.to_owned(), text)].into()),
        ..Default::default()
    })
}

fn json(stage: &str, config: &impl Serialize) -> Result<String, SpecError> {
    serde_json::to_string_pretty(config).map_err(|source| SpecError::Json { stage: stage.into(), source })
}

fn prepare_config(job: &RLHFJob) -> Result<PrepareConfig, SpecError> {
    let stages = job.spec.stages.iter().map(|s| stage_config(job, s)).collect::<Result<_, _>>()?;
    Ok(PrepareConfig { job: job_ref(job), stages })
}

fn job_ref(job: &RLHFJob) -> JobRef {
    JobRef { namespace: job.namespace().unwrap_or_default(), name: job.name_any(), uid: job.uid().unwrap_or_default() }
}

fn stage_config(job: &RLHFJob, stage: &Stage) -> Result<StageConfig, SpecError> {
    let kind = stage.kind().ok_or_else(|| SpecError::Kind(stage.name.clone()))?;
    check_data(stage, &kind)?;
    Ok(StageConfig {
        job: job_ref(job),
        stage: stage.name.clone(),
        paths: paths(job, stage, &kind)?,
        kind,
        strategy: None,
        checkpoint: stage.checkpoint,
        seed: stage.seed.into(),
        collective_timeout_seconds: COLLECTIVE_TIMEOUT_SECONDS,
    })
}

fn check_data(stage: &Stage, kind: &StageKind) -> Result<(), SpecError> {
    let (field, dataset) = match kind {
        StageKind::Sft(s) => ("sft.dataset", &s.dataset),
        StageKind::RewardModel(s) => ("rewardModel.dataset", &s.dataset),
        StageKind::Ppo(s) => ("ppo.prompts", &s.prompts),
    };
    location(format!("spec.stages[{}].{field}.source", stage.name), &dataset.source).map(|_| ())
}

fn location(field: String, value: &str) -> Result<String, SpecError> {
    volume_path(value).map(str::to_owned).ok_or_else(|| SpecError::Location { field, value: value.into() })
}

fn paths(job: &RLHFJob, stage: &Stage, kind: &StageKind) -> Result<StagePaths, SpecError> {
    let (name, uid) = (job.name_any(), job.uid().unwrap_or_default());
    let base_model = location("spec.model.source".into(), &job.spec.model.source)?;
    let output_of = |stage: &String| names::model_dir(&name, &uid, stage);
    let (start, reward) = match kind {
        StageKind::Sft(_) => (None, None),
        StageKind::RewardModel(s) => (s.from.as_ref(), None),
        StageKind::Ppo(s) => (s.actor.as_ref(), Some(&s.reward)),
    };
    Ok(StagePaths {
        start_model: start.map(output_of).unwrap_or_else(|| base_model.clone()),
        base_model,
        reward_model: reward.map(output_of),
        output: output_of(&stage.name),
        checkpoints: names::checkpoints_dir(&name, &uid, &stage.name),
    })
}

//! What a trainer is told: the stage config and its ConfigMap.
//!
//! The config is the same for every attempt of a stage, and those of all stages are known when the job starts, so one
//! immutable ConfigMap serves them all.

use super::{Settings, Task, allowed, job_labels, metadata, sources};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::ResourceExt;
use rlhf_api::config::{JobRef, PrepareConfig, StageConfig, StagePaths};
use rlhf_api::job::{RLHFJob, Stage, out_of_range};
use rlhf_api::names;
use rlhf_api::reference::{ModelRef, VOLUME_SCHEME};
use rlhf_api::source;
use rlhf_api::stage::StageKind;
use serde::Serialize;
use std::collections::BTreeMap;

/// A spec that admission should have refused.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// No kind or several.
    #[error("spec.stages[{0}] must have exactly one of sft, rewardModel and ppo")]
    Kind(String),
    /// A reference to a stage that is none, or not before this one, or puts out something else.
    #[error("spec.stages[{stage}].{field} must be {must_be}: an earlier stage that puts that out, or a source")]
    Reference {
        /// The stage that has the reference.
        stage: String,
        /// The field.
        field: String,
        /// What it has to be.
        must_be: &'static str,
    },
    /// A number that is out of its bounds.
    #[error("{0}")]
    Range(String),
    /// Adapters with dropout where probabilities of one policy are compared.
    #[error("spec.stages[{0}].ppo.lora.dropout must be 0: PPO compares probabilities of one policy; leave it out")]
    Dropout(String),
    /// Something that the operator's chart does not allow.
    #[error("{field} is not allowed on this cluster; leave it out, or have the operator's chart set {switch}")]
    NotAllowed {
        /// The field's path.
        field: String,
        /// The chart's switch.
        switch: &'static str,
    },
    /// Not a location.
    #[error(
        "{field} `{value}` is no location of {what}; write volume://path, without parts that begin with a dot, or a place outside of the volume"
    )]
    Location {
        /// The field's path.
        field: String,
        /// What stands there.
        value: String,
        /// What should lie there.
        what: &'static str,
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

/// Whether attempts can be made of a spec, as far as it can be told without the API server.
///
/// # Errors
/// It says what admission should have refused, or could not see.
pub fn check(job: &RLHFJob, settings: &Settings) -> Result<(), SpecError> {
    if let Some(number) = out_of_range(job) {
        return Err(SpecError::Range(number));
    }
    Task::all(job).try_for_each(|task| allowed(job, task, settings))?;
    prepare_config(job).map(|_| ())
}

/// One ConfigMap with an entry for each task.
pub(super) fn build(job: &RLHFJob) -> Result<ConfigMap, SpecError> {
    let config = |task: Task<'_>| match task {
        Task::Prepare => json(task.name(), &prepare_config(job)?),
        Task::Stage(stage) => json(task.name(), &stage_config(job, stage)?),
    };
    let data = Task::all(job).map(|task| Ok((entry(task), config(task)?)));
    let data = data.collect::<Result<BTreeMap<_, _>, SpecError>>()?;
    let all = data.values().map(String::as_str).collect::<Vec<_>>().concat();
    let name = names::config_map(&job.name_any(), &job.uid().unwrap_or_default(), &all);
    Ok(ConfigMap {
        metadata: metadata(job, name, job_labels(job)),
        immutable: Some(true),
        data: Some(data),
        ..Default::default()
    })
}

/// The entry with a task's config.
pub(super) fn entry(task: Task<'_>) -> String {
    format!("{}.json", task.name())
}

fn json(stage: &str, config: &impl Serialize) -> Result<String, SpecError> {
    serde_json::to_string_pretty(config).map_err(|source| SpecError::Json { stage: stage.into(), source })
}

fn prepare_config(job: &RLHFJob) -> Result<PrepareConfig, SpecError> {
    let stages = job.spec.stages.iter().map(|s| stage_config(job, s)).collect::<Result<_, _>>()?;
    Ok(PrepareConfig { job: job_ref(job), stages, models: existing_models(job), remote: sources::of(job) })
}

fn job_ref(job: &RLHFJob) -> JobRef {
    JobRef { namespace: job.namespace().unwrap_or_default(), name: job.name_any(), uid: job.uid().unwrap_or_default() }
}

fn stage_config(job: &RLHFJob, stage: &Stage) -> Result<StageConfig, SpecError> {
    let kind = stage.kind().ok_or_else(|| SpecError::Kind(stage.name.clone()))?;
    let (field, dataset) = kind.dataset();
    let (run_dir, below) = (job.run_dir(), format!("spec.stages[{}].{}.{field}", stage.name, kind.name()));
    // Where prepare has brought them to: a stage knows the volume alone.
    let dataset = dataset.located(|part, source| {
        let path = source::path(&run_dir, source, false);
        let wrong = || location(format!("{below}.{part}"), source, "a file of records");
        path.map(|path| format!("{VOLUME_SCHEME}{path}")).ok_or_else(wrong)
    })?;
    if let StageKind::Ppo(ppo) = &kind
        && ppo.lora.as_ref().is_some_and(|lora| lora.dropout != 0.0)
    {
        return Err(SpecError::Dropout(stage.name.clone()));
    }
    Ok(StageConfig {
        job: job_ref(job),
        stage: stage.name.clone(),
        paths: paths(job, stage, &kind)?,
        kind: kind.with_dataset(dataset),
        strategy: None,
        checkpoint: stage.checkpoint,
        export: stage.export.clone().unwrap_or_default(),
        keep_checkpoints: job.spec.storage.keep_checkpoints,
        seed: stage.seed.into(),
        collective_timeout_seconds: job.compute(stage).collective_timeout_seconds,
    })
}

fn location(field: String, value: &str, what: &'static str) -> SpecError {
    SpecError::Location { field, value: value.into(), what }
}

/// Where a stage finds its models and writes its own.
fn paths(job: &RLHFJob, stage: &Stage, kind: &StageKind) -> Result<StagePaths, SpecError> {
    check_references(job, stage, kind)?;
    let at = |field: &str, model: &ModelRef| {
        let written = model.source.clone().unwrap_or_default();
        job.model_path(model).ok_or_else(|| location(field.into(), &written, "a model"))
    };
    let base = &job.spec.model;
    let mut paths = StagePaths {
        base_model: at("spec.model.source", base)?,
        start_model: at("start", kind.start().unwrap_or(base))?,
        reference_model: None,
        critic_model: None,
        reward_models: Default::default(),
        output: names::model_dir(&job.run_dir(), &stage.name),
        checkpoints: names::checkpoints_dir(&job.run_dir(), &stage.name),
    };
    if let StageKind::Ppo(ppo) = kind {
        let reference = ppo.reference.as_ref().or(ppo.start.as_ref()).unwrap_or(base);
        paths.reference_model = Some(at("ppo.reference", reference)?);
        paths.critic_model = ppo.critic_start().map(|model| at("ppo.critic", model)).transpose()?;
        let models = ppo.rewards.iter().filter_map(|r| Some((r.name.clone(), r.model.as_ref()?)));
        let models = models.map(|(name, model)| at("ppo.rewards[].model", model).map(|path| (name, path)));
        paths.reward_models = models.collect::<Result<_, _>>()?;
    }
    Ok(paths)
}

fn check_references(job: &RLHFJob, stage: &Stage, kind: &StageKind) -> Result<(), SpecError> {
    let earlier = job.spec.stages.iter().take_while(|s| s.name != stage.name);
    let outputs: Vec<_> = earlier.filter_map(|s| Some((s.name.as_str(), s.kind()?.produces()))).collect();
    for named in kind.models() {
        let fits = match (&named.model.stage, &named.model.source) {
            (Some(name), None) => outputs.contains(&(name.as_str(), named.must_be)),
            (None, Some(source)) => source::path("", source, true).is_some(),
            _ => false,
        };
        if !fits {
            let (stage, must_be) = (stage.name.clone(), named.must_be.words());
            return Err(SpecError::Reference { stage, field: named.field, must_be });
        }
    }
    Ok(())
}

/// The models that exist before the job, each once, the job's own first.
pub(crate) fn existing_models(job: &RLHFJob) -> Vec<String> {
    let kinds: Vec<_> = job.spec.stages.iter().filter_map(Stage::kind).collect();
    let named = kinds.iter().flat_map(StageKind::models).map(|named| named.model);
    let all = std::iter::once(&job.spec.model).chain(named).filter(|model| model.stage.is_none());
    let mut models: Vec<String> = Vec::new();
    for path in all.filter_map(|model| job.model_path(model)) {
        if !models.contains(&path) {
            models.push(path);
        }
    }
    models
}

//! Where a stage's models come from: an earlier stage of the job, or a place outside of it.

use crate::config::volume_path;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A location on the job's volume: `volume://` and a relative path whose parts do not start with a dot.
pub const VOLUME_URI_PATTERN: &str = r"^volume://[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*$";

/// The prefix of every location on the job's volume.
pub const VOLUME_SCHEME: &str = "volume://";

/// Most characters of a stage's name.
pub const MAX_STAGE_NAME: usize = 40;

/// A model in Hugging Face layout: exactly one of `stage` and `source`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[cfg_attr(feature = "crd", schemars(extend("x-kubernetes-validations" = exactly_one())))]
#[serde(rename_all = "camelCase")]
pub struct ModelRef {
    /// What an earlier stage of this job puts out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = MAX_STAGE_NAME))]
    pub stage: Option<String>,
    /// The model's folder on the job's volume, as `volume://path`: `config.json`, `model.safetensors` and tokenizer files.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = VOLUME_URI_PATTERN), length(max = 512))]
    pub source: Option<String>,
}

#[cfg(feature = "crd")]
fn exactly_one() -> serde_json::Value {
    serde_json::json!([{
        "rule": "has(self.stage) != has(self.source)",
        "message": "a model is exactly one of stage (an earlier stage of this job) and source (such as volume://path)",
    }])
}

impl ModelRef {
    /// What the stage of this name puts out.
    pub fn stage(name: impl Into<String>) -> Self {
        Self { stage: Some(name.into()), source: None }
    }

    /// The path below the volume, where that is where the model is.
    pub fn volume_path(&self) -> Option<&str> {
        self.source.as_deref().and_then(volume_path).filter(|_| self.stage.is_none())
    }
}

/// What a stage puts out, and so what can be made of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Produces {
    /// A language model: a stage may start from it.
    Policy,
    /// A language model's backbone with a scalar head: it scores answers.
    RewardModel,
    /// No model.
    Nothing,
}

impl Produces {
    /// In words, with an article.
    pub const fn words(self) -> &'static str {
        match self {
            Produces::Policy => "a policy",
            Produces::RewardModel => "a reward model",
            Produces::Nothing => "nothing",
        }
    }
}

/// A model that a stage names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Named<'a> {
    /// The field of the stage, such as `ppo.start`.
    pub field: String,
    /// What stands there.
    pub model: &'a ModelRef,
    /// What it has to be.
    pub must_be: Produces,
}

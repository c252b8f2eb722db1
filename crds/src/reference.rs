//! Where a stage's models come from: an earlier stage of the job, or a place outside of it.

use crate::source::{self, MODEL_PATTERN, SecretRef};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

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
    /// Where the model is: a folder on the job's volume, as `volume://path`; a repository of the hub, as
    /// `hf://organization/name@revision`; or a folder of a bucket, as `s3://bucket/path`, `gs://bucket/path` or
    /// `az://container/path`. In it are `config.json`, `model.safetensors` and tokenizer files. What is not on the volume is
    /// fetched onto it by prepare.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = MODEL_PATTERN), length(max = 512), extend("x-kubernetes-validations" = source::rules(true)))]
    pub source: Option<String>,
    /// The Secret that opens `source`. Its entries, as each place needs them: `HF_TOKEN` and, for a hub of your own, `HF_ENDPOINT`;
    /// `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_SESSION_TOKEN`, `AWS_REGION` and `AWS_ENDPOINT_URL` (s3);
    /// `GOOGLE_SERVICE_ACCOUNT_KEY` (gs); `AZURE_STORAGE_ACCOUNT_NAME` and `AZURE_STORAGE_ACCOUNT_KEY` or
    /// `AZURE_STORAGE_SAS_TOKEN` (az); and `ca.crt` for a server of your own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret_ref: Option<SecretRef>,
}

#[cfg(feature = "crd")]
fn exactly_one() -> serde_json::Value {
    serde_json::json!([
        {
            "rule": "has(self.stage) != has(self.source)",
            "message": "a model is exactly one of stage (an earlier stage of this job) and source (such as volume://path)",
        },
        {
            "rule": "!has(self.secretRef) || (has(self.source) && !self.source.startsWith('volume://'))",
            "message": "secretRef opens a source outside of the volume, and there is none; leave it out",
        },
    ])
}

impl ModelRef {
    /// What the stage of this name puts out.
    pub fn stage(name: impl Into<String>) -> Self {
        Self { stage: Some(name.into()), ..Self::default() }
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

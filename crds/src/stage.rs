//! What a stage is asked to do: the settings of supervised fine-tuning, reward-model training and PPO.
//!
//! Users write these types in a manifest and the trainer reads the very same types from its config, so
//! there is no translation in which a field could be lost. Defaults are those of the field's reference
//! implementations; where they differ, the doc comment names the one taken.

use crate::decimal;
use crate::reference::{ModelRef, Named, Produces};
use crate::source::{self, FILE_PATTERN, SecretRef};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Files of records, and which part of them is held out: exactly one of `source` and `sources`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[schemars(extend("x-kubernetes-validations" = dataset_rules()))]
#[serde(rename_all = "camelCase")]
pub struct Dataset {
    /// A file of JSON Lines (which gzip or Zstandard may pack) or Parquet: on the job's volume, as
    /// `volume://path/to/file.jsonl`; in a dataset of the hub, as `hf://datasets/organization/name@revision/path/to/file`; in a
    /// bucket, as `s3://bucket/path`, `gs://bucket/path` or `az://container/path`; or at a web address, as
    /// `https://host/path#sha256=…`. What is not on the volume is fetched onto it by prepare.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = FILE_PATTERN), length(max = 512), extend("x-kubernetes-validations" = source::rules(false)))]
    pub source: Option<String>,
    /// Several such files, whose records are mixed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(min = 1, max = 16))]
    pub sources: Vec<DataSource>,
    /// What the fields of a record are called in `source` and `evalSource`, where it is not as the format calls them:
    /// `{prompt: question, completion: answer}`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 16, "additionalProperties" = field_name()))]
    pub fields: BTreeMap<String, String>,
    /// A file of its own whose records are those for evaluation. Of the others then none is held out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = FILE_PATTERN), length(max = 512), extend("x-kubernetes-validations" = source::rules(false)))]
    pub eval_source: Option<String>,
    /// Share of the records held out for evaluation. The split depends only on the stage's seed and on the record's file and
    /// line or row (for preferences and prompts: on its prompt, so that no prompt is in both halves), and so is the same on
    /// every rank and after every restart.
    #[serde(default = "default_eval_fraction")]
    #[schemars(range(min = 0.0, max = 0.5))]
    #[serde(deserialize_with = "decimal::read")]
    pub eval_fraction: f64,
    /// What becomes of a record that cannot be read, or lacks what the format needs.
    #[serde(default)]
    pub on_bad_record: OnBadRecord,
    /// The Secret that opens the dataset's sources, with the entries of a model's `secretRef`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret_ref: Option<SecretRef>,
}

/// One of several files of records.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DataSource {
    /// The file, as a dataset's `source`.
    #[schemars(regex(pattern = FILE_PATTERN), length(max = 512), extend("x-kubernetes-validations" = source::rules(false)))]
    pub source: String,
    /// How often an epoch has each of its training records: 2 twice; 0.5 leaves out half of them, in every epoch the same.
    #[serde(default = "default_one", deserialize_with = "decimal::read")]
    #[schemars(range(min = 0.001, max = 1000.0))]
    pub weight: f64,
    /// What the fields of a record are called in this file, as a dataset's `fields`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 16, "additionalProperties" = field_name()))]
    pub fields: BTreeMap<String, String>,
}

/// What becomes of a record that cannot be used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum OnBadRecord {
    /// It is an error, which prepare tells with file and line.
    #[default]
    Fail,
    /// It is left out, counted and told.
    Skip,
}

fn dataset_rules() -> serde_json::Value {
    serde_json::json!([
        {
            "rule": "has(self.source) != has(self.sources)",
            "message": "a dataset has exactly one of source (a file) and sources (several)",
        },
        {
            "rule": "!has(self.sources) || !has(self.fields) || has(self.evalSource)",
            "message": "fields beside sources speaks of evalSource, and there is none; write the fields of each source beside it",
        },
    ])
}

fn field_name() -> serde_json::Value {
    serde_json::json!({"type": "string", "minLength": 1, "maxLength": 128})
}

impl Dataset {
    /// Every file that it names, with the field below the dataset that does.
    pub fn files(&self) -> Vec<(String, &str)> {
        let one = self.source.as_deref().map(|source| ("source".to_owned(), source));
        let several =
            self.sources.iter().enumerate().map(|(i, part)| (format!("sources[{i}].source"), part.source.as_str()));
        let eval = self.eval_source.as_deref().map(|source| ("evalSource".to_owned(), source));
        one.into_iter().chain(several).chain(eval).collect()
    }

    /// The same dataset with each file where `at` says, and without the Secret that opened the places where they were.
    ///
    /// # Errors
    /// Those of `at`, which is given a file's field and location.
    pub fn located<E>(&self, at: impl Fn(&str, &str) -> Result<String, E>) -> Result<Self, E> {
        let mut located = Self { secret_ref: None, ..self.clone() };
        for (field, source) in [("source", &mut located.source), ("evalSource", &mut located.eval_source)] {
            if let Some(source) = source {
                *source = at(field, source)?;
            }
        }
        for (i, part) in located.sources.iter_mut().enumerate() {
            part.source = at(&format!("sources[{i}].source"), &part.source)?;
        }
        Ok(located)
    }
}

fn default_eval_fraction() -> f64 {
    0.02
}

/// How the records of a supervised fine-tuning file are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum SftFormat {
    /// `{"text"}`: every token is a target.
    Text,
    /// `{"prompt", "completion"}`: the completion is the target.
    #[default]
    PromptCompletion,
    /// `{"instruction", "input"?, "output"}` (Alpaca): the output is the target.
    Instruction,
    /// `{"messages": [{"role", "content"}]}`, rendered by the tokenizer's own chat template: the
    /// assistant's turns are the targets.
    Chat,
}

/// The learning-rate schedule after warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum Schedule {
    /// Stays at the learning rate.
    Constant,
    /// Falls linearly to zero at the last step.
    Linear,
    /// Falls to zero along half a cosine.
    #[default]
    Cosine,
}

/// AdamW (Loshchilov and Hutter 2019) with a schedule and global-norm clipping.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Optimizer {
    /// The peak learning rate.
    #[schemars(range(min = 0.0, max = 1.0))]
    #[serde(deserialize_with = "decimal::read")]
    pub learning_rate: f64,
    /// The schedule after warm-up.
    #[serde(default)]
    pub schedule: Schedule,
    /// Share of all steps in which the learning rate rises linearly from zero.
    #[serde(default)]
    #[schemars(range(min = 0.0, max = 1.0))]
    #[serde(deserialize_with = "decimal::read")]
    pub warmup_ratio: f64,
    /// Decoupled weight decay, applied to matrices and never to biases and norms.
    #[serde(default)]
    #[schemars(range(min = 0.0, max = 1.0))]
    #[serde(deserialize_with = "decimal::read")]
    pub weight_decay: f64,
    /// Decay rate of the first moment.
    #[serde(default = "default_beta1")]
    #[schemars(range(min = 0.0, max = 0.9999999))]
    #[serde(deserialize_with = "decimal::read")]
    pub beta1: f64,
    /// Decay rate of the second moment.
    #[serde(default = "default_beta2")]
    #[schemars(range(min = 0.0, max = 0.9999999))]
    #[serde(deserialize_with = "decimal::read")]
    pub beta2: f64,
    /// Added to the root of the bias-corrected second moment. By default 1e-8, as in torch, and 1e-5 in PPO, as in Ziegler 2019.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "decimal::read_some")]
    #[schemars(range(min = 1e-12, max = 0.1))]
    pub epsilon: Option<f64>,
    /// Gradients are scaled down to this global L2 norm.
    #[serde(default = "default_max_grad_norm")]
    #[schemars(range(min = 1e-6, max = 1e6))]
    #[serde(deserialize_with = "decimal::read")]
    pub max_grad_norm: f64,
}

impl Optimizer {
    /// The default of [`Optimizer::epsilon`].
    pub const EPSILON: f64 = 1e-8;
    /// The same in PPO. There a second moment that has only seen small gradients must not make a step of the full rate; in
    /// supervised training of a large model it would halve every step (clipped to norm 1, a gradient's numbers are about 1e-5).
    pub const PPO_EPSILON: f64 = 1e-5;

    /// The same with this epsilon, unless the user has chosen one.
    pub fn or_epsilon(&self, epsilon: f64) -> Self {
        Self { epsilon: self.epsilon.or(Some(epsilon)), ..self.clone() }
    }
}

fn default_beta1() -> f64 {
    0.9
}
fn default_beta2() -> f64 {
    0.95
}
fn default_max_grad_norm() -> f64 {
    1.0
}

/// How samples become batches.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Batch {
    /// Samples in one optimizer step, over all ranks.
    #[schemars(range(min = 1, max = 1_048_576))]
    pub global_size: u32,
    /// Samples that one rank runs through the model at a time. It changes memory and speed, never the
    /// result: losses are normalised by the valid tokens of the whole global batch.
    #[serde(default = "default_micro_size")]
    #[schemars(range(min = 1, max = 65_536))]
    pub micro_size: u32,
}

fn default_micro_size() -> u32 {
    8
}

/// A linear map of a transformer's block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum Linear {
    /// The queries of attention.
    Query,
    /// The keys of attention.
    Key,
    /// The values of attention.
    Value,
    /// The output of attention.
    Output,
    /// The gate of the feed-forward network, where the model has one.
    Gate,
    /// The way into the feed-forward network.
    Up,
    /// The way out of the feed-forward network.
    Down,
}

impl Linear {
    /// All of them, in a block's order.
    pub const ALL: [Linear; 7] =
        [Linear::Query, Linear::Key, Linear::Value, Linear::Output, Linear::Gate, Linear::Up, Linear::Down];
}

/// Low-rank adaptation (Hu 2021): the model is frozen, and to the output of each target is added
/// `alpha / rank * x A^T B^T`, of which A and B are trained. The head of a reward model and of a critic (with the norm
/// before it) is trained whole. The stage's model is written merged, and its adapters beside it in the layout of PEFT.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Lora {
    /// Rows of A and columns of B.
    #[serde(default = "default_lora_rank")]
    #[schemars(range(min = 1, max = 4096))]
    pub rank: u32,
    /// The adapters' output is scaled by this over the rank. By default twice the rank, so that another rank needs no other
    /// learning rate. (PEFT's default is 8 for every rank.)
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "decimal::read_some")]
    #[schemars(range(min = 1e-6, max = 1e6))]
    pub alpha: Option<f64>,
    /// Share of the adapters' inputs that is dropped in training. PPO compares probabilities of one policy and takes none.
    #[serde(default)]
    #[schemars(range(min = 0.0, max = 0.9))]
    #[serde(deserialize_with = "decimal::read")]
    pub dropout: f64,
    /// The linears of each block that get adapters; by default all.
    #[serde(default = "default_lora_targets")]
    #[schemars(length(min = 1, max = 7))]
    pub targets: Vec<Linear>,
}

fn default_lora_rank() -> u32 {
    8
}
fn default_lora_targets() -> Vec<Linear> {
    Linear::ALL.to_vec()
}

impl Lora {
    /// By what the adapters' output is scaled, times the rank.
    pub fn alpha(&self) -> f64 {
        self.alpha.unwrap_or(2.0 * f64::from(self.rank))
    }

    /// By what the adapters' output is scaled.
    pub fn scale(&self) -> f64 {
        self.alpha() / f64::from(self.rank)
    }
}

/// Whether and how samples share rows. Each sample is learnt as if it stood alone: it sees no other, its positions begin at 0,
/// and its tokens' losses are the same. A row counts as one sample of `batch`. Of the format `text`, what is longer than
/// `maxLength` is cut into chunks of that length, each of which is a sample, in place of losing its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Packing {
    /// Whether samples share rows.
    #[serde(default = "default_true")]
    pub enabled: bool,
    /// The most tokens of a row, at least `maxLength`, which is the default. It may be more than the model has positions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 2, max = 1_048_576))]
    pub length: Option<u32>,
}

fn default_true() -> bool {
    true
}

fn sft_rules() -> serde_json::Value {
    serde_json::json!([{
        "rule": "!has(self.packing) || !has(self.packing.length) || self.packing.length >= self.maxLength",
        "message": "packing.length is the most tokens of a row, and a sample may have maxLength: write at least that",
    }])
}

impl Sft {
    /// The most tokens of a row into which several samples are packed, where they are.
    pub fn row_tokens(&self) -> Option<u32> {
        let packing = self.packing.filter(|packing| packing.enabled)?;
        Some(packing.length.unwrap_or(self.max_length).max(self.max_length))
    }

    /// The most tokens of a row, packed or not.
    pub fn longest_row(&self) -> u32 {
        self.row_tokens().unwrap_or(self.max_length)
    }
}

/// Supervised fine-tuning of a policy.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[schemars(extend("x-kubernetes-validations" = sft_rules()))]
#[serde(rename_all = "camelCase")]
pub struct Sft {
    /// The model from which it starts; without it, the job's model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start: Option<ModelRef>,
    /// The records to learn from.
    pub dataset: Dataset,
    /// How the records are written.
    #[serde(default)]
    pub format: SftFormat,
    /// Passes over the training records.
    #[schemars(range(min = 1, max = 1000))]
    pub epochs: u32,
    /// Stops after this many steps although epochs are left.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000_000_000))]
    pub max_steps: Option<u32>,
    /// How samples become batches.
    pub batch: Batch,
    /// Longer samples are cut to this many tokens.
    #[schemars(range(min = 2, max = 1_048_576))]
    pub max_length: u32,
    /// Several samples in one row, so that no time goes into padding.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub packing: Option<Packing>,
    /// Also learn to predict the prompt.
    #[serde(default)]
    pub train_on_prompt: bool,
    /// Trains adapters in place of the whole model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lora: Option<Lora>,
    /// The optimizer.
    pub optimizer: Optimizer,
}

/// Training of a reward model from preferences (InstructGPT, section 3.4).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RewardModel {
    /// The policy whose model is the backbone; without it, the job's model is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start: Option<ModelRef>,
    /// Preferences: `{"prompt", "chosen", "rejected"}`, or whole dialogues `{"chosen", "rejected"}` whose
    /// common beginning is the prompt, or rankings `{"prompt", "ranked": [best, …, worst]}`.
    pub dataset: Dataset,
    /// Passes over the training records.
    #[schemars(range(min = 1, max = 1000))]
    pub epochs: u32,
    /// Stops after this many steps although epochs are left.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000_000_000))]
    pub max_steps: Option<u32>,
    /// How records (a pair or a ranking each) become batches.
    pub batch: Batch,
    /// Longer sequences (prompt and response) are cut to this many tokens.
    #[schemars(range(min = 2, max = 1_048_576))]
    pub max_length: u32,
    /// Weight of `(score_chosen + score_rejected)^2`, which keeps scores near zero (Eisenstein 2023).
    #[serde(default)]
    #[schemars(range(min = 0.0, max = 10.0))]
    #[serde(deserialize_with = "decimal::read")]
    pub centering_coefficient: f64,
    /// Trains adapters in place of the whole model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lora: Option<Lora>,
    /// The optimizer.
    pub optimizer: Optimizer,
}

/// Estimators of KL(actor || reference) from samples of the actor (Schulman 2020), with
/// `d = log p_actor - log p_reference`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum KlEstimator {
    /// `d`: unbiased.
    #[default]
    K1,
    /// `d^2 / 2`: low variance, biased.
    K2,
    /// `exp(-d) - 1 + d`: unbiased and never negative.
    K3,
}

/// Where the penalty on the KL divergence stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum KlPlace {
    /// Each token's reward is lessened by it, as it was when the token was drawn (Ziegler 2019).
    #[default]
    Reward,
    /// It is added to the loss, as it is while learning (Shao 2024).
    Loss,
}

/// The penalty that keeps the actor near the reference.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[schemars(extend("x-kubernetes-validations" = kl_in_loss()))]
#[serde(rename_all = "camelCase")]
pub struct Kl {
    /// The (first) coefficient beta of the per-token penalty.
    #[schemars(range(min = 0.0, max = 100.0))]
    #[serde(deserialize_with = "decimal::read")]
    pub coefficient: f64,
    /// The estimator.
    #[serde(default)]
    pub estimator: KlEstimator,
    /// Where the penalty stands.
    #[serde(default)]
    pub place: KlPlace,
    /// With a target (nats a response) the coefficient is adapted towards it, as in Ziegler 2019.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "decimal::read_some")]
    #[schemars(range(min = 1e-6, max = 1e6))]
    pub target: Option<f64>,
    /// Samples over which the adaptive coefficient reacts.
    #[serde(default = "default_kl_horizon")]
    #[schemars(range(min = 1, max = 1_000_000_000))]
    pub horizon: u32,
}

/// The gradient of `d` is that of the log-probability of what was drawn, which is zero in the mean: it would pull nowhere.
fn kl_in_loss() -> serde_json::Value {
    serde_json::json!([{
        "rule": "!has(self.place) || self.place != 'loss' || (has(self.estimator) && self.estimator != 'k1')",
        "message": "in the loss k1 has no pull towards the reference; set estimator to k2 or k3, or place to reward",
    }])
}

fn default_kl_horizon() -> u32 {
    10_000
}

/// The law from which responses are drawn.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Sampling {
    /// Logits are divided by this in rollout and wherever log-probabilities are taken.
    #[serde(default = "default_one")]
    #[schemars(range(min = 0.01, max = 10.0))]
    #[serde(deserialize_with = "decimal::read")]
    pub temperature: f64,
    /// Draw from the smallest set of tokens whose probability reaches this (1: all).
    #[serde(default = "default_one")]
    #[schemars(range(min = 0.01, max = 1.0))]
    #[serde(deserialize_with = "decimal::read")]
    pub top_p: f64,
    /// Draw from this many most likely tokens (0: all).
    #[serde(default)]
    #[schemars(range(min = 0, max = 10_000_000))]
    pub top_k: u32,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { temperature: 1.0, top_p: 1.0, top_k: 0 }
    }
}

fn default_one() -> f64 {
    1.0
}

/// One of the things that score an answer: a name, a weight, and exactly one of the members that say how.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[schemars(extend("x-kubernetes-validations" = reward_member()))]
#[serde(rename_all = "camelCase")]
pub struct Reward {
    /// Unique in the stage; its figures are told under it.
    #[schemars(length(min = 1, max = 40), regex(pattern = r"^[a-z]([-a-z0-9]*[a-z0-9])?$"))]
    pub name: String,
    /// What its score is multiplied by.
    #[serde(default = "default_one", deserialize_with = "decimal::read")]
    #[schemars(range(min = -1e6, max = 1e6))]
    pub weight: f64,
    /// A reward model scores the answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<ModelRef>,
}

fn reward_member() -> serde_json::Value {
    serde_json::json!([{
        "rule": "has(self.model)",
        "message": "a reward has exactly one of the members that say how it scores: write model",
    }])
}

/// How advantages are estimated: exactly one member. Only `gae` has a critic.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[schemars(extend("x-kubernetes-validations" = advantage_member()))]
#[serde(rename_all = "camelCase")]
pub struct Advantage {
    /// Generalised advantage estimation with a critic (Schulman 2016).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gae: Option<Gae>,
    /// An answer's reward less the mean of those of the prompt's other answers (RLOO: Kool 2019; Ahmadian 2024).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub leave_one_out: Option<LeaveOneOut>,
    /// An answer's reward less the mean of those of all the prompt's answers, by their deviation (GRPO: Shao 2024).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group_relative: Option<GroupRelative>,
    /// The rewards from a token on, whitened over the rollout (REINFORCE++: Hu 2025).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reinforce_plus_plus: Option<ReinforcePlusPlus>,
}

/// What a stage's `advantage` says.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Estimator {
    /// Generalised advantage estimation with a critic.
    Gae(Gae),
    /// Against the mean of the prompt's other answers.
    LeaveOneOut,
    /// Against the mean of the prompt's answers.
    GroupRelative(GroupRelative),
    /// Against the rollout's mean.
    ReinforcePlusPlus,
}

impl Advantage {
    /// Which estimator it is; `None` where it has none that is known here.
    pub fn estimator(&self) -> Option<Estimator> {
        let Self { gae, leave_one_out, group_relative, reinforce_plus_plus } = self;
        let leave_one_out = || leave_one_out.as_ref().map(|_| Estimator::LeaveOneOut);
        let group_relative = || group_relative.map(Estimator::GroupRelative);
        let reinforce = || reinforce_plus_plus.as_ref().map(|_| Estimator::ReinforcePlusPlus);
        gae.map(Estimator::Gae).or_else(leave_one_out).or_else(group_relative).or_else(reinforce)
    }
}

fn advantage_member() -> serde_json::Value {
    serde_json::json!([{
        "rule": "[has(self.gae), has(self.leaveOneOut), has(self.groupRelative), has(self.reinforcePlusPlus)].filter(is, is).size() == 1",
        "message": "advantage has exactly one of the members that say how it is estimated: write one of gae, leaveOneOut, groupRelative and reinforcePlusPlus, or leave out advantage, which is gae",
    }])
}

/// REINFORCE leave-one-out (Ahmadian 2024).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct LeaveOneOut {}

/// Group relative policy optimisation (Shao 2024).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct GroupRelative {
    /// By which deviation advantages are divided.
    #[serde(default)]
    pub scale: GroupScale,
}

/// The deviation by which advantages are divided.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum GroupScale {
    /// That of the prompt's answers (Shao 2024).
    #[default]
    Group,
    /// That of all answers of the rollout.
    Batch,
    /// None: prompts whose answers are about alike count no more than others (Dr. GRPO: Liu 2025).
    None,
}

/// REINFORCE++ (Hu 2025).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ReinforcePlusPlus {}

impl Default for Advantage {
    fn default() -> Self {
        Self { gae: Some(Gae::default()), leave_one_out: None, group_relative: None, reinforce_plus_plus: None }
    }
}

/// Generalised advantage estimation (Schulman 2016).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Gae {
    /// Between the temporal difference of one step (0) and the whole return (1).
    #[serde(default = "default_lambda", deserialize_with = "decimal::read")]
    #[schemars(range(min = 0.0, max = 1.0))]
    pub lambda: f64,
}

impl Default for Gae {
    fn default() -> Self {
        Self { lambda: default_lambda() }
    }
}

/// Proximal policy optimisation of the actor against the rewards (Schulman 2017; Ziegler 2019; Huang 2024, "The N+
/// implementation details of RLHF with PPO"), and its relatives without a critic, by `advantage`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[schemars(extend("x-kubernetes-validations" = critic_and_samples()))]
#[serde(rename_all = "camelCase")]
pub struct Ppo {
    /// The policy that is trained, the actor; without it, the job's model is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start: Option<ModelRef>,
    /// The policy near which the penalty on the KL divergence keeps the actor; without it, the actor's start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reference: Option<ModelRef>,
    /// The reward model from which the critic starts; without it, the first of `rewards` that is a model. Only where
    /// advantages are estimated by `gae`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub critic: Option<ModelRef>,
    /// What scores an answer: the sum of these, each times its weight.
    #[schemars(length(min = 1, max = 8), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub rewards: Vec<Reward>,
    /// How advantages are estimated.
    #[serde(default)]
    pub advantage: Advantage,
    /// Records `{"prompt"}`.
    pub prompts: Dataset,
    /// Rollouts, each followed by `epochs` passes of learning over it.
    #[schemars(range(min = 1, max = 1_000_000_000))]
    pub iterations: u32,
    /// Responses in one rollout, over all ranks.
    #[schemars(range(min = 1, max = 1_048_576))]
    pub rollout_batch_size: u32,
    /// Responses to each prompt of a rollout, of which `rolloutBatchSize` is a multiple.
    #[serde(default = "default_samples")]
    #[schemars(range(min = 1, max = 1024))]
    pub samples_per_prompt: u32,
    /// How a rollout's responses become optimizer steps: `globalSize` is the PPO mini-batch, of which
    /// `rolloutBatchSize` is a multiple.
    pub batch: Batch,
    /// Passes over one rollout.
    #[serde(default = "default_ppo_epochs")]
    #[schemars(range(min = 1, max = 100))]
    pub epochs: u32,
    /// Longer prompts lose their beginning.
    #[schemars(range(min = 1, max = 1_048_576))]
    pub max_prompt_length: u32,
    /// A response ends at the end-of-sequence token or after this many tokens.
    #[schemars(range(min = 1, max = 1_048_576))]
    pub max_new_tokens: u32,
    /// The law from which responses are drawn.
    #[serde(default)]
    pub sampling: Sampling,
    /// The penalty that keeps the actor near the reference.
    pub kl: Kl,
    /// Discount of later rewards; of no matter where an answer counts as a whole (`leaveOneOut`, `groupRelative`).
    #[serde(default = "default_one")]
    #[schemars(range(min = 0.0, max = 1.0))]
    #[serde(deserialize_with = "decimal::read")]
    pub gamma: f64,
    /// Clip range of the probability ratio.
    #[serde(default = "default_clip")]
    #[schemars(range(min = 0.0, max = 10.0))]
    #[serde(deserialize_with = "decimal::read")]
    pub clip_ratio: f64,
    /// Clip range of the value's change.
    #[serde(default = "default_clip")]
    #[schemars(range(min = 0.0, max = 1e6))]
    #[serde(deserialize_with = "decimal::read")]
    pub clip_value: f64,
    /// Scores are clipped to plus or minus this.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "decimal::read_some")]
    #[schemars(range(min = 0.0, max = 1e6))]
    pub clip_reward: Option<f64>,
    /// Score given in place of the reward model's to a response without an end-of-sequence token.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "decimal::read_some")]
    #[schemars(range(min = -1e6, max = 1e6))]
    pub missing_eos_penalty: Option<f64>,
    /// Weight of the entropy bonus.
    #[serde(default)]
    #[schemars(range(min = 0.0, max = 10.0))]
    #[serde(deserialize_with = "decimal::read")]
    pub entropy_coefficient: f64,
    /// Ends the passes over a rollout once the approximate KL to the rollout's policy passes this (nats a token).
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "decimal::read_some")]
    #[schemars(range(min = 0.0, max = 1e6))]
    pub target_kl: Option<f64>,
    /// Trains adapters of actor and critic in place of the whole models; the reference is then the actor without its
    /// adapters, and costs no memory. The critic goes on with the reward model's adapters where that has some.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lora: Option<Lora>,
    /// The actor's optimizer.
    pub actor_optimizer: Optimizer,
    /// The critic's optimizer. Only where advantages are estimated by `gae`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub critic_optimizer: Option<Optimizer>,
    /// Held-out prompts are answered and scored before the first iteration, after the last, and
    /// every so many between (0: not between).
    #[serde(default)]
    #[schemars(range(min = 0, max = 1_000_000_000))]
    pub eval_every_iterations: u32,
}

fn critic_and_samples() -> serde_json::Value {
    let critic = "(!has(self.advantage) || has(self.advantage.gae))";
    serde_json::json!([
        {"rule": format!("!{critic} || has(self.criticOptimizer)"),
         "message": "advantages are estimated by a critic (gae), so criticOptimizer is required; write it, or another advantage"},
        {"rule": format!("{critic} || !(has(self.criticOptimizer) || has(self.critic))"),
         "message": "this advantage has no critic; leave out critic and criticOptimizer, or set advantage to gae"},
        {"rule": "!has(self.samplesPerPrompt) || self.rolloutBatchSize % self.samplesPerPrompt == 0",
         "message": "rolloutBatchSize must be a multiple of samplesPerPrompt: it counts responses; change one of them"},
        {"rule": "!has(self.advantage) || !(has(self.advantage.leaveOneOut) || has(self.advantage.groupRelative)) || (has(self.samplesPerPrompt) && self.samplesPerPrompt > 1)",
         "message": "this advantage compares the answers to a prompt; set samplesPerPrompt to 2 or more"},
    ])
}

fn default_samples() -> u32 {
    1
}

fn default_ppo_epochs() -> u32 {
    4
}
fn default_lambda() -> f64 {
    0.95
}
fn default_clip() -> f64 {
    0.2
}

/// What a stage does: exactly one of these.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum StageKind {
    /// Supervised fine-tuning.
    Sft(Sft),
    /// Reward-model training.
    RewardModel(RewardModel),
    /// Proximal policy optimisation.
    Ppo(Box<Ppo>),
}

impl StageKind {
    /// The field under which each kind stands in a manifest, and what such a stage puts out.
    pub const ALL: [(&'static str, Produces); 3] =
        [("sft", Produces::Policy), ("rewardModel", Produces::RewardModel), ("ppo", Produces::Policy)];

    fn entry(&self) -> (&'static str, Produces) {
        match self {
            StageKind::Sft(_) => Self::ALL[0],
            StageKind::RewardModel(_) => Self::ALL[1],
            StageKind::Ppo(_) => Self::ALL[2],
        }
    }

    /// The field under which the kind stands in a manifest.
    pub fn name(&self) -> &'static str {
        self.entry().0
    }

    /// What such a stage puts out.
    pub fn produces(&self) -> Produces {
        self.entry().1
    }

    /// The adapters that it trains, where it does.
    pub fn lora(&self) -> Option<&Lora> {
        match self {
            StageKind::Sft(s) => s.lora.as_ref(),
            StageKind::RewardModel(s) => s.lora.as_ref(),
            StageKind::Ppo(s) => s.lora.as_ref(),
        }
    }

    /// The model from which it starts, where it is not the job's.
    pub fn start(&self) -> Option<&ModelRef> {
        match self {
            StageKind::Sft(s) => s.start.as_ref(),
            StageKind::RewardModel(s) => s.start.as_ref(),
            StageKind::Ppo(s) => s.start.as_ref(),
        }
    }

    /// What it learns from, and its field.
    pub fn dataset(&self) -> (&'static str, &Dataset) {
        match self {
            StageKind::Sft(s) => ("dataset", &s.dataset),
            StageKind::RewardModel(s) => ("dataset", &s.dataset),
            StageKind::Ppo(s) => ("prompts", &s.prompts),
        }
    }

    /// The same stage with another dataset.
    pub fn with_dataset(mut self, dataset: Dataset) -> Self {
        match &mut self {
            StageKind::Sft(s) => s.dataset = dataset,
            StageKind::RewardModel(s) => s.dataset = dataset,
            StageKind::Ppo(s) => s.prompts = dataset,
        }
        self
    }

    /// Every model that it names, with its field and what it has to be.
    pub fn models(&self) -> Vec<Named<'_>> {
        let named = |field: String, model, must_be| Named { field: format!("{}.{field}", self.name()), model, must_be };
        let mut all: Vec<_> = self.start().map(|m| named("start".into(), m, Produces::Policy)).into_iter().collect();
        if let StageKind::Ppo(s) = self {
            all.extend(s.reference.as_ref().map(|m| named("reference".into(), m, Produces::Policy)));
            all.extend(s.critic.as_ref().map(|m| named("critic".into(), m, Produces::RewardModel)));
            let rewards =
                s.rewards.iter().filter_map(|r| Some((format!("rewards[{}].model", r.name), r.model.as_ref()?)));
            all.extend(rewards.map(|(field, model)| named(field, model, Produces::RewardModel)));
        }
        all
    }
}

impl Ppo {
    /// The reward model from which the critic starts, where there is one.
    pub fn critic_start(&self) -> Option<&ModelRef> {
        self.advantage.gae?;
        self.critic.as_ref().or_else(|| self.rewards.iter().find_map(|r| r.model.as_ref()))
    }
}

/// How parameters, gradients and optimizer state are spread over the ranks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum Sharding {
    /// Every rank holds everything; gradients are summed by all-reduce.
    #[default]
    Ddp,
    /// Each rank holds its part of the optimizer state and updates its part of the parameters (ZeRO, Rajbhandari 2020).
    Zero1,
    /// As zero1, and each rank keeps only its part of the gradients, reduced after every micro-batch.
    Zero2,
    /// As zero2, and each rank keeps only its part of the parameters; a segment is gathered while it runs.
    Zero3,
}

/// What lives in host memory and comes to the device only while it is used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum Offload {
    /// Nothing.
    #[default]
    None,
    /// Gradients and optimizer state; the optimizer runs on the CPU (ZeRO-Offload, Ren 2021).
    Optimizer,
    /// These and the parameters, which are streamed a segment at a time.
    Parameters,
}

/// What is kept of the forward pass for the backward pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum Recompute {
    /// Everything.
    #[default]
    None,
    /// Each block's input; the block runs again before its backward pass (Chen 2016).
    Block,
}

/// The number format that models compute in. Optimizers always keep parameters and moments in fp32 (Micikevicius 2018).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum Precision {
    /// 32 bits.
    #[default]
    Fp32,
    /// 16 bits with the range of fp32.
    Bf16,
    /// 16 bits with a small range, so the loss is scaled, and a step whose gradients overflow is skipped.
    Fp16,
}

/// How a model is placed and run. These settings change memory and speed, never what is learnt (beyond a number format's
/// rounding).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Strategy {
    /// How parameters, gradients and optimizer state are spread over the ranks.
    #[serde(default)]
    pub sharding: Sharding,
    /// What lives in host memory.
    #[serde(default)]
    pub offload: Offload,
    /// What is kept of the forward pass for the backward pass.
    #[serde(default)]
    pub recompute: Recompute,
    /// The number format that models compute in.
    #[serde(default)]
    pub precision: Precision,
}

/// How a stage's model is written.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Export {
    /// The number format of its weights; without it, that of the model from which the stage starts. What does not fit into
    /// fp16 is refused once the model is trained.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dtype: Option<Precision>,
    /// Weights that are more than this are split into several files with an index, none of which is larger, unless one tensor
    /// is; such as `5G`, which is the default. From `1M` on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16), extend("x-kubernetes-validations" = shard_size()))]
    pub max_shard_size: Option<String>,
}

fn shard_size() -> serde_json::Value {
    serde_json::json!([{
        "rule": r"self.matches('^[1-9][0-9]{0,5}(\\.[0-9]{1,3})?(M|G|T|Mi|Gi|Ti)$')",
        "message": "maxShardSize is an amount of bytes of 1M or more, such as 5G or 512Mi",
    }])
}

/// When a checkpoint is written and how many are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CheckpointPolicy {
    /// Steps between two checkpoints (PPO: iterations). One is also written at the end and on SIGTERM.
    #[serde(default = "default_checkpoint_every")]
    #[schemars(range(min = 1, max = 1_000_000_000))]
    pub every_steps: u32,
    /// Seconds after which one is written at the next step's end, however many steps have passed: what the loss of a node may
    /// cost at most.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000_000_000))]
    pub every_seconds: Option<u32>,
    /// Checkpoints kept; older ones are deleted.
    #[serde(default = "default_checkpoint_keep")]
    #[schemars(range(min = 1, max = 100))]
    pub keep: u32,
}

fn default_checkpoint_every() -> u32 {
    100
}
fn default_checkpoint_keep() -> u32 {
    2
}

impl Default for CheckpointPolicy {
    fn default() -> Self {
        Self { every_steps: default_checkpoint_every(), every_seconds: None, keep: default_checkpoint_keep() }
    }
}

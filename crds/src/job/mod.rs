//! The RLHFJob resource.
//!
//! Everything that can be refused at admission is refused there, by CEL rules whose messages say what to
//! write instead; there is no webhook. Each rule stands at the field of which it speaks, so that the API
//! server's answer names the path. Only fields that do something exist. Strictness is admission's: reading a job never
//! fails for a field that is not known here, since a newer definition may have it.

mod compute;
mod pod;
mod policy;
mod ranges;
mod rules;
mod schema;
mod status;

pub use compute::{Compute, ComputeOverride, Prepare};
pub use pod::{PodIdentity, PodTemplate};
pub use policy::FailurePolicy;
pub use ranges::out_of_range;
pub use schema::crd;
pub use status::{
    AttemptRecord, Failure, Images, MAX_ATTEMPTS, Phase, PlanSource, RLHFJobStatus, Restarts, StagePhase, StagePlan,
    StageStatus,
};

use crate::choice::{StrategyOverride, StrategySpec};
use crate::config::KeepCheckpoints;
use crate::names;
use crate::reference::{MAX_STAGE_NAME, ModelRef, Produces};
use crate::source;
use crate::stage::{CheckpointPolicy, Export, Ppo, RewardModel, Sft, StageKind};
use kube::{CustomResource, KubeSchema, ResourceExt};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Most stages of a job.
pub const MAX_STAGES: usize = 16;

/// A run of reinforcement learning from human feedback: a graph of stages on one volume.
#[derive(CustomResource, Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "rlhf.dev",
    version = "v1alpha1",
    kind = "RLHFJob",
    plural = "rlhfjobs",
    shortname = "rlhf",
    category = "all",
    namespaced,
    status = "RLHFJobStatus",
    doc = "A run of reinforcement learning from human feedback: supervised fine-tuning, reward-model training and PPO as a graph of stages on one volume.",
    printcolumn(name = "Phase", type_ = "string", json_path = ".status.phase"),
    printcolumn(name = "Stage", type_ = "string", json_path = ".status.stage"),
    printcolumn(name = "Progress", type_ = "string", json_path = ".status.progress"),
    printcolumn(name = "Restarts", type_ = "integer", json_path = ".status.restarts"),
    printcolumn(name = "Disruptions", type_ = "integer", json_path = ".status.disruptions"),
    printcolumn(name = "Figure", type_ = "string", json_path = ".status.figure", priority = 1),
    printcolumn(name = "Tokens/s", type_ = "integer", json_path = ".status.tokensPerSecond", priority = 1),
    printcolumn(name = "ETA", type_ = "string", json_path = ".status.eta", priority = 1),
    printcolumn(name = "Message", type_ = "string", json_path = ".status.message", priority = 1),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    validation = Rule::new("self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$') && size(self.metadata.name) <= 63").message(
        "metadata.name must be a DNS label: at most 63 lower-case letters, digits and dashes, beginning with a letter"
    ),
)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = rules::immutable_option("managedBy"),
    validation = rules::changes_while_suspended(),
    validation = rules::memory_is_known(),
    validation = rules::stage_device_memory(),
    validation = rules::stage_cpu_workers(),
    validation = rules::stage_resources(),
)]
pub struct RLHFJobSpec {
    /// The pretrained model from which stages start.
    #[x_kube(validation = rules::immutable("model"), validation = rules::model_is_a_source())]
    pub model: ModelRef,
    /// The volume for models, data, checkpoints and outputs.
    #[x_kube(validation = rules::immutable("storage"))]
    pub storage: Storage,
    /// How the check of model and data runs, before any stage. May change while the job is suspended.
    #[serde(default)]
    pub prepare: Prepare,
    /// Where every stage runs, unless it says otherwise. May change while the job is suspended.
    #[serde(default)]
    pub compute: Compute,
    /// How models are placed and run, for every stage, unless it says otherwise. May change while the job is suspended.
    #[serde(default)]
    pub strategy: StrategySpec,
    /// The stages. An edge is a reference to an earlier stage by name; stages without an edge between them run side by side.
    #[schemars(length(min = 1, max = MAX_STAGES))]
    #[x_kube(
        merge_strategy = ListMerge::Map(vec!["name".into()]),
        validation = rules::references("sft.start", Produces::Policy),
        validation = rules::references("rewardModel.start", Produces::Policy),
        validation = rules::references("ppo.start", Produces::Policy),
        validation = rules::references("ppo.reference", Produces::Policy),
        validation = rules::references("ppo.critic", Produces::RewardModel),
        validation = rules::reward_references(),
        validation = rules::dependencies(),
        validation = rules::same_stages(),
    )]
    pub stages: Vec<Stage>,
    /// Stops all pods after they have written a checkpoint; set back to false, the job goes on from there.
    #[serde(default)]
    pub suspend: bool,
    /// What is done about an attempt that ends badly. May change at any time.
    #[serde(default)]
    pub failure_policy: FailurePolicy,
    /// Fails the job once it has been active for so long, in all. The time runs from the first pod's making on,
    /// back-offs and waiting for nodes included, and stands still while the job is suspended or only waits in a queue.
    /// May change at any time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 315_360_000))]
    pub active_deadline_seconds: Option<u32>,
    /// Deletes the job with its Jobs and pods so long after it succeeded or failed. What it wrote to the volume
    /// stays. May change at any time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 315_360_000))]
    pub ttl_seconds_after_finished: Option<u32>,
    /// Who runs the job. This operator leaves a job alone whose field names another, such as
    /// `kueue.x-k8s.io/multikueue`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(
        length(max = 63),
        regex(pattern = r"^[a-z0-9]([-.a-z0-9]*[a-z0-9])?/[A-Za-z0-9]([-._A-Za-z0-9]*[A-Za-z0-9])?$")
    )]
    pub managed_by: Option<String>,
}

/// The job's volume.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Storage {
    /// An existing claim that all of the job's pods can mount for writing.
    pub volume_claim: VolumeClaim,
    /// The run's folder on the volume, below which its checkpoints and models are written: its identity. A job that is
    /// created anew with the folder of an earlier one, and asks for the same, goes on where that stopped. By default
    /// `jobs/<name>-<the UID's first 8 characters>`, which no other job has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(
        length(min = 1, max = 256),
        regex(pattern = r"^[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*$")
    )]
    pub run_path: Option<String>,
    /// What stays of a stage's checkpoints once it has succeeded. They hold the optimizer's state, several times the
    /// model's size.
    #[serde(default)]
    pub keep_checkpoints: KeepCheckpoints,
}

/// An existing PersistentVolumeClaim in the job's namespace.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct VolumeClaim {
    /// Its name.
    #[schemars(length(min = 1, max = 253))]
    #[x_kube(validation = Rule::new("!format.dns1123Subdomain().validate(self).hasValue()").message(
        "claimName must be the name of a PersistentVolumeClaim: lower-case letters, digits, '-' and '.', with a letter or digit at each end"
    ))]
    pub claim_name: String,
}

/// One stage: a name and exactly one of `sft`, `rewardModel` and `ppo`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = rules::one_kind(),
    validation = rules::same_stage(),
    validation = rules::immutable_option("export"),
    validation = Rule::new("!has(self.ppo) || self.ppo.rolloutBatchSize % self.ppo.batch.globalSize == 0").message(
        "ppo.rolloutBatchSize must be a multiple of ppo.batch.globalSize, the mini-batch; change one of them"
    ),
)]
pub struct Stage {
    /// Unique in the job; part of the names of the stage's pods.
    #[schemars(length(min = 1, max = MAX_STAGE_NAME), regex(pattern = r"^[a-z]([-a-z0-9]*[a-z0-9])?$"))]
    #[x_kube(validation = Rule::new("self != 'prepare'").message(
        "a stage may not be called prepare, which is the check before the stages; choose another name"
    ))]
    pub name: String,
    /// Earlier stages that have to be done before this one starts, although it takes no model from them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), inner(length(min = 1, max = MAX_STAGE_NAME)))]
    pub depends_on: Vec<String>,
    /// Supervised fine-tuning.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sft: Option<Box<Sft>>,
    /// Reward-model training.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reward_model: Option<Box<RewardModel>>,
    /// Proximal policy optimisation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ppo: Option<Box<Ppo>>,
    /// Where this stage runs, as far as it is not where every stage does. May change while the job is suspended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compute: Option<Box<ComputeOverride>>,
    /// How this stage's models are placed, as far as it is not how every stage's are. May change while the job is suspended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub strategy: Option<StrategyOverride>,
    /// When checkpoints are written. May change while the job is suspended.
    #[serde(default)]
    pub checkpoint: CheckpointPolicy,
    /// How the stage's model is written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub export: Option<Export>,
    /// Seeds every random choice of the stage.
    #[serde(default = "default_seed")]
    #[schemars(range(min = 0, max = 4_294_967_295u32))]
    pub seed: u32,
}

fn default_seed() -> u32 {
    42
}

impl Stage {
    /// The stage's one kind, or `None` where it has several, or one that is not known here.
    pub fn kind(&self) -> Option<StageKind> {
        match (&self.sft, &self.reward_model, &self.ppo) {
            (Some(s), None, None) => Some(StageKind::Sft(s.as_ref().clone())),
            (None, Some(s), None) => Some(StageKind::RewardModel(s.as_ref().clone())),
            (None, None, Some(s)) => Some(StageKind::Ppo(s.clone())),
            _ => None,
        }
    }

    /// What is not known here of a stage, in words. Several kinds are known, and wrong.
    fn unknown(&self) -> Option<String> {
        match self.kind() {
            Some(kind) => kind.unknown().map(|field| format!("spec.stages[{}].{field} says something", self.name)),
            None if self.sft.is_none() && self.reward_model.is_none() && self.ppo.is_none() => {
                Some(format!("stage {} is of a kind", self.name))
            }
            None => None,
        }
    }

    /// The names of the stages that have to be done before this one, each once.
    pub fn needs(&self) -> Vec<String> {
        let kind = self.kind();
        let models = kind.iter().flat_map(StageKind::models).filter_map(|named| named.model.stage.clone());
        let mut needs: Vec<String> = Vec::new();
        for name in models.chain(self.depends_on.iter().cloned()) {
            if !needs.contains(&name) {
                needs.push(name);
            }
        }
        needs
    }
}

impl RLHFJob {
    /// The first place of the spec where a newer definition says something that is not known here, in words.
    pub fn unknown(&self) -> Option<String> {
        let Some(field) = self.spec.model.unknown("spec.model") else {
            return self.spec.stages.iter().find_map(Stage::unknown);
        };
        Some(format!("{field} says something"))
    }

    /// Where a stage runs: what it says itself over what is said for every stage.
    pub fn compute(&self, stage: &Stage) -> Compute {
        stage.compute.as_ref().map_or_else(|| self.spec.compute.clone(), |own| own.over(&self.spec.compute))
    }

    /// How a stage's models are placed: what it says itself over what is said for every stage.
    pub fn strategy(&self, stage: &Stage) -> StrategySpec {
        stage.strategy.map_or(self.spec.strategy, |own| own.over(&self.spec.strategy))
    }

    /// The run's folder below the volume.
    pub fn run_dir(&self) -> String {
        let default = || names::job_dir(&self.name_any(), &self.uid().unwrap_or_default());
        self.spec.storage.run_path.clone().unwrap_or_else(default)
    }

    /// Where a model is, or will be, below the volume; `None` where what stands there is no place of one.
    pub fn model_path(&self, model: &ModelRef) -> Option<String> {
        let of_stage = |stage: &String| names::model_dir(&self.run_dir(), stage);
        let of_source = |source: &String| source::path(&self.run_dir(), source, true);
        model.stage.as_ref().map(of_stage).or_else(|| model.source.as_ref().and_then(of_source))
    }

    /// The model that exists before the job of which a model is made: a stage's own start's, and so on.
    pub fn origin<'a>(&'a self, model: &'a ModelRef) -> Option<&'a ModelRef> {
        let mut model = model;
        for _ in 0..=self.spec.stages.len() {
            let Some(name) = &model.stage else { return Some(model) };
            let stage = self.spec.stages.iter().find(|s| s.name == *name)?;
            let start = match (&stage.sft, &stage.reward_model, &stage.ppo) {
                (Some(s), None, None) => s.start.as_ref(),
                (None, Some(s), None) => s.start.as_ref(),
                (None, None, Some(s)) => s.start.as_ref(),
                _ => return None,
            };
            model = start.unwrap_or(&self.spec.model);
        }
        None
    }
}

//! Bytes on each device and each host, by what they are for.
//!
//! The engine holds a model as flat chunks, one a segment (embedding, blocks, head). With N parameters, W ranks and c bytes a
//! number of the compute type, a trained model has a working copy (cN), an fp32 master copy (4N, unless that is the working
//! copy), two moments (8N) and an fp32 gradient (4N), of which the strategy shards some to 1/W (ZeRO, Rajbhandari 2020)
//! and keeps some in host memory (ZeRO-Offload, Ren 2021); a frozen model has only the working copy. To these come what
//! running brings: chunks that are fetched for their use, gradients on their way to their reduction, activations, slices
//! of logits and, in a rollout, keys and values. Phases of a stage follow each other, so a device's need is what lies there
//! all the time and the most that any one phase adds.

use crate::placed::{Placed, Setting, Trained};
use crate::segment::FP32;
use rlhf_api::model::{HeadKind, ModelSpec};
use rlhf_api::stage::{Lora, Strategy};
use serde::Serialize;
use std::ops::Add;

/// The head runs over as many positions at a time as give fp32 logits of this size: 32 MiB, large enough for the kernels and
/// small beside a model.
pub const HEAD_SLICE_BYTES: i64 = 32 << 20;

/// Rows that the engine generates together at most: 64 as in the experience batches of the ColossalAI comparison (2023).
pub const ROLLOUT_ROWS: u32 = 64;

/// What is trained, and on how much at a time.
#[derive(Clone, Debug, PartialEq)]
pub struct Task {
    /// The stage.
    pub stage: Stage,
    /// The shape of the model that is trained; in PPO of the actor.
    pub model: ModelSpec,
    /// The adapters that are trained on frozen weights, where models are not trained whole.
    pub lora: Option<Lora>,
    /// Rows that a rank runs through a model at a time. A ranking has a row for each of its responses.
    pub rows: u32,
    /// Tokens of a row; in PPO of prompt and response together.
    pub time: u32,
    /// Bytes that every rank holds of the stage's dataset ([`dataset_bytes`]).
    pub dataset: f64,
}

/// Bytes that a dataset of so many records takes in memory: the order of an epoch and of an evaluation, 64-bit numbers. Tokens
/// lie in files that are mapped, whose pages the system takes back where it needs them.
pub fn dataset_bytes(records: u64) -> f64 {
    16.0 * records as f64
}

/// A kind of stage, with what only it has.
#[derive(Clone, Debug, PartialEq)]
#[expect(clippy::large_enum_variant, reason = "one is made for a plan, and nobody keeps many")]
pub enum Stage {
    /// Supervised fine-tuning of a language model.
    Sft,
    /// Training of a reward model.
    RewardModel,
    /// PPO with a trained actor, a critic or none, a frozen reference and frozen reward models.
    Ppo {
        /// The reference's shape, where it is another model than the actor's start.
        reference: Option<ModelSpec>,
        /// What the critic starts from, where there is one.
        critic: Option<Scorer>,
        /// The reward models.
        rewards: Vec<Scorer>,
        /// Rows of a rollout that fall to one rank.
        rollout_rows: u32,
        /// The longest response.
        new_tokens: u32,
    },
}

impl Stage {
    /// PPO with one reward model, from which the critic starts too, and the actor's start as its reference.
    pub fn ppo(reward: Scorer, rollout_rows: u32, new_tokens: u32) -> Self {
        Self::Ppo { reference: None, critic: Some(reward.clone()), rewards: vec![reward], rollout_rows, new_tokens }
    }

    /// The same where advantages are estimated without a critic.
    pub fn without_critic(self) -> Self {
        match self {
            Self::Ppo { reference, rewards, rollout_rows, new_tokens, .. } => {
                Self::Ppo { reference, critic: None, rewards, rollout_rows, new_tokens }
            }
            other => other,
        }
    }
}

/// A reward model.
#[derive(Clone, Debug, PartialEq)]
pub struct Scorer {
    /// Its shape.
    pub model: ModelSpec,
    /// Tells the reward models of a stage apart: those with the same number are the same one.
    pub source: usize,
    /// With [`Task::lora`]: its adapters, where it was trained by some from the actor's start. It then shares the actor's frozen
    /// backbone; else it has one of its own.
    pub lora: Option<Lora>,
}

impl Scorer {
    /// A stage's first reward model.
    pub fn new(model: ModelSpec, lora: Option<Lora>) -> Self {
        Self { model, source: 0, lora }
    }
}

/// Where ranks run: one for each device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Machines {
    /// Machines (pods).
    pub nodes: u32,
    /// Devices of each.
    pub devices: u32,
    /// Bytes of each device; `None` where the CPU computes, and all lies in host memory.
    pub device_memory: Option<u64>,
    /// Bytes of host memory of each machine that its ranks may use.
    pub host_memory: u64,
}

impl Machines {
    /// Ranks in all.
    pub fn world_size(&self) -> u32 {
        self.nodes.saturating_mul(self.devices)
    }
}

/// Bytes on one device at its peak.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub struct DeviceBytes {
    /// Working copies at rest.
    pub parameters: f64,
    /// Chunks that were gathered or copied from the host for their use.
    pub fetched: f64,
    /// Master copies and moments.
    pub optimizer: f64,
    /// Gradients: their sums, and those on their way.
    pub gradients: f64,
    /// What autograd keeps and what running a segment takes.
    pub activations: f64,
    /// Slices of logits and what losses make of them.
    pub logits: f64,
    /// Keys and values of a rollout.
    pub cache: f64,
}

impl DeviceBytes {
    /// All of them.
    pub fn total(&self) -> f64 {
        let Self { parameters, fetched, optimizer, gradients, activations, logits, cache } = self;
        parameters + fetched + optimizer + gradients + activations + logits + cache
    }
}

impl Add for DeviceBytes {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            parameters: self.parameters + other.parameters,
            fetched: self.fetched + other.fetched,
            optimizer: self.optimizer + other.optimizer,
            gradients: self.gradients + other.gradients,
            activations: self.activations + other.activations,
            logits: self.logits + other.logits,
            cache: self.cache + other.cache,
        }
    }
}

/// Bytes of tensors in one machine's host memory, of all its ranks, beside those of a CPU that is the device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub struct HostBytes {
    /// Working copies at rest.
    pub parameters: f64,
    /// Master copies and moments.
    pub optimizer: f64,
    /// Sums of gradients.
    pub gradients: f64,
    /// What loading takes beyond all of these, or writing the model if that takes more.
    pub loading: f64,
    /// The dataset.
    pub dataset: f64,
}

impl HostBytes {
    /// All of them.
    pub fn total(&self) -> f64 {
        let Self { parameters, optimizer, gradients, loading, dataset } = self;
        parameters + optimizer + gradients + loading + dataset
    }

    fn scaled(self, ranks: f64) -> Self {
        Self {
            parameters: self.parameters * ranks,
            optimizer: self.optimizer * ranks,
            gradients: self.gradients * ranks,
            loading: self.loading * ranks,
            dataset: self.dataset * ranks,
        }
    }
}

impl Add for HostBytes {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            parameters: self.parameters + other.parameters,
            optimizer: self.optimizer + other.optimizer,
            gradients: self.gradients + other.gradients,
            loading: self.loading + other.loading,
            dataset: self.dataset + other.dataset,
        }
    }
}

/// What a strategy needs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Plan {
    /// The strategy.
    pub strategy: Strategy,
    /// On each device.
    pub device: DeviceBytes,
    /// The phase in which a device needs the most.
    pub phase: &'static str,
    /// On each host.
    pub host: HostBytes,
    /// What of the host's bytes is there only while a trained model is written, at a stage's end.
    pub writing: f64,
    /// On each host, while a checkpoint is written as training goes on.
    pub checkpoint_copies: f64,
}

/// What `strategy` needs for `task` on `machines`. The trainer's tests hold it to what was measured.
pub fn estimate(task: &Task, machines: &Machines, strategy: Strategy) -> Plan {
    let setting =
        Setting { strategy, world: machines.world_size().max(1).into(), gpu: machines.device_memory.is_some() };
    let models = models(task, setting);
    let (device, host) = models
        .iter()
        .flat_map(|m| m.pieces().map(|pieces| m.resident(pieces)))
        .fold((DeviceBytes::default(), HostBytes::default()), |(device, host), (d, h)| (device + d, host + h));
    let (phase, most) = phases(task, &models)
        .into_iter()
        .max_by(|(_, a), (_, b)| a.total().total_cmp(&b.total()))
        .unwrap_or(("rest", DeviceBytes::default()));
    let ranks = f64::from(machines.devices);
    let pieces = models.iter().flat_map(Placed::pieces);
    let trained: f64 = pieces.filter(|p| p.trained).map(|p| p.count * p.elements).sum();
    // Rank 0 alone writes the model.
    let (loading, writing) = (ranks * loading(&models, host.total()), writing(&models, setting));
    Plan {
        strategy,
        device: device + most,
        phase,
        host: HostBytes { loading: loading.max(writing), dataset: task.dataset * ranks, ..host.scaled(ranks) },
        writing: (writing - loading).max(0.0),
        checkpoint_copies: 3.0 * FP32 * trained / setting.world * ranks,
    }
}

/// The models of a stage, in the order in which they are loaded.
pub(crate) fn models(task: &Task, setting: Setting) -> Vec<Placed<'_>> {
    let model = |spec, head, trained| Placed::new(spec, head, trained, setting);
    match (&task.stage, &task.lora) {
        (Stage::Sft, None) => vec![model(&task.model, HeadKind::Lm, Trained::Whole)],
        (Stage::Sft, Some(lora)) => vec![model(&task.model, HeadKind::Lm, Trained::Adapters).adapted(lora)],
        (Stage::RewardModel, None) => vec![model(&task.model, HeadKind::Scalar, Trained::Whole)],
        (Stage::RewardModel, Some(lora)) => {
            vec![model(&task.model, HeadKind::Scalar, Trained::Adapters).adapted(lora)]
        }
        (Stage::Ppo { reference, critic, rewards, .. }, None) => {
            let critic = critic.iter().map(|critic| model(&critic.model, HeadKind::Scalar, Trained::Whole));
            let mut all: Vec<_> = critic.collect();
            all.extend([
                model(&task.model, HeadKind::Lm, Trained::Whole),
                model(reference.as_ref().unwrap_or(&task.model), HeadKind::Lm, Trained::Nothing),
            ]);
            all.extend(rewards.iter().map(|r| model(&r.model, HeadKind::Scalar, Trained::Nothing)));
            all
        }
        (Stage::Ppo { reference, critic, rewards, .. }, Some(lora)) => {
            let mut all = vec![model(&task.model, HeadKind::Lm, Trained::Adapters).adapted(lora)];
            all.extend(critic.iter().map(|critic| {
                let trained = model(&critic.model, HeadKind::Scalar, Trained::Adapters);
                match &critic.lora {
                    Some(own) => trained.adapted(own).sharing(),
                    None => trained.adapted(lora),
                }
            }));
            for (i, reward) in rewards.iter().enumerate() {
                let frozen = model(&reward.model, HeadKind::Scalar, Trained::Nothing);
                let mut before = rewards[..i].iter().chain(critic).filter(|other| other.lora.is_none());
                all.push(match &reward.lora {
                    Some(own) => frozen.adapted(own).sharing(),
                    None if before.any(|other| other.source == reward.source) => frozen.sharing(),
                    None => frozen,
                });
            }
            all.push(match reference {
                Some(reference) => model(reference, HeadKind::Lm, Trained::Nothing),
                None => model(&task.model, HeadKind::Lm, Trained::Nothing).sharing(),
            });
            all
        }
    }
}

/// What each phase of a stage adds to what lies on a device all the time.
fn phases(task: &Task, models: &[Placed<'_>]) -> Vec<(&'static str, DeviceBytes)> {
    let tokens = f64::from(task.rows) * f64::from(task.time);
    let (positions, rollout) = match &task.stage {
        Stage::Sft => (tokens, None),
        Stage::RewardModel => (task.rows.into(), None),
        Stage::Ppo { rollout_rows, new_tokens, .. } => {
            (f64::from(task.rows) * f64::from(*new_tokens), Some((*rollout_rows, *new_tokens)))
        }
    };
    let mut phases = Vec::new();
    for model in models.iter().filter(|m| m.trained != Trained::Nothing) {
        phases.extend(model.learn(&model.pass(task.rows, task.time), positions).into_iter().map(|m| ("learn", m)));
    }
    if let Some((rows, new_tokens)) = rollout {
        for model in models {
            phases.extend(model.score(&model.pass(task.rows, task.time), positions).map(|m| ("score", m)));
        }
        let actors = models.iter().filter(|m| m.trained != Trained::Nothing && m.head == HeadKind::Lm);
        phases.extend(actors.flat_map(|m| m.generate(rows, task.time, new_tokens)).map(|m| ("rollout", m)));
    }
    phases
}

/// What a rank's host memory needs at the height of loading beyond `at_rest`: a chunk's values as they come from the file
/// and joined to a flat buffer, both in fp32, beside what has been loaded before; and the values of all of a model's adapters.
/// Of several chunks of one size, the last one is the height.
fn loading(models: &[Placed<'_>], at_rest: f64) -> f64 {
    let (mut loaded, mut most) = (0.0, 0.0);
    for model in models {
        let first = model.loaded_first().map(|pieces| (pieces, 0.0));
        let last = model.loaded_last().map(|pieces| (pieces, model.adapter_values()));
        for (pieces, values) in first.into_iter().chain(last).filter(|(pieces, _)| pieces.count > 0.0) {
            loaded += model.resident(pieces).1.total();
            most = f64::max(most, loaded + 2.0 * FP32 * pieces.elements + values);
        }
    }
    (most - at_rest).max(0.0)
}

/// What rank 0's host memory needs to write a trained model: a segment's fp32 values, where they do not lie there whole anyhow.
/// Those of a model that trains adapters come from its file, and the adapters are written last.
fn writing(models: &[Placed<'_>], setting: Setting) -> f64 {
    let at_hand = setting.state_on_host() && !(setting.shards_state() && setting.parallel());
    let need = |model: &Placed<'_>| match model.trained {
        Trained::Whole if at_hand => 0.0,
        Trained::Whole => FP32 * model.largest_segment(),
        Trained::Adapters => FP32 * model.largest_segment() + model.adapter_values(),
        Trained::Nothing => 0.0,
    };
    models.iter().map(need).fold(0.0, f64::max)
}

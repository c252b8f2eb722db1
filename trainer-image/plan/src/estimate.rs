//! Bytes on each device and each host, by what they are for.
//!
//! The engine holds a model as flat chunks, one a segment (embedding, blocks, head). With N parameters, W ranks and c bytes a
//! number of the compute type, a trained model has a working copy (cN), an fp32 master copy (4N, unless that is the working
//! copy), two moments (8N) and an fp32 gradient (4N), of which the strategy shards some to 1/W (ZeRO, Rajbhandari 2020)
//! and keeps some in host memory (ZeRO-Offload, Ren 2021); a frozen model has only the working copy. To these come what
//! running brings: chunks that are fetched for their use, gradients on their way to their reduction, activations, slices
//! of logits and, in a rollout, keys and values. Phases of a stage follow each other, so a device's need is what lies there
//! all the time and the most that any one phase adds.

use crate::segment::{Chunks, FP32, Pass};
use rlhf_api::model::{HeadKind, ModelSpec};
use rlhf_api::stage::{Lora, Offload, Precision, Recompute, Sharding, Strategy};
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
    /// The shape of the model that is trained; in PPO of actor and reference.
    pub model: ModelSpec,
    /// The adapters that are trained on frozen weights, where models are not trained whole.
    pub lora: Option<Lora>,
    /// Rows that a rank runs through a model at a time. A ranking has a row for each of its responses.
    pub rows: u32,
    /// Tokens of a row; in PPO of prompt and response together.
    pub time: u32,
}

/// A kind of stage, with what only it has.
#[derive(Clone, Debug, PartialEq)]
pub enum Stage {
    /// Supervised fine-tuning of a language model.
    Sft,
    /// Training of a reward model.
    RewardModel,
    /// PPO with a trained actor and critic, a frozen reference and a frozen reward model.
    Ppo {
        /// The shape of critic and reward model.
        reward: ModelSpec,
        /// With [`Task::lora`]: the adapters of the reward model, where it was trained by some from the actor's start. All four
        /// models then share one frozen backbone; else there are two.
        reward_lora: Option<Lora>,
        /// Rows of a rollout that fall to one rank.
        rollout_rows: u32,
        /// The longest response.
        new_tokens: u32,
    },
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
}

impl HostBytes {
    /// All of them.
    pub fn total(&self) -> f64 {
        let Self { parameters, optimizer, gradients, loading } = self;
        parameters + optimizer + gradients + loading
    }

    fn scaled(self, ranks: f64) -> Self {
        Self {
            parameters: self.parameters * ranks,
            optimizer: self.optimizer * ranks,
            gradients: self.gradients * ranks,
            loading: self.loading * ranks,
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
    /// On each host, while a checkpoint is written as training goes on.
    pub checkpoint_copies: f64,
}

/// A strategy on so many ranks.
#[derive(Clone, Copy)]
struct Setting {
    strategy: Strategy,
    world: f64,
    gpu: bool,
}

impl Setting {
    /// Bytes of a number in the compute type.
    fn bytes(&self) -> f64 {
        match self.strategy.precision {
            Precision::Fp32 => FP32,
            Precision::Bf16 | Precision::Fp16 => 2.0,
        }
    }

    fn parallel(&self) -> bool {
        self.world > 1.0
    }

    fn shards_parameters(&self) -> bool {
        self.strategy.sharding >= Sharding::Zero3
    }

    fn shards_state(&self) -> bool {
        self.strategy.sharding >= Sharding::Zero1
    }

    fn streams(&self) -> bool {
        self.strategy.offload >= Offload::Parameters
    }

    fn state_on_host(&self) -> bool {
        self.strategy.offload >= Offload::Optimizer
    }

    /// Gradients stay whole on the device until a step's last micro-batch.
    fn keeps_gradients(&self) -> bool {
        self.strategy.sharding < Sharding::Zero2 && !self.state_on_host()
    }

    /// The share of a chunk whose working copy a rank keeps.
    fn resting_share(&self) -> f64 {
        if self.shards_parameters() { 1.0 / self.world } else { 1.0 }
    }

    /// The share of a chunk that a rank's optimizer updates.
    fn own_share(&self) -> f64 {
        if self.shards_state() { 1.0 / self.world } else { 1.0 }
    }

    /// The working copy is the master copy: the same format in the same memory.
    fn master_is_working_copy(&self) -> bool {
        self.bytes() == FP32 && self.streams() == self.state_on_host()
    }

    /// Bytes for one chunk of `elements` to be on the device while it is used.
    fn fetched(&self, elements: f64) -> f64 {
        if self.streams() || self.shards_parameters() { self.bytes() * elements } else { 0.0 }
    }

    /// Bytes that gathering a chunk takes beside the chunk: gloo gathers into a buffer of its own.
    fn gathering(&self, elements: f64) -> f64 {
        let buffer = self.shards_parameters() && self.parallel() && !self.gpu;
        if buffer { self.bytes() * elements } else { 0.0 }
    }

    /// Bytes of a gradient of `elements` numbers of `bytes` bytes while its reduction is in flight.
    fn in_flight(&self, elements: f64, bytes: f64) -> f64 {
        let received = match (self.parallel() && self.shards_state(), self.gpu) {
            (false, _) => 0.0,
            (true, true) => bytes * elements / self.world,
            // Without NCCL the parts of all ranks are exchanged and added up here.
            (true, false) => bytes * elements,
        };
        self.arriving(elements, bytes) + received
    }

    /// Bytes of the sum of the parts that were exchanged.
    fn added_up(&self, elements: f64) -> f64 {
        let exchanged = self.parallel() && self.shards_state() && !self.gpu;
        if exchanged { FP32 * elements / self.world } else { 0.0 }
    }

    /// As [`Setting::in_flight`] for an embedding's or a head's gradient, which is summed in fp32 and travels in the compute
    /// type; and what turning it into that takes.
    fn widened_in_flight(&self, elements: f64) -> (f64, f64) {
        if self.keeps_gradients() {
            return (self.in_flight(elements, FP32), 0.0);
        }
        let bytes = if self.parallel() { self.bytes() } else { FP32 };
        let narrowing = if bytes < FP32 { (FP32 + bytes) * elements } else { 0.0 };
        (self.in_flight(elements, bytes), narrowing)
    }

    /// Bytes of a gradient that arrives and waits for its reduction, where it is not added to the sum at once.
    fn arriving(&self, elements: f64, bytes: f64) -> f64 {
        if self.keeps_gradients() { 0.0 } else { bytes * elements }
    }

    /// Whether attention runs in a kernel that never holds all weights. libtorch's CPU kernel takes everything; of those for
    /// CUDA only flash attention shares keys and values among heads, in 16 bits and up to a head size of 256.
    fn fuses_attention(&self, spec: &ModelSpec) -> bool {
        let grouped = spec.heads != spec.kv_heads;
        !self.gpu || !grouped || (self.bytes() < FP32 && spec.head_dim <= 256 && spec.head_dim % 8 == 0)
    }

    fn pass(&self, spec: &ModelSpec, rows: u32, time: u32) -> Pass {
        Pass { rows: rows.into(), time: time.into(), bytes: self.bytes(), fused: self.fuses_attention(spec) }
    }
}

/// A model at work under a setting.
struct Placed<'a> {
    spec: &'a ModelSpec,
    head: HeadKind,
    trained: bool,
    chunks: Chunks,
    setting: Setting,
}

impl<'a> Placed<'a> {
    fn new(spec: &'a ModelSpec, head: HeadKind, trained: bool, setting: Setting) -> Self {
        Self { spec, head, trained, chunks: Chunks::new(spec, head, setting.world), setting }
    }

    fn tied(&self) -> bool {
        self.head == HeadKind::Lm && self.spec.tied_head
    }

    /// What a rank keeps all the time of a chunk, or of chunks, of so many elements.
    fn resident(&self, elements: f64) -> (DeviceBytes, HostBytes) {
        let (mut device, mut host) = (DeviceBytes::default(), HostBytes::default());
        let set = &self.setting;
        let parameters = set.bytes() * elements * set.resting_share();
        *(if set.streams() { &mut host.parameters } else { &mut device.parameters }) = parameters;
        if !self.trained {
            return (device, host);
        }
        let own = elements * set.own_share();
        let master = if set.master_is_working_copy() { 0.0 } else { FP32 * own };
        let (optimizer, gradients) = (master + 2.0 * FP32 * own, FP32 * own);
        if set.state_on_host() {
            (host.optimizer, host.gradients) = (optimizer, gradients);
        } else {
            device.optimizer = optimizer;
            device.gradients = if set.keeps_gradients() { FP32 * elements } else { gradients };
        }
        (device, host)
    }

    /// Two chunks: the one that runs and the one that comes.
    fn two_blocks(&self) -> f64 {
        let set = &self.setting;
        let blocks = self.chunks.layers.min(2.0);
        blocks * set.fetched(self.chunks.block) + set.gathering(self.chunks.block)
    }

    /// The head's chunk, and the embedding's where the head is tied to it.
    fn fetched_head(&self) -> f64 {
        let set = &self.setting;
        set.fetched(self.chunks.head) + if self.tied() { set.fetched(self.chunks.embed) } else { 0.0 }
    }

    /// What gathering these takes beside them.
    fn gathering_head(&self) -> f64 {
        let set = &self.setting;
        set.gathering(self.chunks.head) + if self.tied() { set.gathering(self.chunks.embed) } else { 0.0 }
    }

    /// The chunks that are on the device when a pass begins.
    fn fetched_embed(&self) -> f64 {
        let set = &self.setting;
        set.fetched(self.chunks.embed + self.chunks.block) + set.gathering(self.chunks.embed)
    }

    /// Positions in one of the head's slices of at most `positions`.
    fn slice(&self, positions: f64) -> f64 {
        let row = FP32 * self.spec.vocab as f64;
        let most = if self.head == HeadKind::Lm { (HEAD_SLICE_BYTES as f64 / row).floor() } else { positions };
        most.clamp(1.0, positions.max(1.0))
    }

    /// A slice's input and what the norm makes of it.
    fn slice_input(&self, positions: f64) -> f64 {
        let pass = Pass { rows: positions, time: 1.0, bytes: self.setting.bytes(), fused: true };
        pass.input(self.spec) + pass.saved_norm(self.spec)
    }

    /// What the head takes at `positions` positions without a graph, where `tensors` as large as the logits are made of them.
    fn head_forward(&self, positions: f64, tensors: f64) -> f64 {
        let slice = self.slice(positions);
        match self.head {
            HeadKind::Lm => {
                tensors * FP32 * slice * self.spec.vocab as f64 + slice * self.spec.hidden as f64 * self.setting.bytes()
            }
            HeadKind::Scalar => self.slice_input(slice) + FP32 * slice * self.spec.hidden as f64,
        }
    }

    /// What the head takes at `positions` positions with its backward, and whether its parameters' gradients have begun to
    /// arrive: while logits' log-softmax and its gradients are there, and while the output weights' gradient is.
    fn head_backward(&self, positions: f64) -> [(f64, bool); 2] {
        let (bytes, hidden) = (self.setting.bytes(), self.spec.hidden as f64);
        let slice = self.slice(positions);
        let input = self.slice_input(slice);
        match self.head {
            HeadKind::Lm => {
                let (logits, weights) = (slice * self.spec.vocab as f64, hidden * self.spec.vocab as f64);
                // A CPU widens it as a whole before it is added to the sum.
                let widened = if self.setting.gpu || bytes == FP32 { 0.0 } else { FP32 * weights };
                [
                    (3.0 * FP32 * logits + input, positions > slice),
                    (bytes * weights + (bytes * logits + input).max(widened), true),
                ]
            }
            HeadKind::Scalar => [(input + 2.0 * (FP32 + bytes) * slice * hidden, true); 2],
        }
    }

    /// Forward and backward over a micro-batch, at the moments at which the most can be on the device. `positions` are those at which the head is run.
    fn learn(&self, pass: &Pass, positions: f64) -> Vec<DeviceBytes> {
        let (set, chunks) = (&self.setting, &self.chunks);
        let input = pass.input(self.spec);
        let saved = pass.saved(self.spec);
        let recompute = set.strategy.recompute == Recompute::Block;
        let kept = |blocks: f64| blocks * (input + if recompute { 0.0 } else { saved });
        let rerun = if recompute { saved } else { 0.0 };
        let arriving_embed = if self.tied() { set.arriving(chunks.embed, FP32) } else { 0.0 };

        let forward = DeviceBytes {
            fetched: self.fetched_embed().max(self.two_blocks()),
            activations: kept(chunks.layers - 1.0) + 2.0 * input + pass.forward(self.spec, pass.time),
            ..DeviceBytes::default()
        };
        let arriving_head = arriving_embed + set.arriving(chunks.head, FP32);
        let head = self.head_backward(positions).map(|(logits, gradients_there)| DeviceBytes {
            fetched: set.fetched(chunks.block) + self.fetched_head(),
            gradients: if gradients_there { arriving_head } else { 0.0 },
            activations: kept(chunks.layers) + 2.0 * input,
            logits,
            ..DeviceBytes::default()
        });
        let gathering = DeviceBytes {
            fetched: set.fetched(chunks.block) + self.fetched_head() + self.gathering_head(),
            activations: kept(chunks.layers) + input,
            ..DeviceBytes::default()
        };
        // A block's backward: first its activations are whole, then its gradients, and at last these go on their way while
        // those of the segment above arrive.
        let bytes = set.bytes();
        let flight = set.in_flight(chunks.block, bytes);
        let block = |blocks_kept: f64, above: f64, above_added_up: f64| {
            let widest = bytes * (self.spec.hidden * self.spec.ffn) as f64;
            [
                (kept(blocks_kept) + rerun + input + pass.backward(self.spec), above + widest),
                (
                    kept(blocks_kept - 1.0) + 3.0 * input,
                    above + bytes * chunks.block + set.arriving(chunks.block, bytes),
                ),
                (kept(blocks_kept - 1.0) + input, above + above_added_up + flight),
            ]
            .map(|(activations, gradients)| DeviceBytes {
                fetched: self.two_blocks(),
                gradients: arriving_embed + gradients,
                activations,
                ..DeviceBytes::default()
            })
        };
        let mut moments = vec![forward, gathering];
        moments.extend(head);
        let (head_flight, _) = set.widened_in_flight(chunks.head);
        moments.extend(block(chunks.layers, head_flight, set.added_up(chunks.head)));
        if chunks.layers > 1.0 {
            moments.extend(block(chunks.layers - 1.0, flight, set.added_up(chunks.block)));
        }
        let (embed_flight, narrowing) = set.widened_in_flight(chunks.embed);
        let rows = FP32 * pass.tokens() * self.spec.hidden as f64;
        moments.extend(
            [
                (set.arriving(chunks.embed, FP32) + flight, rows),
                (narrowing + flight, 0.0),
                (embed_flight + flight + set.added_up(chunks.block), 0.0),
                (embed_flight + set.added_up(chunks.embed), 0.0),
            ]
            .map(|(gradients, rows)| DeviceBytes {
                gradients,
                activations: input + rows,
                ..DeviceBytes::default()
            }),
        );
        moments
    }

    /// A pass without a graph, the head at `positions` positions.
    fn score(&self, pass: &Pass, positions: f64) -> [DeviceBytes; 2] {
        // Log-probabilities and entropies: logits, log-softmax, and two tensors on the way to an entropy.
        self.infer(pass, pass.time, positions, 4.0)
    }

    fn infer(&self, pass: &Pass, keys: f64, positions: f64, slices: f64) -> [DeviceBytes; 2] {
        let input = pass.input(self.spec);
        [
            DeviceBytes {
                fetched: self.fetched_embed().max(self.two_blocks()),
                activations: input + pass.forward(self.spec, keys),
                ..DeviceBytes::default()
            },
            DeviceBytes {
                fetched: self.fetched_head(),
                activations: input,
                logits: self.head_forward(positions, slices),
                ..DeviceBytes::default()
            },
        ]
    }

    /// Generation of `new_tokens` tokens after the longest prompts that leave room for them.
    fn generate(&self, rows: u32, time: u32, new_tokens: u32) -> Vec<DeviceBytes> {
        let (spec, set) = (self.spec, &self.setting);
        let rows = rows.min(ROLLOUT_ROWS);
        let prompt = time.saturating_sub(new_tokens).max(1);
        let row = 2.0 * (spec.kv_heads * spec.head_dim) as f64 * set.bytes();
        let cache = f64::from(rows) * f64::from(time) * row * self.chunks.layers;
        let prompts = set.pass(spec, rows, prompt);
        // Rows of unequal length have a mask, once as flags and once as numbers.
        let mask = prompts.tokens() * prompts.time * (1.0 + set.bytes());
        // The sampler holds the logits, the law and its cumulative sums in fp64.
        let slices = 4.0;
        let prefill = self.infer(&prompts, prompt.into(), rows.into(), slices);
        let decode = self.infer(&set.pass(spec, rows, 1), time.into(), rows.into(), slices);
        let with_cache = |moment: DeviceBytes, mask: f64| DeviceBytes {
            cache: moment.cache + cache,
            activations: moment.activations + mask,
            ..moment
        };
        prefill.map(|m| with_cache(m, mask)).into_iter().chain(decode.map(|m| with_cache(m, 0.0))).collect()
    }
}

/// What `strategy` needs for `task` on `machines`. The trainer's tests hold it to what was measured.
pub fn estimate(task: &Task, machines: &Machines, strategy: Strategy) -> Plan {
    let setting =
        Setting { strategy, world: machines.world_size().max(1).into(), gpu: machines.device_memory.is_some() };
    let models = models(task, setting);
    let (device, host) = models
        .iter()
        .map(|m| m.resident(m.chunks.total()))
        .fold((DeviceBytes::default(), HostBytes::default()), |(device, host), (d, h)| (device + d, host + h));
    let (phase, most) = phases(task, setting, &models)
        .into_iter()
        .max_by(|(_, a), (_, b)| a.total().total_cmp(&b.total()))
        .unwrap_or(("rest", DeviceBytes::default()));
    let ranks = f64::from(machines.devices);
    let trained: f64 = models.iter().filter(|m| m.trained).map(|m| m.chunks.total()).sum();
    // Rank 0 alone writes the model.
    let loading = f64::max(ranks * loading(&models, host.total()), writing(&models, setting));
    Plan {
        strategy,
        device: device + most,
        phase,
        host: HostBytes { loading, ..host.scaled(ranks) },
        checkpoint_copies: 3.0 * FP32 * trained / setting.world * ranks,
    }
}

/// The models of a stage, in the order in which they are loaded.
fn models(task: &Task, setting: Setting) -> Vec<Placed<'_>> {
    let model = |spec, head, trained| Placed::new(spec, head, trained, setting);
    match &task.stage {
        Stage::Sft => vec![model(&task.model, HeadKind::Lm, true)],
        Stage::RewardModel => vec![model(&task.model, HeadKind::Scalar, true)],
        Stage::Ppo { reward, .. } => vec![
            model(reward, HeadKind::Scalar, true),
            model(&task.model, HeadKind::Lm, true),
            model(&task.model, HeadKind::Lm, false),
            model(reward, HeadKind::Scalar, false),
        ],
    }
}

/// What each phase of a stage adds to what lies on a device all the time.
fn phases(task: &Task, setting: Setting, models: &[Placed<'_>]) -> Vec<(&'static str, DeviceBytes)> {
    let pass = |m: &Placed<'_>| setting.pass(m.spec, task.rows, task.time);
    let tokens = f64::from(task.rows) * f64::from(task.time);
    let (positions, rollout) = match &task.stage {
        Stage::Sft => (tokens, None),
        Stage::RewardModel => (task.rows.into(), None),
        Stage::Ppo { rollout_rows, new_tokens, .. } => {
            (f64::from(task.rows) * f64::from(*new_tokens), Some((*rollout_rows, *new_tokens)))
        }
    };
    let mut phases = Vec::new();
    for model in models.iter().filter(|m| m.trained) {
        phases.extend(model.learn(&pass(model), positions).into_iter().map(|m| ("learn", m)));
    }
    if let Some((rows, new_tokens)) = rollout {
        for model in models {
            phases.extend(model.score(&pass(model), positions).map(|m| ("score", m)));
        }
        let actors = models.iter().filter(|m| m.trained && m.head == HeadKind::Lm);
        phases.extend(actors.flat_map(|m| m.generate(rows, task.time, new_tokens)).map(|m| ("rollout", m)));
    }
    phases
}

/// What a rank's host memory needs at the height of loading beyond `at_rest`: a chunk's values as they come from the file
/// and joined to a flat buffer, both in fp32, beside what has been loaded before.
fn loading(models: &[Placed<'_>], at_rest: f64) -> f64 {
    let (mut loaded, mut most) = (0.0, 0.0);
    for model in models {
        for elements in model.chunks.each() {
            loaded += model.resident(elements).1.total();
            most = f64::max(most, loaded + 2.0 * FP32 * elements);
        }
    }
    (most - at_rest).max(0.0)
}

/// What rank 0's host memory needs to write a trained model: a chunk's fp32 values, where they do not lie there whole anyhow.
fn writing(models: &[Placed<'_>], setting: Setting) -> f64 {
    let whole = setting.state_on_host() && !(setting.shards_state() && setting.parallel());
    let largest = models.iter().filter(|m| m.trained).flat_map(|m| m.chunks.each()).fold(0.0, f64::max);
    if whole { 0.0 } else { FP32 * largest }
}

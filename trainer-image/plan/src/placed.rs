//! A model under a strategy: what it keeps on device and host, and what running it brings.

use crate::estimate::{DeviceBytes, HEAD_SLICE_BYTES, HostBytes, ROLLOUT_ROWS};
use crate::segment::{Chunks, FP32, Pass, attention_widths, chunk};
use rlhf_api::model::{HeadKind, ModelSpec};
use rlhf_api::stage::{Lora, Offload, Precision, Recompute, Sharding, Strategy};

/// A strategy on so many ranks.
#[derive(Clone, Copy)]
pub(crate) struct Setting {
    pub strategy: Strategy,
    pub world: f64,
    pub gpu: bool,
}

impl Setting {
    /// Bytes of a number in the compute type.
    fn bytes(&self) -> f64 {
        match self.strategy.precision {
            Precision::Fp32 => FP32,
            Precision::Bf16 | Precision::Fp16 => 2.0,
        }
    }

    pub fn parallel(&self) -> bool {
        self.world > 1.0
    }

    fn shards_parameters(&self) -> bool {
        self.strategy.sharding >= Sharding::Zero3
    }

    pub fn shards_state(&self) -> bool {
        self.strategy.sharding >= Sharding::Zero1
    }

    fn streams(&self) -> bool {
        self.strategy.offload >= Offload::Parameters
    }

    pub fn state_on_host(&self) -> bool {
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
    /// CUDA only flash attention shares keys and values among heads, in 16 bits, up to a head size of 256 and without a mask. None
    /// caps scores.
    fn fuses_attention(&self, spec: &ModelSpec, masked: bool) -> bool {
        let flash = !masked && self.bytes() < FP32 && spec.head_dim <= 256 && spec.head_dim % 8 == 0;
        spec.traits.attention_cap.is_none() && (!self.shares_on_gpu(spec) || flash)
    }

    /// Whether heads share keys and values on a GPU, where a kernel that takes a mask does not.
    fn shares_on_gpu(&self, spec: &ModelSpec) -> bool {
        self.gpu && spec.heads != spec.kv_heads
    }
}

/// What is trained of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Trained {
    /// All of it.
    Whole,
    /// Its adapters, and a scalar head.
    Adapters,
    /// Nothing.
    Nothing,
}

/// A model at work under a setting.
pub(crate) struct Placed<'a> {
    pub spec: &'a ModelSpec,
    pub head: HeadKind,
    pub trained: Trained,
    /// Its adapters, which may be frozen too.
    pub lora: Option<&'a Lora>,
    /// Embedding, blocks and a language model's head are there anyhow, for another model.
    pub shares: bool,
    pub setting: Setting,
    chunks: Chunks,
    /// Elements of the chunk of a block's adapters.
    adapters: f64,
}

/// So many chunks of so many elements each.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Pieces {
    pub count: f64,
    pub elements: f64,
    pub trained: bool,
}

/// Elements of a model's chunks of which gradients are taken.
struct Gradients {
    embed: f64,
    block: f64,
    head: f64,
    /// The largest gradient of one of a block's matrices.
    widest: f64,
}

impl<'a> Placed<'a> {
    /// A model without adapters.
    pub fn new(spec: &'a ModelSpec, head: HeadKind, trained: Trained, setting: Setting) -> Self {
        let chunks = Chunks::new(spec, head, setting.world);
        Self { spec, head, trained, lora: None, shares: false, setting, chunks, adapters: 0.0 }
    }

    /// The model with adapters, which are trained where the model is.
    pub fn adapted(mut self, lora: &'a Lora) -> Self {
        self.lora = Some(lora);
        self.adapters = chunk(&self.spec.adapter_params(lora), self.setting.world);
        self
    }

    /// The model on frozen chunks that are there anyhow.
    pub fn sharing(self) -> Self {
        Self { shares: true, ..self }
    }

    /// The chunks that are in memory for this model.
    pub fn pieces(&self) -> [Pieces; 5] {
        let ([embed, blocks, language_head], [scalar_head, adapters]) = (self.loaded_first(), self.loaded_last());
        [embed, blocks, language_head, scalar_head, adapters]
    }

    /// What is loaded before the adapters' values are there, in order.
    pub fn loaded_first(&self) -> [Pieces; 3] {
        let trained = self.trained == Trained::Whole;
        let Chunks { embed, block, head, layers } = self.chunks;
        let language_head = if self.head == HeadKind::Lm { 1.0 } else { 0.0 };
        let there = if self.shares { 0.0 } else { 1.0 };
        [(1.0, embed), (layers, block), (language_head, head)].map(|(count, elements)| Pieces {
            count: there * count,
            elements,
            trained,
        })
    }

    /// A scalar head, and the adapters, in order.
    pub fn loaded_last(&self) -> [Pieces; 2] {
        let trained = self.trained != Trained::Nothing;
        let adapters = if self.lora.is_some() { self.chunks.layers } else { 0.0 };
        let scalar_head = if self.head == HeadKind::Scalar { 1.0 } else { 0.0 };
        [(scalar_head, self.chunks.head), (adapters, self.adapters)].map(|(count, elements)| Pieces {
            count,
            elements,
            trained,
        })
    }

    /// Bytes of the adapters' fp32 values, from which their chunks are made.
    pub fn adapter_values(&self) -> f64 {
        if self.lora.is_some() { FP32 * self.adapters * self.chunks.layers } else { 0.0 }
    }

    /// Elements of the largest segment.
    pub fn largest_segment(&self) -> f64 {
        self.chunks.embed.max(self.chunks.block).max(self.chunks.head)
    }

    pub fn pass(&self, rows: u32, time: u32) -> Pass<'a> {
        let (bytes, fused) = (self.setting.bytes(), self.setting.fuses_attention(self.spec, false));
        Pass { rows: rows.into(), time: time.into(), bytes, fused, lora: self.lora }
    }

    fn tied(&self) -> bool {
        self.head == HeadKind::Lm && self.spec.tied_head
    }

    /// Elements of a block's chunks.
    fn block(&self) -> f64 {
        self.chunks.block + self.adapters
    }

    fn gradients(&self) -> Gradients {
        let Chunks { embed, block, head, .. } = self.chunks;
        let (hidden, ffn) = (self.spec.hidden as f64, self.spec.ffn as f64);
        match (self.trained, self.lora) {
            (Trained::Adapters, Some(lora)) => Gradients {
                embed: 0.0,
                block: self.adapters,
                head: if self.head == HeadKind::Scalar { head } else { 0.0 },
                widest: f64::from(lora.rank) * hidden.max(ffn),
            },
            _ => Gradients { embed, block, head, widest: hidden * ffn },
        }
    }

    /// What a rank keeps all the time of some chunks.
    pub fn resident(&self, pieces: Pieces) -> (DeviceBytes, HostBytes) {
        let (mut device, mut host) = (DeviceBytes::default(), HostBytes::default());
        let (set, elements, trained) = (&self.setting, pieces.elements * pieces.count, pieces.trained);
        let parameters = set.bytes() * elements * set.resting_share();
        *(if set.streams() { &mut host.parameters } else { &mut device.parameters }) = parameters;
        if !trained {
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
        blocks * set.fetched(self.block()) + set.gathering(self.block())
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

    /// The chunks that are on the device when a pass begins. Both may be on their way at once.
    fn fetched_embed(&self) -> f64 {
        let (set, elements) = (&self.setting, self.chunks.embed + self.block());
        set.fetched(elements) + set.gathering(elements)
    }

    /// Positions in one of the head's slices of at most `positions`.
    fn slice(&self, positions: f64) -> f64 {
        let row = FP32 * self.spec.vocab as f64;
        let most = if self.head == HeadKind::Lm { (HEAD_SLICE_BYTES as f64 / row).floor() } else { positions };
        most.clamp(1.0, positions.max(1.0))
    }

    /// A slice's input and what the norm makes of it.
    fn slice_input(&self, positions: f64) -> f64 {
        let pass = Pass { rows: positions, time: 1.0, bytes: self.setting.bytes(), fused: true, lora: None };
        pass.input(self.spec) + pass.saved_norm(self.spec, true)
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
                let width = self.spec.embed_width() as f64;
                let (logits, weights) = (slice * self.spec.vocab as f64, width * self.spec.vocab as f64);
                // What is capped is kept beside what comes of it.
                let capped = if self.spec.traits.logit_cap.is_some() { FP32 * logits } else { 0.0 };
                // A CPU widens it as a whole before it is added to the sum.
                let widened = if self.setting.gpu || bytes == FP32 { 0.0 } else { FP32 * weights };
                let frozen = self.trained == Trained::Adapters;
                let last = if frozen { 0.0 } else { bytes * weights + (bytes * logits + input).max(widened) };
                [(3.0 * FP32 * logits + capped + input, positions > slice), (last, true)]
            }
            HeadKind::Scalar => [(input + 2.0 * (FP32 + bytes) * slice * hidden, true); 2],
        }
    }

    /// Forward and backward over a micro-batch, at the moments at which the most can be on the device. `positions` are those at which the head is run.
    pub fn learn(&self, pass: &Pass<'_>, positions: f64) -> Vec<DeviceBytes> {
        let (set, chunks, grads) = (&self.setting, &self.chunks, self.gradients());
        let input = pass.input(self.spec);
        let saved = pass.saved(self.spec);
        let recompute = set.strategy.recompute == Recompute::Block;
        let kept = |blocks: f64| blocks * (input + if recompute { 0.0 } else { saved });
        let rerun = if recompute { saved } else { 0.0 };
        let arriving_embed = if self.tied() { set.arriving(grads.embed, FP32) } else { 0.0 };

        let forward = DeviceBytes {
            fetched: self.fetched_embed().max(self.two_blocks()),
            activations: kept(chunks.layers - 1.0) + 2.0 * input + pass.forward(self.spec, pass.time),
            ..DeviceBytes::default()
        };
        let arriving_head = arriving_embed + set.arriving(grads.head, FP32);
        let head = self.head_backward(positions).map(|(logits, gradients_there)| DeviceBytes {
            fetched: set.fetched(self.block()) + self.fetched_head(),
            gradients: if gradients_there { arriving_head } else { 0.0 },
            activations: kept(chunks.layers) + 2.0 * input,
            logits,
            ..DeviceBytes::default()
        });
        let gathering = DeviceBytes {
            fetched: set.fetched(self.block()) + self.fetched_head() + self.gathering_head(),
            activations: kept(chunks.layers) + input,
            ..DeviceBytes::default()
        };
        // A block's backward: first its activations are whole, then its gradients, and at last these go on their way while
        // those of the segment above arrive.
        let bytes = set.bytes();
        let flight = set.in_flight(grads.block, bytes);
        let block = |blocks_kept: f64, above: f64, above_added_up: f64| {
            [
                (kept(blocks_kept) + rerun + input + pass.backward(self.spec), above + bytes * grads.widest),
                (kept(blocks_kept - 1.0) + 3.0 * input, above + bytes * grads.block + set.arriving(grads.block, bytes)),
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
        let (head_flight, _) = set.widened_in_flight(grads.head);
        moments.extend(block(chunks.layers, head_flight, set.added_up(grads.head)));
        if chunks.layers > 1.0 {
            moments.extend(block(chunks.layers - 1.0, flight, set.added_up(grads.block)));
        }
        let (embed_flight, narrowing) = set.widened_in_flight(grads.embed);
        let rows = if grads.embed > 0.0 { FP32 * pass.tokens() * self.spec.hidden as f64 } else { 0.0 };
        moments.extend((grads.embed > 0.0 && self.spec.refines_embedding()).then(|| DeviceBytes {
            // Tokens' rows go through parameters once more.
            fetched: set.fetched(chunks.embed) + set.gathering(chunks.embed),
            gradients: set.arriving(grads.embed, FP32) + flight,
            activations: 4.0 * input,
            ..DeviceBytes::default()
        }));
        moments.extend(
            [
                (set.arriving(grads.embed, FP32) + flight, rows),
                (narrowing + flight, 0.0),
                (embed_flight + flight + set.added_up(grads.block), 0.0),
                (embed_flight + set.added_up(grads.embed), 0.0),
            ]
            .map(|(gradients, rows)| DeviceBytes {
                gradients,
                activations: input + rows,
                ..DeviceBytes::default()
            }),
        );
        let bias = pass.bias(self.spec, pass.time, true);
        moments.iter_mut().for_each(|moment| moment.activations += bias);
        moments
    }

    /// A pass without a graph, the head at `positions` positions.
    pub fn score(&self, pass: &Pass<'_>, positions: f64) -> [DeviceBytes; 2] {
        // Log-probabilities and entropies: logits, log-softmax, and two tensors on the way to an entropy.
        let [mut blocks, head] = self.infer(pass, pass.time, positions, 4.0);
        blocks.activations += pass.bias(self.spec, pass.time, true);
        [blocks, head]
    }

    fn infer(&self, pass: &Pass<'_>, keys: f64, positions: f64, slices: f64) -> [DeviceBytes; 2] {
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
    pub fn generate(&self, rows: u32, time: u32, new_tokens: u32) -> Vec<DeviceBytes> {
        let (spec, set) = (self.spec, &self.setting);
        let rows = rows.min(ROLLOUT_ROWS);
        let prompt = time.saturating_sub(new_tokens).max(1);
        let row = attention_widths(spec).1 * set.bytes();
        let cache = f64::from(rows) * f64::from(time) * row * self.chunks.layers;
        // Prompts of unequal length have a mask, for which each head gets keys and values of its own on a GPU; single tokens
        // after them do without the kernel that wants those.
        let shares = set.shares_on_gpu(spec);
        let prompts = self.pass(rows, prompt);
        let prompts = Pass { fused: prompts.fused || shares, ..prompts };
        let spread = if shares { 2.0 * prompts.tensor((spec.heads * spec.head_dim) as f64) } else { 0.0 };
        // The mask itself is there once as flags and once as numbers.
        let mask =
            prompts.tokens() * prompts.time * (1.0 + set.bytes()) + spread + prompts.bias(spec, prompt.into(), false);
        // The sampler holds the logits, the law and its cumulative sums in fp64.
        let slices = 4.0;
        let prefill = self.infer(&prompts, prompt.into(), rows.into(), slices);
        let tokens = Pass { fused: set.fuses_attention(spec, true), ..self.pass(rows, 1) };
        let decode = self.infer(&tokens, time.into(), rows.into(), slices);
        let with_cache = |moment: DeviceBytes, mask: f64| DeviceBytes {
            cache: moment.cache + cache,
            activations: moment.activations + mask,
            ..moment
        };
        prefill.map(|m| with_cache(m, mask)).into_iter().chain(decode.map(|m| with_cache(m, 0.0))).collect()
    }
}

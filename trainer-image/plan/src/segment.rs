//! What one segment takes: the elements of its chunk, and the tensors that running it makes.
//!
//! Sizes are `f64`, whole numbers below 2^53, which no product of dimensions can make wrap. Shapes are taken as they are said
//! to be, so nothing here runs as often, or takes as much room, as a dimension or the number of layers says.

use rlhf_api::model::{HeadKind, Mlp, ModelSpec, Norm, ParamSpec, Positions, Segment};
use rlhf_api::stage::{Linear, Lora};

/// Each tensor of a chunk starts at a multiple of this many elements (64 bytes in fp32, a cache line and a vector register).
pub const ALIGN: i64 = 16;

/// Bytes of an fp32 number.
pub(crate) const FP32: f64 = 4.0;

/// Elements of a model's chunks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Chunks {
    pub embed: f64,
    pub block: f64,
    pub head: f64,
    pub layers: f64,
}

/// Numbers a token in all queries, and in all keys and values.
pub(crate) fn attention_widths(spec: &ModelSpec) -> (f64, f64) {
    let head_dim = spec.head_dim as f64;
    (spec.heads as f64 * head_dim, 2.0 * spec.kv_heads as f64 * head_dim)
}

/// Elements of the chunk of these parameters, padded to a multiple of `parts`.
pub(crate) fn chunk(params: &[ParamSpec], parts: f64) -> f64 {
    let aligned =
        |p: &ParamSpec| (p.shape.iter().map(|&n| n as f64).product::<f64>() / ALIGN as f64).ceil() * ALIGN as f64;
    let elements: f64 = params.iter().map(aligned).sum();
    (elements / parts).ceil() * parts
}

impl Chunks {
    /// Of a model with this head, every chunk padded to a multiple of `parts`.
    pub fn new(spec: &ModelSpec, head: HeadKind, parts: f64) -> Self {
        let chunk = |segment| chunk(&spec.params(segment, head), parts);
        Self {
            embed: chunk(Segment::Embed),
            block: chunk(Segment::Block(0)),
            head: chunk(Segment::Head),
            layers: spec.layers as f64,
        }
    }
}

/// Rows of so many tokens in a number format of `bytes` bytes, which a block attends over with or without a kernel that
/// never holds the matrix of attention weights. With adapters, nothing else of the block is trained.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pass<'a> {
    pub rows: f64,
    pub time: f64,
    pub bytes: f64,
    pub fused: bool,
    pub lora: Option<&'a Lora>,
}

impl Pass<'_> {
    pub fn tokens(&self) -> f64 {
        self.rows * self.time
    }

    /// Bytes of a tensor with this many numbers a token.
    pub fn tensor(&self, width: f64) -> f64 {
        self.tokens() * width * self.bytes
    }

    /// Bytes of a block's input.
    pub fn input(&self, spec: &ModelSpec) -> f64 {
        self.tensor(spec.hidden as f64)
    }

    /// Whether autograd needs the input of these linears, which is one tensor: for the gradient of their weights, or of an
    /// adapter's. (With dropout an adapter has an input of its own.)
    fn keeps_input_of(&self, linears: &[Linear]) -> bool {
        self.lora.is_none_or(|lora| lora.dropout == 0.0 && linears.iter().any(|l| lora.targets.contains(l)))
    }

    /// Bytes that autograd saves of a block, its input apart.
    pub fn saved(&self, spec: &ModelSpec) -> f64 {
        let hidden = spec.hidden as f64;
        let (query, key_value) = attention_widths(spec);
        let after_attention = self.tensor(hidden);
        let projections = self.tensor(query + key_value);
        let norms = self.saved_norm(spec, self.keeps_input_of(&[Linear::Query, Linear::Key, Linear::Value]))
            + self.saved_norm(spec, self.keeps_input_of(&[Linear::Gate, Linear::Up]));
        norms
            + projections
            + self.saved_attention(spec)
            + after_attention
            + self.saved_mlp(spec, self.keeps_input_of(&[Linear::Down]))
            + self.saved_adapters(spec)
            + self.saved_head_norms(spec)
            + self.saved_norms_around(spec)
    }

    /// What autograd saves of the norms of what is added to the residual stream: their inputs, of which nothing else has need.
    fn saved_norms_around(&self, spec: &ModelSpec) -> f64 {
        if !spec.traits.norms_around {
            return 0.0;
        }
        let input = if self.bytes < FP32 { 0.0 } else { self.input(spec) };
        2.0 * (self.saved_norm(spec, false) + input)
    }

    /// The scaled input of a root-mean-square norm as wide as that, for the gradient of the norm's weight.
    fn scaled(&self, spec: &ModelSpec, width: f64) -> f64 {
        let bytes = if spec.traits.norms_from_one { FP32 } else { self.bytes };
        if self.lora.is_none() { bytes * self.tokens() * width } else { 0.0 }
    }

    /// What is added to the scores of every block, and held as long as any of them runs, over `keys` keys a row: ALiBi's
    /// numbers for each head, the same for all rows where pads are at their ends.
    pub fn bias(&self, spec: &ModelSpec, keys: f64, same: bool) -> f64 {
        let rows = if same { 1.0 } else { self.rows };
        let heads = if spec.positions == Positions::Alibi { spec.heads as f64 } else { 0.0 };
        rows * heads * self.time * keys * self.bytes
    }

    /// What autograd saves of the norms of queries and keys: their inputs in fp32, the scaled ones for the gradient of the
    /// weight, and a number a head.
    fn saved_head_norms(&self, spec: &ModelSpec) -> f64 {
        if !spec.qk_norm {
            return 0.0;
        }
        let heads = (spec.heads + spec.kv_heads) as f64;
        let width = heads * spec.head_dim as f64;
        FP32 * self.tokens() * (width + heads) + self.scaled(spec, width)
    }

    /// What autograd saves of a norm and, where linears that follow need it, the norm's output.
    pub fn saved_norm(&self, spec: &ModelSpec, output: bool) -> f64 {
        let hidden = spec.hidden as f64;
        let output = if output { self.tensor(hidden) } else { 0.0 };
        match spec.norm {
            Norm::Layer => output + 2.0 * FP32 * self.tokens(),
            // The scaled input too, for the gradient of the weight; and the input in fp32, where it is not the input itself.
            Norm::Rms => {
                let widened = if self.bytes < FP32 { FP32 * self.tokens() * hidden } else { 0.0 };
                output + self.scaled(spec, hidden) + widened + FP32 * self.tokens()
            }
        }
    }

    /// What autograd saves for the adapters: what lies between A and B, and with dropout what went in and what was left out.
    fn saved_adapters(&self, spec: &ModelSpec) -> f64 {
        let Some(lora) = self.lora else { return 0.0 };
        let targets = spec.linears().filter(|(linear, ..)| lora.targets.contains(linear));
        let dropped = if lora.dropout > 0.0 { 2.0 } else { 0.0 };
        targets.map(|(_, [_, input], _)| self.tensor(f64::from(lora.rank) + dropped * input as f64)).sum()
    }

    /// Bytes of the draws of dropout at their height: four tensors of 64-bit numbers as wide as the widest input.
    fn draws(&self, spec: &ModelSpec) -> f64 {
        let widest = spec.ffn.max(spec.hidden) as f64;
        if self.lora.is_some_and(|lora| lora.dropout > 0.0) { 32.0 * self.tokens() * widest } else { 0.0 }
    }

    /// Attention's output and the logarithms of its sums; without a fused kernel also the weights, and queries, keys and
    /// values for every head in fp32.
    fn saved_attention(&self, spec: &ModelSpec) -> f64 {
        let (query, _) = attention_widths(spec);
        if spec.traits.attention_cap.is_some() {
            // The capped scores, their softmax and the weights; queries once more, and keys and values for every head.
            let narrowed = if self.bytes < FP32 { self.bytes } else { 0.0 };
            let scores = self.tokens() * self.time * spec.heads as f64 * (self.bytes + FP32 + narrowed);
            return 4.0 * self.tensor(query) + scores;
        }
        if self.fused {
            self.tensor(query) + FP32 * self.tokens() * spec.heads as f64
        } else {
            self.tensor(query) + 3.0 * FP32 * self.tokens() * query + self.weights(spec, self.time)
        }
    }

    /// The fp32 matrix of attention weights over `keys` keys a row.
    fn weights(&self, spec: &ModelSpec, keys: f64) -> f64 {
        FP32 * self.tokens() * keys * spec.heads as f64
    }

    /// What autograd saves of the feed-forward network, with or without the input of its last linear.
    fn saved_mlp(&self, spec: &ModelSpec, last_input: bool) -> f64 {
        let tensors = match spec.mlp {
            Mlp::SwiGlu => 3.0,
            Mlp::Gelu | Mlp::Relu => 1.0,
        };
        self.tensor(spec.ffn as f64) * (tensors + f64::from(u8::from(last_input)))
    }

    /// Bytes beside saved tensors and the gradient from above at the height of a block's backward, which is in its
    /// feed-forward network, or in attention that is not fused. An adapter's input has a gradient of its own until it is added.
    pub fn backward(&self, spec: &ModelSpec) -> f64 {
        let adapted = self.adapts(Linear::Down);
        let inner = match spec.mlp {
            Mlp::SwiGlu => 2.0,
            Mlp::Gelu | Mlp::Relu if adapted => 2.0,
            Mlp::Gelu | Mlp::Relu => 1.0,
        };
        let mlp = self.tensor(inner * spec.ffn as f64);
        if self.fused {
            return mlp;
        }
        let saved_mlp = self.saved_mlp(spec, self.keeps_input_of(&[Linear::Down]));
        let attention = 2.0 * self.weights(spec, self.time) + self.input(spec) - saved_mlp;
        mlp.max(attention)
    }

    fn adapts(&self, linear: Linear) -> bool {
        self.lora.is_some_and(|lora| lora.targets.contains(&linear))
    }

    /// Bytes beside its input at the height of a block's forward without a graph, over `keys` keys a row.
    pub fn forward(&self, spec: &ModelSpec, keys: f64) -> f64 {
        let hidden = spec.hidden as f64;
        let (query, key_value) = attention_widths(spec);
        let ffn = spec.ffn as f64;
        // While an adapter's output is added, the output, the adapter's and their sum are there.
        let tensors = match spec.mlp {
            Mlp::SwiGlu => 4.0,
            Mlp::Gelu | Mlp::Relu if self.adapts(Linear::Up) => 3.0,
            Mlp::Gelu | Mlp::Relu => 2.0,
        };
        let mlp = self.tensor(2.0 * hidden + tensors * ffn) + self.draws(spec);
        let mut attention = self.tensor(hidden + 2.0 * query + key_value);
        if !self.fused {
            let widened = FP32 * query * (self.tokens() + 2.0 * self.rows * keys);
            attention += widened + 2.0 * self.weights(spec, keys);
        }
        mlp.max(attention)
    }
}

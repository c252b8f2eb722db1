//! What one segment takes: the elements of its chunk, and the tensors that running it makes.
//!
//! Sizes are `f64`, whole numbers below 2^53, which no product of dimensions can make wrap.

use rlhf_api::model::{HeadKind, Mlp, ModelSpec, Norm, Segment};

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

impl Chunks {
    /// Of a model with this head, every chunk padded to a multiple of `parts`.
    pub fn new(spec: &ModelSpec, head: HeadKind, parts: f64) -> Self {
        let chunk = |segment| {
            let elements: f64 = spec
                .params(segment, head)
                .iter()
                .map(|p| (p.shape.iter().map(|&n| n as f64).product::<f64>() / ALIGN as f64).ceil() * ALIGN as f64)
                .sum();
            (elements / parts).ceil() * parts
        };
        Self {
            embed: chunk(Segment::Embed),
            block: chunk(Segment::Block(0)),
            head: chunk(Segment::Head),
            layers: spec.layers as f64,
        }
    }

    /// Of the whole model.
    pub fn total(&self) -> f64 {
        self.embed + self.layers * self.block + self.head
    }

    /// In the order in which they are loaded.
    pub fn each(&self) -> impl Iterator<Item = f64> {
        let blocks = std::iter::repeat_n(self.block, self.layers as usize);
        std::iter::once(self.embed).chain(blocks).chain([self.head])
    }
}

/// Rows of so many tokens in a number format of `bytes` bytes, which a block attends over with or without a kernel that
/// never holds the matrix of attention weights.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pass {
    pub rows: f64,
    pub time: f64,
    pub bytes: f64,
    pub fused: bool,
}

impl Pass {
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

    /// Bytes that autograd saves of a block, its input apart.
    pub fn saved(&self, spec: &ModelSpec) -> f64 {
        let (hidden, query) = (spec.hidden as f64, (spec.heads * spec.head_dim) as f64);
        let key_value = (2 * spec.kv_heads * spec.head_dim) as f64;
        let after_attention = self.tensor(hidden);
        let projections = self.tensor(query + key_value);
        2.0 * self.saved_norm(spec) + projections + self.saved_attention(spec) + after_attention + self.saved_mlp(spec)
    }

    /// A norm's output, which linears save, and what the norm itself does.
    pub fn saved_norm(&self, spec: &ModelSpec) -> f64 {
        let hidden = spec.hidden as f64;
        match spec.norm {
            Norm::Layer => self.tensor(hidden) + 2.0 * FP32 * self.tokens(),
            // The scaled input too; and the input in fp32, where it is not the input itself.
            Norm::Rms => {
                let widened = if self.bytes < FP32 { FP32 * self.tokens() * hidden } else { 0.0 };
                2.0 * self.tensor(hidden) + widened + FP32 * self.tokens()
            }
        }
    }

    /// Attention's output and the logarithms of its sums; without a fused kernel also the weights, and queries, keys and
    /// values for every head in fp32.
    fn saved_attention(&self, spec: &ModelSpec) -> f64 {
        let query = (spec.heads * spec.head_dim) as f64;
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

    fn saved_mlp(&self, spec: &ModelSpec) -> f64 {
        self.tensor(spec.ffn as f64)
            * match spec.mlp {
                Mlp::SwiGlu => 4.0,
                Mlp::Gelu => 2.0,
            }
    }

    /// Bytes beside saved tensors and the gradient from above at the height of a block's backward, which is in its
    /// feed-forward network, or in attention that is not fused.
    pub fn backward(&self, spec: &ModelSpec) -> f64 {
        let inner = match spec.mlp {
            Mlp::SwiGlu => 2.0,
            Mlp::Gelu => 1.0,
        };
        let mlp = self.tensor(inner * spec.ffn as f64);
        if self.fused {
            return mlp;
        }
        let attention = 2.0 * self.weights(spec, self.time) + self.input(spec) - self.saved_mlp(spec);
        mlp.max(attention)
    }

    /// Bytes beside its input at the height of a block's forward without a graph, over `keys` keys a row.
    pub fn forward(&self, spec: &ModelSpec, keys: f64) -> f64 {
        let (hidden, query) = (spec.hidden as f64, (spec.heads * spec.head_dim) as f64);
        let key_value = (2 * spec.kv_heads * spec.head_dim) as f64;
        let mlp = self.tensor(2.0 * hidden) + self.saved_mlp(spec);
        let mut attention = self.tensor(hidden + 2.0 * query + key_value);
        if !self.fused {
            let widened = FP32 * query * (self.tokens() + 2.0 * self.rows * keys);
            attention += widened + 2.0 * self.weights(spec, keys);
        }
        mlp.max(attention)
    }
}

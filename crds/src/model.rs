//! The shape of a model: the switches that tell one decoder-only transformer from another, and the parameters that follow
//! from them.
//!
//! Prepare reports it, and both sides plan with it.

mod traits;

use crate::stage::{Linear, Lora};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
pub use traits::Traits;

/// How activations are normalised.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum Norm {
    /// Root-mean-square norm with a weight (Zhang and Sennrich 2019).
    Rms,
    /// Layer norm with weight and bias.
    #[default]
    Layer,
}

/// How a token's position enters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(from = "Option<f64>", into = "Option<f64>")]
pub enum Positions {
    /// Rotary embedding of queries and keys, halves rotated (Su 2021, in the layout of Hugging Face's Llama).
    Rotary {
        /// Base of the frequencies.
        theta: f64,
    },
    /// Attention's scores fall with the distance, in each head at its own pace (ALiBi, Press 2022).
    Alibi,
    /// A learned vector a position, added to the token's.
    #[default]
    Learned,
}

/// A structural schema has no place for variants of several forms.
impl From<Option<f64>> for Positions {
    fn from(theta: Option<f64>) -> Self {
        match theta {
            None => Positions::Learned,
            Some(0.0) => Positions::Alibi,
            Some(theta) => Positions::Rotary { theta },
        }
    }
}

impl From<Positions> for Option<f64> {
    fn from(positions: Positions) -> Self {
        match positions {
            Positions::Rotary { theta } => Some(theta),
            Positions::Alibi => Some(0.0),
            Positions::Learned => None,
        }
    }
}

impl Positions {
    fn is_learned(&self) -> bool {
        *self == Positions::Learned
    }
}

/// How rotary frequencies are stretched to contexts that are longer than those of pre-training.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    /// Every frequency is divided by the factor (Chen 2023).
    Linear {
        /// By how much the context grows.
        factor: f64,
    },
    /// Low frequencies are divided by the factor, high ones stay, and those between are blended (Llama 3.1).
    Llama3 {
        /// By how much the context grows.
        factor: f64,
        /// Turns within the original context up to which a frequency is low.
        low: f64,
        /// Turns within the original context from which on a frequency is high.
        high: f64,
        /// Positions of pre-training.
        original: f64,
    },
    /// As `Llama3`, blended by the frequency's index, and with scaled attention (YaRN, Peng 2023).
    Yarn {
        /// By how much the context grows.
        factor: f64,
        /// By what sines and cosines are multiplied.
        attention: f64,
        /// The blend's first and last index.
        ramp: [f64; 2],
    },
}

/// The feed-forward network of a block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum Mlp {
    /// `down(silu(gate(x)) * up(x))` (Shazeer 2020).
    SwiGlu,
    /// `down(gelu(up(x)))` with the tanh approximation.
    #[default]
    Gelu,
    /// `down(relu(up(x)))`.
    Relu,
}

/// What stands on top of the last block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeadKind {
    /// Logits over the vocabulary.
    Lm,
    /// One number a position: a score or a value.
    Scalar,
}

/// The shape and switches of a model.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ModelSpec {
    /// Tokens in the vocabulary.
    pub vocab: i64,
    /// Width of the residual stream.
    pub hidden: i64,
    /// Number of blocks.
    pub layers: usize,
    /// Query heads.
    pub heads: i64,
    /// Key and value heads; query heads share them in groups (Ainslie 2023).
    pub kv_heads: i64,
    /// Width of a head.
    pub head_dim: i64,
    /// Width of the feed-forward network.
    pub ffn: i64,
    /// Positions that the model knows.
    pub max_positions: i64,
    /// How activations are normalised.
    pub norm: Norm,
    /// Added to the variance in norms.
    pub norm_eps: f64,
    /// How a token's position enters: the base of the rotary embedding's frequencies, 0 where scores fall with the distance, or
    /// nothing where vectors are learned.
    #[serde(rename = "ropeTheta", default, skip_serializing_if = "Positions::is_learned")]
    #[schemars(with = "Option<f64>")]
    pub positions: Positions,
    /// The feed-forward network.
    pub mlp: Mlp,
    /// Biases on queries, keys and values.
    pub qkv_bias: bool,
    /// Bias on the attention's output.
    pub attention_output_bias: bool,
    /// Biases in the feed-forward network.
    pub mlp_bias: bool,
    /// The output head is the token embedding.
    pub tied_head: bool,
    /// Queries and keys are normalised in each head (Henry 2020).
    #[serde(default, skip_serializing_if = "is_off")]
    pub qk_norm: bool,
    /// What few models have, as numbers by name.
    #[serde(default, skip_serializing_if = "Traits::is_none")]
    #[schemars(with = "BTreeMap<String, f64>")]
    pub traits: Traits,
    /// A token sees itself and those before it, in all so many; left out, all before it. This and what follows changes no
    /// size that a plan would notice, so it does not travel: whoever runs a model reads it from the model.
    #[serde(skip)]
    pub sliding_window: Option<i64>,
    /// Rows of the table of positions before that of the first position.
    #[serde(skip)]
    pub position_offset: i64,
    /// How rotary frequencies are stretched.
    #[serde(skip)]
    pub rope_scaling: Option<RopeScaling>,
    /// The tokens that there are, where the vocabulary is padded: the head then speaks of these alone.
    #[serde(skip)]
    pub known_tokens: Option<i64>,
    /// The blocks that see everything in spite of the sliding window.
    #[serde(skip)]
    pub full_blocks: Vec<usize>,
    /// Base of the rotary frequencies in blocks with a window, where it is another there; these are not stretched.
    #[serde(skip)]
    pub local_theta: Option<f64>,
    /// By what attention's scores are multiplied, where it is not one over the root of a head's width.
    #[serde(skip)]
    pub query_scale: Option<f64>,
    /// By what token embeddings are multiplied.
    #[serde(skip)]
    pub embed_scale: Option<f64>,
    /// The gate of the feed-forward network is a GELU with the tanh approximation.
    #[serde(skip)]
    pub gelu_gate: bool,
    /// A block's norms follow each residual (Vaswani 2017) instead of preceding what is added to it.
    #[serde(skip)]
    pub norms_after: bool,
}

fn is_off(switch: &bool) -> bool {
    !switch
}

/// A link of the chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Segment {
    /// Token (and position) embedding.
    Embed,
    /// The block with this index.
    Block(usize),
    /// Final norm and output head.
    Head,
}

/// A parameter's role in its segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Param {
    TokenEmbedding,
    PositionEmbedding,
    EmbedProjection,
    EmbedNormWeight,
    EmbedNormBias,
    AttentionNormWeight,
    AttentionNormBias,
    QueryWeight,
    QueryBias,
    KeyWeight,
    KeyBias,
    ValueWeight,
    ValueBias,
    OutputWeight,
    OutputBias,
    AttentionPostNormWeight,
    MlpNormWeight,
    MlpNormBias,
    MlpPostNormWeight,
    GateWeight,
    GateBias,
    UpWeight,
    UpBias,
    DownWeight,
    DownBias,
    QueryNormWeight,
    KeyNormWeight,
    FinalNormWeight,
    FinalNormBias,
    HeadProjection,
    LmHeadWeight,
    ScalarHeadWeight,
    ScalarHeadBias,
    LoraA(Linear),
    LoraB(Linear),
}

impl Param {
    /// The weight and the bias of a block's linear.
    pub fn of(linear: Linear) -> (Param, Param) {
        match linear {
            Linear::Query => (Param::QueryWeight, Param::QueryBias),
            Linear::Key => (Param::KeyWeight, Param::KeyBias),
            Linear::Value => (Param::ValueWeight, Param::ValueBias),
            Linear::Output => (Param::OutputWeight, Param::OutputBias),
            Linear::Gate => (Param::GateWeight, Param::GateBias),
            Linear::Up => (Param::UpWeight, Param::UpBias),
            Linear::Down => (Param::DownWeight, Param::DownBias),
        }
    }

    /// Whether it is the weight of a norm.
    pub fn is_norm_weight(self) -> bool {
        use Param::*;
        matches!(
            self,
            EmbedNormWeight
                | AttentionNormWeight
                | AttentionPostNormWeight
                | MlpNormWeight
                | MlpPostNormWeight
                | FinalNormWeight
                | QueryNormWeight
                | KeyNormWeight
        )
    }

    /// The linear of which this is the weight.
    pub fn as_weight(self) -> Option<Linear> {
        Linear::ALL.into_iter().find(|linear| Param::of(*linear).0 == self)
    }
}

/// A parameter and its shape; matrices are `[out, in]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParamSpec {
    /// Its role.
    pub param: Param,
    /// Its shape.
    pub shape: Vec<i64>,
}

impl ModelSpec {
    /// The segments in forward order: for who runs them. Nothing that only counts goes through them, as a shape that is only
    /// said to be one may have any number of layers.
    pub fn segments(&self) -> Vec<Segment> {
        let blocks = (0..self.layers).map(Segment::Block);
        std::iter::once(Segment::Embed).chain(blocks).chain([Segment::Head]).collect()
    }

    /// The parameters of a segment, matrices first: weight decay then applies to one contiguous range.
    pub fn params(&self, segment: Segment, head: HeadKind) -> Vec<ParamSpec> {
        let mut list = ParamList::default();
        match segment {
            Segment::Embed => self.embed_params(&mut list),
            Segment::Block(_) => self.block_params(&mut list),
            Segment::Head => self.head_params(&mut list, head),
        }
        list.0.sort_by_key(|p| p.shape.len() < 2);
        list.0
    }

    /// All parameters of the model; the largest number where there are more.
    pub fn parameter_count(&self, head: HeadKind) -> i64 {
        let numel = |p: ParamSpec| p.shape.iter().fold(1, |n: i64, side| n.saturating_mul(*side));
        let of = |segment| self.params(segment, head).into_iter().map(numel).fold(0, i64::saturating_add);
        let layers = i64::try_from(self.layers).unwrap_or(i64::MAX);
        let blocks = of(Segment::Block(0)).saturating_mul(layers);
        of(Segment::Embed).saturating_add(blocks).saturating_add(of(Segment::Head))
    }

    /// Width of the token embedding, and of what the output head sees.
    pub fn embed_width(&self) -> i64 {
        self.traits.embed_width.unwrap_or(self.hidden)
    }

    /// Whether rows of the token embedding go through parameters before they reach the first block.
    pub fn refines_embedding(&self) -> bool {
        self.traits.embed_norm || self.traits.embed_width.is_some()
    }

    /// How far back a block sees, where that is less than everything.
    pub fn window(&self, block: usize) -> Option<i64> {
        self.sliding_window.filter(|_| !self.full_blocks.contains(&block))
    }

    fn embed_params(&self, list: &mut ParamList) {
        list.push(Param::TokenEmbedding, &[self.vocab, self.embed_width()]);
        if let Some(width) = self.traits.embed_width {
            list.push(Param::EmbedProjection, &[self.hidden, width]);
        }
        if self.traits.embed_norm {
            list.norm(self, Param::EmbedNormWeight, Param::EmbedNormBias);
        }
        if self.positions == Positions::Learned {
            list.push(Param::PositionEmbedding, &[self.max_positions + self.position_offset, self.hidden]);
        }
    }

    fn block_params(&self, list: &mut ParamList) {
        list.norm(self, Param::AttentionNormWeight, Param::AttentionNormBias);
        if self.qk_norm {
            list.push(Param::QueryNormWeight, &[self.head_dim]);
            list.push(Param::KeyNormWeight, &[self.head_dim]);
        }
        for (linear, [out, input], has_bias) in self.linears() {
            let (weight, bias) = Param::of(linear);
            list.linear(weight, bias, out, input, has_bias);
            if linear == Linear::Output {
                if self.traits.norms_around {
                    list.push(Param::AttentionPostNormWeight, &[self.hidden]);
                }
                list.norm(self, Param::MlpNormWeight, Param::MlpNormBias);
            }
        }
        if self.traits.norms_around {
            list.push(Param::MlpPostNormWeight, &[self.hidden]);
        }
    }

    /// The linears of a block: their shapes `[out, in]`, and whether they have a bias.
    pub fn linears(&self) -> impl Iterator<Item = (Linear, [i64; 2], bool)> {
        let [query, key_value] = [self.heads, self.kv_heads].map(|heads| heads.saturating_mul(self.head_dim));
        let of = move |linear| match linear {
            Linear::Query => ([query, self.hidden], self.qkv_bias),
            Linear::Key | Linear::Value => ([key_value, self.hidden], self.qkv_bias),
            Linear::Output => ([self.hidden, query], self.attention_output_bias),
            Linear::Gate | Linear::Up => ([self.ffn, self.hidden], self.mlp_bias),
            Linear::Down => ([self.hidden, self.ffn], self.mlp_bias),
        };
        let gated = self.mlp == Mlp::SwiGlu;
        Linear::ALL.into_iter().filter(move |l| gated || *l != Linear::Gate).map(move |linear| {
            let (shape, has_bias) = of(linear);
            (linear, shape, has_bias)
        })
    }

    /// The parameters of a block's adapters (LoRA, Hu 2021): A `[rank, in]` and B `[out, rank]` of each target.
    pub fn adapter_params(&self, lora: &Lora) -> Vec<ParamSpec> {
        let rank = i64::from(lora.rank);
        let targets = self.linears().filter(|(linear, ..)| lora.targets.contains(linear));
        let factors = targets.flat_map(|(linear, [out, input], _)| {
            [(Param::LoraA(linear), vec![rank, input]), (Param::LoraB(linear), vec![out, rank])]
        });
        factors.map(|(param, shape)| ParamSpec { param, shape }).collect()
    }

    fn head_params(&self, list: &mut ParamList, head: HeadKind) {
        if !self.traits.no_final_norm {
            list.norm(self, Param::FinalNormWeight, Param::FinalNormBias);
        }
        let width = self.embed_width();
        if self.traits.embed_width.is_some() {
            list.push(Param::HeadProjection, &[width, self.hidden]);
        }
        match head {
            HeadKind::Lm if self.tied_head => {}
            HeadKind::Lm => list.push(Param::LmHeadWeight, &[self.vocab, width]),
            HeadKind::Scalar => list.linear(Param::ScalarHeadWeight, Param::ScalarHeadBias, 1, width, true),
        }
    }
}

#[derive(Default)]
struct ParamList(Vec<ParamSpec>);

impl ParamList {
    fn push(&mut self, param: Param, shape: &[i64]) {
        self.0.push(ParamSpec { param, shape: shape.to_vec() });
    }

    fn linear(&mut self, weight: Param, bias: Param, out: i64, input: i64, has_bias: bool) {
        self.push(weight, &[out, input]);
        if has_bias {
            self.push(bias, &[out]);
        }
    }

    fn norm(&mut self, spec: &ModelSpec, weight: Param, bias: Param) {
        self.push(weight, &[spec.hidden]);
        if spec.norm == Norm::Layer {
            self.push(bias, &[spec.hidden]);
        }
    }
}

//! Llama 2 and 3, and what shares its architecture, such as SmolLM2: RMS norm, rotary positions, grouped queries, SwiGLU.

use super::{Config, Definition, HfTensor, rope};
use crate::error::Result;
use crate::model::{Mlp, ModelSpec, Norm, Param, Segment};
use serde_json::Value;

pub(super) const FAMILY: Definition = Definition {
    model_type: "llama",
    classes: ["LlamaForCausalLM", "LlamaForSequenceClassification"],
    prefix: "model.",
    spec,
    tensors,
};

fn spec(config: &Config<'_>) -> Result<ModelSpec> {
    let bias = config.flag("attention_bias", false);
    Ok(ModelSpec {
        qkv_bias: bias,
        attention_output_bias: bias,
        mlp_bias: config.flag("mlp_bias", false),
        ..base(config, 2048, None)?
    })
}

/// What the families of Llama's kind have in common, without biases; `positions` and `head_dim` count where the config is silent.
pub(super) fn base(config: &Config<'_>, positions: i64, head_dim: Option<i64>) -> Result<ModelSpec> {
    config.one_of("hidden_act", "silu", &["silu", "swish"])?;
    let (hidden, heads) = (config.size("hidden_size")?, config.size("num_attention_heads")?);
    let head_dim = match (config.json.get("head_dim"), head_dim) {
        (None | Some(Value::Null), None) => config.head_dim(hidden, heads)?,
        (_, default) => config.size_or("head_dim", default.unwrap_or_default())?,
    };
    let max_positions = config.size_or("max_position_embeddings", positions)?;
    let (positions, rope_scaling) = rope::read(config, head_dim, max_positions)?;
    Ok(ModelSpec {
        vocab: config.size("vocab_size")?,
        hidden,
        layers: config.size("num_hidden_layers")? as usize,
        heads,
        kv_heads: config.size_or("num_key_value_heads", heads)?,
        head_dim,
        ffn: config.size("intermediate_size")?,
        max_positions,
        norm: Norm::Rms,
        norm_eps: config.epsilon("rms_norm_eps", 1e-6)?,
        positions,
        rope_scaling,
        mlp: Mlp::SwiGlu,
        tied_head: config.flag("tie_word_embeddings", false),
        ..ModelSpec::default()
    })
}

pub(super) fn tensors(segment: Segment) -> Vec<HfTensor> {
    let plain = |name: &str, param| HfTensor::plain(name.into(), param);
    match segment {
        Segment::Embed => vec![plain("model.embed_tokens.weight", Param::TokenEmbedding)],
        Segment::Block(i) => block(i),
        Segment::Head => {
            vec![plain("model.norm.weight", Param::FinalNormWeight), plain("lm_head.weight", Param::LmHeadWeight)]
        }
    }
}

fn block(i: usize) -> Vec<HfTensor> {
    let table = [
        ("input_layernorm.weight", Param::AttentionNormWeight),
        ("self_attn.q_proj.weight", Param::QueryWeight),
        ("self_attn.q_proj.bias", Param::QueryBias),
        ("self_attn.q_norm.weight", Param::QueryNormWeight),
        ("self_attn.k_proj.weight", Param::KeyWeight),
        ("self_attn.k_proj.bias", Param::KeyBias),
        ("self_attn.k_norm.weight", Param::KeyNormWeight),
        ("self_attn.v_proj.weight", Param::ValueWeight),
        ("self_attn.v_proj.bias", Param::ValueBias),
        ("self_attn.o_proj.weight", Param::OutputWeight),
        ("self_attn.o_proj.bias", Param::OutputBias),
        ("post_attention_layernorm.weight", Param::MlpNormWeight),
        ("mlp.gate_proj.weight", Param::GateWeight),
        ("mlp.gate_proj.bias", Param::GateBias),
        ("mlp.up_proj.weight", Param::UpWeight),
        ("mlp.up_proj.bias", Param::UpBias),
        ("mlp.down_proj.weight", Param::DownWeight),
        ("mlp.down_proj.bias", Param::DownBias),
    ];
    table.into_iter().map(|(name, param)| HfTensor::plain(format!("model.layers.{i}.{name}"), param)).collect()
}

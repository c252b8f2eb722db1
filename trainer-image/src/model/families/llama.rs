//! Llama: RMS norm, rotary positions, grouped queries, SwiGLU.

use super::{Config, HfTensor};
use crate::error::Result;
use crate::model::{Mlp, ModelSpec, Norm, Param, Positions, Segment};

pub(super) fn spec(config: &Config<'_>) -> Result<ModelSpec> {
    config.one_of("hidden_act", "silu", &["silu"])?;
    let (hidden, heads) = (config.size("hidden_size")?, config.size("num_attention_heads")?);
    Ok(ModelSpec {
        vocab: config.size("vocab_size")?,
        hidden,
        layers: config.size("num_hidden_layers")? as usize,
        heads,
        kv_heads: config.size_or("num_key_value_heads", heads)?,
        head_dim: config.size_or("head_dim", hidden / heads)?,
        ffn: config.size("intermediate_size")?,
        max_positions: config.size_or("max_position_embeddings", 2048)?,
        norm: Norm::Rms,
        norm_eps: config.number_or("rms_norm_eps", 1e-6)?,
        positions: Positions::Rotary { theta: rope_theta(config)? },
        mlp: Mlp::SwiGlu,
        qkv_bias: config.flag("attention_bias", false),
        attention_output_bias: config.flag("attention_bias", false),
        mlp_bias: config.flag("mlp_bias", false),
        tied_head: config.flag("tie_word_embeddings", false),
    })
}

/// The base of the rotary frequencies: its own field until transformers 4, in `rope_parameters` since 5.
fn rope_theta(config: &Config<'_>) -> Result<f64> {
    for field in ["rope_scaling", "rope_parameters"] {
        let Some(inner) = config.json.get(field).filter(|v| v.is_object()) else { continue };
        let inner = Config { path: config.path, json: inner };
        let kind = if inner.json.get("rope_type").is_some() { "rope_type" } else { "type" };
        inner.one_of(kind, "default", &["default"])?;
        if inner.json.get("rope_theta").is_some() {
            return inner.number_or("rope_theta", 1e4);
        }
    }
    config.number_or("rope_theta", 1e4)
}

pub(super) fn tensors(spec: &ModelSpec, segment: Segment) -> Vec<HfTensor> {
    let plain = |name: String, param| HfTensor::plain(name, param);
    match segment {
        Segment::Embed => vec![plain("model.embed_tokens.weight".into(), Param::TokenEmbedding)],
        Segment::Block(i) => block(i),
        Segment::Head => {
            let norm = plain("model.norm.weight".into(), Param::FinalNormWeight);
            if spec.tied_head { vec![norm] } else { vec![norm, plain("lm_head.weight".into(), Param::LmHeadWeight)] }
        }
    }
}

fn block(i: usize) -> Vec<HfTensor> {
    let table = [
        ("input_layernorm.weight", Param::AttentionNormWeight),
        ("self_attn.q_proj.weight", Param::QueryWeight),
        ("self_attn.q_proj.bias", Param::QueryBias),
        ("self_attn.k_proj.weight", Param::KeyWeight),
        ("self_attn.k_proj.bias", Param::KeyBias),
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

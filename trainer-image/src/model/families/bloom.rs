//! BLOOM: layer norm, of the embedding too, scores that fall with the distance (ALiBi), biases everywhere, a tied head; queries,
//! keys and values are one matrix, head by head.

use super::{Config, Definition, HfTensor, Layout, gpt2};
use crate::error::Result;
use crate::model::{Mlp, ModelSpec, Param, Positions, Segment, Traits};

pub(super) const FAMILY: Definition = Definition {
    model_type: "bloom",
    classes: ["BloomForCausalLM", "BloomForSequenceClassification"],
    prefix: "transformer.",
    spec,
    tensors,
};

fn spec(config: &Config<'_>) -> Result<ModelSpec> {
    config.must_be("apply_residual_connection_post_layernorm", false)?;
    let names = [["n_embed", "hidden_size"], ["n_layer", "num_hidden_layers"], ["n_head", "num_attention_heads"]];
    let base = gpt2::base(config, names.map(|fields| config.first_of(fields)))?;
    Ok(ModelSpec {
        ffn: 4 * base.hidden,
        // ALiBi has no end; this is how far it was trained.
        max_positions: config.size_or("seq_length", 2048)?,
        norm_eps: config.epsilon("layer_norm_epsilon", base.norm_eps)?,
        positions: Positions::Alibi,
        mlp: Mlp::Gelu,
        qkv_bias: true,
        attention_output_bias: true,
        mlp_bias: true,
        traits: Traits { embed_norm: true, ..Traits::default() },
        ..base
    })
}

fn tensors(segment: Segment) -> Vec<HfTensor> {
    let plain = |name: &str, param| HfTensor::plain(format!("transformer.{name}"), param);
    match segment {
        Segment::Embed => vec![
            plain("word_embeddings.weight", Param::TokenEmbedding),
            plain("word_embeddings_layernorm.weight", Param::EmbedNormWeight),
            plain("word_embeddings_layernorm.bias", Param::EmbedNormBias),
        ],
        Segment::Block(i) => block(i),
        Segment::Head => vec![
            plain("ln_f.weight", Param::FinalNormWeight),
            plain("ln_f.bias", Param::FinalNormBias),
            HfTensor::plain("lm_head.weight".into(), Param::LmHeadWeight),
        ],
    }
}

fn block(i: usize) -> Vec<HfTensor> {
    use Param::*;
    let name = |name: &str| format!("transformer.h.{i}.{name}");
    let plain = |of: &str, param| HfTensor::plain(name(of), param);
    let fused = |of: &str, parts: [Param; 3]| HfTensor { name: name(of), parts: parts.to_vec(), layout: Layout::Heads };
    vec![
        plain("input_layernorm.weight", AttentionNormWeight),
        plain("input_layernorm.bias", AttentionNormBias),
        fused("self_attention.query_key_value.weight", [QueryWeight, KeyWeight, ValueWeight]),
        fused("self_attention.query_key_value.bias", [QueryBias, KeyBias, ValueBias]),
        plain("self_attention.dense.weight", OutputWeight),
        plain("self_attention.dense.bias", OutputBias),
        plain("post_attention_layernorm.weight", MlpNormWeight),
        plain("post_attention_layernorm.bias", MlpNormBias),
        plain("mlp.dense_h_to_4h.weight", UpWeight),
        plain("mlp.dense_h_to_4h.bias", UpBias),
        plain("mlp.dense_4h_to_h.weight", DownWeight),
        plain("mlp.dense_4h_to_h.bias", DownBias),
    ]
}

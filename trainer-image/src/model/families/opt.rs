//! OPT: layer norm, learned positions from row 2 on, ReLU, biases everywhere, a tied head; the one of 350 million parameters
//! normalises after each residual, and has embeddings of another width.

use super::{Config, Definition, HfTensor, gpt2};
use crate::error::Result;
use crate::model::{Mlp, ModelSpec, Param, Segment, Traits};

pub(super) const FAMILY: Definition = Definition {
    model_type: "opt",
    classes: ["OPTForCausalLM", "OPTForSequenceClassification"],
    prefix: "model.",
    spec,
    tensors,
};

fn spec(config: &Config<'_>) -> Result<ModelSpec> {
    config.one_of("activation_function", "relu", &["relu"])?;
    config.must_be("layer_norm_elementwise_affine", true)?;
    let base = gpt2::base(config, ["hidden_size", "num_hidden_layers", "num_attention_heads"])?;
    let width = config.size_or("word_embed_proj_dim", base.hidden)?;
    let before = config.flag("do_layer_norm_before", true);
    let bias = config.flag("enable_bias", true);
    Ok(ModelSpec {
        ffn: config.size("ffn_dim")?,
        max_positions: config.size_or("max_position_embeddings", 2048)?,
        position_offset: 2,
        mlp: Mlp::Relu,
        qkv_bias: bias,
        attention_output_bias: bias,
        mlp_bias: bias,
        norms_after: !before,
        traits: Traits {
            embed_width: (width != base.hidden).then_some(width),
            no_final_norm: !before || config.flag("_remove_final_layer_norm", false),
            ..Traits::default()
        },
        ..base
    })
}

fn tensors(segment: Segment) -> Vec<HfTensor> {
    let plain = |name: &str, param| HfTensor::plain(name.into(), param);
    match segment {
        Segment::Embed => vec![
            plain("model.decoder.embed_tokens.weight", Param::TokenEmbedding),
            plain("model.decoder.embed_positions.weight", Param::PositionEmbedding),
            plain("model.decoder.project_in.weight", Param::EmbedProjection),
        ],
        Segment::Block(i) => block(i),
        Segment::Head => vec![
            plain("model.decoder.final_layer_norm.weight", Param::FinalNormWeight),
            plain("model.decoder.final_layer_norm.bias", Param::FinalNormBias),
            plain("model.decoder.project_out.weight", Param::HeadProjection),
            plain("lm_head.weight", Param::LmHeadWeight),
        ],
    }
}

fn block(i: usize) -> Vec<HfTensor> {
    let table = [
        ("self_attn_layer_norm.weight", Param::AttentionNormWeight),
        ("self_attn_layer_norm.bias", Param::AttentionNormBias),
        ("self_attn.q_proj.weight", Param::QueryWeight),
        ("self_attn.q_proj.bias", Param::QueryBias),
        ("self_attn.k_proj.weight", Param::KeyWeight),
        ("self_attn.k_proj.bias", Param::KeyBias),
        ("self_attn.v_proj.weight", Param::ValueWeight),
        ("self_attn.v_proj.bias", Param::ValueBias),
        ("self_attn.out_proj.weight", Param::OutputWeight),
        ("self_attn.out_proj.bias", Param::OutputBias),
        ("final_layer_norm.weight", Param::MlpNormWeight),
        ("final_layer_norm.bias", Param::MlpNormBias),
        ("fc1.weight", Param::UpWeight),
        ("fc1.bias", Param::UpBias),
        ("fc2.weight", Param::DownWeight),
        ("fc2.bias", Param::DownBias),
    ];
    table.into_iter().map(|(name, param)| HfTensor::plain(format!("model.decoder.layers.{i}.{name}"), param)).collect()
}

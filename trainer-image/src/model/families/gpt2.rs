//! GPT-2: layer norm, learned positions, biases everywhere, a tied head, weights stored as `[in, out]`.

use super::{Config, Definition, HfTensor, Layout};
use crate::error::Result;
use crate::model::{Mlp, ModelSpec, Norm, Param, Positions, Segment};

/// As PyTorch's layer norm has it.
const NORM_EPS: f64 = 1e-5;

pub(super) const FAMILY: Definition = Definition {
    model_type: "gpt2",
    classes: ["GPT2LMHeadModel", "GPT2ForSequenceClassification"],
    prefix: "transformer.",
    spec,
    tensors,
};

fn spec(config: &Config<'_>) -> Result<ModelSpec> {
    config.one_of("activation_function", "gelu_new", &["gelu_new", "gelu_pytorch_tanh"])?;
    config.must_be("scale_attn_by_inverse_layer_idx", false)?;
    config.must_be("scale_attn_weights", true)?;
    config.must_be("add_cross_attention", false)?;
    let base = base(config, ["n_embd", "n_layer", "n_head"])?;
    Ok(ModelSpec {
        ffn: config.size_or("n_inner", 4 * base.hidden)?,
        max_positions: config.size_or("n_positions", 1024)?,
        norm_eps: config.epsilon("layer_norm_epsilon", NORM_EPS)?,
        mlp: Mlp::Gelu,
        qkv_bias: true,
        attention_output_bias: true,
        mlp_bias: true,
        ..base
    })
}

/// What the families of GPT-2's kind have in common: layer norm, learned positions, a head for each share of the hidden state,
/// a tied output. `fields` are the names of the hidden size, the number of blocks and that of heads.
pub(super) fn base(config: &Config<'_>, [hidden, layers, heads]: [&str; 3]) -> Result<ModelSpec> {
    let (hidden, heads) = (config.size(hidden)?, config.size(heads)?);
    Ok(ModelSpec {
        vocab: config.size("vocab_size")?,
        hidden,
        layers: config.size(layers)? as usize,
        heads,
        kv_heads: heads,
        head_dim: config.head_dim(hidden, heads)?,
        norm: Norm::Layer,
        norm_eps: NORM_EPS,
        positions: Positions::Learned,
        tied_head: config.flag("tie_word_embeddings", true),
        ..ModelSpec::default()
    })
}

fn tensors(segment: Segment) -> Vec<HfTensor> {
    match segment {
        Segment::Embed => vec![
            HfTensor::plain("transformer.wte.weight".into(), Param::TokenEmbedding),
            HfTensor::plain("transformer.wpe.weight".into(), Param::PositionEmbedding),
        ],
        Segment::Block(i) => block(i),
        Segment::Head => vec![
            HfTensor::plain("transformer.ln_f.weight".into(), Param::FinalNormWeight),
            HfTensor::plain("transformer.ln_f.bias".into(), Param::FinalNormBias),
            HfTensor::plain("lm_head.weight".into(), Param::LmHeadWeight),
        ],
    }
}

fn block(i: usize) -> Vec<HfTensor> {
    use Param::*;
    let plain = |name: &str, param| HfTensor::plain(format!("transformer.h.{i}.{name}"), param);
    let conv = |name: &str, parts: &[Param]| HfTensor {
        name: format!("transformer.h.{i}.{name}"),
        parts: parts.to_vec(),
        layout: Layout::Transposed,
    };
    vec![
        plain("ln_1.weight", AttentionNormWeight),
        plain("ln_1.bias", AttentionNormBias),
        conv("attn.c_attn.weight", &[QueryWeight, KeyWeight, ValueWeight]),
        HfTensor { layout: Layout::Rows, ..conv("attn.c_attn.bias", &[QueryBias, KeyBias, ValueBias]) },
        conv("attn.c_proj.weight", &[OutputWeight]),
        plain("attn.c_proj.bias", OutputBias),
        plain("ln_2.weight", MlpNormWeight),
        plain("ln_2.bias", MlpNormBias),
        conv("mlp.c_fc.weight", &[UpWeight]),
        plain("mlp.c_fc.bias", UpBias),
        conv("mlp.c_proj.weight", &[DownWeight]),
        plain("mlp.c_proj.bias", DownBias),
    ]
}

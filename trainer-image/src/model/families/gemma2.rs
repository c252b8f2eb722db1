//! Gemma 2: scaled embeddings, norms on both sides of each part whose weights count from one, a GELU gate, windows in every other
//! block, soft caps on attention's scores and on logits, a tied head.

use super::{Config, Definition, HfTensor, llama, rope};
use crate::error::Result;
use crate::model::{Mlp, ModelSpec, Norm, Param, Segment, Traits};

pub(super) const FAMILY: Definition = Definition {
    model_type: "gemma2",
    classes: ["Gemma2ForCausalLM", "Gemma2ForSequenceClassification"],
    prefix: "model.",
    spec,
    tensors,
};

fn spec(config: &Config<'_>) -> Result<ModelSpec> {
    let base = base(config, 8192, |block| block % 2 == 0)?;
    let (positions, rope_scaling) = rope::read(config, base.head_dim, base.max_positions)?;
    let attention_cap = config.cap("attn_logit_softcapping", Some(50.0))?;
    let logit_cap = config.cap("final_logit_softcapping", Some(30.0))?;
    Ok(ModelSpec { positions, rope_scaling, traits: Traits { attention_cap, logit_cap, ..base.traits }, ..base })
}

/// What Gemma 2 and 3 have in common, without rotary positions; `positions` counts where the config is silent, as does `slides`,
/// which says whether a block sees no further than a window.
pub(super) fn base(config: &Config<'_>, positions: i64, slides: impl Fn(usize) -> bool) -> Result<ModelSpec> {
    config.one_of("hidden_activation", "gelu_pytorch_tanh", &["gelu_pytorch_tanh"])?;
    config.must_be("use_bidirectional_attention", false)?;
    let (hidden, layers) = (config.size("hidden_size")?, config.size("num_hidden_layers")? as usize);
    let bias = config.flag("attention_bias", false);
    let (sliding_window, full_blocks) = config.windows(Some(4096), layers, slides)?;
    Ok(ModelSpec {
        vocab: config.size("vocab_size")?,
        hidden,
        layers,
        heads: config.size("num_attention_heads")?,
        kv_heads: config.size_or("num_key_value_heads", 4)?,
        head_dim: config.size_or("head_dim", 256)?,
        ffn: config.size("intermediate_size")?,
        max_positions: config.size_or("max_position_embeddings", positions)?,
        norm: Norm::Rms,
        norm_eps: config.epsilon("rms_norm_eps", 1e-6)?,
        mlp: Mlp::SwiGlu,
        gelu_gate: true,
        qkv_bias: bias,
        attention_output_bias: bias,
        tied_head: config.flag("tie_word_embeddings", true),
        traits: Traits { norms_around: true, norms_from_one: true, ..Traits::default() },
        sliding_window,
        full_blocks,
        query_scale: Some(config.positive_or("query_pre_attn_scalar", 256.0)?.powf(-0.5)),
        embed_scale: Some((hidden as f64).sqrt()),
        ..ModelSpec::default()
    })
}

/// Llama's, with the norms of what is added to the residual stream; the name of one of them is that of another norm there.
pub(super) fn tensors(segment: Segment) -> Vec<HfTensor> {
    let mut tensors = llama::tensors(segment);
    if let Segment::Block(i) = segment {
        let norms = [
            ("post_attention_layernorm.weight", Param::AttentionPostNormWeight),
            ("pre_feedforward_layernorm.weight", Param::MlpNormWeight),
            ("post_feedforward_layernorm.weight", Param::MlpPostNormWeight),
        ];
        tensors.retain(|tensor| tensor.parts != [Param::MlpNormWeight]);
        tensors.extend(norms.map(|(name, param)| HfTensor::plain(format!("model.layers.{i}.{name}"), param)));
    }
    tensors
}

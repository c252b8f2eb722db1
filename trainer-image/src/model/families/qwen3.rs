//! Qwen 3: Llama whose queries and keys are normalised in each head, with a head size of its own.

use super::{Config, Definition, llama, qwen2};
use crate::error::Result;
use crate::model::ModelSpec;

pub(super) const FAMILY: Definition = Definition {
    model_type: "qwen3",
    classes: ["Qwen3ForCausalLM", "Qwen3ForSequenceClassification"],
    prefix: "model.",
    spec,
    tensors: llama::tensors,
};

fn spec(config: &Config<'_>) -> Result<ModelSpec> {
    let base = llama::base(config, 32_768, Some(128))?;
    let (sliding_window, full_blocks) = qwen2::windows(config, base.layers)?;
    let bias = config.flag("attention_bias", false);
    Ok(ModelSpec { qkv_bias: bias, attention_output_bias: bias, qk_norm: true, sliding_window, full_blocks, ..base })
}

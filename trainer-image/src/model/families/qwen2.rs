//! Qwen 2 and 2.5: Llama with biases on queries, keys and values.

use super::{Config, Definition, llama};
use crate::error::Result;
use crate::model::ModelSpec;

pub(super) const FAMILY: Definition = Definition {
    model_type: "qwen2",
    classes: ["Qwen2ForCausalLM", "Qwen2ForSequenceClassification"],
    prefix: "model.",
    spec,
    tensors: llama::tensors,
};

fn spec(config: &Config<'_>) -> Result<ModelSpec> {
    let base = llama::base(config, 32_768, None)?;
    Ok(ModelSpec { qkv_bias: true, sliding_window: window(config, base.layers)?, ..base })
}

/// The window counts where `use_sliding_window` says so, from block `max_window_layers` on.
pub(super) fn window(config: &Config<'_>, layers: usize) -> Result<Option<i64>> {
    if !config.flag("use_sliding_window", false) {
        return Ok(None);
    }
    if config.json.get("layer_types").is_none() && config.size_or("max_window_layers", 28)? >= layers as i64 {
        return Ok(None);
    }
    if config.json.get("layer_types").is_none() && config.number_or("max_window_layers", 28.0)? > 0.0 {
        return Err(config.error(
            "max_window_layers between 0 and the number of blocks is not supported; all blocks must see equally far",
        ));
    }
    config.window(Some(4096), layers)
}

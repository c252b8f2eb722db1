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
    let (sliding_window, full_blocks) = windows(config, base.layers)?;
    Ok(ModelSpec { qkv_bias: true, sliding_window, full_blocks, ..base })
}

/// The window counts where `use_sliding_window` says so, from block `max_window_layers` on.
pub(super) fn windows(config: &Config<'_>, layers: usize) -> Result<(Option<i64>, Vec<usize>)> {
    if !config.flag("use_sliding_window", false) {
        return Ok((None, vec![]));
    }
    let (window, first) = (config.window(Some(4096))?, config.number_or("max_window_layers", 28.0)?);
    config.windows(Some(4096), layers, |block| window.is_some() && block as f64 >= first)
}

//! Mistral: Llama without biases, whose tokens see no further back than a sliding window.

use super::{Config, Definition, llama};
use crate::error::Result;
use crate::model::ModelSpec;

pub(super) const FAMILY: Definition = Definition {
    model_type: "mistral",
    classes: ["MistralForCausalLM", "MistralForSequenceClassification"],
    prefix: "model.",
    spec,
    tensors: llama::tensors,
};

fn spec(config: &Config<'_>) -> Result<ModelSpec> {
    let base = llama::base(config, 4096 * 32, None)?;
    let window = config.window(Some(4096))?;
    // The class of `transformers` does not look at `layer_types`.
    if config.windows(Some(4096), base.layers, |_| window.is_some())? != (window, vec![]) {
        return Err(
            config.error("layer_types other than sliding_window says of all blocks is not supported in mistral")
        );
    }
    Ok(ModelSpec { sliding_window: window, ..base })
}

//! Gemma 3, its language model: Gemma 2 without soft caps in attention, whose queries and keys are normalised in each head; five
//! blocks in six have a window, and rotary frequencies of their own.

use super::{Config, Definition, gemma2, rope};
use crate::error::Result;
use crate::model::{ModelSpec, Positions, RopeScaling, Traits};
use serde_json::{Value, json};

pub(super) const FAMILY: Definition = Definition {
    model_type: "gemma3_text",
    classes: ["Gemma3ForCausalLM", "Gemma3TextForSequenceClassification"],
    prefix: "model.",
    spec,
    tensors: gemma2::tensors,
};

fn spec(config: &Config<'_>) -> Result<ModelSpec> {
    let pattern = config.size_or("sliding_window_pattern", 6)? as usize;
    let base = gemma2::base(config, 131_072, |block| !(block + 1).is_multiple_of(pattern))?;
    if config.cap("attn_logit_softcapping", None)?.is_some() {
        return Err(config.error("attn_logit_softcapping is not supported in gemma3_text; it must be null"));
    }
    let (positions, rope_scaling) = rotary(config, &base, "full_attention", "rope_theta", 1e6)?;
    let local = match rotary(config, &base, "sliding_attention", "rope_local_base_freq", 1e4)? {
        (Positions::Rotary { theta }, None) => theta,
        _ => return Err(config.error("rope_parameters.sliding_attention: only rope_type default is supported")),
    };
    let logit_cap = config.cap("final_logit_softcapping", None)?;
    Ok(ModelSpec {
        positions,
        rope_scaling,
        local_theta: Some(local),
        qk_norm: true,
        traits: Traits { logit_cap, ..base.traits },
        ..base
    })
}

/// The rotary positions of one kind of blocks: `rope_parameters` has them by kind; before version 5 of `transformers` the base had
/// the field `theta`, and `rope_scaling` counted for blocks that see everything.
fn rotary(
    config: &Config<'_>,
    base: &ModelSpec,
    kind: &str,
    theta: &str,
    default: f64,
) -> Result<(Positions, Option<RopeScaling>)> {
    let mut parameters = match config.json.get("rope_parameters") {
        None | Some(Value::Null) => json!({}),
        Some(kinds) => match kinds.get(kind) {
            Some(parameters) if parameters.is_object() => parameters.clone(),
            _ => return Err(config.error(format!("rope_parameters.{kind} is missing"))),
        },
    };
    let scaling = config.json.get("rope_scaling").and_then(Value::as_object).filter(|_| kind == "full_attention");
    for (field, value) in scaling.into_iter().flatten() {
        parameters[field] = value.clone();
    }
    if parameters.get("rope_theta").is_none() {
        parameters["rope_theta"] = json!(config.positive_or(theta, default)?);
    }
    let json = json!({"rope_parameters": parameters});
    rope::read(&Config { path: config.path, json: &json }, base.head_dim, base.max_positions)
}

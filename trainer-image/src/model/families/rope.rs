//! What a config says about rotary positions: `rope_parameters` of transformers 5, or `rope_theta` and `rope_scaling` of 4.

use super::Config;
use crate::error::Result;
use crate::model::{Positions, RopeScaling};
use serde_json::Value;

const KINDS: [&str; 5] = ["default", "linear", "dynamic", "llama3", "yarn"];

/// The base of the frequencies, and how they are stretched.
pub(super) fn read(config: &Config<'_>, head_dim: i64, max_positions: i64) -> Result<(Positions, Option<RopeScaling>)> {
    let inner = ["rope_scaling", "rope_parameters"].iter().find_map(|f| config.json.get(*f).filter(|v| v.is_object()));
    let Some(inner) = inner else {
        return Ok((Positions::Rotary { theta: config.positive_or("rope_theta", 1e4)? }, None));
    };
    let inner = Config { path: config.path, json: inner };
    let theta = match inner.json.get("rope_theta") {
        Some(_) => inner.positive_or("rope_theta", 1e4)?,
        None => config.positive_or("rope_theta", 1e4)?,
    };
    for part in [config, &inner] {
        if part.number_or("partial_rotary_factor", 1.0)? != 1.0 {
            return Err(part.error("partial_rotary_factor is not supported; it must be 1 or left out"));
        }
    }
    let kind = if inner.json.get("rope_type").is_some() { "rope_type" } else { "type" };
    inner.one_of(kind, "default", &KINDS)?;
    let original = match inner.json.get("original_max_position_embeddings").filter(|v| !v.is_null()) {
        Some(_) => inner.positive("original_max_position_embeddings")?,
        None => config.positive_or("original_max_position_embeddings", max_positions as f64)?,
    };
    let scaling = match inner.json.get(kind).and_then(Value::as_str) {
        Some("linear") => Some(RopeScaling::Linear { factor: inner.positive("factor")? }),
        Some("llama3") => Some(llama3(&inner, original)?),
        Some("yarn") => Some(yarn(&inner, theta, head_dim, original, max_positions as f64)?),
        // Dynamic scaling sets in beyond the model's positions, and no sequence is longer than these.
        _ => None,
    };
    Ok((Positions::Rotary { theta }, scaling))
}

fn llama3(config: &Config<'_>, original: f64) -> Result<RopeScaling> {
    let [factor, low, high] = ["factor", "low_freq_factor", "high_freq_factor"].map(|field| config.positive(field));
    let (factor, low, high) = (factor?, low?, high?);
    if low >= high {
        return Err(config.error(format!("low_freq_factor {low} must be below high_freq_factor {high}")));
    }
    Ok(RopeScaling::Llama3 { factor, low, high, original })
}

fn yarn(config: &Config<'_>, theta: f64, head_dim: i64, original: f64, max_positions: f64) -> Result<RopeScaling> {
    let factor = match config.json.get("factor").filter(|v| !v.is_null()) {
        Some(_) => config.positive("factor")?,
        None => max_positions / original,
    };
    if theta <= 1.0 {
        return Err(config.error(format!("rope_theta {theta} must be above 1")));
    }
    let set = |field: &str| config.json.get(field).and_then(Value::as_f64).filter(|v| *v != 0.0);
    let scale = |m: f64| if factor <= 1.0 { 1.0 } else { 0.1 * m * factor.ln() + 1.0 };
    let attention =
        match (config.json.get("attention_factor").and_then(Value::as_f64), set("mscale"), set("mscale_all_dim")) {
            (Some(attention), ..) => attention,
            (None, Some(mscale), Some(all)) => scale(mscale) / scale(all),
            _ => scale(1.0),
        };
    // The index of the frequency that makes so many turns within the original context.
    let dim = head_dim as f64;
    let index = |turns: f64| dim * (original / (turns * 2.0 * std::f64::consts::PI)).ln() / (2.0 * theta.ln());
    let (mut first, mut last) = (index(set("beta_fast").unwrap_or(32.0)), index(set("beta_slow").unwrap_or(1.0)));
    if config.flag("truncate", true) {
        (first, last) = (first.floor(), last.ceil());
    }
    (first, last) = (first.max(0.0), last.min(dim - 1.0));
    if first == last {
        last += 0.001;
    }
    Ok(RopeScaling::Yarn { factor, attention, ramp: [first, last] })
}

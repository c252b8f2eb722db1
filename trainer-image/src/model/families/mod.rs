//! The supported families. Each file maps a Hugging Face config onto [`ModelSpec`] and tensor names onto
//! [`Param`]s; the tables run both ways. Adding a family is adding one file and one line in each match here.

mod gpt2;
mod llama;

use super::{HeadKind, ModelSpec, Param, Segment};
use crate::error::{Error, Result};
use serde_json::Value;
use std::path::Path;

/// A model family, named as `model_type` in Hugging Face configs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// GPT-2 (Radford 2019).
    Gpt2,
    /// Llama (Touvron 2023) and what shares its architecture, such as SmolLM2.
    Llama,
}

/// A tensor of a Hugging Face checkpoint: one or more parameters joined along their first dimension.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HfTensor {
    /// Its name in a causal language model's checkpoint.
    pub name: String,
    /// The parameters in it, in order.
    pub parts: Vec<Param>,
    /// Stored as `[in, out]` (GPT-2's Conv1D).
    pub transposed: bool,
}

impl HfTensor {
    fn plain(name: String, param: Param) -> Self {
        Self { name, parts: vec![param], transposed: false }
    }
}

impl Family {
    /// Every family.
    pub const ALL: [Family; 2] = [Family::Gpt2, Family::Llama];

    /// The `model_type` of its configs.
    pub fn model_type(self) -> &'static str {
        match self {
            Family::Gpt2 => "gpt2",
            Family::Llama => "llama",
        }
    }

    /// The class of `transformers` that loads a model of this family with this head.
    pub fn architecture(self, head: HeadKind) -> &'static str {
        match (self, head) {
            (Family::Gpt2, HeadKind::Lm) => "GPT2LMHeadModel",
            (Family::Gpt2, HeadKind::Scalar) => "GPT2ForSequenceClassification",
            (Family::Llama, HeadKind::Lm) => "LlamaForCausalLM",
            (Family::Llama, HeadKind::Scalar) => "LlamaForSequenceClassification",
        }
    }

    /// The prefix that a bare backbone's checkpoint leaves out of its tensor names.
    pub fn backbone_prefix(self) -> &'static str {
        match self {
            Family::Gpt2 => "transformer.",
            Family::Llama => "model.",
        }
    }

    /// The family and shape of the model with this config.
    ///
    /// # Errors
    /// Names the field that is missing, wrong or asks for something that is not supported.
    pub fn read(config: &Config<'_>) -> Result<(Family, ModelSpec)> {
        let model_type = config.text("model_type")?;
        let family = Self::ALL.into_iter().find(|f| f.model_type() == model_type).ok_or_else(|| {
            let known: Vec<_> = Self::ALL.iter().map(|f| f.model_type()).collect();
            config.error(format!("model_type '{model_type}' is not supported; supported are {}", known.join(", ")))
        })?;
        let spec = match family {
            Family::Gpt2 => gpt2::spec(config),
            Family::Llama => llama::spec(config),
        }?;
        config.check(&spec)?;
        Ok((family, spec))
    }

    /// The checkpoint's tensors that hold a segment's parameters, the score head's apart.
    pub fn tensors(self, spec: &ModelSpec, segment: Segment) -> Vec<HfTensor> {
        match self {
            Family::Gpt2 => gpt2::tensors(segment),
            Family::Llama => llama::tensors(spec, segment),
        }
    }
}

/// A `config.json` and where it lies, for error messages.
#[derive(Clone, Copy, Debug)]
pub struct Config<'a> {
    /// The file.
    pub path: &'a Path,
    /// Its content.
    pub json: &'a Value,
}

impl Config<'_> {
    fn error(&self, what: impl std::fmt::Display) -> Error {
        Error::input(format!("{}: {what}", self.path.display()))
    }

    fn text(&self, field: &str) -> Result<&str> {
        self.json
            .get(field)
            .and_then(Value::as_str)
            .ok_or_else(|| self.error(format!("field '{field}' is missing or not a string")))
    }

    fn size(&self, field: &str) -> Result<i64> {
        match self.json.get(field).and_then(Value::as_i64) {
            Some(n) if (1..=1 << 31).contains(&n) => Ok(n),
            _ => Err(self.error(format!("field '{field}' is missing or not a positive whole number"))),
        }
    }

    fn size_or(&self, field: &str, default: i64) -> Result<i64> {
        if self.json.get(field).is_none_or(Value::is_null) { Ok(default) } else { self.size(field) }
    }

    fn number_or(&self, field: &str, default: f64) -> Result<f64> {
        match self.json.get(field) {
            None | Some(Value::Null) => Ok(default),
            Some(value) => value.as_f64().ok_or_else(|| self.error(format!("field '{field}' is not a number"))),
        }
    }

    fn flag(&self, field: &str, default: bool) -> bool {
        self.json.get(field).and_then(Value::as_bool).unwrap_or(default)
    }

    fn one_of(&self, field: &str, default: &str, supported: &[&str]) -> Result<()> {
        let value = self.json.get(field).and_then(Value::as_str).unwrap_or(default);
        if supported.contains(&value) {
            Ok(())
        } else {
            Err(self.error(format!("{field} '{value}' is not supported; supported is {}", supported.join(" or "))))
        }
    }

    fn check(&self, spec: &ModelSpec) -> Result<()> {
        if spec.heads % spec.kv_heads != 0 {
            return Err(self.error(format!(
                "{} attention heads cannot share {} key and value heads evenly",
                spec.heads, spec.kv_heads
            )));
        }
        if spec.head_dim % 2 != 0 {
            return Err(self.error(format!("a head dimension of {} is odd", spec.head_dim)));
        }
        Ok(())
    }
}

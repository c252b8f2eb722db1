//! The supported families. Each file maps a Hugging Face config onto [`ModelSpec`] and tensor names onto
//! [`Param`]s; the tables run both ways. Adding a family is adding one file, its module and its line in [`Family::ALL`].

mod bloom;
mod gemma2;
mod gemma3;
mod gpt2;
mod llama;
mod mistral;
mod opt;
mod qwen2;
mod qwen3;
mod rope;

use super::{HeadKind, ModelSpec, Param, Segment};
use crate::error::{Error, Result};
use rlhf_api::report::MAX_LAYERS;
use serde_json::Value;
use std::path::Path;
use tch::Tensor;

/// A model family: what tells its checkpoints from others'.
#[derive(Debug)]
pub struct Definition {
    /// Its name as `model_type` in configs.
    model_type: &'static str,
    /// The classes of `transformers` that load it as a causal language model and with one score.
    classes: [&'static str; 2],
    /// The prefix that a bare backbone's checkpoint leaves out of its tensor names.
    prefix: &'static str,
    /// The shape that a config says.
    spec: fn(&Config<'_>) -> Result<ModelSpec>,
    /// The tensors that may hold a segment's parameters; those of parameters that a model does not have are left out.
    tensors: fn(Segment) -> Vec<HfTensor>,
}

/// A model family, known by its definition.
#[derive(Clone, Copy, Debug)]
pub struct Family(&'static Definition);

/// A tensor of a Hugging Face checkpoint: one or more parameters joined along their first dimension.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HfTensor {
    /// Its name in a causal language model's checkpoint.
    pub name: String,
    /// The parameters in it, in order.
    pub parts: Vec<Param>,
    /// How they lie in it.
    pub layout: Layout,
}

/// How a tensor of a checkpoint holds its parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// Below each other.
    Rows,
    /// As `[in, out]`, beside each other (GPT-2's Conv1D).
    Transposed,
    /// Head by head: the rows of each for the first head, then for the second (BLOOM).
    Heads,
}

impl HfTensor {
    pub(super) fn plain(name: String, param: Param) -> Self {
        Self { name, parts: vec![param], layout: Layout::Rows }
    }
}

/// Parts that lie head by head, as the pieces that lie below each other.
pub(super) fn dealt(parts: &[&Tensor], heads: i64) -> Result<Vec<Tensor>> {
    let piece = |head: i64, part: &Tensor| {
        let rows = part.size().first().copied().unwrap_or_default() / heads;
        Ok(part.f_narrow(0, head * rows, rows)?)
    };
    (0..heads).flat_map(|head| parts.iter().map(move |part| piece(head, part))).collect()
}

/// As many parts as asked for, of one size, out of a tensor in which they lie head by head.
pub(super) fn gathered(whole: &Tensor, heads: i64, parts: i64) -> Result<Vec<Tensor>> {
    let size = whole.size();
    let Some((&rows, rest)) = size.split_first() else {
        return Err(Error::input("a tensor that holds parts head by head is a single number"));
    };
    let by_head = whole.f_view([&[heads, parts, rows / (heads * parts)], rest].concat().as_slice())?;
    let part = |i| Ok(by_head.f_select(1, i)?.f_reshape([&[rows / parts], rest].concat().as_slice())?);
    (0..parts).map(part).collect()
}

impl Family {
    /// Every family.
    pub const ALL: [Family; 9] = [
        Family(&bloom::FAMILY),
        Family(&gemma2::FAMILY),
        Family(&gemma3::FAMILY),
        Family(&gpt2::FAMILY),
        Family(&llama::FAMILY),
        Family(&mistral::FAMILY),
        Family(&opt::FAMILY),
        Family(&qwen2::FAMILY),
        Family(&qwen3::FAMILY),
    ];

    /// The `model_type` of its configs.
    pub fn model_type(self) -> &'static str {
        self.0.model_type
    }

    /// The class of `transformers` that loads a model of this family with this head.
    pub fn architecture(self, head: HeadKind) -> &'static str {
        let [language, scalar] = self.0.classes;
        match head {
            HeadKind::Lm => language,
            HeadKind::Scalar => scalar,
        }
    }

    /// The prefix that a bare backbone's checkpoint leaves out of its tensor names.
    pub fn backbone_prefix(self) -> &'static str {
        self.0.prefix
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
        let spec = (family.0.spec)(config)?;
        config.check(&spec)?;
        Ok((family, spec))
    }

    /// The checkpoint's tensors that may hold a segment's parameters, the score head's apart: a parameter that the model does
    /// not have has none.
    pub fn tensors(self, segment: Segment) -> Vec<HfTensor> {
        (self.0.tensors)(segment)
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

    /// The first of these fields that is there: names under which a family's configs have one thing.
    fn first_of<'f>(&self, fields: [&'f str; 2]) -> &'f str {
        let [field, other] = fields;
        if self.json.get(field).is_none_or(Value::is_null) && self.json.get(other).is_some() { other } else { field }
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

    fn positive(&self, field: &str) -> Result<f64> {
        let value = self.json.get(field).and_then(Value::as_f64).filter(|v| *v > 0.0 && v.is_finite());
        value.ok_or_else(|| self.error(format!("field '{field}' is missing or not a number above zero")))
    }

    fn positive_or(&self, field: &str, default: f64) -> Result<f64> {
        if self.json.get(field).is_none_or(Value::is_null) { Ok(default) } else { self.positive(field) }
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

    /// Refuses a switch that is not at the one value that is supported.
    fn must_be(&self, field: &str, supported: bool) -> Result<()> {
        if self.flag(field, supported) == supported {
            return Ok(());
        }
        Err(self.error(format!("{field} {} is not supported; it must be {supported}", !supported)))
    }

    /// How far back blocks with a window see, and the blocks that have none. `slides` says it of a block where `layer_types` is
    /// silent; `default` counts where `sliding_window` is.
    fn windows(
        &self,
        default: Option<i64>,
        layers: usize,
        slides: impl Fn(usize) -> bool,
    ) -> Result<(Option<i64>, Vec<usize>)> {
        // Whoever says that there are more is refused for that.
        let layers = layers.min(MAX_LAYERS);
        let kind = |kind: &Value| match kind.as_str() {
            Some("sliding_attention") => Ok(true),
            Some("full_attention") => Ok(false),
            _ => Err(self.error(format!(
                "layer_types {kind} is not supported; supported is sliding_attention or full_attention"
            ))),
        };
        let sliding: Vec<bool> = match self.json.get("layer_types").filter(|types| !types.is_null()) {
            None => (0..layers).map(slides).collect(),
            Some(types) => types.as_array().into_iter().flatten().map(kind).collect::<Result<_>>()?,
        };
        if sliding.len() < layers {
            return Err(self.error(format!("layer_types has {} entries for {layers} blocks", sliding.len())));
        }
        let full: Vec<usize> = (0..layers).filter(|&block| !sliding[block]).collect();
        if full.len() == layers {
            return Ok((None, vec![]));
        }
        match self.window(default)? {
            None => Err(self.error("layer_types has sliding attention, and sliding_window is missing")),
            window => Ok((window, full)),
        }
    }

    /// What `sliding_window` says.
    fn window(&self, default: Option<i64>) -> Result<Option<i64>> {
        match self.json.get("sliding_window") {
            None => Ok(default),
            Some(Value::Null) => Ok(None),
            Some(_) => self.size("sliding_window").map(Some),
        }
    }

    /// The bound of a soft cap; null is none.
    fn cap(&self, field: &str, default: Option<f64>) -> Result<Option<f64>> {
        match self.json.get(field) {
            None => Ok(default),
            Some(Value::Null) => Ok(None),
            Some(_) => self.positive(field).map(Some),
        }
    }

    /// The width of a head where the heads share the hidden state evenly.
    fn head_dim(&self, hidden: i64, heads: i64) -> Result<i64> {
        match hidden % heads {
            0 => Ok(hidden / heads),
            _ => Err(self.error(format!("a hidden size of {hidden} is no multiple of {heads} attention heads"))),
        }
    }

    /// What is added to a variance.
    fn epsilon(&self, field: &str, default: f64) -> Result<f64> {
        let value = self.number_or(field, default)?;
        match (0.0..1.0).contains(&value) {
            true => Ok(value),
            false => Err(self.error(format!("{field} is {value}, and must be from 0 to 1"))),
        }
    }

    fn check(&self, spec: &ModelSpec) -> Result<()> {
        spec.check().map_err(|e| self.error(e))?;
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

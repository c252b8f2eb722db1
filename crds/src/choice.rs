//! A strategy as a user writes it: each setting by name, or `auto`.

use crate::stage::{Offload, Precision, Recompute, Sharding, Strategy};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::IntoDeserializer;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;
use std::borrow::Cow;

/// What a user writes in place of a setting to leave it to the operator.
const AUTO: &str = "auto";

/// A setting that is written, or left to the operator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice<T> {
    /// The operator chooses what is fastest of what fits.
    Auto,
    /// As written.
    Fixed(T),
}

impl<T> Choice<T> {
    /// The setting, where it is written.
    pub fn fixed(self) -> Option<T> {
        match self {
            Choice::Auto => None,
            Choice::Fixed(setting) => Some(setting),
        }
    }
}

impl<T: Default> Default for Choice<T> {
    fn default() -> Self {
        Choice::Fixed(T::default())
    }
}

impl<T: Serialize> Serialize for Choice<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Choice::Auto => serializer.serialize_str(AUTO),
            Choice::Fixed(setting) => setting.serialize(serializer),
        }
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Choice<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        if text == AUTO { Ok(Choice::Auto) } else { T::deserialize(text.into_deserializer()).map(Choice::Fixed) }
    }
}

/// A setting of a few values.
pub trait Named: Serialize + Sized + 'static {
    /// All of them.
    const ALL: &'static [Self];
}

impl Named for Sharding {
    const ALL: &'static [Self] = &[Sharding::Ddp, Sharding::Zero1, Sharding::Zero2, Sharding::Zero3];
}

impl Named for Offload {
    const ALL: &'static [Self] = &[Offload::None, Offload::Optimizer, Offload::Parameters];
}

impl Named for Recompute {
    const ALL: &'static [Self] = &[Recompute::None, Recompute::Block];
}

impl<T: Named> JsonSchema for Choice<T> {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "Choice".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        let settings = T::ALL.iter().filter_map(|setting| serde_json::to_value(setting).ok());
        let names: Vec<Value> = std::iter::once(AUTO.into()).chain(settings).collect();
        json_schema!({"type": "string", "enum": names})
    }
}

/// How models are placed and run. The settings change memory and speed, never what is learnt (beyond a number format's
/// rounding). Of those that are `auto` the operator takes for each stage the fastest that fits into the memory of its
/// devices and pods, and refuses the job before any device is taken where none does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct StrategySpec {
    /// How parameters, gradients and optimizer state are spread over the ranks: `ddp` (each rank has all), `zero1`
    /// (optimizer state is spread; ZeRO, Rajbhandari 2020), `zero2` (gradients too), `zero3` (parameters too), or `auto`.
    #[serde(default)]
    pub sharding: Choice<Sharding>,
    /// What lives in host memory and comes to the device only while it is used: `none`, `optimizer` (gradients and
    /// optimizer state; ZeRO-Offload, Ren 2021), `parameters` (these too, streamed a segment at a time), or `auto`.
    #[serde(default)]
    pub offload: Choice<Offload>,
    /// What is kept of the forward pass for the backward pass: `none` recomputes nothing, `block` keeps each block's
    /// input and runs the block again (Chen 2016), or `auto`.
    #[serde(default)]
    pub recompute: Choice<Recompute>,
    /// The number format that models compute in. It is never chosen, as it changes what is computed.
    #[serde(default)]
    pub precision: Precision,
}

/// How a stage's models are placed, in so far as it is not how every stage's are: each setting that is written goes before the
/// job's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct StrategyOverride {
    /// How parameters, gradients and optimizer state are spread over the ranks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sharding: Option<Choice<Sharding>>,
    /// What lives in host memory and comes to the device only while it is used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub offload: Option<Choice<Offload>>,
    /// What is kept of the forward pass for the backward pass.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recompute: Option<Choice<Recompute>>,
    /// The number format that models compute in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub precision: Option<Precision>,
}

impl StrategyOverride {
    /// This over the job's.
    pub fn over(self, job: &StrategySpec) -> StrategySpec {
        StrategySpec {
            sharding: self.sharding.unwrap_or(job.sharding),
            offload: self.offload.unwrap_or(job.offload),
            recompute: self.recompute.unwrap_or(job.recompute),
            precision: self.precision.unwrap_or(job.precision),
        }
    }
}

impl StrategySpec {
    /// Whether something is left to the operator.
    pub fn has_auto(&self) -> bool {
        self.fixed().is_none()
    }

    /// The strategy, where nothing is left to choose.
    pub fn fixed(&self) -> Option<Strategy> {
        Some(Strategy {
            sharding: self.sharding.fixed()?,
            offload: self.offload.fixed()?,
            recompute: self.recompute.fixed()?,
            precision: self.precision,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_setting_is_auto_or_one_of_its_names() {
        let spec: StrategySpec = serde_json::from_value(json!({"sharding": "auto", "offload": "optimizer"})).unwrap();
        assert_eq!((spec.sharding, spec.offload.fixed()), (Choice::Auto, Some(Offload::Optimizer)));
        assert_eq!((spec.has_auto(), spec.recompute.fixed()), (true, Some(Recompute::None)));
        let written = json!({"sharding": "auto", "offload": "optimizer", "recompute": "none", "precision": "fp32"});
        assert_eq!(serde_json::to_value(spec).unwrap(), written);
        let wrong = serde_json::from_value::<StrategySpec>(json!({"offload": "all"})).unwrap_err().to_string();
        assert!(wrong.contains("`all`") && wrong.contains("`optimizer`"), "{wrong}");
        assert_eq!(StrategySpec::default().fixed(), Some(Strategy::default()));
        let own: StrategyOverride =
            serde_json::from_value(json!({"offload": "parameters", "precision": "bf16"})).unwrap();
        let both = json!({"sharding": "auto", "offload": "parameters", "recompute": "none", "precision": "bf16"});
        assert_eq!(serde_json::to_value(own.over(&spec)).unwrap(), both);
    }
}

//! What few models have. It travels as numbers by name, a shape that need not change with each switch that is added.

use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Switches of few families that change what a model takes. One that is off does not travel.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Traits {
    /// Width of the token embedding, where projections lie between it and the blocks, and between these and the output.
    #[serde(deserialize_with = "width", skip_serializing_if = "Option::is_none")]
    pub embed_width: Option<i64>,
    /// The token embedding is normalised.
    #[serde(with = "flag", skip_serializing_if = "super::is_off")]
    pub embed_norm: bool,
    /// Nothing is normalised after the last block.
    #[serde(with = "flag", skip_serializing_if = "super::is_off")]
    pub no_final_norm: bool,
    /// What attention and the feed-forward network add to the residual stream is normalised, too.
    #[serde(with = "flag", skip_serializing_if = "super::is_off")]
    pub norms_around: bool,
    /// Weights of root-mean-square norms are counted from one, and multiplied in fp32.
    #[serde(with = "flag", skip_serializing_if = "super::is_off")]
    pub norms_from_one: bool,
    /// Attention's scores `s` count as `c tanh(s / c)`, for which no fused kernel is at hand.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attention_cap: Option<f64>,
    /// Logits `l` count as `c tanh(l / c)`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub logit_cap: Option<f64>,
}

impl Traits {
    pub(super) fn is_none(&self) -> bool {
        *self == Self::default()
    }
}

/// A switch among numbers.
mod flag {
    use super::{Deserialize, Deserializer, Serialize, Serializer};

    pub fn serialize<S: Serializer>(switch: &bool, to: S) -> Result<S::Ok, S::Error> {
        u8::from(*switch).serialize(to)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<bool, D::Error> {
        Ok(f64::deserialize(from)? != 0.0)
    }
}

/// Up to here each whole number is one.
const MOST_EXACT: f64 = (1u64 << f64::MANTISSA_DIGITS) as f64;

/// A width among numbers, where JSON does not tell 512 from 512.0.
fn width<'de, D: Deserializer<'de>>(from: D) -> Result<Option<i64>, D::Error> {
    let Some(number) = Option::<f64>::deserialize(from)? else { return Ok(None) };
    // Whether a model can have it, whoever reads a report asks.
    let whole = number.fract() == 0.0 && number.abs() <= MOST_EXACT;
    if whole { Ok(Some(number as i64)) } else { Err(D::Error::custom(format!("{number} is no width"))) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn traits_travel_as_numbers_by_name() {
        let traits =
            Traits { embed_width: Some(512), norms_around: true, attention_cap: Some(50.0), ..Traits::default() };
        let told = serde_json::to_value(&traits).unwrap();
        assert_eq!(told, json!({"embedWidth": 512, "normsAround": 1, "attentionCap": 50.0}));
        assert_eq!(serde_json::from_value::<Traits>(told).unwrap(), traits);
        assert!(serde_json::from_value::<Traits>(json!({})).unwrap().is_none());
        let of = |width| serde_json::from_value::<Traits>(json!({"embedWidth": width})).map(|t| t.embed_width);
        assert_eq!(of(json!(512.0)).unwrap(), Some(512), "the API server may write it so");
        for width in [json!(0.5), json!(1e300), json!("512")] {
            assert!(of(width.clone()).is_err(), "{width}");
        }
    }
}

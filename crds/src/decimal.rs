//! Decimal numbers that may be written as text.
//!
//! `2e-5` is a number in YAML 1.2 and JSON, and a string in YAML 1.1, which PyYAML writes and reads. Both mean the same
//! here. What is read is an `f64`, and is written as a number again.

use serde::de::{Error, Unexpected, Visitor};
use serde::{Deserialize, Deserializer};
use std::fmt;

/// What a decimal looks like where it is written as text.
pub const PATTERN: &str = r"^[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?$";

/// Most characters of a decimal.
pub const MAX_LENGTH: i64 = 32;

/// Reads a finite number, or text that is one.
///
/// # Errors
/// It is neither.
pub fn read<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    deserializer.deserialize_any(Decimal)
}

/// As [`read`], for a field that may be left out.
///
/// # Errors
/// There is something else than a number.
pub fn read_some<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<f64>, D::Error> {
    #[derive(Deserialize)]
    struct Number(#[serde(deserialize_with = "read")] f64);
    Ok(Option::<Number>::deserialize(deserializer)?.map(|n| n.0))
}

struct Decimal;

impl Visitor<'_> for Decimal {
    type Value = f64;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a decimal number")
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<f64, E> {
        if value.is_finite() { Ok(value) } else { Err(E::invalid_value(Unexpected::Float(value), &self)) }
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<f64, E> {
        Ok(value as f64)
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<f64, E> {
        Ok(value as f64)
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<f64, E> {
        let wrong = || E::invalid_value(Unexpected::Str(text), &self);
        // Rust reads words for what is not finite, too.
        let looks_like_one =
            text.len() <= MAX_LENGTH as usize && !text.chars().any(|c| c.is_alphabetic() && c != 'e' && c != 'E');
        let value = text.parse().ok().filter(|_| looks_like_one).ok_or_else(wrong)?;
        self.visit_f64(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[derive(Deserialize)]
    struct Both {
        #[serde(deserialize_with = "read")]
        one: f64,
        #[serde(default, deserialize_with = "read_some")]
        some: Option<f64>,
    }

    #[test]
    fn a_decimal_is_read_from_a_number_and_from_text() {
        for (written, value) in [(json!(2e-5), 2e-5), (json!("2e-5"), 2e-5), (json!(3), 3.0), (json!("-.5E1"), -5.0)] {
            let both: Both = serde_json::from_value(json!({"one": written, "some": written})).unwrap();
            assert_eq!((both.one, both.some), (value, Some(value)));
        }
        assert_eq!(serde_json::from_value::<Both>(json!({"one": 1})).unwrap().some, None);
    }

    #[test]
    fn what_is_no_finite_decimal_is_refused() {
        for wrong in [json!("inf"), json!("NaN"), json!("1e999"), json!("0x10"), json!(""), json!(true), json!({})] {
            assert!(serde_json::from_value::<Both>(json!({"one": wrong})).is_err(), "{wrong}");
        }
    }
}

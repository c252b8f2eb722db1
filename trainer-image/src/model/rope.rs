//! Rotary positions (Su 2021), their frequencies stretched as the model's config asks: the formulas of
//! `modeling_rope_utils.py` in `transformers` 5.24, in fp32 as there.

use super::RopeScaling;
use crate::error::Result;
use std::f64::consts::PI;
use tch::{Device, Kind, Tensor};

/// Cosine and sine `[b, 1, t, d]` for each position, computed in fp32.
pub(super) fn tables(
    head_dim: i64,
    theta: f64,
    scaling: Option<RopeScaling>,
    positions: &Tensor,
    kind: Kind,
) -> Result<(Tensor, Tensor)> {
    let (frequencies, scale) = frequencies(head_dim, theta, scaling, positions.device())?;
    let angles = positions.to_kind(Kind::Float).f_unsqueeze(-1)?.f_mul(&frequencies)?.f_unsqueeze(1)?;
    let angles = Tensor::f_cat(&[&angles, &angles], -1)?;
    let scaled = |t: Tensor| if scale == 1.0 { Ok(t) } else { t.f_mul_scalar(scale) };
    Ok((scaled(angles.f_cos()?)?.f_to_kind(kind)?, scaled(angles.f_sin()?)?.f_to_kind(kind)?))
}

/// The frequencies `[d / 2]`, and by what sines and cosines are multiplied.
fn frequencies(head_dim: i64, theta: f64, scaling: Option<RopeScaling>, device: Device) -> Result<(Tensor, f64)> {
    let options = (Kind::Float, device);
    let exponents = Tensor::f_arange_start_step(0, head_dim, 2, options)? / head_dim as f64;
    let plain = Tensor::from(theta).to_kind(Kind::Float).to_device(device).f_pow(&exponents)?.f_reciprocal()?;
    Ok(match scaling {
        None => (plain, 1.0),
        Some(RopeScaling::Linear { factor }) => (plain.f_div_scalar(factor)?, 1.0),
        Some(RopeScaling::Llama3 { factor, low, high, original }) => {
            let wavelength = plain.f_reciprocal()?.f_mul_scalar(2.0 * PI)?;
            let slow = plain.f_div_scalar(factor)?;
            let smooth = ((wavelength.f_reciprocal()? * original) - low) / (high - low);
            let blended = slow.f_lerp_tensor(&plain, &smooth)?;
            let blended = blended.f_where_self(&wavelength.f_le(original / low)?, &slow)?;
            (blended.f_where_self(&wavelength.f_ge(original / high)?, &plain)?, 1.0)
        }
        Some(RopeScaling::Yarn { factor, attention, ramp: [first, last] }) => {
            let slow = plain.f_div_scalar(factor)?;
            let index = Tensor::f_arange(head_dim / 2, options)?;
            let ramp = ((index - first) / (last - first)).f_clamp(0.0, 1.0)?;
            (plain.f_lerp_tensor(&slow, &ramp)?, attention)
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Expected: `ROPE_INIT_FUNCTIONS[...]` of transformers 5.24 for a head size of 16.
    #[test]
    fn frequencies_are_those_of_transformers() {
        let values = |theta, scaling| {
            let (frequencies, scale) = frequencies(16, theta, scaling, Device::Cpu).unwrap();
            (Vec::<f64>::try_from(frequencies.to_kind(Kind::Double)).unwrap(), scale)
        };
        let llama3 = RopeScaling::Llama3 { factor: 32.0, low: 1.0, high: 4.0, original: 8192.0 };
        let cases: [(f64, RopeScaling, [f64; 8]); 2] = [
            (
                1e5,
                RopeScaling::Linear { factor: 4.0 },
                [
                    0.25,
                    0.05928434059,
                    0.01405853219,
                    0.003333803732,
                    0.0007905694656,
                    0.0001874735462,
                    4.445698505e-5,
                    1.054241329e-5,
                ],
            ),
            (
                5e5,
                llama3,
                [
                    1.0,
                    0.1939227581,
                    0.03760603070,
                    0.007292665076,
                    0.0004295567051,
                    8.570255886e-6,
                    1.661967417e-6,
                    3.222932889e-7,
                ],
            ),
        ];
        for (theta, scaling, expected) in cases {
            let (actual, scale) = values(theta, Some(scaling));
            let close = |(a, e): (&f64, &f64)| (a - e).abs() <= 3e-7 * e.abs();
            assert!(
                actual.len() == 8 && actual.iter().zip(&expected).all(close),
                "{scaling:?}: {actual:?} {expected:?}"
            );
            assert_eq!(scale, 1.0);
        }
    }

    /// Expected: as above, from configs, as YaRN's blend is worked out when one is read.
    #[test]
    fn yarn_of_a_config_is_that_of_transformers() {
        use crate::model::families::{Config, Family};
        let read = |rope: serde_json::Value| {
            let config = serde_json::json!({
                "model_type": "llama", "vocab_size": 9, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
                "intermediate_size": 8, "max_position_embeddings": 4096, "rope_parameters": rope
            });
            let (_, spec) = Family::read(&Config { path: std::path::Path::new("config.json"), json: &config }).unwrap();
            let crate::model::Positions::Rotary { theta } = spec.positions else { panic!("no rotary positions") };
            let (frequencies, scale) = frequencies(spec.head_dim, theta, spec.rope_scaling, Device::Cpu).unwrap();
            (Vec::<f64>::try_from(frequencies.to_kind(Kind::Double)).unwrap(), scale)
        };
        let cases: [(serde_json::Value, [f64; 8], f64); 3] = [
            (
                serde_json::json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024, "rope_theta": 1e4}),
                [
                    1.0,
                    0.3162277639,
                    0.08125000447,
                    0.01976423711,
                    0.004375000019,
                    0.0007905694656,
                    0.0002500000119,
                    7.905694656e-5,
                ],
                1.138629436111989,
            ),
            (
                serde_json::json!({"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "rope_theta": 1e4,
                    "mscale": 1.0, "mscale_all_dim": 0.5, "beta_fast": 16, "beta_slow": 2, "truncate": false}),
                [
                    1.0,
                    0.1205339879,
                    0.01250000019,
                    0.003952847328,
                    0.001249999972,
                    0.0003952847328,
                    0.0001250000059,
                    3.952847328e-5,
                ],
                1.094179988101349,
            ),
            (
                serde_json::json!({"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
                [
                    1.0,
                    0.3162277639,
                    0.1000000015,
                    0.03162277862,
                    0.009999999776,
                    0.00316227763,
                    0.001000000047,
                    0.0003162277864,
                ],
                1.0,
            ),
        ];
        for (rope, expected, factor) in cases {
            let (actual, scale) = read(rope.clone());
            let close = |(a, e): (&f64, &f64)| (a - e).abs() <= 1e-6 * e.abs();
            assert!(actual.iter().zip(&expected).all(close), "{rope}: {actual:?} {expected:?}");
            assert!((scale - factor).abs() < 1e-12, "{scale} {factor}");
        }
    }
}

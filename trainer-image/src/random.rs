//! Random numbers by counter: each is a pure function of its coordinates (seed, iteration, row, token…).
//!
//! Nothing has to be saved to resume, and what is drawn for a sample does not depend on which rank draws it
//! or in which batch. The mixing function is SplitMix64's (Steele 2014).

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// 64 random bits for these coordinates.
pub fn bits(coordinates: &[u64]) -> u64 {
    coordinates
        .iter()
        .fold(0, |state, c| mix(state.wrapping_add(0x9e37_79b9_7f4a_7c15) ^ mix(c.wrapping_add(0x9e37_79b9_7f4a_7c15))))
}

/// Uniform in `[0, 1)`.
pub fn uniform(coordinates: &[u64]) -> f64 {
    (bits(coordinates) >> 11) as f64 / (1u64 << 53) as f64
}

/// Standard normal (Box and Muller 1958).
pub fn normal(coordinates: &[u64]) -> f64 {
    let draw = bits(coordinates);
    let (u, v) = (1.0 - uniform(&[draw, 0]), uniform(&[draw, 1]));
    (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_depend_on_every_coordinate_and_on_nothing_else() {
        assert_eq!(bits(&[1, 2, 3]), bits(&[1, 2, 3]));
        assert_ne!(bits(&[1, 2, 3]), bits(&[1, 3, 2]));
        assert_ne!(bits(&[1, 2]), bits(&[1, 2, 0]));
    }

    #[test]
    fn moments_are_those_of_the_distributions() {
        let n = 20_000u64;
        let mean = |f: &dyn Fn(u64) -> f64| (0..n).map(f).sum::<f64>() / n as f64;
        assert!((mean(&|i| uniform(&[7, i])) - 0.5).abs() < 0.01);
        assert!(mean(&|i| normal(&[7, i])).abs() < 0.03);
        assert!((mean(&|i| normal(&[7, i]).powi(2)) - 1.0).abs() < 0.05);
    }
}

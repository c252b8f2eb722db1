//! The order in which an epoch visits the records: the same on every rank, platform and version.
//!
//! Fisher and Yates's shuffle (Knuth's algorithm P) over counter-based random numbers.

use crate::random;

/// Keeps these draws apart from others with the same seed.
const STREAM: u64 = u64::from_le_bytes(*b"epochord");

/// A permutation of `0..len` that depends on `seed` and `epoch` alone.
pub fn permutation(len: usize, seed: u64, epoch: u64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..len).collect();
    for last in (1..len).rev() {
        let draw = random::bits(&[STREAM, seed, epoch, last as u64]);
        order.swap(last, below(draw, last as u64 + 1) as usize);
    }
    order
}

/// 64 random bits as a number below `bound`: the upper half of a product (Lemire 2019), whose bias of at most
/// `bound / 2^64` is beyond notice.
fn below(draw: u64, bound: u64) -> u64 {
    ((u128::from(draw) * u128::from(bound)) >> 64) as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn an_order_never_changes_between_versions() {
        // Computed by a Python transcription of the method; where a checkpoint stands in its epoch depends on it.
        assert_eq!(permutation(10, 42, 0), [3, 7, 9, 6, 4, 5, 1, 0, 2, 8]);
        assert_eq!(permutation(10, 42, 1), [3, 2, 4, 0, 5, 7, 8, 6, 1, 9]);
    }

    #[test]
    fn every_place_is_as_likely() {
        let (len, epochs) = (8, 8000);
        let mut counts = vec![vec![0u32; len]; len];
        for epoch in 0..epochs {
            for (place, record) in permutation(len, 7, epoch).into_iter().enumerate() {
                counts[record][place] += 1;
            }
        }
        // 1000 expected, standard deviation 30.
        assert!(counts.iter().flatten().all(|&n| (850..1150).contains(&n)), "{counts:?}");
    }

    proptest! {
        #[test]
        fn every_record_is_visited_once(len in 0usize..300, seed: u64, epoch: u64) {
            let mut order = permutation(len, seed, epoch);
            prop_assert_eq!(&order, &permutation(len, seed, epoch));
            order.sort_unstable();
            prop_assert_eq!(order, (0..len).collect::<Vec<_>>());
        }
    }
}

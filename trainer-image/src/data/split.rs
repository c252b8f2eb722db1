//! The split into training and evaluation records, and how often an epoch has each.
//!
//! All of it follows from three hashes of each record, so that it needs no random state and no more memory than they take.

use sha2::{Digest, Sha256};

/// What decides about a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Keys {
    /// By it a record is held out: that of its prompt, where it has one.
    pub split: u64,
    /// By it a record is drawn where its file's weight is a fraction: its own, so that of many records of one prompt some stay.
    pub own: u64,
    /// That of what makes two records the same question, in whichever files they stand.
    pub prompt: u64,
}

impl Keys {
    /// Bytes of them in a file.
    pub const BYTES: usize = 24;

    /// As they lie in a file.
    pub fn bytes(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        for (part, key) in bytes.chunks_exact_mut(8).zip([self.split, self.own, self.prompt]) {
            part.copy_from_slice(&key.to_le_bytes());
        }
        bytes
    }

    /// Those that lie in a file so.
    pub fn of(bytes: &[u8]) -> Self {
        let key = |at: usize| bytes[at..].iter().take(8).rev().fold(0, |key, byte| key << 8 | u64::from(*byte));
        Self { split: key(0), own: key(8), prompt: key(16) }
    }
}

/// How often an epoch has a record: the weight's whole part, and once more for a share of the records that is its fraction.
pub(super) fn times(weight: f64, seed: u64, own: u64) -> usize {
    weight as usize + usize::from(draw(seed, own) < weight.fract())
}

/// A record's draw, in [0, 1).
pub(super) fn draw(seed: u64, own: u64) -> f64 {
    hash(seed, &[&own.to_le_bytes()[..], b"weight"].concat()) as f64 / 2f64.powi(64)
}

/// A hash that is the same on every platform and in every version.
pub(super) fn hash(seed: u64, key: &[u8]) -> u64 {
    let digest = Sha256::new().chain_update(seed.to_le_bytes()).chain_update(key).finalize();
    digest.iter().take(8).fold(0, |hash, byte| (hash << 8) | u64::from(*byte))
}

/// The hash below which records are held out: the fraction's share of all hashes, moved as far as it takes to leave
/// the least hash out of training and the greatest in it. With one hash only there is nothing to split.
pub(super) fn threshold(hashes: impl Iterator<Item = u64>, eval_fraction: f64) -> u64 {
    if eval_fraction <= 0.0 {
        return 0;
    }
    let ends = hashes.fold(None, |ends, hash| match ends {
        None => Some((hash, hash)),
        Some((least, greatest)) => Some((hash.min(least), hash.max(greatest))),
    });
    match ends {
        Some((least, greatest)) if least < greatest => {
            let share = (eval_fraction * 2f64.powi(64)) as u64;
            share.clamp(least + 1, greatest)
        }
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_come_back_from_their_bytes() {
        let keys = Keys { split: 1, own: u64::MAX - 5, prompt: 0x0102_0304_0506_0708 };
        assert_eq!(Keys::of(&keys.bytes()), keys);
    }
}

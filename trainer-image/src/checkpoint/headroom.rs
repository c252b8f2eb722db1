//! Whether host memory has room for the copies that a checkpoint keeps while training goes on.
//!
//! Training itself takes more than what lies there between steps: activations, gradients, a rollout's cache. What it has taken
//! before it takes again, beside the copies; so the most that this process ever had beyond what it has at rest counts as taken.

use crate::telemetry::memory;
use std::sync::{Arc, Mutex, PoisonError};

/// What this process has been seen to take beyond what it has at rest. Clones are the same.
#[derive(Clone, Default)]
pub struct Headroom(Arc<Mutex<Seen>>);

#[derive(Default)]
struct Seen {
    /// The most bytes of training beyond what is there at rest.
    training: u64,
    /// The most bytes of copies that may have been made meanwhile, and so be in the peak.
    copies: u64,
}

impl Headroom {
    /// Whether there is room for copies of `bytes` in each of `workers` processes that share the memory, while they train. Asked
    /// at rest; where there is, the copies are as good as made.
    pub(super) fn take(&self, bytes: u64, workers: u64) -> bool {
        self.take_of(memory::host_room(), [c10d::host_bytes(), c10d::peak_host_bytes()], bytes, workers)
    }

    fn take_of(&self, room: Option<u64>, [now, peak]: [u64; 2], bytes: u64, workers: u64) -> bool {
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        seen.training = seen.training.max(peak.saturating_sub(now).saturating_sub(seen.copies));
        let needed = bytes.saturating_add(seen.training).saturating_mul(workers);
        let fits = room.is_none_or(|room| needed < room);
        if fits {
            seen.copies = seen.copies.max(bytes);
        }
        fits
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_training_took_before_is_not_room_for_copies() {
        let fits = |room, peak, workers| Headroom::default().take_of(room, [100, peak], 50, workers);
        assert!(fits(Some(51), 100, 1) && !fits(Some(50), 100, 1));
        // 30 at its height beyond the 100 at rest.
        assert!(fits(Some(81), 130, 1) && !fits(Some(80), 130, 1));
        assert!(fits(Some(161), 130, 2) && !fits(Some(160), 130, 2));
        assert!(fits(None, u64::MAX, 9), "where nobody says, there is room");
    }

    /// Else each save would find less room than the one before.
    #[test]
    fn copies_that_were_made_before_do_not_count_as_training() {
        let headroom = Headroom::default();
        assert!(headroom.take_of(Some(81), [100, 130], 50, 1));
        for _ in 0..3 {
            assert!(headroom.take_of(Some(81), [100, 180], 50, 1));
        }
        assert!(!headroom.take_of(Some(81), [100, 190], 50, 1), "40 of training");
        assert!(headroom.take_of(Some(91), [150, 190], 50, 1), "what was seen is remembered");
        assert!(!headroom.take_of(Some(90), [150, 190], 50, 1));
    }
}

//! Whether host memory has room for the copies that a checkpoint keeps while training goes on.
//!
//! Training itself takes more than what lies there between steps: activations, gradients, a rollout's cache. What it has taken
//! before it takes again, beside the copies; so the most that this process had beyond what it has at rest, since its models were
//! loaded, counts as taken.
//!
//! The kernel tells that most only with mapped files in it, as those of the models. They are not training's, so they must be in
//! what is at rest too: as many as were there when the models had been loaded, but no more than there are now, as those that
//! the kernel has dropped since may have been gone at the height. Then what training took is told too high by them, and never
//! too low: files that were mapped since count as training.

use crate::telemetry::memory;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What this process has been seen to take beyond what it has at rest. Clones are the same.
#[derive(Clone, Default)]
pub struct Headroom(Arc<Mutex<Seen>>);

#[derive(Default)]
struct Seen {
    /// The most bytes of training beyond what is there at rest.
    training: u64,
    /// The most bytes of copies that may have been made meanwhile, and so be in the peak.
    copies: u64,
    /// Bytes of mapped files when all models had been loaded; `None` where the peak is that of loading too.
    files: Option<u64>,
}

/// What this process holds, in bytes.
#[derive(Clone, Copy)]
struct Held {
    /// Now, mapped files included.
    now: u64,
    /// Of that, what lies in no file.
    anonymous: u64,
    /// The most since the models were loaded.
    peak: u64,
}

impl Held {
    fn read() -> Self {
        let [now, anonymous] = [c10d::host_bytes(), c10d::anonymous_host_bytes()];
        Self { now, anonymous, peak: c10d::recent_peak_host_bytes() }
    }

    fn files(&self) -> u64 {
        self.now.saturating_sub(self.anonymous)
    }
}

impl Headroom {
    /// Says that all models are loaded, and that nothing else is done yet: what it took to load them, training does not take.
    /// Where the kernel does not forget that, it counts as training.
    pub fn loaded(&self) {
        if c10d::restart_recent_peak() {
            self.seen().files = Some(Held::read().files());
        }
    }

    /// Whether there is room for copies of `bytes` in each of `workers` processes that share the memory, while they train. Asked
    /// at rest.
    pub(super) fn fits(&self, bytes: u64, workers: u64) -> bool {
        self.fits_of(memory::host_room(), Held::read(), bytes, workers)
    }

    /// Says that copies of `bytes` may be made from now on.
    pub(super) fn take(&self, bytes: u64) {
        let mut seen = self.seen();
        seen.copies = seen.copies.max(bytes);
    }

    fn fits_of(&self, room: Option<u64>, held: Held, bytes: u64, workers: u64) -> bool {
        let mut seen = self.seen();
        let rest = held.now.min(held.anonymous.saturating_add(seen.files.unwrap_or(u64::MAX)));
        seen.training = seen.training.max(held.peak.saturating_sub(rest).saturating_sub(seen.copies));
        let needed = bytes.saturating_add(seen.training).saturating_mul(workers);
        room.is_none_or(|room| needed < room)
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of which 40 are files.
    fn held(now: u64, peak: u64) -> Held {
        Held { now, anonymous: now - 40, peak }
    }

    #[test]
    fn what_training_took_before_is_not_room_for_copies() {
        let fits = |room, peak, workers| Headroom::default().fits_of(room, held(100, peak), 50, workers);
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
        assert!(headroom.fits_of(Some(81), held(100, 130), 50, 1));
        headroom.take(50);
        for _ in 0..3 {
            assert!(headroom.fits_of(Some(81), held(100, 180), 50, 1));
            headroom.take(50);
        }
        assert!(!headroom.fits_of(Some(81), held(100, 190), 50, 1), "40 of training");
        assert!(headroom.fits_of(Some(91), held(150, 190), 50, 1), "what was seen is remembered");
        assert!(!headroom.fits_of(Some(90), held(150, 190), 50, 1));
    }

    /// Where another rank has no room, none makes copies, and what is in the peak is training.
    #[test]
    fn copies_for_which_there_was_room_and_that_were_not_made_are_not_in_the_peak() {
        let headroom = Headroom::default();
        assert!(headroom.fits_of(Some(81), held(100, 130), 50, 1));
        assert!(!headroom.fits_of(Some(130), held(100, 180), 50, 1), "80 of training");
        assert!(headroom.fits_of(Some(131), held(100, 180), 50, 1));
    }

    #[test]
    fn mapped_files_are_no_training_unless_they_came_or_may_have_gone_since_the_models_were_loaded() {
        let training = |now, anonymous, peak| {
            let headroom = Headroom::default();
            headroom.seen().files = Some(40);
            headroom.fits_of(None, Held { now, anonymous, peak }, 50, 1);
            headroom.seen().training
        };
        assert_eq!(training(100, 60, 130), 30, "the files are in both");
        assert_eq!(training(120, 80, 130), 10, "moments that came to stay are in both");
        assert_eq!(training(70, 60, 130), 60, "30 of the files are gone, perhaps before the height");
        assert_eq!(training(140, 60, 140), 40, "40 of files came");
    }
}

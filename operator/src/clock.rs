//! The time that the rules are told: the machine's, but for jumps.
//!
//! Deadlines that run for days are kept in status as times of day, so that they outlive the process. A clock that is set
//! while the process runs would let them pass at once, or begin anew. So the time told here goes on steadily, and comes
//! nearer to the machine's by a share of what passes.

use jiff::{SignedDuration, Timestamp};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// One part in so many of the time that passes goes into the correction.
const SHARE: i32 = 10;
/// What a clock that is kept right differs by from one reading to the next, in whole seconds; no jump.
const KEPT: SignedDuration = SignedDuration::from_secs(2);

/// A clock that makes no jumps.
#[derive(Debug)]
pub struct Clock(Mutex<(Timestamp, Instant)>);

impl Default for Clock {
    fn default() -> Self {
        Self(Mutex::new((Timestamp::now(), Instant::now())))
    }
}

impl Clock {
    /// The time in whole seconds, as Kubernetes counts.
    pub fn now(&self) -> Timestamp {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let read = Instant::now();
        let passed = SignedDuration::try_from(read.duration_since(last.1)).unwrap_or_default();
        let time = follow(last.0, passed, Timestamp::now());
        *last = (time, read);
        Timestamp::from_second(time.as_second()).unwrap_or(time)
    }
}

/// The time told after some time has passed, where the machine's clock says `machine`.
fn follow(last: Timestamp, passed: SignedDuration, machine: Timestamp) -> Timestamp {
    let steady = last.saturating_add(passed).unwrap_or(last);
    let off = machine.duration_since(steady);
    let step = if off.abs() <= KEPT { off } else { off.clamp(-passed / SHARE, passed / SHARE) };
    steady.saturating_add(step).unwrap_or(steady)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(1_800_000_000 + second).unwrap()
    }

    #[test]
    fn a_clock_that_is_set_is_followed_slowly_and_one_that_is_kept_right_at_once() {
        let minute = SignedDuration::from_secs(60);
        assert_eq!(follow(at(0), minute, at(61)), at(61));
        for (machine, told) in [(86_400, 66), (-86_400, 54), (64, 64), (70, 66)] {
            assert_eq!(follow(at(0), minute, at(machine)), at(told), "the machine says {machine}");
        }
        let mut time = at(0);
        for minutes in 1..=600 {
            time = follow(time, minute, at(3600 + 60 * minutes));
        }
        assert_eq!(time, at(3600 + 60 * 600), "an hour is caught up within ten");
    }
}

//! How fast steps go, from a moving window over this attempt's own steps.

use std::collections::VecDeque;
use std::time::Instant;

/// Steps over which the pace is taken: enough to smooth evaluations and checkpoints, few enough to follow a change.
const WINDOW: usize = 32;

/// When the last steps ended.
#[derive(Debug, Default)]
pub(super) struct Pace {
    marks: VecDeque<(u64, Instant)>,
}

impl Pace {
    /// Notes that `step` ended at `now`. A step that is not later than the one before starts a new window.
    pub fn mark(&mut self, step: u64, now: Instant) {
        if self.marks.back().is_some_and(|(last, _)| step <= *last) {
            self.marks.clear();
        }
        self.marks.push_back((step, now));
        if self.marks.len() > WINDOW + 1 {
            self.marks.pop_front();
        }
    }

    /// Seconds that `steps` more will take, once two steps have ended.
    pub fn seconds_for(&self, steps: u64) -> Option<u64> {
        let ((first, start), (last, end)) = (self.marks.front()?, self.marks.back()?);
        let seen = last.checked_sub(*first).filter(|n| *n > 0)?;
        Some((end.duration_since(*start).as_secs_f64() / seen as f64 * steps as f64).round() as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn the_pace_follows_the_last_steps() {
        let (mut pace, start) = (Pace::default(), Instant::now());
        let mut now = start;
        pace.mark(100, now);
        assert_eq!(pace.seconds_for(10), None);
        for step in 101..=200 {
            now += Duration::from_secs(2);
            pace.mark(step, now);
        }
        assert_eq!(pace.seconds_for(10), Some(20));
        for step in 201..=200 + WINDOW as u64 {
            now += Duration::from_secs(4);
            pace.mark(step, now);
        }
        assert_eq!(pace.seconds_for(10), Some(40));
        assert_eq!(pace.seconds_for(0), Some(0));
    }

    #[test]
    fn going_back_starts_anew() {
        let (mut pace, now) = (Pace::default(), Instant::now());
        pace.mark(5, now);
        pace.mark(5, now + Duration::from_secs(9));
        assert_eq!(pace.seconds_for(1), None);
        pace.mark(7, now + Duration::from_secs(13));
        assert_eq!(pace.seconds_for(1), Some(2));
    }
}

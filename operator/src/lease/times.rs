//! How long things take around a Lease, and that two can never lead.

use std::time::Duration;

/// How long things take around a Lease. The defaults are those of Kubernetes' own components, a bit shorter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeaseTimes {
    /// How long a Lease that is not renewed keeps others out.
    pub duration: Duration,
    /// A holder that could not renew for so long has lost it. Shorter than the duration by more than a request takes.
    pub renew_deadline: Duration,
    /// How often candidates look, and how soon a failed renewal is tried again. A renewal may take no longer.
    pub retry_period: Duration,
}

impl Default for LeaseTimes {
    fn default() -> Self {
        let [duration, renew_deadline, retry_period] = [15, 10, 2].map(Duration::from_secs);
        Self { duration, renew_deadline, retry_period }
    }
}

impl LeaseTimes {
    /// Times of which a holder that is cut off stops before another begins.
    ///
    /// # Errors
    /// They are in another order, or too close.
    pub fn check(self) -> Result<Self, String> {
        let Self { duration, renew_deadline, retry_period } = self;
        if retry_period.is_zero() || renew_deadline < 2 * retry_period || duration < renew_deadline + retry_period {
            return Err(format!(
                "the lease's duration ({duration:?}) must exceed its renewal deadline ({renew_deadline:?}) by the retry \
                 period ({retry_period:?}) at least, and the deadline must be twice that period or more"
            ));
        }
        if duration.subsec_nanos() > 0 || i32::try_from(duration.as_secs()).is_err() {
            return Err(format!("the lease's duration ({duration:?}) is no number of seconds that a Lease can hold"));
        }
        Ok(self)
    }

    /// How often the holder renews: so that one renewal may fail.
    pub(super) fn renew_period(self) -> Duration {
        self.renew_deadline / 2
    }

    pub(super) fn seconds(self) -> Option<i32> {
        i32::try_from(self.duration.as_secs()).ok()
    }
}

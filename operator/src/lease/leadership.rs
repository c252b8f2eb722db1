//! Whether this process leads, for all who write.

use std::sync::{Arc, Mutex, PoisonError};
#[cfg(test)]
use std::time::Duration;
use tokio::time::Instant;

/// Whether this process leads. Clones are the same leadership.
#[derive(Clone, Debug, Default)]
pub struct Leadership(Arc<Mutex<Option<Instant>>>);

impl Leadership {
    /// Whether this process leads now.
    pub fn holds(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).is_some_and(|until| Instant::now() < until)
    }

    /// Until a deadline after the time at which a write that succeeded was begun.
    pub(super) fn renewed(&self, until: Instant) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(until);
    }

    pub(super) fn ended(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// One that holds for as long as a test takes.
    #[cfg(test)]
    pub(crate) fn held() -> Self {
        let leadership = Self::default();
        leadership.renewed(Instant::now() + Duration::from_secs(3600));
        leadership
    }
}

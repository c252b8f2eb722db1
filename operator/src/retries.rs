//! What failed passes leave behind until they succeed: how often in a row a job's passes failed, and what the API
//! server refused. It is kept in memory only: an operator that starts anew tries anew. Waits go by a clock that nobody sets.

use crate::decide::Trouble;
use kube::ResourceExt;
use rlhf_api::job::RLHFJob;
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The longest wait between two tries.
const LONGEST: Duration = Duration::from_secs(300);
/// The first wait after a refusal: somebody has to do something first.
const AFTER_REFUSAL: Duration = Duration::from_secs(5);
/// The first wait after an error.
const AFTER_ERROR: Duration = Duration::from_secs(1);

#[derive(Clone, Default)]
struct Entry {
    errors: u32,
    refusals: u32,
    /// With the time of the next try.
    trouble: Option<(Trouble, Instant)>,
}

/// By namespace and name of the job.
#[derive(Default)]
pub struct Retries(Mutex<HashMap<(String, String), Entry>>);

impl Retries {
    fn lock(&self) -> MutexGuard<'_, HashMap<(String, String), Entry>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the API server last refused of a job.
    pub fn trouble(&self, job: &RLHFJob) -> Option<Trouble> {
        let (trouble, due) = self.lock().get(&key(job))?.trouble.clone()?;
        let left = due.saturating_duration_since(Instant::now());
        Some(Trouble { retry_after: left.try_into().unwrap_or_default(), ..trouble })
    }

    /// Notes a refusal. The wait for the next try grows.
    pub fn refused(&self, job: &RLHFJob, trouble: Trouble) {
        let mut all = self.lock();
        let entry = all.entry(key(job)).or_default();
        entry.refusals += 1;
        entry.trouble = Some((trouble, Instant::now() + doubled(AFTER_REFUSAL, entry.refusals)));
    }

    /// Notes an error and says how long to wait.
    pub fn failed(&self, namespace: &str, name: &str) -> Duration {
        let mut all = self.lock();
        let entry = all.entry((namespace.to_owned(), name.to_owned())).or_default();
        entry.errors += 1;
        doubled(AFTER_ERROR, entry.errors)
    }

    /// A pass succeeded; what was refused stays until it is made.
    pub fn passed(&self, job: &RLHFJob) {
        let mut all = self.lock();
        if all.get(&key(job)).is_some_and(|e| e.trouble.is_none()) {
            all.remove(&key(job));
        }
    }

    /// The job's children were made, or the job is gone.
    pub fn forget(&self, namespace: &str, name: &str) {
        self.lock().remove(&(namespace.to_owned(), name.to_owned()));
    }
}

fn key(job: &RLHFJob) -> (String, String) {
    (job.namespace().unwrap_or_default(), job.name_any())
}

fn doubled(first: Duration, times: u32) -> Duration {
    first.saturating_mul(1 << times.saturating_sub(1).min(16)).min(LONGEST)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::build::tests::job;
    use jiff::SignedDuration;

    #[test]
    fn waits_double_up_to_five_minutes_and_start_anew_after_a_good_pass() {
        let retries = Retries::default();
        let waits: Vec<_> = (0..12).map(|_| retries.failed("team", "demo").as_secs()).collect();
        assert_eq!(waits, [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300, 300]);
        retries.passed(&job());
        assert_eq!(retries.failed("team", "demo").as_secs(), 1);
    }

    #[test]
    fn a_refusal_outlives_good_passes_until_it_is_forgotten() {
        let retries = Retries::default();
        let retry_after = SignedDuration::ZERO;
        let trouble = Trouble { stage: "tune".into(), attempt: 1, message: "no".into(), retry_after, permanent: false };
        let waits = || retries.trouble(&job()).map(|t| (t.message, t.retry_after.as_secs_f64().round()));
        retries.refused(&job(), trouble.clone());
        assert_eq!(waits(), Some(("no".into(), 5.0)));
        retries.refused(&job(), trouble);
        retries.passed(&job());
        assert_eq!(waits(), Some(("no".into(), 10.0)));
        retries.forget("team", "demo");
        assert_eq!(waits(), None);
    }
}

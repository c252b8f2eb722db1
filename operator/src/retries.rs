//! What failed passes leave behind until they succeed: how often in a row a job's passes failed, and what the API
//! server refused of each stage. It is kept in memory only: an operator that starts anew tries anew. Waits go by a clock that nobody sets.

use crate::decide::Trouble;
use kube::ResourceExt;
use rlhf_api::job::RLHFJob;
use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The longest wait between two tries.
const LONGEST: Duration = Duration::from_secs(300);
/// The first wait after a refusal: somebody has to do something first.
const AFTER_REFUSAL: Duration = Duration::from_secs(5);
/// The first wait after an error.
const AFTER_ERROR: Duration = Duration::from_secs(1);

#[derive(Default)]
struct Entry {
    errors: u32,
    /// By the stage.
    refusals: BTreeMap<String, Refusal>,
}

struct Refusal {
    /// The job's, since another job may get its name.
    uid: Option<String>,
    trouble: Trouble,
    times: u32,
    due: Instant,
}

/// By namespace and name of the job.
#[derive(Default)]
pub struct Retries(Mutex<HashMap<(String, String), Entry>>);

impl Retries {
    fn lock(&self) -> MutexGuard<'_, HashMap<(String, String), Entry>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the API server last refused of a job: one trouble for each stage that has some.
    pub fn troubles(&self, job: &RLHFJob) -> Vec<Trouble> {
        let all = self.lock();
        let refusals = all.get(&key(job)).into_iter().flat_map(|entry| entry.refusals.values());
        let told = |refusal: &Refusal| {
            let left = refusal.due.saturating_duration_since(Instant::now());
            Trouble { retry_after: left.try_into().unwrap_or_default(), ..refusal.trouble.clone() }
        };
        refusals.filter(|refusal| refusal.uid == job.uid()).map(told).collect()
    }

    /// Notes a refusal. The stage's wait for the next try grows; the same words again are no news.
    pub fn refused(&self, job: &RLHFJob, trouble: Trouble) {
        let mut all = self.lock();
        let refusals = &mut all.entry(key(job)).or_default().refusals;
        let before = refusals.get(&trouble.stage).filter(|refusal| refusal.uid == job.uid());
        let times = before.map_or(0, |refusal| refusal.times) + 1;
        let due = Instant::now() + doubled(AFTER_REFUSAL, times);
        let said = |old: &Trouble| old.attempt == trouble.attempt && old.message == trouble.message;
        let is_news = before.is_none_or(|refusal| refusal.trouble.is_news || !said(&refusal.trouble));
        let trouble = Trouble { is_news, ..trouble };
        refusals.insert(trouble.stage.clone(), Refusal { uid: job.uid(), trouble, times, due });
    }

    /// A stage's children were made.
    pub fn made(&self, job: &RLHFJob, stage: &str) {
        if let Some(entry) = self.lock().get_mut(&key(job)) {
            entry.refusals.remove(stage);
        }
    }

    /// Notes an error and says how long to wait.
    pub fn failed(&self, namespace: &str, name: &str) -> Duration {
        let mut all = self.lock();
        let entry = all.entry((namespace.to_owned(), name.to_owned())).or_default();
        entry.errors += 1;
        doubled(AFTER_ERROR, entry.errors)
    }

    /// A pass succeeded, and told what was news; what was refused stays until it is made.
    pub fn passed(&self, job: &RLHFJob) {
        let mut all = self.lock();
        if let Some(entry) = all.get_mut(&key(job)) {
            entry.errors = 0;
            entry.refusals.values_mut().for_each(|refusal| refusal.trouble.is_news = false);
            if entry.refusals.is_empty() {
                all.remove(&key(job));
            }
        }
    }

    /// Nothing of the job is tried again, or it is gone.
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

    fn trouble(stage: &str) -> Trouble {
        let (message, retry_after) = ("no".into(), SignedDuration::ZERO);
        Trouble { stage: stage.into(), attempt: 1, message, retry_after, permanent: false, is_news: true }
    }

    /// Each stage's wait, in seconds.
    fn waits(retries: &Retries, job: &RLHFJob) -> Vec<(String, f64)> {
        let wait = |t: Trouble| (t.stage, t.retry_after.as_secs_f64().round());
        retries.troubles(job).into_iter().map(wait).collect()
    }

    #[test]
    fn a_refusal_outlives_good_passes_until_the_stage_is_made() {
        let (retries, job) = (Retries::default(), job());
        retries.refused(&job, trouble("tune"));
        retries.refused(&job, trouble("judge"));
        retries.refused(&job, trouble("tune"));
        retries.passed(&job);
        assert_eq!(waits(&retries, &job), [("judge".into(), 5.0), ("tune".into(), 10.0)]);
        retries.refused(&job, trouble("judge"));
        let is_news = |stage: &str| retries.troubles(&job).iter().any(|t| t.stage == stage && t.is_news);
        assert!(!is_news("judge"), "it was told, and says the same");
        retries.refused(&job, Trouble { message: "no more".into(), ..trouble("judge") });
        assert!(is_news("judge"));
        retries.made(&job, "judge");
        retries.passed(&job);
        assert_eq!(waits(&retries, &job), [("tune".into(), 10.0)], "another stage's success is not its own");
        retries.made(&job, "tune");
        retries.passed(&job);
        assert!(retries.lock().is_empty());
    }

    #[test]
    fn a_job_inherits_nothing_from_one_that_had_its_name() {
        let (retries, first) = (Retries::default(), job());
        retries.refused(&first, Trouble { permanent: true, ..trouble("prepare") });
        retries.refused(&first, trouble("prepare"));
        let mut second = first.clone();
        second.metadata.uid = Some("another".into());
        assert!(waits(&retries, &second).is_empty());
        retries.refused(&second, trouble("prepare"));
        assert_eq!(waits(&retries, &second), [("prepare".into(), 5.0)]);
        retries.forget("team", "demo");
        assert!(retries.lock().is_empty());
    }
}

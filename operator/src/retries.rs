//! What failed passes leave behind until they succeed: how often in a row a job's passes failed or were out of date, and
//! what the API server refused of each stage. It is kept in memory only: an operator that starts anew tries anew. Waits go by a clock
//! that nobody sets.

use crate::decide::Trouble;
use kube::ResourceExt;
use rlhf_api::job::{RLHFJob, StageStatus};
use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The longest wait between two tries.
const LONGEST: Duration = Duration::from_secs(300);
/// The first wait after a refusal: somebody has to do something first.
const AFTER_REFUSAL: Duration = Duration::from_secs(5);
/// The first wait after a pass that met a change in flight, for the case that the change's own event is not coming.
const AFTER_CHANGE: Duration = Duration::from_secs(1);
/// The first wait after an error.
const AFTER_ERROR: Duration = Duration::from_secs(1);

#[derive(Default)]
struct Entry {
    errors: u32,
    /// Passes in a row that decided on what had changed meanwhile.
    stale: u32,
    /// By the stage.
    refusals: BTreeMap<String, Refusal>,
}

struct Refusal {
    /// The job's, since another job may get its name.
    uid: Option<String>,
    attempt: u32,
    message: String,
    permanent: bool,
    is_news: bool,
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
        let refusals = all.get(&key(job)).into_iter().flat_map(|entry| &entry.refusals);
        let trouble = |(stage, refusal): (&String, &Refusal)| Trouble {
            stage: stage.clone(),
            attempt: refusal.attempt,
            message: refusal.message.clone(),
            retry_after: refusal.due.saturating_duration_since(Instant::now()).try_into().unwrap_or_default(),
            permanent: refusal.permanent,
            is_news: refusal.is_news,
        };
        refusals.filter(|(_, refusal)| refusal.uid == job.uid()).map(trouble).collect()
    }

    /// Notes that objects of the stage's attempt are refused. The wait for the next try grows; the same words again are
    /// no news.
    pub fn refused(&self, job: &RLHFJob, slot: &StageStatus, message: String, permanent: bool) {
        let mut all = self.lock();
        let refusals = &mut all.entry(key(job)).or_default().refusals;
        let (uid, attempt) = (job.uid(), slot.attempt);
        let before = refusals.get(&slot.name).filter(|refusal| refusal.uid == uid);
        let times = before.map_or(0, |refusal| refusal.times) + 1;
        let due = Instant::now() + doubled(AFTER_REFUSAL, times);
        let said = |old: &Refusal| old.attempt == attempt && old.message == message;
        let is_news = before.is_none_or(|old| old.is_news || !said(old));
        refusals.insert(slot.name.clone(), Refusal { uid, attempt, message, permanent, is_news, times, due });
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

    /// Notes that what was decided was out of date, and says how often in a row that was so, and how long to wait. Mostly
    /// the change is on its way; where it never comes, nothing is asked again and again.
    pub fn stale(&self, namespace: &str, name: &str) -> (u32, Duration) {
        let mut all = self.lock();
        let entry = all.entry((namespace.to_owned(), name.to_owned())).or_default();
        entry.stale += 1;
        (entry.stale, doubled(AFTER_CHANGE, entry.stale))
    }

    /// A pass succeeded, and told what was news; what was refused stays until it is made.
    pub fn passed(&self, job: &RLHFJob) {
        let mut all = self.lock();
        if let Some(entry) = all.get_mut(&key(job)) {
            (entry.errors, entry.stale) = (0, 0);
            entry.refusals.values_mut().for_each(|refusal| refusal.is_news = false);
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

    #[test]
    fn waits_double_up_to_five_minutes_and_start_anew_after_a_good_pass() {
        let retries = Retries::default();
        let waits: Vec<_> = (0..12).map(|_| retries.failed("team", "demo").as_secs()).collect();
        assert_eq!(waits, [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300, 300]);
        let stale: Vec<_> =
            (0..11).map(|_| retries.stale("team", "demo")).map(|(n, wait)| (n, wait.as_secs())).collect();
        assert_eq!(stale[..3], [(1, 1), (2, 2), (3, 4)]);
        assert_eq!(stale[10], (11, 300));
        retries.passed(&job());
        assert_eq!(retries.failed("team", "demo").as_secs(), 1);
        assert_eq!(retries.stale("team", "demo").0, 1);
    }

    /// The first attempt of a stage is refused.
    fn refuse(retries: &Retries, job: &RLHFJob, stage: &str, message: &str, permanent: bool) {
        let slot = StageStatus { name: stage.into(), attempt: 1, ..StageStatus::default() };
        retries.refused(job, &slot, message.into(), permanent);
    }

    /// Each stage's wait, in seconds.
    fn waits(retries: &Retries, job: &RLHFJob) -> Vec<(String, f64)> {
        let wait = |t: Trouble| (t.stage, t.retry_after.as_secs_f64().round());
        retries.troubles(job).into_iter().map(wait).collect()
    }

    #[test]
    fn a_refusal_outlives_good_passes_until_the_stage_is_made() {
        let (retries, job) = (Retries::default(), job());
        refuse(&retries, &job, "tune", "no", false);
        refuse(&retries, &job, "judge", "no", false);
        refuse(&retries, &job, "tune", "no", false);
        retries.passed(&job);
        assert_eq!(waits(&retries, &job), [("judge".into(), 5.0), ("tune".into(), 10.0)]);
        refuse(&retries, &job, "judge", "no", false);
        let is_news = |stage: &str| retries.troubles(&job).iter().any(|t| t.stage == stage && t.is_news);
        assert!(!is_news("judge"), "it was told, and says the same");
        refuse(&retries, &job, "judge", "no more", false);
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
        refuse(&retries, &first, "prepare", "no", true);
        refuse(&retries, &first, "prepare", "no", false);
        let mut second = first.clone();
        second.metadata.uid = Some("another".into());
        assert!(waits(&retries, &second).is_empty());
        refuse(&retries, &second, "prepare", "no", false);
        assert_eq!(waits(&retries, &second), [("prepare".into(), 5.0)]);
        retries.forget("team", "demo");
        assert!(retries.lock().is_empty());
    }
}

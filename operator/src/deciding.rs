//! Where decisions are made: off the workers that serve everything else, and for a time that ends.
//!
//! A decision is pure and takes a millisecond. Should one not end, on what a job or its pods say, its thread cannot be
//! stopped; so it is left alone, the job is not decided on again before it has ended and a wait is over that doubles each
//! time, and a namespace has no more than `MOST_OVERDUE` such threads. Nothing else waits for it.

use crate::decide::Decision;
use kube::ResourceExt;
use rlhf_api::job::RLHFJob;
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::task::JoinHandle;

/// A decision takes a thousandth of this.
const LIMIT: Duration = Duration::from_secs(5);
/// Threads of a namespace that do not come back.
const MOST_OVERDUE: usize = 2;
/// The first wait after a decision that took too long.
const FIRST_WAIT: Duration = Duration::from_secs(10);
/// The longest.
const LONGEST_WAIT: Duration = Duration::from_secs(3600);

/// Why there is no decision.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Undecided {
    /// It took too long.
    #[error("to decide what follows took more than {} s", limit.as_secs())]
    TooLong {
        /// The time that it had.
        limit: Duration,
    },
    /// The rules have a bug.
    #[error("to decide what follows ended in a bug of the operator; its log says which")]
    Bug,
    /// One before was too long, and the wait is not over.
    #[error("a decision that took too long is not tried again yet")]
    Waits(Duration),
}

/// The decisions that took too long.
pub struct Deciding {
    limit: Duration,
    overdue: Mutex<Overdue>,
}

#[derive(Default)]
struct Overdue {
    /// Those that have not ended.
    threads: Vec<Thread>,
    /// By namespace and name of the job.
    waits: HashMap<(String, String), Wait>,
}

struct Thread {
    namespace: String,
    /// The job's.
    uid: String,
    handle: JoinHandle<Decision>,
}

struct Wait {
    /// The job's, since another may get its name.
    uid: String,
    times: u32,
    due: Instant,
}

impl Default for Deciding {
    fn default() -> Self {
        Self::within(LIMIT)
    }
}

impl Deciding {
    /// Each decision has so long.
    pub fn within(limit: Duration) -> Self {
        Self { limit, overdue: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Overdue> {
        self.overdue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Decides on a job.
    ///
    /// # Errors
    /// It takes too long, or took too long before.
    pub async fn decide(
        &self,
        job: &RLHFJob,
        decide: impl FnOnce() -> Decision + Send + 'static,
    ) -> Result<Decision, Undecided> {
        let key = (job.namespace().unwrap_or_default(), job.name_any());
        let uid = job.uid().unwrap_or_default();
        self.lock().may_begin(&key, &uid)?;
        let mut handle = tokio::task::spawn_blocking(decide);
        let answer = tokio::time::timeout(self.limit, &mut handle).await;
        let mut overdue = self.lock();
        let why = match answer {
            Ok(Ok(decision)) => {
                overdue.waits.remove(&key);
                return Ok(decision);
            }
            Ok(Err(_)) => Undecided::Bug,
            Err(_) => {
                overdue.threads.push(Thread { namespace: key.0.clone(), uid: uid.clone(), handle });
                Undecided::TooLong { limit: self.limit }
            }
        };
        let times = overdue.waits.get(&key).filter(|wait| wait.uid == uid).map_or(0, |wait| wait.times) + 1;
        let wait = FIRST_WAIT.saturating_mul(1 << (times - 1).min(16)).min(LONGEST_WAIT);
        overdue.waits.insert(key, Wait { uid, times, due: Instant::now() + wait });
        Err(why)
    }

    /// The job is gone.
    pub fn forget(&self, namespace: &str, name: &str) {
        self.lock().waits.remove(&(namespace.to_owned(), name.to_owned()));
    }
}

impl Overdue {
    fn may_begin(&mut self, key: &(String, String), uid: &str) -> Result<(), Undecided> {
        self.threads.retain(|thread| !thread.handle.is_finished());
        let wait = self.waits.get(key).filter(|wait| wait.uid == uid);
        let left = wait.map_or(Duration::ZERO, |wait| wait.due.saturating_duration_since(Instant::now()));
        if !left.is_zero() {
            return Err(Undecided::Waits(left));
        }
        let of_namespace = || self.threads.iter().filter(|thread| thread.namespace == key.0);
        if of_namespace().count() >= MOST_OVERDUE || of_namespace().any(|thread| thread.uid == uid) {
            return Err(Undecided::Waits(FIRST_WAIT));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    /// Lets the decisions of a test end, also when it fails.
    struct Release(Arc<AtomicBool>);

    impl Drop for Release {
        fn drop(&mut self) {
            self.0.store(true, Ordering::SeqCst);
        }
    }

    /// A decision that does not end before it is let go.
    fn spins(release: &Release) -> impl FnOnce() -> Decision + Send + 'static + use<> {
        let over = release.0.clone();
        move || {
            while !over.load(Ordering::SeqCst) {
                std::thread::sleep(Duration::from_millis(1));
            }
            Decision::default()
        }
    }

    fn job(namespace: &str, name: &str) -> RLHFJob {
        let mut job = crate::build::tests::job();
        job.metadata.uid = Some(name.into());
        (job.metadata.namespace, job.metadata.name) = (Some(namespace.into()), Some(name.into()));
        job
    }

    #[tokio::test]
    async fn a_decision_that_does_not_end_is_given_up_in_time_and_not_made_again_at_once() {
        let release = Release(Arc::default());
        let deciding = Deciding::within(Duration::from_millis(50));
        let (a, b) = (job("team", "a"), job("team", "b"));
        let first = deciding.decide(&a, spins(&release)).await;
        assert!(matches!(first, Err(Undecided::TooLong { .. })));
        let again = || unreachable!("it is not begun");
        assert!(matches!(deciding.decide(&a, again).await, Err(Undecided::Waits(wait)) if wait <= FIRST_WAIT));
        let deciding = Deciding { limit: LIMIT, ..deciding };
        assert!(deciding.decide(&b, Decision::default).await.is_ok(), "another job goes on");
        deciding.lock().waits.values_mut().for_each(|wait| wait.due = Instant::now());
        assert!(
            matches!(deciding.decide(&a, again).await, Err(Undecided::Waits(_))),
            "the wait is over, the thread is not"
        );
        drop(release);
        while deciding.lock().threads.iter().any(|thread| !thread.handle.is_finished()) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert!(deciding.decide(&a, Decision::default).await.is_ok());
        assert!(deciding.lock().waits.is_empty() && deciding.lock().threads.is_empty(), "it starts anew");
    }

    #[tokio::test]
    async fn a_namespace_has_two_threads_that_do_not_end_at_most_and_others_go_on() {
        let release = Release(Arc::default());
        let deciding = Deciding::within(Duration::from_millis(10));
        let mut spinning = 0;
        for n in 0..50 {
            let undecided = deciding.decide(&job("hostile", &n.to_string()), spins(&release)).await.unwrap_err();
            spinning += usize::from(matches!(undecided, Undecided::TooLong { .. }));
        }
        assert_eq!(spinning, MOST_OVERDUE);
        let deciding = Deciding { limit: LIMIT, ..deciding };
        assert!(deciding.decide(&job("other", "a"), Decision::default).await.is_ok());
    }

    #[tokio::test]
    async fn a_bug_in_the_rules_ends_one_pass_and_is_waited_after_longer_each_time() {
        let (deciding, job) = (Deciding::default(), job("team", "a"));
        let mut waits = Vec::new();
        for _ in 0..3 {
            let bug = || -> Decision { std::panic::resume_unwind(Box::new("a bug")) };
            assert_eq!(deciding.decide(&job, bug).await.unwrap_err(), Undecided::Bug);
            let Err(Undecided::Waits(wait)) = deciding.decide(&job, Decision::default).await else { panic!("no wait") };
            waits.push(wait.as_secs_f64().round() as u64);
            deciding.lock().waits.values_mut().for_each(|wait| wait.due = Instant::now());
        }
        assert_eq!(waits, [10, 20, 40]);
        deciding.forget("team", "a");
        assert!(deciding.decide(&job, Decision::default).await.is_ok());
    }
}

//! What this process knows it has made for each job, so that it is not written again with every stage.
//!
//! What is known to be made is looked at, and made again should somebody have deleted it; what may not be looked at is left
//! alone until a later attempt. An operator that starts anew knows nothing, and writes.

use kube::ResourceExt;
use rlhf_api::job::RLHFJob;
use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

#[derive(Default)]
struct Entry {
    /// The job's, since another may get its name.
    uid: Option<String>,
    /// Tags of children.
    made: HashSet<u64>,
    /// The generation of the spec whose Jobs the API server was asked about.
    checked: Option<i64>,
    /// The version of the job over which this process last wrote another.
    written_over: Option<String>,
}

/// By namespace and name of the job.
#[derive(Default)]
pub struct Known(Mutex<HashMap<(String, String), Entry>>);

impl Known {
    fn lock(&self) -> MutexGuard<'_, HashMap<(String, String), Entry>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with<T>(&self, job: &RLHFJob, of: impl FnOnce(&mut Entry) -> T) -> T {
        let mut all = self.lock();
        let entry = all.entry((job.namespace().unwrap_or_default(), job.name_any())).or_default();
        if entry.uid != job.uid() {
            *entry = Entry { uid: job.uid(), ..Entry::default() };
        }
        of(entry)
    }

    /// Whether a child with this tag was made.
    pub fn is_made(&self, job: &RLHFJob, tag: u64) -> bool {
        self.with(job, |entry| entry.made.contains(&tag))
    }

    /// A child with this tag was made.
    pub fn made(&self, job: &RLHFJob, tag: u64) {
        self.with(job, |entry| _ = entry.made.insert(tag));
    }

    /// The generation of the job whose Jobs were last checked, if this process checked any.
    pub fn checked(&self, job: &RLHFJob) -> Option<i64> {
        self.with(job, |entry| entry.checked)
    }

    /// The Jobs of the job, as it is now, were checked, or need not be.
    pub fn check_done(&self, job: &RLHFJob) {
        self.with(job, |entry| entry.checked = Some(job.metadata.generation.unwrap_or_default()));
    }

    /// This process has written over the job as it was looked at.
    pub fn wrote_over(&self, job: &RLHFJob) {
        self.with(job, |entry| entry.written_over = job.resource_version());
    }

    /// Whether there is a later version of the job than this, of which its watch has not told yet.
    pub fn is_written_over(&self, job: &RLHFJob) -> bool {
        self.with(job, |entry| entry.written_over.is_some() && entry.written_over == job.resource_version())
    }

    /// The job is over.
    pub fn ended(&self, job: &RLHFJob) {
        self.with(job, |entry| (entry.made, entry.checked) = (HashSet::new(), None));
    }

    /// The job is gone.
    pub fn forget(&self, namespace: &str, name: &str) {
        self.lock().remove(&(namespace.to_owned(), name.to_owned()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::build::tests::job;

    #[test]
    fn a_job_inherits_nothing_from_one_that_had_its_name() {
        let (known, first) = (Known::default(), job());
        known.made(&first, 1);
        known.check_done(&first);
        assert!(known.is_made(&first, 1) && !known.is_made(&first, 2));
        assert_eq!(known.checked(&first), Some(1));
        assert!(!known.is_written_over(&first));
        known.wrote_over(&first);
        assert!(known.is_written_over(&first));
        known.ended(&first);
        assert!(!known.is_made(&first, 1) && known.is_written_over(&first));
        let mut later = first.clone();
        later.metadata.resource_version = Some("8".into());
        assert!(!known.is_written_over(&later));
        known.made(&first, 1);
        let mut second = first.clone();
        second.metadata.uid = Some("another".into());
        assert!(!known.is_made(&second, 1) && known.checked(&second).is_none());
        known.forget("team", "demo");
        assert!(known.lock().is_empty());
    }
}

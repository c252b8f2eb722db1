//! The Secret with the key to the progress of a job's trainers: the only place outside of the operator's own Secret
//! where the key is written. Pods take it into their environment by reference.

use super::{job_labels, metadata};
use crate::keys::ProgressKeys;
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use kube::ResourceExt;
use rlhf_api::job::RLHFJob;
use rlhf_api::names;
use std::fmt;

/// A Secret that does not show what is in it.
#[derive(Clone)]
pub struct KeySecret(pub Secret);

impl fmt::Debug for KeySecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KeySecret({})", self.0.name_any())
    }
}

pub(super) fn build(job: &RLHFJob, keys: &ProgressKeys) -> KeySecret {
    let key = keys.of(&job.uid().unwrap_or_default());
    KeySecret(Secret {
        metadata: metadata(job, name(job, keys), job_labels(job)),
        immutable: Some(true),
        type_: Some("Opaque".into()),
        data: Some([(names::PROGRESS_SECRET_ENTRY.to_owned(), ByteString(key.into_bytes()))].into()),
        ..Default::default()
    })
}

pub(super) fn name(job: &RLHFJob, keys: &ProgressKeys) -> String {
    names::progress_secret(&job.name_any(), &keys.tag(&job.uid().unwrap_or_default()))
}

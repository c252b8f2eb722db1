//! The headless Service of a job: it gives the first pod of an attempt, with rank 0, a name in DNS.
//!
//! Ranks find rank 0 by it, and there each other's addresses. A name for every pod would have the cluster write the list of
//! all addresses anew whenever one of the gang's pods comes or goes, and tell it to all who watch.
//!
//! It publishes a pod that is not ready, since ranks look for each other before any of them could be. It selects by
//! the job's UID too, so that pods left by an earlier job of the same name never answer.

use super::{job_labels, metadata};
use crate::view::INDEX_KEY;
use k8s_openapi::api::core::v1::{Service, ServicePort, ServiceSpec};
use kube::ResourceExt;
use rlhf_api::config::RENDEZVOUS_PORT;
use rlhf_api::job::RLHFJob;
use rlhf_api::names;

pub(super) fn build(job: &RLHFJob) -> Service {
    let own = job_labels(job);
    let mut selector = own.clone();
    selector.insert(INDEX_KEY.into(), "0".into());
    Service {
        metadata: metadata(job, name(job), own),
        spec: Some(ServiceSpec {
            cluster_ip: Some("None".into()),
            publish_not_ready_addresses: Some(true),
            selector: Some(selector),
            ports: Some(vec![ServicePort {
                name: Some("rendezvous".into()),
                port: RENDEZVOUS_PORT.into(),
                ..Default::default()
            }]),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// Its name, which is the domain of the pods.
pub(super) fn name(job: &RLHFJob) -> String {
    names::service(&job.name_any(), &job.uid().unwrap_or_default())
}

//! The headless Service of a stage: it gives the first pod, with rank 0, a name in DNS.
//!
//! Ranks find rank 0 by it, and there each other's addresses. A name for every pod would have the cluster write the list of
//! all addresses anew whenever one of the gang's pods comes or goes, and tell it to all who watch.
//!
//! It publishes a pod that is not ready, since ranks look for each other before any of them could be. It selects by
//! the job's UID too, so that pods left by an earlier job of the same name never answer.

use super::{Task, child_name, labels, metadata};
use crate::view::INDEX_KEY;
use k8s_openapi::api::core::v1::{Service, ServicePort, ServiceSpec};
use rlhf_api::config::RENDEZVOUS_PORT;
use rlhf_api::job::RLHFJob;

pub(super) fn build(job: &RLHFJob, task: Task<'_>) -> Service {
    let own = labels(job, task);
    let mut selector = own.clone();
    selector.insert(INDEX_KEY.into(), "0".into());
    Service {
        metadata: metadata(job, child_name(job, task), own),
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

//! The headless Service of a stage: it gives each pod a name in DNS.
//!
//! It publishes pods that are not ready, since ranks look for each other before any of them could be. It selects by
//! the job's UID too, so that pods left by an earlier job of the same name never answer.

use super::{Task, labels, metadata};
use k8s_openapi::api::core::v1::{Service, ServicePort, ServiceSpec};
use kube::ResourceExt;
use rlhf_api::config::RENDEZVOUS_PORT;
use rlhf_api::job::RLHFJob;
use rlhf_api::names;

pub(super) fn build(job: &RLHFJob, task: Task<'_>) -> Service {
    let selector = labels(job, task);
    Service {
        metadata: metadata(job, names::stage(&job.name_any(), task.name()), selector.clone()),
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

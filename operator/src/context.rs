//! What every pass works with: the connection to the API server, what is known of the cluster, and what the process keeps
//! between passes.

use crate::build::Settings;
use crate::children::Children;
use crate::clock::Clock;
use crate::deciding::Deciding;
use crate::known::Known;
use crate::lease::Leadership;
use crate::listed::Listed;
use crate::metrics::Metrics;
use crate::progress::ProgressReader;
use crate::questions::Questions;
use crate::retries::Retries;
use crate::turns::Turns;
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::Pod;
use kube::runtime::events::Recorder;
use kube::{Api, Client, Resource, ResourceExt};
use rlhf_api::job::RLHFJob;
use std::sync::Arc;

/// What every pass works with.
pub struct Context {
    /// The API server.
    pub client: Client,
    /// The operator's Jobs.
    pub jobs: Children<Job>,
    /// Their pods.
    pub pods: Children<Pod>,
    /// Whether these are all.
    pub listed: Listed,
    /// What the flags say.
    pub settings: Settings,
    /// The operator's metrics.
    pub metrics: Arc<Metrics>,
    /// One for the process: it holds the memory of which warnings were sent.
    pub recorder: Recorder,
    /// Asks trainers how far they are.
    pub progress: ProgressReader,
    /// What failed passes left behind.
    pub retries: Retries,
    /// The time that passes go by.
    pub clock: Clock,
    /// What was made for jobs.
    pub known: Known,
    /// What events have told.
    pub questions: Questions,
    /// Where it is decided what follows.
    pub deciding: Deciding,
    /// Whose pass is next.
    pub turns: Turns,
    /// Whether this operator may write.
    pub leadership: Leadership,
}

impl Context {
    /// The API of one kind in a job's namespace.
    pub fn api<K>(&self, job: &RLHFJob) -> Api<K>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
    {
        Api::namespaced(self.client.clone(), &job.namespace().unwrap_or_default())
    }
}

//! The NetworkPolicy of a job: who reaches its pods, and whom they reach.
//!
//! The ranks of a gang talk over ports that they choose, so a job's own pods reach each other on all. Metrics and
//! progress are for Prometheus and the operator, on the ports of the workers. It holds from before the first pod on,
//! where the cluster's network enforces policies.

use super::{Task, job_labels, labels, metadata, sources};
use k8s_openapi::api::networking::v1::{
    NetworkPolicy, NetworkPolicyEgressRule, NetworkPolicyIngressRule, NetworkPolicyPeer, NetworkPolicyPort,
    NetworkPolicySpec,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::ResourceExt;
use rlhf_api::config::HTTP_PORT;
use rlhf_api::job::RLHFJob;
use rlhf_api::names;
use serde::Deserialize;

/// What the operator's flag says about the network of trainer pods.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct NetworkRules {
    /// The operator's own pods, which ask for progress.
    pub operator: Vec<NetworkPolicyPeer>,
    /// Prometheus' pods, which ask for metrics.
    pub prometheus: Vec<NetworkPolicyPeer>,
    /// Whom trainer pods reach.
    pub egress: Egress,
    /// The ports on which the cluster's DNS answers: of its Service, and of its pods, which is what some networks look at.
    #[serde(default = "dns_ports")]
    pub dns_ports: Vec<u16>,
}

fn dns_ports() -> Vec<u16> {
    vec![53, 5353]
}

/// Whom trainer pods reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub enum Egress {
    /// Everybody.
    All,
    /// Their own job's pods, and DNS.
    Restricted,
}

pub(super) fn build(job: &RLHFJob, rules: &NetworkRules) -> NetworkPolicy {
    let gang = LabelSelector { match_labels: Some(job_labels(job)), ..Default::default() };
    let own = vec![NetworkPolicyPeer { pod_selector: Some(gang.clone()), ..Default::default() }];
    let mut ingress = vec![NetworkPolicyIngressRule { from: Some(own.clone()), ..Default::default() }];
    let readers: Vec<_> = rules.operator.iter().chain(&rules.prometheus).cloned().collect();
    // A rule that names nobody would let in everybody.
    if !readers.is_empty() {
        ingress.push(NetworkPolicyIngressRule { from: Some(readers), ports: Some(vec![worker_ports(job)]) });
    }
    let dns = || rules.dns_ports.iter().flat_map(|dns| ["UDP", "TCP"].map(|protocol| port(protocol, *dns))).collect();
    // Written out, since another policy of the namespace may deny what no policy lets through.
    let egress = match rules.egress {
        Egress::All => vec![NetworkPolicyEgressRule::default()],
        Egress::Restricted => vec![
            NetworkPolicyEgressRule { to: Some(own), ..Default::default() },
            NetworkPolicyEgressRule { ports: Some(dns()), ..Default::default() },
        ],
    };
    NetworkPolicy {
        metadata: metadata(
            job,
            names::network_policy(&job.name_any(), &job.uid().unwrap_or_default()),
            job_labels(job),
        ),
        spec: Some(NetworkPolicySpec {
            pod_selector: Some(gang),
            policy_types: Some(["Ingress", "Egress"].map(String::from).into()),
            ingress: Some(ingress),
            egress: Some(egress),
        }),
    }
}

/// The policy that lets a job's prepare out to everybody, where it has to fetch something and the rules hold its pods in: a
/// policy knows addresses and not names, and the hub and buckets answer at many. It selects no other pod.
pub(super) fn outside(job: &RLHFJob, rules: &NetworkRules) -> Option<NetworkPolicy> {
    if rules.egress == Egress::All || sources::of(job).is_empty() {
        return None;
    }
    let labels = labels(job, Task::Prepare);
    let name = names::prepare_network_policy(&job.name_any(), &job.uid().unwrap_or_default());
    Some(NetworkPolicy {
        metadata: metadata(job, name, labels.clone()),
        spec: Some(NetworkPolicySpec {
            pod_selector: Some(LabelSelector { match_labels: Some(labels), ..Default::default() }),
            policy_types: Some(vec!["Egress".into()]),
            egress: Some(vec![NetworkPolicyEgressRule::default()]),
            ..Default::default()
        }),
    })
}

fn port(protocol: &str, port: u16) -> NetworkPolicyPort {
    NetworkPolicyPort { protocol: Some(protocol.into()), port: Some(IntOrString::Int(port.into())), end_port: None }
}

/// The HTTP ports of as many workers as any of the job's pods has.
fn worker_ports(job: &RLHFJob) -> NetworkPolicyPort {
    let most = Task::all(job).map(|t| t.compute(job).workers_per_node()).max().unwrap_or(1);
    let last = i32::from(HTTP_PORT) + i32::try_from(most).unwrap_or(1) - 1;
    NetworkPolicyPort { end_port: (most > 1).then_some(last), ..port("TCP", HTTP_PORT) }
}

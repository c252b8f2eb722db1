//! Where prepare runs: on CPU, with limits, and not on the nodes that the stages' devices need.

use k8s_openapi::api::core::v1::ResourceRequirements;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use rlhf_api::job::{Compute, PodTemplate, RLHFJob};
use std::collections::BTreeMap;

/// What prepare asks for: it streams files and keeps no tensors. Little enough for the limits that namespaces commonly give to
/// containers that name none.
const REQUESTS: [(&str, &str); 2] = [("cpu", "100m"), ("memory", "128Mi")];
/// The resources that every node has. Others are those of devices.
const OF_EVERY_NODE: [&str; 3] = ["cpu", "memory", "ephemeral-storage"];
/// Nothing has to be saved.
const GRACE_SECONDS: u32 = 30;

pub(super) fn compute(job: &RLHFJob) -> Compute {
    let own = &job.spec.prepare;
    let of_stages = job.spec.compute.pod_template.clone();
    let inherited = PodTemplate {
        node_selector: BTreeMap::new(),
        affinity: None,
        topology_spread_constraints: vec![],
        runtime_class_name: None,
        resource_claims: vec![],
        ipc_lock: false,
        ..of_stages
    };
    Compute {
        resources: resources(&own.resources, &job.spec.compute.resources),
        pod_template: own.pod_template.over(&inherited),
        grace_period_seconds: GRACE_SECONDS,
        ..Compute::default()
    }
}

/// Without claims of devices. Limits are by default those of the stages, so that a quota or a range that wants limits is met where stages meet it.
fn resources(own: &ResourceRequirements, stages: &ResourceRequirements) -> ResourceRequirements {
    let mut limits: BTreeMap<_, _> = stages.limits.clone().unwrap_or_default();
    limits.retain(|name, _| OF_EVERY_NODE.contains(&name.as_str()));
    limits.extend(own.limits.clone().unwrap_or_default());
    let mut requests: BTreeMap<_, _> = REQUESTS.map(|(name, amount)| (name.to_owned(), Quantity(amount.into()))).into();
    for (name, request) in &mut requests {
        if let Some(limit) = limits.get(name).filter(|limit| amount(limit) < amount(request)) {
            *request = limit.clone();
        }
    }
    requests.extend(own.requests.clone().unwrap_or_default());
    ResourceRequirements {
        requests: Some(requests),
        limits: (!limits.is_empty()).then_some(limits),
        ..Default::default()
    }
}

/// An amount as a number, to be compared with another of the same resource. What is no amount the API server refuses.
fn amount(quantity: &Quantity) -> f64 {
    memory_plan::parse_quantity(&quantity.0).unwrap_or(f64::INFINITY)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::build::tests::job;
    use serde_json::{Value, json};

    fn with(prepare: Value, compute: Value) -> Compute {
        let mut job = job();
        job.spec.prepare = serde_json::from_value(prepare).unwrap();
        job.spec.compute = serde_json::from_value(compute).unwrap();
        super::compute(&job)
    }

    fn sides(compute: Compute) -> (Value, Value) {
        (json!(compute.resources.requests), json!(compute.resources.limits))
    }

    #[test]
    fn limits_are_those_of_the_stages_and_requests_no_more_than_these() {
        let limits = json!({"cpu": "50m", "memory": "64Gi", "rdma/hca": "1"});
        let (requests, limits) = sides(with(json!({}), json!({"resources": {"limits": limits}})));
        assert_eq!(requests, json!({"cpu": "50m", "memory": "128Mi"}));
        assert_eq!(limits, json!({"cpu": "50m", "memory": "64Gi"}));
        let own = json!({"resources": {"requests": {"cpu": "2"}, "limits": {"memory": "1Gi"}}});
        let (requests, limits) = sides(with(own, json!({"resources": {"limits": {"memory": "64Gi"}}})));
        assert_eq!((requests, limits), (json!({"cpu": "2", "memory": "128Mi"}), json!({"memory": "1Gi"})));
        assert_eq!(sides(with(json!({}), json!({}))).1, Value::Null);
    }

    #[test]
    fn prepare_goes_to_any_node_unless_it_says_where() {
        let stages = json!({"nodes": 4, "devicesPerNode": 8, "podTemplate": {
            "nodeSelector": {"gpu": "yes"}, "runtimeClassName": "nvidia", "ipcLock": true, "tolerations": [{"key": "gpu"}], "labels": {"a": "b"}}});
        let compute = with(json!({"podTemplate": {"nodeSelector": {"cpu": "yes"}}}), stages.clone());
        assert_eq!((compute.nodes, compute.devices_per_node), (1, 0));
        let template = compute.pod_template;
        assert_eq!(template.node_selector, [("cpu".to_owned(), "yes".to_owned())].into());
        assert!(
            template.runtime_class_name.is_none()
                && !template.ipc_lock
                && template.tolerations.len() == 1
                && template.labels.len() == 1
        );
        assert!(with(json!({}), stages).pod_template.node_selector.is_empty());
    }
}

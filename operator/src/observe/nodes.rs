//! What nodes tell: how much memory their devices have, and whether one that does not end its pods is gone.
//!
//! NVIDIA's GPU feature discovery labels nodes with the memory. Nodes are asked only for a stage whose strategy is to be
//! chosen and whose manifest does not say it, and for pods that should long have ended. An operator that may not read nodes,
//! as it watches one namespace, knows nothing.

use super::{Error, failed};
use crate::context::Context;
use crate::decide::{DeviceMemory, NodeState, ask};
use crate::view::StageView;
use futures::future::try_join_all;
use k8s_openapi::api::core::v1::{Node, Taint, Toleration};
use kube::api::ListParams;
use kube::{Api, ResourceExt};
use rlhf_api::job::{Compute, RLHFJob};
use rlhf_api::names;
use std::collections::{BTreeMap, BTreeSet};

/// The label counts in these.
const MEBIBYTE: u64 = 1 << 20;
/// By which whoever knows that a node is down says so: its pods may be taken for ended.
const OUT_OF_SERVICE: &str = "node.kubernetes.io/out-of-service";

/// What is known of the devices by stage, for those stages that are about to be planned with it.
pub async fn device_memory(
    job: &RLHFJob,
    stages: &BTreeMap<String, StageView>,
    ctx: &Context,
) -> Result<BTreeMap<String, DeviceMemory>, Error> {
    let asked = ask::for_memory(job, stages).map(|(stage, compute)| async move {
        let nodes = list(&selector(&compute), ctx).await?;
        let known = nodes.map_or(DeviceMemory::Unreadable, |nodes| least(&nodes, &compute));
        Ok((stage.to_owned(), known))
    });
    Ok(try_join_all(asked).await?.into_iter().collect())
}

/// What is known of nodes by their names.
pub async fn states(names: BTreeSet<String>, ctx: &Context) -> Result<BTreeMap<String, NodeState>, Error> {
    let asked = names.into_iter().map(|name| async move {
        let found = list(&ListParams::default().fields(&format!("metadata.name={name}")), ctx).await?;
        let state = found.map_or(NodeState::Unreadable, |nodes| nodes.first().map_or(NodeState::Gone, state));
        Ok((name, state))
    });
    Ok(try_join_all(asked).await?.into_iter().collect())
}

fn state(node: &Node) -> NodeState {
    let out = taints(node).any(|taint| taint.key == OUT_OF_SERVICE);
    if out { NodeState::OutOfService } else { NodeState::There }
}

fn taints(node: &Node) -> impl Iterator<Item = &Taint> {
    node.spec.iter().filter_map(|s| s.taints.as_ref()).flatten()
}

fn selector(compute: &Compute) -> ListParams {
    let pairs = compute.pod_template.node_selector.iter().map(|(key, value)| format!("{key}={value}"));
    ListParams::default().labels(&pairs.collect::<Vec<_>>().join(","))
}

/// Nodes, where the operator may read them.
async fn list(which: &ListParams, ctx: &Context) -> Result<Option<Vec<Node>>, Error> {
    let api: Api<Node> = Api::all(ctx.client.clone());
    match ctx.metrics.api("list", api.list(which).await) {
        Ok(nodes) => Ok(Some(nodes.items)),
        Err(kube::Error::Api(status)) if status.is_forbidden() => Ok(None),
        Err(error) => Err(failed("nodes".into(), error)),
    }
}

/// The least that a node tells on which the pods can run: one that has their devices, and whose taints they tolerate.
fn least(nodes: &[Node], compute: &Compute) -> DeviceMemory {
    let fits = nodes.iter().filter(|node| devices(node, compute) >= u64::from(compute.devices_per_node));
    let tolerated = |taint: &Taint| compute.pod_template.tolerations.iter().any(|t| tolerates(t, taint));
    let mut fits =
        fits.filter(|node| taints(node).filter(|t| t.effect != "PreferNoSchedule").all(tolerated)).peekable();
    if fits.peek().is_none() {
        return DeviceMemory::NoNode;
    }
    fits.filter_map(|n| bytes(n.labels())).min().map_or(DeviceMemory::Untold, DeviceMemory::Bytes)
}

/// How many devices a node has for pods.
fn devices(node: &Node, compute: &Compute) -> u64 {
    let allocatable = node.status.as_ref().and_then(|s| s.allocatable.as_ref());
    let count = allocatable.and_then(|a| a.get(&compute.device_resource));
    count.and_then(|q| q.0.parse().ok()).unwrap_or(0)
}

/// As the scheduler reads a toleration. A node that is down for a moment is left out like any other that is tainted.
fn tolerates(toleration: &Toleration, taint: &Taint) -> bool {
    let key = toleration.key.as_deref().unwrap_or_default();
    let exists = toleration.operator.as_deref() == Some("Exists");
    let effect = toleration.effect.as_deref().filter(|e| !e.is_empty());
    let same_key = key == taint.key || (key.is_empty() && exists);
    let value = |v: &Option<String>| v.clone().unwrap_or_default();
    same_key && effect.is_none_or(|e| e == taint.effect) && (exists || value(&toleration.value) == value(&taint.value))
}

fn bytes(labels: &BTreeMap<String, String>) -> Option<u64> {
    labels.get(names::LABEL_DEVICE_MEMORY)?.parse::<u64>().ok()?.checked_mul(MEBIBYTE).filter(|bytes| *bytes > 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn node(memory: Option<&str>, devices: &str, taints: Value) -> Node {
        let labels = memory.map_or(json!({}), |m| json!({names::LABEL_DEVICE_MEMORY: m}));
        serde_json::from_value(json!({
            "metadata": {"name": "n", "labels": labels}, "spec": {"taints": taints},
            "status": {"allocatable": {"nvidia.com/gpu": devices}},
        }))
        .unwrap()
    }

    fn compute(tolerations: Value) -> Compute {
        serde_json::from_value(json!({"devicesPerNode": 4, "podTemplate": {"tolerations": tolerations}})).unwrap()
    }

    #[test]
    fn only_nodes_on_which_the_pods_can_run_say_how_much_memory_there_is() {
        let gpu = json!([{"key": "gpu", "value": "yes", "effect": "NoSchedule"}]);
        let large = node(Some("81920"), "8", json!([]));
        let eighty = DeviceMemory::Bytes(80 << 30);
        let tolerating = json!([{"key": "gpu", "operator": "Exists"}]);
        for (name, nodes, tolerations, known) in [
            (
                "the least counts",
                vec![large.clone(), node(Some("16384"), "4", json!([]))],
                json!([]),
                DeviceMemory::Bytes(16 << 30),
            ),
            ("too few devices", vec![large.clone(), node(Some("16384"), "1", json!([]))], json!([]), eighty),
            ("a taint", vec![large.clone(), node(Some("16384"), "8", gpu.clone())], json!([]), eighty),
            (
                "a taint that is tolerated",
                vec![node(Some("16384"), "8", gpu.clone())],
                tolerating.clone(),
                DeviceMemory::Bytes(16 << 30),
            ),
            (
                "a taint of another value",
                vec![node(Some("16384"), "8", gpu)],
                json!([{"key": "gpu", "value": "no"}]),
                DeviceMemory::NoNode,
            ),
            ("a pool scaled to zero", vec![], json!([]), DeviceMemory::NoNode),
            ("a node that does not tell", vec![node(None, "8", json!([]))], json!([]), DeviceMemory::Untold),
        ] {
            assert_eq!(least(&nodes, &compute(tolerations)), known, "{name}");
        }
    }

    #[test]
    fn a_node_is_out_of_service_by_its_taint_alone() {
        assert_eq!(
            state(&node(None, "8", json!([{"key": "node.kubernetes.io/unreachable", "effect": "NoExecute"}]))),
            NodeState::There
        );
        let out = json!([{"key": OUT_OF_SERVICE, "value": "nodeshutdown", "effect": "NoExecute"}]);
        assert_eq!(state(&node(None, "8", out)), NodeState::OutOfService);
    }
}

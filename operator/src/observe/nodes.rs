//! How much memory devices have, where nodes tell it.
//!
//! NVIDIA's GPU feature discovery labels nodes with it. Nodes are asked only for a stage whose strategy is to be chosen
//! and whose manifest does not say it; an operator that may not read nodes, as it watches one namespace, knows nothing.

use super::{Error, failed};
use crate::context::Context;
use crate::view::{JobState, StageView};
use futures::future::try_join_all;
use k8s_openapi::api::core::v1::Node;
use kube::api::ListParams;
use kube::{Api, ResourceExt};
use rlhf_api::job::{Compute, RLHFJob, StagePhase};
use rlhf_api::names;
use std::collections::BTreeMap;

/// The label counts in these.
const MEBIBYTE: u64 = 1 << 20;

/// Bytes of a device by stage, for those stages that are about to be planned with it.
pub async fn device_memory(
    job: &RLHFJob,
    stages: &BTreeMap<String, StageView>,
    ctx: &Context,
) -> Result<BTreeMap<String, u64>, Error> {
    let asked = unplanned(job, stages).map(|(stage, compute)| async move {
        let least = least_on_nodes(&compute, ctx).await?;
        Ok(least.map(|bytes| (stage.to_owned(), bytes)))
    });
    let found = try_join_all(asked).await?;
    Ok(found.into_iter().flatten().collect())
}

/// The stages that wait for this, once prepare is done.
fn unplanned<'a>(job: &'a RLHFJob, stages: &BTreeMap<String, StageView>) -> impl Iterator<Item = (&'a str, Compute)> {
    let status = job.status.as_ref();
    let slot = status.and_then(|s| s.prepare.as_ref());
    let view = stages.get(names::PREPARE);
    let done = slot.is_some_and(|slot| {
        let complete = |view: &StageView| view.job(slot.attempt).is_some_and(|j| j.state == JobState::Complete);
        slot.phase == StagePhase::Succeeded || view.is_some_and(complete)
    });
    let unplanned =
        move |name: &str| status.is_none_or(|s| s.stages.iter().all(|s| s.name != name || s.plan.is_none()));
    let over = status.is_some_and(|s| s.phase.is_terminal());
    let wanted = done && !over && job.spec.stages.iter().any(|stage| job.strategy(stage).has_auto());
    let stages = job.spec.stages.iter().filter(move |stage| wanted && unplanned(&stage.name));
    let computes = stages.map(|s| (s.name.as_str(), job.compute(s)));
    computes.filter(|(_, compute)| compute.devices_per_node > 0 && compute.device_memory.is_none())
}

/// The least that a node tells on which the pods may run.
async fn least_on_nodes(compute: &Compute, ctx: &Context) -> Result<Option<u64>, Error> {
    let pairs = compute.pod_template.node_selector.iter().map(|(key, value)| format!("{key}={value}"));
    let selector: Vec<String> = pairs.chain([names::LABEL_DEVICE_MEMORY.to_owned()]).collect();
    let api: Api<Node> = Api::all(ctx.client.clone());
    let found = api.list_metadata(&ListParams::default().labels(&selector.join(","))).await;
    match ctx.metrics.api("list", found) {
        Ok(nodes) => Ok(nodes.items.iter().filter_map(|n| bytes(n.labels())).min()),
        Err(kube::Error::Api(status)) if status.is_forbidden() => Ok(None),
        Err(error) => Err(failed("nodes".into(), error)),
    }
}

fn bytes(labels: &BTreeMap<String, String>) -> Option<u64> {
    labels.get(names::LABEL_DEVICE_MEMORY)?.parse::<u64>().ok()?.checked_mul(MEBIBYTE).filter(|bytes| *bytes > 0)
}

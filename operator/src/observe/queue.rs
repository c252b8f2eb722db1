//! Why a queue lets an attempt wait.
//!
//! Kueue makes a Workload for each Job that it queues, and says in the conditions of that alone what the Job waits for.
//! Workloads are read while a Job waits, and not watched: a cluster without Kueue has none, and one may come later.

use super::{Error, failed};
use crate::context::Context;
use crate::view::{JobView, Wait};
use kube::Api;
use kube::ResourceExt;
use kube::api::{ApiResource, DynamicObject, GroupVersionKind, ListParams};
use rlhf_api::job::RLHFJob;
use serde_json::Value;

/// By which a Workload is found: the UID of its Job.
const LABEL_JOB_UID: &str = "kueue.x-k8s.io/job-uid";

/// What Kueue says of a Job that waits in one of its queues, once it says anything.
pub(super) async fn wait(job: &RLHFJob, child: &JobView, ctx: &Context) -> Result<Option<Wait>, Error> {
    let Some(held) = child.held().filter(|_| child.queue.is_some()) else { return Ok(None) };
    let kind = ApiResource::from_gvk(&GroupVersionKind::gvk("kueue.x-k8s.io", "v1beta2", "Workload"));
    let namespace = job.namespace().unwrap_or_default();
    let api = Api::<DynamicObject>::namespaced_with(ctx.client.clone(), &namespace, &kind);
    let of_job = ListParams::default().labels(&format!("{LABEL_JOB_UID}={}", child.uid));
    let said = match ctx.metrics.api("list", api.list(&of_job).await) {
        Ok(found) => found.items.iter().find_map(reason),
        Err(kube::Error::Api(status)) if status.code == 404 => Some(NO_KUEUE.to_owned()),
        // An operator with a role of somebody's own making.
        Err(kube::Error::Api(status)) if status.is_forbidden() => None,
        Err(error) => return Err(failed(format!("Workloads of Job {}", child.name), error)),
    };
    Ok(said.map(|said| Wait { text: format!("{}: {said}", held.text), ..held }))
}

/// What is said in place of Kueue where there is none.
const NO_KUEUE: &str = "this cluster has no Kueue that tells (v1beta2, 0.15 or newer); install one, or delete the RLHFJob and create it without the label kueue.x-k8s.io/queue-name";

/// What a Workload waits for, in Kueue's words.
fn reason(workload: &DynamicObject) -> Option<String> {
    let conditions = workload.data.pointer("/status/conditions").and_then(Value::as_array)?;
    let condition = |kind: &str| conditions.iter().find(|c| c["type"] == kind);
    let holds = |kind: &str| condition(kind).is_some_and(|c| c["status"] == "True");
    let message = |kind: &str| Some(condition(kind)?["message"].as_str()?.trim().to_owned()).filter(|m| !m.is_empty());
    match (holds("QuotaReserved"), holds("Evicted"), holds("Admitted")) {
        (true, true, _) => message("Evicted"),
        (true, false, true) => None,
        (true, false, false) => Some("its quota is reserved, and admission checks are under way".into()),
        (false, ..) => message("QuotaReserved"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_workload_says_what_it_waits_for_until_it_is_admitted() {
        let condition = |kind: &str, status: &str, message: &str| json!({"type": kind, "status": status, "reason": "R", "message": message});
        let lacks =
            "couldn't assign flavors to pod set main: insufficient unused quota for cpu in flavor a, 1 more needed";
        let preempted =
            "Preempted to accommodate a workload (UID: u, JobUID: j) due to prioritization in the ClusterQueue";
        for (conditions, said) in [
            (json!([]), None),
            (json!([condition("QuotaReserved", "False", lacks)]), Some(lacks)),
            (
                json!([condition("QuotaReserved", "True", "in cq"), condition("Admitted", "False", "checks")]),
                Some("its quota is reserved, and admission checks are under way"),
            ),
            (json!([condition("QuotaReserved", "True", "in cq"), condition("Admitted", "True", "in cq")]), None),
            (
                json!([
                    condition("QuotaReserved", "True", "in cq"),
                    condition("Admitted", "True", "in cq"),
                    condition("Evicted", "True", preempted)
                ]),
                Some(preempted),
            ),
            (json!([condition("QuotaReserved", "False", lacks), condition("Evicted", "True", preempted)]), Some(lacks)),
        ] {
            let workload: DynamicObject = serde_json::from_value(json!({
                "apiVersion": "kueue.x-k8s.io/v1beta2", "kind": "Workload", "metadata": {"name": "w"},
                "status": {"conditions": conditions},
            }))
            .unwrap();
            assert_eq!(reason(&workload).as_deref(), said, "{conditions}");
        }
    }
}

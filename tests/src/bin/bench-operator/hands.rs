//! The hands of a hostile namespace: its jobs, and loops that write over everything that it may write, each as fast as the
//! API server takes it.
//!
//! They are those of a tenant, an account with all rights in its namespace and none elsewhere. How its pods end they decide, and
//! not kwok.

use crate::absurd;
use crate::cluster::{Cluster, POLL, account, client};
use crate::load;
use anyhow::Context;
use e2e::audit::Writes;
use e2e::manifest::Manifest;
use futures::future::join;
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{Pod, ServiceAccount};
use k8s_openapi::api::rbac::v1::RoleBinding;
use kube::api::{ListParams, Patch, PatchParams};
use kube::{Api, Client, Resource, ResourceExt};
use rlhf_api::job::{MAX_STAGES, RLHFJob};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::fmt::Debug;
use std::time::Duration;
use tokio::task::JoinHandle;
use tokio::time::sleep;

/// The namespace; `tests/scale` leaves its pods alone.
pub const NAMESPACE: &str = "hostile";
/// Its account.
const ACCOUNT: &str = "hands";
/// A loop that finds nothing to write looks again after so long.
const PAUSE: Duration = Duration::from_millis(200);

/// Hands at work, until they are dropped.
pub struct Hands {
    work: JoinHandle<()>,
    /// What they have written.
    pub audit: Writes,
}

impl Hands {
    /// Applies so many jobs and begins to write.
    pub async fn begin(cluster: &Cluster, jobs: usize) -> anyhow::Result<Self> {
        let admin = &cluster.client;
        load::namespace(admin, NAMESPACE, "privileged").await?;
        let own = tenant(cluster).await?;
        let manifest = job()?;
        let named = |n: usize| manifest.clone().set("/metadata/name", json!(format!("hostile-{n}")));
        load::apply(&own, (0..jobs).map(|n| (NAMESPACE.to_owned(), named(n)))).await?;
        let user = format!("system:serviceaccount:{NAMESPACE}:{ACCOUNT}");
        let audit = Writes::of(&user, &cluster.audit_log())?;
        let (pods, jobs) =
            (Api::<Pod>::namespaced(own.clone(), NAMESPACE), Api::<Job>::namespaced(own.clone(), NAMESPACE));
        let copies = copy_labels(Api::all(admin.clone()), pods.clone());
        let statuses = join(write_over(pods, absurd::pod_status), write_over(jobs, |_, turn| absurd::job_status(turn)));
        let work = tokio::spawn(async move { _ = join(statuses, copies).await });
        Ok(Self { work, audit })
    }
}

impl Drop for Hands {
    fn drop(&mut self) {
        self.work.abort();
    }
}

/// The API server, as the namespace's own account.
async fn tenant(cluster: &Cluster) -> anyhow::Result<Client> {
    let admin = &cluster.client;
    let accounts = Api::<ServiceAccount>::namespaced(admin.clone(), NAMESPACE);
    load::create(accounts, json!({"metadata": {"name": ACCOUNT}})).await?;
    let binding = json!({
        "metadata": {"name": ACCOUNT},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "cluster-admin"},
        "subjects": [{"kind": "ServiceAccount", "name": ACCOUNT, "namespace": NAMESPACE}],
    });
    load::create(Api::<RoleBinding>::namespaced(admin.clone(), NAMESPACE), binding).await?;
    client(&account(&cluster.state, NAMESPACE, ACCOUNT).await?).await
}

/// A job with as many stages as there may be, all side by side, of which the operator chooses the strategies.
fn job() -> anyhow::Result<Manifest> {
    let compute = json!({"nodes": 1, "devicesPerNode": load::GPUS_A_POD, "deviceMemory": "80Gi",
        "resources": {"requests": {"cpu": "16", "memory": "128Gi"}, "limits": {"memory": "512Gi"}}});
    let mut job = load::job(1).set("/spec/compute", compute);
    let first = job.0.pointer("/spec/stages/0").cloned().context("the example has no stages")?;
    let stage = |n: usize| {
        let mut stage = first.clone();
        stage["name"] = absurd::stage_name(n).into();
        stage
    };
    job.0["spec"]["stages"] = (0..MAX_STAGES).map(stage).collect();
    job.0["spec"]["strategy"] = json!({"sharding": "auto", "offload": "auto", "recompute": "auto"});
    job.0["spec"]["failurePolicy"] = json!({"maxRestarts": 100, "maxDisruptions": 800, "progressSteps": 1});
    Ok(job)
}

/// Writes over the status of each object, one after the other, again and again. What the API server refuses, the audit log
/// tells.
async fn write_over<K>(api: Api<K>, status: impl Fn(&K, usize) -> Value)
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + Debug + DeserializeOwned,
{
    for round in 0.. {
        let all = api.list(&ListParams::default()).await.map(|list| list.items).unwrap_or_default();
        if all.is_empty() {
            sleep(PAUSE).await;
        }
        for (n, object) in all.iter().enumerate() {
            let patch = json!({"status": status(object, round + n)});
            _ = api.patch_status(&object.name_any(), &PatchParams::default(), &Patch::Merge(patch)).await;
        }
    }
}

/// Makes a pod with copied labels for each job of the cluster, and makes it anew where somebody has removed it.
async fn copy_labels(jobs: Api<RLHFJob>, pods: Api<Pod>) {
    loop {
        let all = jobs.list(&ListParams::default()).await.map(|list| list.items).unwrap_or_default();
        for job in &all {
            // Most are there already.
            _ = load::create(pods.clone(), absurd::copy_of_child(job)).await;
        }
        sleep(POLL).await;
    }
}

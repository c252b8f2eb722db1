//! What the bench puts into the cluster: nodes, namespaces with a volume's claim, pods of others, and RLHFJobs.

use anyhow::Context;
use e2e::manifest::{self, Manifest};
use futures::{StreamExt, TryStreamExt, stream};
use k8s_openapi::api::core::v1::{Namespace, Node, PersistentVolume, PersistentVolumeClaim, Pod};
use kube::api::{ApiResource, DynamicObject, PostParams};
use kube::{Api, Client, Resource};
use rlhf_api::job::RLHFJob;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::fmt::Debug;

/// Pods of a stage.
pub const NODES_A_STAGE: usize = 4;
/// Fake GPUs of a pod.
pub const GPUS_A_POD: usize = 8;
/// Pods that a node has room for. kwok lists the pods of each node when it starts, and some API servers look through all of
/// the cluster's for that: with fewer nodes the bench measures less of it.
const PODS_A_NODE: usize = 8;
/// Jobs are spread over so many namespaces.
const NAMESPACES: usize = 10;
/// Requests at the same time.
const CONCURRENCY: usize = 32;
/// The claim that the example names.
const CLAIM: &str = "rlhf-data";

/// The namespace of the job with this number.
fn team(number: usize) -> String {
    format!("team-{}", number % NAMESPACES)
}

/// Makes an object.
pub async fn create<K>(api: Api<K>, object: Value) -> anyhow::Result<()>
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Serialize,
{
    let text = object["metadata"]["name"].to_string();
    let object: K = serde_json::from_value(object).with_context(|| format!("{} {text}", K::kind(&())))?;
    api.create(&PostParams::default(), &object).await.with_context(|| format!("{} {text}", K::kind(&())))?;
    Ok(())
}

async fn all(writes: impl Iterator<Item = impl Future<Output = anyhow::Result<()>>>) -> anyhow::Result<()> {
    stream::iter(writes).buffer_unordered(CONCURRENCY).try_collect().await
}

/// As many nodes as all jobs' stages take at once.
pub async fn nodes(client: &Client, jobs: usize) -> anyhow::Result<usize> {
    let count = (jobs * NODES_A_STAGE).div_ceil(PODS_A_NODE);
    let resources =
        json!({"cpu": "256", "memory": "2Ti", "pods": "110", "nvidia.com/gpu": (PODS_A_NODE * GPUS_A_POD).to_string()});
    let node = |n: usize| {
        json!({
            "metadata": {"name": format!("gpu-{n}"), "labels": {"kubernetes.io/hostname": format!("gpu-{n}")}},
            "status": {"capacity": resources, "allocatable": resources},
        })
    };
    all((0..count).map(|n| create::<Node>(Api::all(client.clone()), node(n)))).await?;
    Ok(count)
}

/// The namespaces with this Pod Security Standard.
pub async fn namespaces(client: &Client, standard: &str) -> anyhow::Result<()> {
    for name in (0..NAMESPACES).map(team) {
        namespace(client, &name, standard).await?;
    }
    Ok(())
}

/// A namespace with this Pod Security Standard and a claim that is bound at once. Nothing mounts it.
pub async fn namespace(client: &Client, name: &str, standard: &str) -> anyhow::Result<()> {
    let labels = json!({"pod-security.kubernetes.io/enforce": standard});
    create::<Namespace>(Api::all(client.clone()), json!({"metadata": {"name": name, "labels": labels}})).await?;
    let volume = json!({"metadata": {"name": name}, "spec": {
        "accessModes": ["ReadWriteMany"], "storageClassName": "", "capacity": {"storage": "1Ti"},
        "nfs": {"server": "nfs.example.com", "path": "/"}, "claimRef": {"namespace": name, "name": CLAIM}}});
    create::<PersistentVolume>(Api::all(client.clone()), volume).await?;
    let claim = json!({"metadata": {"name": CLAIM}, "spec": {
        "accessModes": ["ReadWriteMany"], "storageClassName": "", "volumeName": name,
        "resources": {"requests": {"storage": "1Ti"}}}});
    create::<PersistentVolumeClaim>(Api::namespaced(client.clone(), name), claim).await
}

/// Pods that are no RLHFJob's, with as much in them as such have. Nobody schedules them.
pub async fn foreign_pods(client: &Client, count: usize) -> anyhow::Result<()> {
    let name = "others";
    create::<Namespace>(Api::all(client.clone()), json!({"metadata": {"name": name}})).await?;
    let env: Vec<_> = (0..20).map(|n| json!({"name": format!("SETTING_{n}"), "value": "x".repeat(100)})).collect();
    let pod = |n: usize| {
        json!({
            "metadata": {"name": format!("other-{n}"), "labels": {"app": "other"}},
            "spec": {"schedulerName": "nobody", "containers": [{"name": "main", "image": "example.com/other:1", "env": env}]},
        })
    };
    all((0..count).map(|n| create::<Pod>(Api::namespaced(client.clone(), name), pod(n)))).await
}

/// The example's job with the bench's nodes and GPUs, and with its first `stages` stages.
pub fn job(stages: usize) -> Manifest {
    let compute = json!({"nodes": NODES_A_STAGE, "devicesPerNode": GPUS_A_POD,
        "resources": {"requests": {"cpu": "16", "memory": "128Gi"}}});
    let mut job = manifest::example().set("/spec/compute", compute);
    if let Some(all) = job.0["spec"]["stages"].as_array_mut() {
        all.truncate(stages);
    }
    job
}

/// All jobs, at once.
pub async fn jobs(client: &Client, jobs: usize, stages: usize) -> anyhow::Result<()> {
    let manifest = job(stages);
    let all = (0..jobs).map(|n| (team(n), manifest.clone().set("/metadata/name", json!(format!("job-{n}")))));
    apply(client, all).await
}

/// Jobs, each in its namespace, at once.
pub async fn apply(client: &Client, jobs: impl Iterator<Item = (String, Manifest)>) -> anyhow::Result<()> {
    all(jobs.map(|(namespace, job)| create::<RLHFJob>(Api::namespaced(client.clone(), &namespace), job.0))).await
}

/// As many objects of another kind, spread over the namespaces, at once.
pub async fn objects(client: &Client, kind: &ApiResource, count: usize, object: &Value) -> anyhow::Result<()> {
    let write = |n: usize| {
        let mut object = object.clone();
        object["metadata"]["name"] = json!(format!("job-{n}"));
        async move {
            let api = Api::<DynamicObject>::namespaced_with(client.clone(), &team(n), kind);
            let object = serde_json::from_value(object).context("an object")?;
            api.create(&PostParams::default(), &object).await.with_context(|| format!("{} {n}", kind.kind))?;
            Ok(())
        }
    };
    all((0..count).map(write)).await
}

//! The same with Kubeflow Trainer: so many TrainJobs of as many nodes, each of which is one stage, at once. As an RLHFJob is
//! prepared first, a TrainJob has an initializer, by a runtime in the way of those that the trainer brings for language models.
//!
//! `tests/cluster/peer.sh` builds the trainer's manager and JobSet's from their Go modules. They run as processes with the
//! flags, rights and accounts of their chart, JobSet's leader election on; what a cluster gives to their pods (the
//! namespace's name, the webhooks' certificates, a Service's way to them) the bench gives to these processes.

use crate::cluster::{ALL_STAGES, Cluster, Start, account, kwok, until};
use crate::load;
use crate::parts::{self, Part};
use crate::say;
use anyhow::{Context, ensure};
use e2e::audit::Writes;
use e2e::tools;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::Api;
use kube::api::{ApiResource, DynamicObject, GroupVersionKind, ListParams, PostParams};
use rlhf_api::names;
use serde::Serialize;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;
use tokio::process::Command;

/// The chart's release and namespace, as its documents have them.
const CHART: &str = "kubeflow-trainer";
const NAMESPACE: &str = "kubeflow-system";
/// An address of the pods' range that kwok gives to no pod here.
const ADDRESS: &str = "10.98.255.254";
/// Where both managers want their certificates.
const CERTIFICATES: &str = "/tmp/k8s-webhook-server/serving-certs";

/// A manager of the peer.
struct Manager {
    name: &'static str,
    program: &'static str,
    /// Its Deployment and its account.
    deployment: &'static str,
    service: &'static str,
    /// The name of the webhooks' port in the Service, and the process's port.
    port: (&'static str, u16),
    secret: &'static str,
    /// The ConfigMap with its configuration.
    config: &'static str,
}

/// Values of the chart: no pods, and ports that keep the two apart on one machine.
const VALUES: &str = "manager.replicas=0,jobset.controller.replicas=0,manager.config.webhook.port=9444,\
    manager.config.health.healthProbeBindAddress=:8082,manager.config.metrics.bindAddress=:8444";

const MANAGERS: [Manager; 2] = [
    Manager {
        name: "jobset",
        program: "jobset",
        deployment: "jobset-controller",
        service: "jobset-webhook-service",
        port: ("webhook", 9443),
        secret: "jobset-webhook-server-cert",
        config: "jobset-controller-config",
    },
    Manager {
        name: "trainer",
        program: "trainer-controller-manager",
        deployment: "kubeflow-trainer-controller-manager",
        service: "kubeflow-trainer-controller-manager",
        port: ("webhook-server", 9444),
        secret: "kubeflow-trainer-webhook-cert",
        config: "kubeflow-trainer-config",
    },
];

/// What came out.
#[derive(Default, Serialize)]
struct Report {
    peer: &'static str,
    jobs: usize,
    initializer: bool,
    seconds: f64,
    writes_per_attempt: f64,
    peak_rss_bytes: u64,
    cpu_seconds: BTreeMap<&'static str, f64>,
    load_before: f64,
    load_after: f64,
}

/// Measures the peer.
pub async fn bench(jobs: usize, initializer: bool) -> anyhow::Result<()> {
    let mut report =
        Report { peer: "kubeflow trainer", jobs, initializer, load_before: parts::load()?, ..Report::default() };
    let cluster = Cluster::connect().await?;
    let client = &cluster.client;
    say("installing the chart without its pods");
    let chart = tools::cache().join("peer/kubeflow-trainer").display().to_string();
    tools::helm(&["install", CHART, &chart, "--namespace", NAMESPACE, "--create-namespace", "--set", VALUES])
        .await
        .good();
    let _kwok = kwok(&cluster, &ALL_STAGES)?;
    // The runtime's pods do not meet a stricter one.
    cluster.fill("privileged", jobs).await?;
    let mut managers = Vec::new();
    let mut audits = Vec::new();
    for manager in &MANAGERS {
        managers.push((manager.name, start(manager, &cluster).await?));
        let user = format!("system:serviceaccount:{NAMESPACE}:{}", manager.deployment);
        audits.push((manager.name, Writes::of(&user, &cluster.audit_log())?));
    }
    let runtime = runtime(initializer)?;
    let accepted = async || Ok(tools::kubectl_with(&["apply", "--filename", "-"], &runtime).await.ok);
    until("the webhooks of the peer", 120, accepted).await?;

    say("applying the TrainJobs");
    let mut processes = cluster.processes.clone();
    processes.extend(managers.iter().map(|(name, part)| (*name, part.id())));
    let before: BTreeMap<_, _> =
        processes.iter().map(|(name, id)| Ok((*name, parts::cpu_seconds(*id)?))).collect::<anyhow::Result<_>>()?;
    let begun = Instant::now();
    load::objects(client, &train_jobs(), jobs, &train_job()).await?;
    until_complete(&cluster, &mut managers, jobs).await?;
    report.seconds = begun.elapsed().as_secs_f64();
    for (name, id) in &processes {
        report.cpu_seconds.insert(*name, parts::cpu_seconds(*id)? - before[name]);
    }
    for (_, part) in &managers {
        report.peak_rss_bytes += parts::peak_rss_bytes(part.id())?;
    }
    let mut writes = 0;
    for (name, audit) in &mut audits {
        writes += audit.read_on()?.len();
        println!("API writes of {name} a TrainJob, by kind");
        for (kind, count) in audit.by_kind() {
            println!("  {kind:<58}  {:.3}", count as f64 / jobs as f64);
        }
    }
    report.writes_per_attempt = writes as f64 / jobs as f64;
    report.load_after = parts::load()?;
    println!("\n{}", serde_json::to_string(&report)?);
    Ok(())
}

fn train_jobs() -> ApiResource {
    ApiResource::from_gvk(&GroupVersionKind::gvk("trainer.kubeflow.org", "v1alpha1", "TrainJob"))
}

/// The trainer's own runtime for PyTorch, with an initializer before it. kwok ends its pod as it ends that of a preparation.
fn runtime(initializer: bool) -> anyhow::Result<Value> {
    let path = tools::cache().join("peer/torch_distributed.yaml");
    let mut runtime: Value = serde_yaml_ng::from_str(&fs::read_to_string(&path)?)?;
    let jobs = runtime.pointer_mut("/spec/template/spec/replicatedJobs").and_then(Value::as_array_mut);
    let jobs = jobs.with_context(|| format!("{} has no replicatedJobs", path.display()))?;
    if initializer {
        const NAME: &str = "dataset-initializer";
        jobs[0]["dependsOn"] = json!([{"name": NAME, "status": "Complete"}]);
        let container = json!({"name": NAME, "image": "example.com/dataset-initializer"});
        let pod =
            json!({"metadata": {"labels": {names::LABEL_STAGE: names::PREPARE}}, "spec": {"containers": [container]}});
        let metadata = json!({"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": NAME}});
        jobs.insert(0, json!({"name": NAME, "template": {"metadata": metadata, "spec": {"template": pod}}}));
    }
    Ok(runtime)
}

/// A TrainJob of the size of a stage.
fn train_job() -> Value {
    let all = json!({"cpu": "16", "memory": "128Gi", "nvidia.com/gpu": load::GPUS_A_POD.to_string()});
    let gpus = json!({"nvidia.com/gpu": load::GPUS_A_POD.to_string()});
    json!({
        "apiVersion": "trainer.kubeflow.org/v1alpha1", "kind": "TrainJob", "metadata": {},
        "spec": {
            "runtimeRef": {"name": "torch-distributed"},
            "trainer": {"numNodes": load::NODES_A_STAGE, "resourcesPerNode": {"requests": all, "limits": gpus}},
        },
    })
}

async fn until_complete(cluster: &Cluster, managers: &mut [(&'static str, Part)], jobs: usize) -> anyhow::Result<()> {
    const PATIENCE: u64 = 300;
    let api = Api::<DynamicObject>::all_with(cluster.client.clone(), &train_jobs());
    let is = |job: &DynamicObject, kind: &str| {
        let conditions = job.data.pointer("/status/conditions").and_then(|c| c.as_array());
        conditions.into_iter().flatten().any(|c| c["type"] == kind && c["status"] == "True")
    };
    let (mut last, mut since) = (0, Instant::now());
    loop {
        for (_, part) in managers.iter_mut() {
            part.check()?;
        }
        let all = api.list(&ListParams::default()).await?.items;
        ensure!(!all.iter().any(|job| is(job, "Failed")), "a TrainJob has failed");
        let done = all.iter().filter(|job| is(job, "Complete")).count();
        if done == jobs {
            return Ok(());
        }
        if done != last {
            (last, since) = (done, Instant::now());
            say(&format!("{done} of {jobs}"));
        }
        ensure!(since.elapsed().as_secs() < PATIENCE, "{done} of {jobs} TrainJobs, and none more for {PATIENCE} s");
        tokio::time::sleep(std::time::Duration::from_secs(5)).await;
    }
}

/// Starts a manager, and plays what its pod would find.
async fn start(manager: &Manager, cluster: &Cluster) -> anyhow::Result<Part> {
    let Cluster { client, state, .. } = cluster;
    let certificates = state.join(manager.name);
    if certificates.exists() {
        fs::remove_dir_all(&certificates)?;
    }
    fs::create_dir_all(&certificates)?;
    fs::create_dir_all(CERTIFICATES)?;
    let Start { mut args, env } = crate::cluster::start(client, NAMESPACE, manager.deployment).await?;
    for arg in &mut args {
        if arg.starts_with("--config=") {
            *arg = format!("--config={}", config(manager, cluster).await?.display());
        }
    }
    // In a mount namespace of its own, which ends with it.
    let script = format!(
        "mount --bind \"$0\" {CERTIFICATES} && mount -t tmpfs none /run && mkdir -p /run/secrets/kubernetes.io/serviceaccount \
         && printf {NAMESPACE} > /run/secrets/kubernetes.io/serviceaccount/namespace && exec \"$@\""
    );
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", &script]).arg(&certificates);
    command.arg(tools::cache().join("bin").join(manager.program)).args(args);
    command.envs(env).env("KUBECONFIG", account(state, NAMESPACE, manager.deployment).await?);
    let part = Part::start(manager.name, &mut command, &cluster.logs())?;
    project(manager, cluster, &certificates).await?;
    let (port, number) = manager.port;
    let slice = json!({
        "metadata": {"name": manager.service, "labels": {"kubernetes.io/service-name": manager.service}},
        "addressType": "IPv4", "endpoints": [{"addresses": [ADDRESS]}], "ports": [{"name": port, "port": number}],
    });
    let slices = Api::<EndpointSlice>::namespaced(client.clone(), NAMESPACE);
    slices.create(&PostParams::default(), &serde_json::from_value(slice)?).await?;
    Ok(part)
}

/// A manager's configuration as a file.
async fn config(manager: &Manager, cluster: &Cluster) -> anyhow::Result<PathBuf> {
    let name = manager.config;
    let map = Api::<ConfigMap>::namespaced(cluster.client.clone(), NAMESPACE).get(name).await?;
    let text = map.data.and_then(|d| d.into_values().next()).with_context(|| format!("ConfigMap {name} is empty"))?;
    let path = cluster.state.join(format!("{}.yaml", manager.name));
    fs::write(&path, text)?;
    Ok(path)
}

/// Writes the certificates into files once the manager has made them, as a kubelet does.
async fn project(manager: &Manager, cluster: &Cluster, folder: &Path) -> anyhow::Result<()> {
    let secrets = Api::<Secret>::namespaced(cluster.client.clone(), NAMESPACE);
    // The chart makes them with empty values.
    let made = async || {
        let data = secrets.get(manager.secret).await?.data.unwrap_or_default();
        Ok(!data.is_empty() && data.values().all(|value| !value.0.is_empty()))
    };
    until("the webhooks' certificates", 60, made).await?;
    let files = secrets.get(manager.secret).await?.data.unwrap_or_default();
    // Each at once, and last the one that the manager waits for.
    let (last, rest): (Vec<_>, Vec<_>) = files.into_iter().partition(|(name, _)| name == "tls.crt");
    for (name, bytes) in rest.into_iter().chain(last) {
        let aside = folder.join(format!("{name}.new"));
        fs::write(&aside, bytes.0)?;
        fs::rename(aside, folder.join(name))?;
    }
    Ok(())
}

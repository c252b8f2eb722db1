//! The control plane of the bench, which `tests/bench-operator.sh` starts, and what is put beside it: nodes, the chart without
//! its pods, accounts, and kwok.

use crate::load;
use crate::parts::{self, Part};
use crate::say;
use anyhow::{Context, ensure};
use e2e::{RELEASE, SYSTEM, tools};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Node;
use kube::api::ListParams;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client, Config};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tokio::process::Command;
use tokio::time::sleep;

/// How often something is looked at that is waited for.
pub const POLL: Duration = Duration::from_secs(2);
/// What kwok plays where pods come to their end.
pub const ALL_STAGES: [&str; 2] = ["run.yaml", "end.yaml"];
/// The addresses of pods; `bench-operator.sh` has this machine answer them.
const POD_CIDR: &str = "10.98.0.0/16";

/// The control plane of the bench.
pub struct Cluster {
    /// The API server, as its administrator.
    pub client: Client,
    /// Where its state and logs are.
    pub state: PathBuf,
    /// Its processes.
    pub processes: BTreeMap<&'static str, u32>,
}

impl Cluster {
    pub async fn connect() -> anyhow::Result<Self> {
        let state = tools::cache().join("cluster");
        let client = client(&tools::kubeconfig()).await?;
        Ok(Self { client, processes: parts::control_plane(&state)?, state })
    }

    /// Makes namespaces of a Pod Security Standard, and as many nodes as so many jobs take at once.
    pub async fn fill(&self, standard: &str, jobs: usize) -> anyhow::Result<()> {
        say("making nodes and namespaces");
        load::namespaces(&self.client, standard).await?;
        let nodes = load::nodes(&self.client, jobs).await?;
        until("nodes that are Ready", 300, async || Ok(ready_nodes(&self.client).await? == nodes)).await
    }

    /// Where its parts write what they have to say.
    pub fn logs(&self) -> PathBuf {
        self.state.join("log")
    }

    /// The API server's record of all writes.
    pub fn audit_log(&self) -> PathBuf {
        self.logs().join("audit.log")
    }
}

/// Polls until `condition` holds.
pub async fn until(what: &str, seconds: u64, condition: impl AsyncFn() -> anyhow::Result<bool>) -> anyhow::Result<()> {
    let begun = Instant::now();
    while !condition().await? {
        ensure!(begun.elapsed().as_secs() < seconds, "{what}: not after {seconds} s");
        sleep(POLL).await;
    }
    Ok(())
}

/// The API server, as whom a kubeconfig says.
pub async fn client(kubeconfig: &Path) -> anyhow::Result<Client> {
    let config = Kubeconfig::read_from(kubeconfig).context("the control plane is not up: run `make bench-operator`")?;
    Ok(Client::try_from(Config::from_custom_kubeconfig(config, &KubeConfigOptions::default()).await?)?)
}

/// Installs all of the chart, with no pod of the operator.
pub async fn install() {
    let chart = tools::root().join("charts/rlhf-operator").display().to_string();
    let args = ["install", RELEASE, &chart, "--namespace", SYSTEM, "--create-namespace", "--set", "replicas=0"];
    tools::helm(&args).await.good();
}

/// With what a Deployment starts its program.
#[derive(Clone)]
pub struct Start {
    /// Its arguments.
    pub args: Vec<String>,
    /// What is set in its environment to a value of its own.
    pub env: Vec<(String, String)>,
}

/// With what a Deployment would start its program.
pub async fn start(client: &Client, namespace: &str, deployment: &str) -> anyhow::Result<Start> {
    let deployment = Api::<Deployment>::namespaced(client.clone(), namespace).get(deployment).await?;
    let pod = deployment.spec.template.spec.context("the Deployment has no pod")?;
    let container = pod.containers.into_iter().next().context("the Deployment has no container")?;
    let args = container.args.context("the Deployment's container has no arguments")?;
    let env = container.env.into_iter().flatten().filter_map(|var| Some((var.name, var.value?)));
    Ok(Start { args, env: env.collect() })
}

/// A kubeconfig with a new token of an account.
pub async fn account(state: &Path, namespace: &str, name: &str) -> anyhow::Result<PathBuf> {
    let token = tools::kubectl(&["create", "token", name, "--namespace", namespace, "--duration", "8h"]).await.good();
    let mut config = Kubeconfig::read_from(tools::kubeconfig())?;
    for user in &mut config.auth_infos {
        user.auth_info =
            Some(kube::config::AuthInfo { token: Some(token.trim().to_owned().into()), ..Default::default() });
    }
    for context in config.contexts.iter_mut().filter_map(|c| c.context.as_mut()) {
        context.namespace = Some(namespace.into());
    }
    let path = state.join(format!("{name}.conf"));
    std::fs::write(&path, serde_yaml_ng::to_string(&config)?)?;
    Ok(path)
}

/// Starts kwok, which plays these files.
pub fn kwok(cluster: &Cluster, files: &[&str]) -> anyhow::Result<Part> {
    let mut command = Command::new(tools::cache().join("bin/kwok"));
    command.arg("--kubeconfig").arg(tools::kubeconfig()).args(["--cidr", POD_CIDR]);
    command.args(["--manage-all-nodes", "--node-lease-duration-seconds", "0", "--server-address", ""]);
    for file in files {
        command.arg("--config").arg(tools::root().join("tests/scale").join(file));
    }
    Part::start("kwok", &mut command, &cluster.logs())
}

async fn ready_nodes(client: &Client) -> anyhow::Result<usize> {
    let nodes = Api::<Node>::all(client.clone()).list(&ListParams::default()).await?;
    let ready = |n: &&Node| {
        let status = n.status.iter().flat_map(|s| s.conditions.iter().flatten());
        let tainted = n.spec.as_ref().is_some_and(|s| s.taints.as_ref().is_some_and(|t| !t.is_empty()));
        !tainted && status.into_iter().any(|c| c.type_ == "Ready" && c.status == "True")
    };
    Ok(nodes.items.iter().filter(ready).count())
}

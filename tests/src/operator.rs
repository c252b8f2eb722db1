//! An operator that the chart installed, and what is seen of it.

use crate::RELEASE;
use crate::scene::eventually;
use crate::tools::{self, Answer, helm, kubectl};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::Pod;
use kube::api::ListParams;
use kube::{Api, Client, ResourceExt};
use std::time::{SystemTime, UNIX_EPOCH};

/// A release of the chart, in a namespace of its own.
#[derive(Clone)]
pub struct Operator {
    client: Client,
    /// The namespace of the release.
    pub namespace: String,
    /// The class of the jobs that it runs, where it has one.
    pub class: Option<String>,
    /// Values of the chart that it is always installed with.
    settings: Vec<String>,
}

/// What Helm left.
pub struct Uninstalled {
    /// Objects of any kind with the chart's labels, as kind and name.
    pub labelled: Vec<String>,
    /// Helm's own records of the release.
    pub records: String,
}

impl Operator {
    pub(crate) fn new(client: Client, namespace: &str, settings: &[&str]) -> Self {
        let settings = settings.iter().map(|s| (*s).to_owned()).collect();
        Self { client, namespace: namespace.into(), class: None, settings }
    }

    pub(crate) fn of_class(self, class: &str) -> Self {
        Self { class: Some(class.into()), ..self }
    }

    /// Installs the chart, or upgrades it, with the images that `tests/cluster/images.sh` made, under the restricted
    /// standard, and with more of the chart's values.
    pub async fn install(&self, values: &[&str]) {
        let namespace = serde_json::json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {
            "name": self.namespace, "labels": {"pod-security.kubernetes.io/enforce": "restricted"}}});
        tools::kubectl_with(&["apply", "--filename", "-"], &namespace).await.good();
        let chart = tools::root().join("charts/rlhf-operator").display().to_string();
        // Images keep their tag when they are built anew; another annotation makes another pod.
        let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("the clock is right").as_secs();
        let run = format!("podAnnotations.tests=run-{now}");
        // The pods of a namespace share few cores with those of others.
        let ours = ["image.tag=dev", "trainer.image.tag=dev", "resources.requests.cpu=10m"];
        let settings = ours.into_iter().chain(self.settings.iter().map(String::as_str)).chain(values.iter().copied());
        let mut args = vec!["upgrade", "--install", RELEASE, &chart, "--namespace", &self.namespace];
        args.extend(["--wait", "--timeout", "2m", "--set-string", &run]);
        args.extend(settings.flat_map(|value| ["--set", value]));
        let Answer { ok, errors, .. } = helm(&args).await;
        if !ok {
            let pods = kubectl(&["describe", "pods", "--namespace", &self.namespace]).await;
            panic!("the operator cannot be installed: {errors}\n{}", pods.output);
        }
    }

    /// Uninstalls the chart and waits until what it ran is gone.
    pub async fn uninstall(&self) {
        let args = ["uninstall", RELEASE, "--namespace", &self.namespace, "--ignore-not-found", "--wait"];
        helm(&[&args[..], &["--timeout", "2m"]].concat()).await.good();
        let no_pods = async || self.pods().await.is_empty();
        eventually("the end of the operator's pod", no_pods).await;
    }

    /// Uninstalls the chart and looks for what stays.
    pub async fn uninstall_and_look(&self) -> Uninstalled {
        self.uninstall().await;
        let args = ["get", "secrets", "--namespace", &self.namespace, "--selector", "owner=helm", "--output", "name"];
        let records = kubectl(&args).await.good();
        Uninstalled { labelled: labelled("app.kubernetes.io/name=rlhf-operator").await, records }
    }

    /// The name by which the API server knows it.
    pub fn account(&self) -> String {
        service_account(&self.namespace)
    }

    /// The API server, as its administrator.
    pub fn client(&self) -> Client {
        self.client.clone()
    }

    /// The API of its pods.
    pub fn pods_api(&self) -> Api<Pod> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    /// Its pods.
    pub async fn pods(&self) -> Vec<Pod> {
        let selector = ListParams::default().labels(&format!("app.kubernetes.io/instance={RELEASE}"));
        self.pods_api().list(&selector).await.unwrap_or_else(|e| panic!("the operator's pods: {e}")).items
    }

    /// Its pod that leads, if one does.
    pub async fn leader(&self) -> Option<Pod> {
        let lease = Api::<Lease>::namespaced(self.client.clone(), &self.namespace).get(RELEASE).await;
        let lease = lease.unwrap_or_else(|e| panic!("Lease {RELEASE}: {e}"));
        let holder = lease.spec.and_then(|s| s.holder_identity).unwrap_or_default();
        self.pods().await.into_iter().find(|p| holder.starts_with(&format!("{}_", p.name_any())))
    }
}

/// The name by which the API server knows an operator in a namespace.
pub fn service_account(namespace: &str) -> String {
    format!("system:serviceaccount:{namespace}:{RELEASE}")
}

/// Objects of every kind that match a selector, as kind and name.
pub async fn labelled(selector: &str) -> Vec<String> {
    let kinds = kubectl(&["api-resources", "--verbs=list", "--output", "name"]).await.good();
    let kinds: Vec<&str> = kinds.lines().collect();
    let found = kubectl(&["get", &kinds.join(","), "--all-namespaces", "--selector", selector, "--output", "name"])
        .await
        .good();
    found.lines().map(str::to_owned).collect()
}

//! Kueue itself, from its own chart, and queues for tests.
//!
//! It is installed once, by whichever test needs it first, and stays. It looks at labelled namespaces only, so that no other
//! test's objects pass through its webhooks. Left out of the chart is the aggregated API of pending workloads: this
//! cluster has no front proxy, and an API service that does not answer holds up the deletion of every namespace.

use crate::scene::{Scene, eventually};
use crate::tools::{cache, helm_with, kubectl, kubectl_with};
use futures::FutureExt;
use k8s_openapi::api::core::v1::Namespace;
use kube::api::{ApiResource, DynamicObject, GroupVersionKind, ListParams, Patch, PatchParams};
use kube::{Api, ResourceExt};
use serde::Deserialize;
use serde_json::{Value, json};
use std::panic::AssertUnwindSafe;
use tokio::sync::Mutex;

const API: &str = "kueue.x-k8s.io/v1beta2";
const NAMESPACE: &str = "kueue-system";
const CHOSEN: &str = "rlhf.dev/queues";
static INSTALLED: Mutex<bool> = Mutex::const_new(false);

/// Two flavors of nodes, `a` and `b`, of which each test has its own, chosen by labels of the one node.
pub const FLAVORS: [&str; 2] = ["a", "b"];

/// Kueue's objects for one scene: a LocalQueue named [`Queue::NAME`] that leads to a ClusterQueue of the scene's name.
pub struct Queue<'a> {
    scene: &'a Scene,
}

impl<'a> Queue<'a> {
    /// The LocalQueue.
    pub const NAME: &'static str = "team-a";

    /// Installs Kueue if need be, and makes the queue with quota for so many pods of each flavor.
    pub async fn new(scene: &'a Scene, pods: [u32; 2]) -> Self {
        let mut installed = INSTALLED.lock().await;
        if !*installed {
            install().await;
            *installed = true;
        }
        drop(installed);
        let queue = Self { scene };
        let chosen = Patch::Merge(json!({"metadata": {"labels": {CHOSEN: "yes"}}}));
        let namespaces = Api::<Namespace>::all(scene.client.clone());
        namespaces.patch(&scene.namespace, &PatchParams::default(), &chosen).await.expect("a namespace takes a label");
        let node = kubectl(&["get", "nodes", "--output", "name"]).await.good();
        for flavor in FLAVORS {
            let label = format!("{}={flavor}", queue.label(flavor));
            kubectl(&["label", "--overwrite", node.trim(), &label]).await.good();
            let labels = json!({queue.label(flavor): flavor});
            queue.put("ResourceFlavor", &queue.flavor(flavor), json!({"nodeLabels": labels})).await;
        }
        queue.put("LocalQueue", Self::NAME, json!({"clusterQueue": scene.namespace})).await;
        queue.allow(pods).await;
        queue
    }

    /// Sets the quota, in pods of each flavor.
    pub async fn allow(&self, pods: [u32; 2]) {
        let plenty = |name: &str| json!({"name": name, "nominalQuota": "100Gi"});
        let flavor = |(flavor, pods): (&str, u32)| {
            json!({"name": self.flavor(flavor), "resources": [
            plenty("cpu"), plenty("memory"), {"name": "pods", "nominalQuota": pods}]})
        };
        let spec = json!({
            "namespaceSelector": {},
            "preemption": {"withinClusterQueue": "LowerPriority"},
            "resourceGroups": [{
                "coveredResources": ["cpu", "memory", "pods"],
                "flavors": FLAVORS.into_iter().zip(pods).map(flavor).collect::<Vec<_>>(),
            }],
        });
        self.put("ClusterQueue", &self.scene.namespace, spec).await;
    }

    /// A priority for workloads.
    pub async fn priority(&self, name: &str, value: i32) {
        let class =
            json!({"apiVersion": API, "kind": "WorkloadPriorityClass", "metadata": {"name": name}, "value": value});
        apply(&class).await;
    }

    /// The label by which a flavor's nodes are chosen.
    pub fn label(&self, flavor: &str) -> String {
        format!("rlhf.dev/{}-{flavor}", &self.scene.namespace[..self.scene.namespace.len().min(40)])
    }

    fn flavor(&self, flavor: &str) -> String {
        format!("{}-{flavor}", self.scene.namespace)
    }

    /// Pods that count against the quota now, of each flavor.
    pub async fn used(&self) -> [u64; 2] {
        let kind = kind("ClusterQueue");
        let api = Api::<DynamicObject>::all_with(self.scene.client.clone(), &kind);
        let queue = api.get(&self.scene.namespace).await.unwrap_or_else(|e| panic!("ClusterQueue: {e}"));
        let flavors = queue.data.pointer("/status/flavorsReservation").and_then(Value::as_array);
        let pods = |name: String| {
            let flavor = flavors.into_iter().flatten().find(|f| f["name"] == name)?;
            let pods = flavor["resources"].as_array()?.iter().find(|r| r["name"] == "pods")?;
            pods["total"].as_str()?.parse().ok()
        };
        FLAVORS.map(|flavor| pods(self.flavor(flavor)).unwrap_or(0))
    }

    /// Waits until so many pods of each flavor count against the quota.
    pub async fn await_used(&self, pods: [u64; 2]) {
        eventually(&format!("a use of {pods:?} pods"), async || self.used().await == pods).await;
    }

    /// The Workloads that were made: the Job, the pods, and the priority class of each.
    pub async fn workloads(&self) -> Vec<(String, u64, Option<String>)> {
        let kind = kind("Workload");
        let api = Api::<DynamicObject>::namespaced_with(self.scene.client.clone(), &self.scene.namespace, &kind);
        let all = api.list(&ListParams::default()).await.unwrap_or_else(|e| panic!("Workloads: {e}"));
        let describe = |w: DynamicObject| {
            let job = w.owner_references().first().map(|o| o.name.clone()).unwrap_or_default();
            let pods = w.data.pointer("/spec/podSets/0/count").and_then(Value::as_u64).unwrap_or_default();
            let class = w.data.pointer("/spec/priorityClassRef/name").and_then(Value::as_str).map(str::to_owned);
            (job, pods, class)
        };
        let mut found: Vec<_> = all.into_iter().map(describe).collect();
        found.sort();
        found
    }

    async fn put(&self, kind: &str, name: &str, spec: Value) {
        let mut object = json!({"apiVersion": API, "kind": kind, "metadata": {"name": name}, "spec": spec});
        if kind == "LocalQueue" {
            object["metadata"]["namespace"] = json!(self.scene.namespace);
        }
        apply(&object).await;
    }
}

fn kind(kind: &str) -> ApiResource {
    ApiResource::from_gvk(&GroupVersionKind::gvk("kueue.x-k8s.io", "v1beta2", kind))
}

async fn apply(object: &Value) {
    kubectl_with(&["apply", "--server-side", "--force-conflicts", "--filename", "-"], object).await.good();
}

async fn install() {
    let chart = cache().join("kueue/chart");
    let path = chart.display().to_string();
    let config = json!({
        "apiVersion": "config.kueue.x-k8s.io/v1beta2", "kind": "Configuration",
        "health": {"healthProbeBindAddress": ":8081"},
        "metrics": {"bindAddress": ":8443"},
        "webhook": {"port": 9443},
        "leaderElection": {"leaderElect": false},
        "integrations": {"frameworks": ["batch/job"]},
        "managedJobsNamespaceSelector": {"matchLabels": {CHOSEN: "yes"}},
    });
    let values = json!({
        "controllerManager": {
            "featureGates": [{"name": "VisibilityOnDemand", "enabled": false}],
            "manager": {
                "image": {"repository": "docker.io/rlhf/kueue", "tag": "dev", "pullPolicy": "Never"},
                "resources": {"requests": {"cpu": "10m", "memory": "128Mi"}},
            },
            "readinessProbe": {"initialDelaySeconds": 1},
        },
        "managerConfig": {"controllerManagerConfigYaml": config.to_string()},
    });
    let args = ["template", "kueue", &path, "--namespace", NAMESPACE, "--values", "-"];
    let manifests = helm_with(&args, &values).await;
    assert!(manifests.ok, "{path}: {}; `tests/cluster/images.sh kueue` makes chart and image", manifests.errors);
    let labels = json!({"pod-security.kubernetes.io/enforce": "restricted"});
    let mut items =
        vec![json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE, "labels": labels}})];
    for document in serde_yaml_ng::Deserializer::from_str(&manifests.output) {
        let object = Value::deserialize(document).unwrap_or_else(|e| panic!("the chart of Kueue: {e}"));
        if object["kind"].is_string() && object["kind"] != "APIService" {
            items.push(object);
        }
    }
    apply(&json!({"apiVersion": "v1", "kind": "List", "items": items})).await;
    // Its pod is ready while it still makes the certificates of its webhooks.
    let flavor = json!({"apiVersion": API, "kind": "ResourceFlavor", "metadata": {"name": "probe"}});
    let takes = ["create", "--dry-run=server", "--filename", "-"];
    let serves = eventually("Kueue", async || kubectl_with(&takes, &flavor).await.ok);
    if AssertUnwindSafe(serves).catch_unwind().await.is_err() {
        let pods = kubectl(&["describe", "pods", "--namespace", NAMESPACE]).await;
        let log =
            kubectl(&["logs", "deployment/kueue-controller-manager", "--namespace", NAMESPACE, "--tail", "40"]).await;
        panic!("Kueue does not serve: {}\n{}{}", pods.output, log.output, log.errors);
    }
}

//! What all tests share: the cores of this machine, and the operator.

use crate::scene::{Scene, eventually};
use crate::tools::{self, Answer, helm, kubeconfig, kubectl};
use crate::{RELEASE, SYSTEM};
use futures::FutureExt;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::Pod;
use kube::api::ListParams;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client, Config, ResourceExt};
use serde_json::{Value, json};
use std::any::type_name_of_val;
use std::panic::{AssertUnwindSafe, resume_unwind};
use std::time::{SystemTime, UNIX_EPOCH};
use tokio::runtime::Builder;
use tokio::sync::{Mutex, MutexGuard, RwLock, RwLockReadGuard};
use tokio::task::LocalSet;

/// What is known of the operator. Whoever holds the lock can rely on it.
static OPERATOR: RwLock<Operator> = RwLock::const_new(Operator::Unknown);
/// Trainers take all cores of a small machine, so one test at a time runs them.
static CORES: Mutex<()> = Mutex::const_new(());

#[derive(PartialEq)]
enum Operator {
    /// An earlier run may have left something.
    Unknown,
    Absent,
    /// Not whole, should installing fail: the tests that follow need not try again.
    Installing,
    Installed,
}

/// Runs a test in a namespace of its own, with the operator there. A failed test prints what the namespace holds; its
/// namespace goes all the same, so that its pods do not disturb the next test.
pub fn on_the_cluster<F: AsyncFnOnce(&Scene)>(test: F) {
    let name = name_of(&test);
    run(async move {
        let _operator = operator().await;
        let cores = CORES.lock().await;
        play(&name, Some(cores), test).await;
    });
}

/// Runs a test while no other runs, with nothing installed before; the test may install and uninstall the operator.
pub fn on_the_cluster_alone<F: AsyncFnOnce(&Scene)>(test: F) {
    let name = name_of(&test);
    run(async move {
        let mut operator = OPERATOR.write().await;
        remove(&mut operator).await;
        play(&name, None, test).await;
    });
}

/// The namespace for a test: the name of the function that made the closure `test`, in a namespace's letters.
fn name_of<F>(test: &F) -> String {
    let path = type_name_of_val(test).trim_end_matches("::{{closure}}");
    path.rsplit("::").next().unwrap_or(path).replace('_', "-")
}

fn run(test: impl Future<Output = ()>) {
    let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
    LocalSet::new().block_on(&runtime, test);
}

async fn play<F: AsyncFnOnce(&Scene)>(name: &str, cores: Option<MutexGuard<'static, ()>>, test: F) {
    let scene = Scene::new(client().await, name, cores).await;
    let result = AssertUnwindSafe(test(&scene)).catch_unwind().await;
    if result.is_err() {
        scene.report().await;
    }
    scene.leave().await;
    if let Err(panic) = result {
        resume_unwind(panic);
    }
}

async fn client() -> Client {
    let path = kubeconfig();
    let advice = "start the cluster first: `make cluster-up images`, or `make test` for all";
    let read = Kubeconfig::read_from(&path).unwrap_or_else(|e| panic!("{}: {e}; {advice}", path.display()));
    let config = Config::from_custom_kubeconfig(read, &KubeConfigOptions::default()).await;
    let client = Client::try_from(config.unwrap_or_else(|e| panic!("{}: {e}", path.display()))).expect("a client");
    client
        .apiserver_version()
        .await
        .unwrap_or_else(|e| panic!("the cluster of {} does not answer: {e}; {advice}", path.display()));
    client
}

/// The operator, installed by whoever comes first.
async fn operator() -> RwLockReadGuard<'static, Operator> {
    let there = OPERATOR.read().await;
    if *there == Operator::Installed {
        return there;
    }
    drop(there);
    let mut there = OPERATOR.write().await;
    if *there != Operator::Installed {
        remove(&mut there).await;
        *there = Operator::Installing;
        install(true).await;
        *there = Operator::Installed;
    }
    there.downgrade()
}

/// Sees to it that no operator is there.
async fn remove(operator: &mut Operator) {
    assert!(
        *operator != Operator::Installing,
        "the operator could not be installed, as the first test that needed it says"
    );
    if *operator != Operator::Absent {
        no_other_jobs().await;
        uninstall().await;
        *operator = Operator::Absent;
    }
}

/// Changes the definition of RLHFJobs by a JSON patch, of which it then knows nothing: Helm would not write over it.
pub async fn change_definition(change: Value) {
    for (kind, patch) in [("json", json!([change])), ("merge", json!({"metadata": {"managedFields": [{}]}}))] {
        let (kind, patch) = (format!("--type={kind}"), patch.to_string());
        kubectl(&["patch", "crd", "rlhfjobs.rlhf.dev", &kind, "--patch", &patch]).await.good();
    }
}

/// Installs the chart with the images that `tests/cluster/images.sh` made, under the restricted standard.
pub async fn install(keep_crds: bool) {
    install_with(keep_crds, &[]).await;
}

/// The same, with more of the chart's values.
pub async fn install_with(keep_crds: bool, more: &[&str]) {
    let namespace = serde_json::json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {
        "name": SYSTEM, "labels": {"pod-security.kubernetes.io/enforce": "restricted"}}});
    tools::kubectl_with(&["apply", "--filename", "-"], &namespace).await.good();
    let chart = tools::root().join("charts/rlhf-operator").display().to_string();
    // Images keep their tag when they are built anew; another annotation makes another pod.
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("the clock is right").as_secs();
    let values = [
        "image.tag=dev".to_owned(),
        "trainer.image.tag=dev".into(),
        format!("crds.keep={keep_crds}"),
        "dashboard.enabled=true".into(),
        // One works, one stands by.
        "replicas=2".into(),
    ];
    let run = format!("podAnnotations.tests=run-{now}");
    let mut args = vec!["upgrade", "--install", RELEASE, &chart, "--namespace", SYSTEM, "--wait", "--timeout", "1m"];
    args.extend(values.iter().map(String::as_str).chain(more.iter().copied()).flat_map(|v| ["--set", v]));
    args.extend(["--set-string", &run]);
    let Answer { ok, errors, .. } = helm(&args).await;
    if !ok {
        let pods = kubectl(&["describe", "pods", "--namespace", SYSTEM]).await;
        panic!("the operator cannot be installed: {errors}\n{}", pods.output);
    }
}

/// These tests take the definition of RLHFJobs away, and with it every RLHFJob: they must be the tests' own.
async fn no_other_jobs() {
    let columns = "custom-columns=NAMESPACE:.metadata.namespace,NAME:.metadata.name";
    let jobs = kubectl(&["get", "rlhfjobs", "--all-namespaces", "--no-headers", "--output", columns]).await;
    let demo = jobs.output.lines().find(|line| jobs.ok && line.starts_with("demo "));
    assert!(demo.is_none(), "the cluster runs the demo, which these tests would delete: `make demo-down` first");
}

/// What Helm left.
pub struct Uninstalled {
    /// Objects of any kind with the chart's labels, as kind and name.
    pub labelled: Vec<String>,
    /// Helm's own records of the release.
    pub records: String,
}

/// Uninstalls the chart and waits until what it ran is gone.
pub async fn uninstall() -> Uninstalled {
    helm(&["uninstall", RELEASE, "--namespace", SYSTEM, "--ignore-not-found", "--wait", "--timeout", "1m"])
        .await
        .good();
    let no_pods = async || kubectl(&["get", "pods", "--namespace", SYSTEM, "--output", "name"]).await.good().is_empty();
    eventually("the end of the operator's pod", 60, no_pods).await;
    let records = kubectl(&["get", "secrets", "--namespace", SYSTEM, "--selector", "owner=helm", "--output", "name"])
        .await
        .good();
    Uninstalled { labelled: labelled("app.kubernetes.io/name=rlhf-operator").await, records }
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

/// The operator's pods.
pub async fn operator_pods(scene: &Scene) -> (Api<Pod>, Vec<Pod>) {
    let api = Api::namespaced(scene.client.clone(), SYSTEM);
    let selector = ListParams::default().labels(&format!("app.kubernetes.io/instance={RELEASE}"));
    let pods = api.list(&selector).await.unwrap_or_else(|e| panic!("the operator's pods: {e}"));
    (api, pods.items)
}

/// The operator's pod that leads.
pub async fn leader(scene: &Scene) -> Option<Pod> {
    let lease = Api::<Lease>::namespaced(scene.client.clone(), SYSTEM).get(RELEASE).await;
    let lease = lease.unwrap_or_else(|e| panic!("Lease {RELEASE}: {e}"));
    let holder = lease.spec.and_then(|s| s.holder_identity).unwrap_or_default();
    let (_, pods) = operator_pods(scene).await;
    pods.into_iter().find(|p| holder.starts_with(&format!("{}_", p.name_any())))
}

/// How many passes over jobs the leading operator has made since it started, by its own metrics.
pub async fn operator_passes(scene: &Scene) -> u64 {
    let pod = leader(scene).await.expect("an operator leads");
    let ip = pod.status.as_ref().and_then(|s| s.pod_ip.clone()).expect("the operator's pod has an address");
    let client = reqwest::Client::builder().no_proxy().build().expect("an HTTP client");
    let answer = client.get(format!("http://{ip}:8080/metrics")).send().await.expect("the operator serves metrics");
    let text = answer.text().await.expect("the operator's metrics are text");
    let line = text.lines().find_map(|l| l.strip_prefix("rlhf_operator_reconcile_duration_seconds_count "));
    line.and_then(|count| count.parse().ok()).unwrap_or_else(|| panic!("no count of passes in\n{text}"))
}

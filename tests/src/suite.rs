//! What tests share, and which of them run side by side.
//!
//! Most tests run side by side. They rely on one operator that minds all namespaces, or have one of their own, which minds
//! the RLHFJobs of a class in their namespace: they choose its settings, or kill it. Then, one after the other, those that
//! disturb everything: the control plane, or the definition of RLHFJobs.

use crate::manifest;
use crate::operator::Operator;
use crate::scene::{Scene, eventually};
use crate::tools::{cache, helm, kubeconfig, kubectl, root};
use crate::turns::{Kind, Turns};
use crate::{RELEASE, SYSTEM};
use futures::FutureExt;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use serde_json::{Value, json};
use std::any::type_name_of_val;
use std::fs::OpenOptions;
use std::io::Write;
use std::panic::{AssertUnwindSafe, resume_unwind};
use std::time::{Duration, Instant};
use tokio::runtime::Builder;
use tokio::sync::Mutex;
use tokio::task::LocalSet;

/// Tests at a time. More than cores, since most of a test's time is the cluster's: pods are placed, start and end.
const WIDTH: usize = 5;
static TURNS: Turns = Turns::new(WIDTH);
static GROUND: Mutex<Ground> = Mutex::const_new(Ground::Unknown);

/// What of the product is in the cluster before a test begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ground {
    /// An earlier run, or a test, may have left something.
    Unknown,
    /// It could not be made what a test needed: those that follow need not try again.
    Broken,
    /// Nothing.
    Bare,
    /// The definition of RLHFJobs, and an operator for all namespaces.
    Operator,
}

/// Runs a test in a namespace of its own, beside others, with an operator that they share. A failed test prints what the
/// namespace holds; its namespace goes all the same, so that its pods do not disturb other tests.
pub fn on_the_cluster<F: AsyncFnOnce(&Scene) + Send>(test: F) {
    let name = name_of(&test);
    run(&name, Kind::Beside, async |client| {
        ground(Ground::Operator, &client).await;
        let operator = Operator::new(client.clone(), SYSTEM, &[]);
        play(Scene::new(client, &name, operator).await, test).await;
    });
}

/// The same, with an operator of the test's own, that minds this namespace and is installed with these of the chart's
/// values. The other one leaves the namespace's jobs alone.
pub fn on_the_cluster_with<F: AsyncFnOnce(&Scene) + Send>(values: &[&str], test: F) {
    let name = name_of(&test);
    run(&name, Kind::Beside, async |client| {
        ground(Ground::Operator, &client).await;
        let (watched, class) = (format!("watchNamespaces={{{name}}}"), format!("class={name}"));
        let settings = [&["crds.enabled=false", &watched, &class], values].concat();
        let operator = Operator::new(client.clone(), &format!("{name}-op"), &settings).of_class(&name);
        let scene = Scene::new(client, &name, operator).await;
        scene.operator.install(&[]).await;
        play(scene, test).await;
    });
}

/// Runs a test while no other runs, with nothing installed before; the test may install and uninstall the operator.
pub fn on_the_cluster_alone<F: AsyncFnOnce(&Scene) + Send>(test: F) {
    alone(Kind::Alone, test);
}

/// The same, after all others: what the test does to the control plane its controllers may not get over, which run without a
/// leader's lease here and so never start anew.
pub fn on_the_cluster_at_last<F: AsyncFnOnce(&Scene) + Send>(test: F) {
    alone(Kind::Last, test);
}

fn alone<F: AsyncFnOnce(&Scene) + Send>(kind: Kind, test: F) {
    let name = name_of(&test);
    run(&name, kind, async |client| {
        ground(Ground::Bare, &client).await;
        *GROUND.lock().await = Ground::Unknown;
        let operator = Operator::new(client.clone(), SYSTEM, &[]);
        play(Scene::new(client, &name, operator).await, test).await;
    });
}

/// The namespace for a test: the name of the function that made the closure `test`, in a namespace's letters.
fn name_of<F>(test: &F) -> String {
    let path = type_name_of_val(test).trim_end_matches("::{{closure}}");
    path.rsplit("::").next().unwrap_or(path).replace('_', "-")
}

/// Runs a test when its turn comes, on a thread whose stack holds what a test awaits as it is compiled without being
/// optimized.
fn run(name: &str, kind: Kind, test: impl AsyncFnOnce(Client) + Send) {
    const STACK_BYTES: usize = 32 << 20;
    let result = std::thread::scope(|threads| {
        let run = || run_here(name, kind, test);
        let thread = std::thread::Builder::new().name(name.into()).stack_size(STACK_BYTES).spawn_scoped(threads, run);
        thread.expect("a thread").join()
    });
    result.unwrap_or_else(|panic| resume_unwind(panic));
}

fn run_here(name: &str, kind: Kind, test: impl AsyncFnOnce(Client)) {
    let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
    LocalSet::new().block_on(&runtime, async {
        let came = Instant::now();
        let turn = TURNS.take(kind).await;
        let began = Instant::now();
        let result = AssertUnwindSafe(async { test(client().await).await }).catch_unwind().await;
        note(name, kind, began - came, began.elapsed());
        drop(turn);
        result.unwrap_or_else(|panic| resume_unwind(panic));
    });
}

/// Where a run's time goes: a line for each test in a log.
fn note(name: &str, kind: Kind, waited: Duration, took: Duration) {
    let log = OpenOptions::new().create(true).append(true).open(cache().join("logs/test-cluster-times.log"));
    if let Ok(mut log) = log {
        // The log is for who wants to know; a test does not fail for want of it.
        let _ = writeln!(log, "{:6.1} s, after {:6.1} s, {kind:?}: {name}", took.as_secs_f64(), waited.as_secs_f64());
    }
}

async fn play<F: AsyncFnOnce(&Scene)>(scene: Scene, test: F) {
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

/// Makes the ground what a kind of tests needs; whoever comes first does it.
async fn ground(wanted: Ground, client: &Client) {
    let mut ground = GROUND.lock().await;
    assert!(*ground != Ground::Broken, "the operator could not be installed, as the first test that needed it says");
    if *ground == wanted {
        return;
    }
    let before = std::mem::replace(&mut *ground, Ground::Broken);
    let shared = Operator::new(client.clone(), SYSTEM, &["crds.enabled=false", "dashboard.enabled=true"]);
    if matches!(before, Ground::Unknown) {
        no_other_jobs().await;
        uninstall_all().await;
    } else if before == Ground::Operator {
        shared.uninstall().await;
    }
    match wanted {
        Ground::Operator => {
            define().await;
            shared.install(&[]).await;
        }
        _ => undefine().await,
    }
    *ground = wanted;
}

/// The definition of RLHFJobs, whoever had it before.
async fn define() {
    let definition = root().join("crds/rlhfjob.yaml").display().to_string();
    let apply = ["apply", "--server-side", "--force-conflicts", "--filename", &definition];
    kubectl(&apply).await.good();
    // kubectl gives up waiting where the definition has no conditions yet.
    let wait = ["wait", "--for=condition=Established", "--timeout=5s", "--filename", &definition];
    eventually("the definition's use", async || kubectl(&wait).await.ok).await;
}

async fn undefine() {
    kubectl(&["delete", "crd", manifest::DEFINITION, "--ignore-not-found", "--timeout=120s"]).await.good();
}

/// Takes away every operator that an earlier run left.
async fn uninstall_all() {
    let releases = helm(&["list", "--all-namespaces", "--filter", RELEASE, "--output", "json"]).await.good();
    let releases: Vec<Value> = serde_json::from_str(&releases).unwrap_or_else(|e| panic!("helm list: {e}"));
    for namespace in releases.iter().filter_map(|release| release["namespace"].as_str()) {
        helm(&["uninstall", RELEASE, "--namespace", namespace, "--wait", "--timeout", "2m"]).await.good();
    }
}

/// Changes the definition of RLHFJobs by a JSON patch, of which it then knows nothing: Helm would not write over it.
pub async fn change_definition(change: Value) {
    for (kind, patch) in [("json", json!([change])), ("merge", json!({"metadata": {"managedFields": [{}]}}))] {
        let (kind, patch) = (format!("--type={kind}"), patch.to_string());
        kubectl(&["patch", "crd", manifest::DEFINITION, &kind, "--patch", &patch]).await.good();
    }
}

/// These tests take the definition of RLHFJobs away, and with it every RLHFJob: they must be the tests' own.
async fn no_other_jobs() {
    let columns = "custom-columns=NAMESPACE:.metadata.namespace,NAME:.metadata.name";
    let jobs = kubectl(&["get", "rlhfjobs", "--all-namespaces", "--no-headers", "--output", columns]).await;
    let demo = jobs.output.lines().find(|line| jobs.ok && line.starts_with("demo "));
    assert!(demo.is_none(), "the cluster runs the demo, which these tests would delete: `make demo-down` first");
}

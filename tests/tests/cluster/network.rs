//! The fence around a job's pods as connections meet it: whom a NetworkPolicy keeps out of them and in them.
//!
//! Every connection that must fail is made elsewhere, too, where no policy stands in its way.

use e2e::manifest::{Manifest, NAME, example};
use e2e::tools::kubectl;
use e2e::{Scene, eventually, install_with, on_the_cluster, on_the_cluster_alone, stage};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::networking::v1::NetworkPolicy;
use kube::api::PostParams;
use kube::{Api, ResourceExt};
use rlhf_api::config::{HTTP_PORT, RENDEZVOUS_PORT};
use rlhf_api::job::{Phase, RLHFJob};
use rlhf_api::names;
use serde_json::{Value, json};

/// A namespace that is not the scene's, and a pod there.
const ELSEWHERE: &str = "default";
const OUTSIDER: &str = "outsider";
/// Listens on the ports of its arguments.
const LISTENER: &str = "@open = map { IO::Socket::INET->new(LocalPort => $_, Listen => 9) or die $! } @ARGV; sleep";
/// Says whether a connection to the host and port that follow is made.
const CONNECT: &str = "timeout 3 bash -c '< /dev/tcp/$0/$1' $0 $1 2> /dev/null && echo open || echo closed";
/// The API server's Service.
const API_SERVER: &str = "10.96.0.1";

/// Fine-tuning alone, on two nodes.
fn fine_tuning(steps: u64) -> Manifest {
    example().only(&["sft"]).stage("sft", "sft/epochs", json!(100)).stage("sft", "sft/maxSteps", json!(steps))
}

/// Starts a pod that listens on the ports of a trainer and from which connections can be made.
async fn start(scene: &Scene, namespace: &str, name: &str, labels: Value) -> Pod {
    let command = ["perl", "-MIO::Socket::INET", "-e", LISTENER].map(str::to_owned).into_iter();
    let command: Vec<_> = command.chain([HTTP_PORT, RENDEZVOUS_PORT].map(|port| port.to_string())).collect();
    let pod = json!({"metadata": {"name": name, "labels": labels}, "spec": {
        "securityContext": {"runAsNonRoot": true, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}},
        "automountServiceAccountToken": false,
        "terminationGracePeriodSeconds": 0,
        "containers": [{"name": "c", "image": "docker.io/rlhf/trainer:dev", "command": command,
            "securityContext": {"allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}}}]}});
    let pod: Pod = serde_json::from_value(pod).expect("a pod");
    let api = Api::<Pod>::namespaced(scene.client.clone(), namespace);
    api.create(&PostParams::default(), &pod).await.unwrap_or_else(|e| panic!("{name}: {e}"));
    let runs = |pod: Option<&Pod>| {
        pod.is_some_and(|p| p.status.as_ref().is_some_and(|s| s.phase.as_deref() == Some("Running")))
    };
    scene.await_object(&api, name, 60, runs).await.expect("the condition asks for a pod")
}

/// Takes away the pod elsewhere, which an earlier run may have left.
async fn stop_outsider() {
    kubectl(&["delete", "pod", OUTSIDER, "--namespace", ELSEWHERE, "--ignore-not-found"]).await.good();
}

fn address(pod: &Pod) -> String {
    pod.status.as_ref().and_then(|s| s.pod_ip.clone()).expect("a pod that runs has an address")
}

/// What a script says that runs in a pod.
async fn inside(pod: &Pod, script: &str, arguments: &[&str]) -> String {
    let (name, namespace) = (pod.name_any(), pod.namespace().expect("pods have a namespace"));
    let run = ["exec", "--namespace", &namespace, &name, "--", "bash", "-c", script];
    kubectl(&[&run[..], arguments].concat()).await.good().trim().to_owned()
}

/// Whether a connection can be made from a pod.
async fn reaches(from: &Pod, host: &str, port: u16) -> bool {
    match inside(from, CONNECT, &[host, &port.to_string()]).await.as_str() {
        "open" => true,
        "closed" => false,
        other => panic!("{}: {other}", from.name_any()),
    }
}

/// Waits until the operator has been told of more steps than before.
async fn progress(scene: &Scene) -> RLHFJob {
    let told = |job: &RLHFJob| stage(job, "sft").progress.map_or(0, |p| p.step);
    let before = told(&scene.job(NAME).await);
    scene.await_job(NAME, "progress", 120, |job| told(job) > before).await
}

#[test]
fn a_running_job_lets_in_its_gang_operator_and_prometheus_alone() {
    on_the_cluster(async |scene| {
        scene.apply(fine_tuning(1000)).await;
        let job = progress(scene).await;
        let [first, second] = &scene.pods(&job, "sft", 1).await[..] else { panic!("two nodes") };
        let policy = scene.api::<NetworkPolicy>().get(&names::network_policy(NAME)).await.expect("a NetworkPolicy");
        let gang = policy.spec.and_then(|s| s.pod_selector).and_then(|s| s.match_labels).expect("labels of the gang");
        // Each is but one label, or the namespace, away from the gang or Prometheus.
        stop_outsider().await;
        let outsider = start(scene, ELSEWHERE, OUTSIDER, json!(gang)).await;
        let mut left = gang.clone();
        left.insert(names::LABEL_JOB_UID.into(), "another".into());
        let leftover = start(scene, &scene.namespace, "leftover", json!(left)).await;
        let label = "app.kubernetes.io/name";
        let grafana = start(scene, &scene.namespace, "grafana", json!({label: "grafana"})).await;
        let prometheus = start(scene, &scene.namespace, "prometheus", json!({label: "prometheus"})).await;

        let scrapes = async || reaches(&prometheus, &address(first), HTTP_PORT).await;
        eventually("Prometheus' connection", 30, scrapes).await;
        assert!(reaches(&prometheus, &address(second), HTTP_PORT).await);
        assert!(!reaches(&prometheus, &address(first), RENDEZVOUS_PORT).await, "metrics are all that it gets");
        for stranger in [&outsider, &leftover, &grafana] {
            for (trainer, port) in [(first, HTTP_PORT), (second, HTTP_PORT), (first, RENDEZVOUS_PORT)] {
                let reached = reaches(stranger, &address(trainer), port).await;
                assert!(!reached, "{} is let in at port {port} of {}", stranger.name_any(), trainer.name_any());
            }
        }
        assert!(reaches(second, &address(first), RENDEZVOUS_PORT).await, "the gang is not apart");
        for (from, to) in [(&outsider, &leftover), (&grafana, &prometheus), (second, &grafana)] {
            for port in [HTTP_PORT, RENDEZVOUS_PORT] {
                let (from_name, to_name) = (from.name_any(), to.name_any());
                assert!(reaches(from, &address(to), port).await, "nothing is between {from_name} and {to_name}");
            }
        }
        progress(scene).await;
        stop_outsider().await;
    });
}

#[test]
fn a_restricted_job_trains_to_its_end_and_reaches_nobody_else() {
    on_the_cluster_alone(async |scene| {
        install_with(true, &["trainer.networkPolicy.egress=Restricted"]).await;
        let neighbour = start(scene, &scene.namespace, "neighbour", json!({})).await;
        let visitor = start(scene, &scene.namespace, "visitor", json!({})).await;
        scene.apply(fine_tuning(150)).await;
        let job = progress(scene).await;
        let [first, second] = &scene.pods(&job, "sft", 1).await[..] else { panic!("two nodes") };
        for (host, port) in [(address(&neighbour).as_str(), HTTP_PORT), (API_SERVER, 443)] {
            assert!(reaches(&visitor, host, port).await, "nothing is between others and port {port} of {host}");
            assert!(!reaches(second, host, port).await, "a trainer reaches port {port} of {host}");
        }
        let name = inside(second, "echo $MASTER_ADDR", &[]).await;
        assert!(reaches(second, &name, RENDEZVOUS_PORT).await, "{name} is {}", first.name_any());
        scene.await_phase(NAME, Phase::Succeeded, 120).await;
    });
}

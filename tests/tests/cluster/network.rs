//! The fence around a job's pods as connections meet it: whom a NetworkPolicy keeps out of them and in them.
//!
//! Every connection that must fail is made elsewhere, too, where no policy stands in its way.

use e2e::manifest::{NAME, endless, example};
use e2e::tools::kubectl;
use e2e::{Scene, eventually, on_the_cluster, on_the_cluster_with, stage, uid};
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
/// Says of each host and port that follow whether a connection is made.
const CONNECT: &str = "while [ $# -gt 0 ]; do \
    (timeout 3 bash -c '< /dev/tcp/$0/$1' $1 $2 2> /dev/null && echo $1 $2 open || echo $1 $2 closed) & shift 2; done; wait";
/// The API server's Service.
const API_SERVER: &str = "10.96.0.1";
/// Where some clusters' DNS pods listen behind the Service's port 53.
const UNPRIVILEGED_DNS: u16 = 5353;

/// Starts a pod that listens on the ports of a trainer and from which connections can be made.
async fn start(scene: &Scene, namespace: &str, name: &str, labels: Value) -> Pod {
    let command = ["perl", "-MIO::Socket::INET", "-e", LISTENER].map(str::to_owned).into_iter();
    let command: Vec<_> =
        command.chain([HTTP_PORT, RENDEZVOUS_PORT, UNPRIVILEGED_DNS].map(|port| port.to_string())).collect();
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
    scene.await_object(&api, name, runs).await.expect("the condition asks for a pod")
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
    let run = ["exec", "--namespace", &namespace, &name, "--", "bash", "-c", script, "bash"];
    kubectl(&[&run[..], arguments].concat()).await.good().trim().to_owned()
}

/// Those of the places that connections from a pod do not get to.
async fn out_of_reach<'a>(from: &Pod, places: &[(&'a str, u16)]) -> Vec<(&'a str, u16)> {
    let ports: Vec<_> = places.iter().map(|(_, port)| port.to_string()).collect();
    let arguments: Vec<_> = places.iter().zip(&ports).flat_map(|((host, _), port)| [*host, port]).collect();
    let said = inside(from, CONNECT, &arguments).await;
    let is = |place: &(&str, u16), word: &str| said.lines().any(|l| l == format!("{} {} {word}", place.0, place.1));
    assert!(places.iter().all(|p| is(p, "open") || is(p, "closed")), "{}: {said}", from.name_any());
    places.iter().filter(|p| is(p, "closed")).copied().collect()
}

/// Whether connections from a pod get to all of the places.
async fn reaches(from: &Pod, places: &[(&str, u16)]) -> bool {
    out_of_reach(from, places).await.is_empty()
}

/// Whether connections from a pod get to none of the places.
async fn is_kept_from(from: &Pod, places: &[(&str, u16)]) -> bool {
    out_of_reach(from, places).await == places
}

/// Waits until the operator has been told of more steps than before.
async fn progress(scene: &Scene) -> RLHFJob {
    let told = |job: &RLHFJob| stage(job, "sft").progress.map_or(0, |p| p.step);
    let before = told(&scene.job(NAME).await);
    scene.await_job(NAME, "progress", |job| told(job) > before).await
}

#[test]
fn a_running_job_lets_in_its_gang_operator_and_prometheus_alone() {
    on_the_cluster(async |scene| {
        scene.apply(endless()).await;
        let job = progress(scene).await;
        let [first, second] = &scene.pods(&job, "sft", 1).await[..] else { panic!("two nodes") };
        let policy =
            scene.api::<NetworkPolicy>().get(&names::network_policy(NAME, &uid(&job))).await.expect("a NetworkPolicy");
        let gang = policy.spec.and_then(|s| s.pod_selector).and_then(|s| s.match_labels).expect("labels of the gang");
        // Each is but one label, or the namespace, away from the gang or Prometheus.
        stop_outsider().await;
        let mut left = gang.clone();
        left.insert(names::LABEL_JOB_UID.into(), "another".into());
        let (label, here) = ("app.kubernetes.io/name", scene.namespace.as_str());
        let (outsider, leftover, grafana, prometheus) = tokio::join!(
            start(scene, ELSEWHERE, OUTSIDER, json!(gang)),
            start(scene, here, "leftover", json!(left)),
            start(scene, here, "grafana", json!({label: "grafana"})),
            start(scene, here, "prometheus", json!({label: "prometheus"})),
        );

        let [first_at, second_at] = [first, second].map(address);
        let metrics = [(first_at.as_str(), HTTP_PORT), (second_at.as_str(), HTTP_PORT)];
        eventually("Prometheus' connections", async || reaches(&prometheus, &metrics).await).await;
        assert!(is_kept_from(&prometheus, &[(&first_at, RENDEZVOUS_PORT)]).await, "metrics are all that it gets");
        let all = [metrics[0], metrics[1], (&first_at, RENDEZVOUS_PORT)];
        for stranger in [&outsider, &leftover, &grafana] {
            assert!(is_kept_from(stranger, &all).await, "{} is let in", stranger.name_any());
        }
        assert!(reaches(second, &[(&first_at, RENDEZVOUS_PORT)]).await, "the gang is apart");
        for (from, to) in [(&outsider, &leftover), (&grafana, &prometheus), (second, &grafana)] {
            let to_at = address(to);
            let open = reaches(from, &[(&to_at, HTTP_PORT), (&to_at, RENDEZVOUS_PORT)]).await;
            assert!(open, "something is between {} and {}", from.name_any(), to.name_any());
        }
        progress(scene).await;
        stop_outsider().await;
    });
}

#[test]
fn a_restricted_job_trains_and_reaches_nobody_else() {
    on_the_cluster_with(&["trainer.networkPolicy.egress=Restricted"], async |scene| {
        let here = scene.namespace.as_str();
        let (neighbour, visitor) =
            tokio::join!(start(scene, here, "neighbour", json!({})), start(scene, here, "visitor", json!({})));
        scene.apply(endless()).await;
        let job = progress(scene).await;
        let [first, second] = &scene.pods(&job, "sft", 1).await[..] else { panic!("two nodes") };
        let neighbour_at = address(&neighbour);
        let others = [(neighbour_at.as_str(), HTTP_PORT), (API_SERVER, 443)];
        assert!(reaches(&visitor, &others).await, "something is between others and {others:?}");
        assert!(is_kept_from(second, &others).await, "a trainer reaches one of {others:?}");
        assert!(reaches(second, &[(&neighbour_at, UNPRIVILEGED_DNS)]).await, "DNS may be out of reach");
        let name = inside(second, "echo $MASTER_ADDR", &[]).await;
        assert!(reaches(second, &[(&name, RENDEZVOUS_PORT)]).await, "{name} is {}", first.name_any());
        progress(scene).await;
    });
}

#[test]
fn a_job_trains_where_all_is_denied_that_nothing_allows() {
    on_the_cluster(async |scene| {
        let deny = json!({"metadata": {"name": "default-deny"}, "spec": {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}});
        let deny: NetworkPolicy = serde_json::from_value(deny).expect("a policy");
        scene.api::<NetworkPolicy>().create(&PostParams::default(), &deny).await.expect("a policy");
        let visitor = start(scene, &scene.namespace, "visitor", json!({})).await;
        eventually("the denial", async || is_kept_from(&visitor, &[(API_SERVER, 443)]).await).await;
        // Two nodes, which find each other by DNS, and nothing but the job's own policy lets them.
        scene.apply(example().only(&["sft"])).await;
        scene.await_phase(NAME, Phase::Succeeded).await;
    });
}

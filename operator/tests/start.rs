//! The operator's process before it works.

#![allow(clippy::unwrap_used, clippy::panic)] // tests fail by panicking

use std::net::TcpListener;
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

/// Long enough for a process to start or to end on a busy machine.
const LIMIT: Duration = Duration::from_secs(60);

/// Two ports that nobody listens on.
fn free_ports() -> [u16; 2] {
    let listeners = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
    listeners.map(|listener| listener.local_addr().unwrap().port())
}

/// A process that does not outlive the test.
struct Operator(Child);

impl Drop for Operator {
    fn drop(&mut self) {
        _ = self.0.kill();
        _ = self.0.wait();
    }
}

/// An operator whose API server refuses connections, and the port on which it serves.
fn without_api_server(folder: &tempfile::TempDir) -> (Operator, u16) {
    let [port, away] = free_ports();
    let kubeconfig = folder.path().join("kubeconfig");
    let config = format!(
        r#"{{"apiVersion": "v1", "kind": "Config", "current-context": "away",
            "contexts": [{{"name": "away", "context": {{"cluster": "away", "user": "nobody"}}}}],
            "clusters": [{{"name": "away", "cluster": {{"server": "http://127.0.0.1:{away}"}}}}],
            "users": [{{"name": "nobody", "user": {{}}}}]}}"#
    );
    std::fs::write(&kubeconfig, config).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_rlhf-operator"));
    command.env("KUBECONFIG", kubeconfig).args(["--trainer-image", "trainer", "--http-port", &port.to_string()]);
    for name in ["HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy"] {
        command.env_remove(name);
    }
    (Operator(command.spawn().unwrap()), port)
}

async fn status(port: u16, path: &str) -> Option<u16> {
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    Some(client.get(format!("http://127.0.0.1:{port}{path}")).send().await.ok()?.status().as_u16())
}

async fn end(operator: &mut Operator) -> ExitStatus {
    let started = Instant::now();
    loop {
        if let Some(status) = operator.0.try_wait().unwrap() {
            return status;
        }
        assert!(started.elapsed() < LIMIT, "it does not end");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn it_waits_for_an_api_server_that_is_away_alive_but_not_ready_and_stops_when_told() {
    let folder = tempfile::tempdir().unwrap();
    let (mut operator, port) = without_api_server(&folder);
    let started = Instant::now();
    while status(port, "/healthz").await != Some(200) {
        assert!(started.elapsed() < LIMIT && operator.0.try_wait().unwrap().is_none(), "it does not serve");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // Longer than it takes to be refused, and to be refused again.
    tokio::time::sleep(Duration::from_secs(6)).await;
    assert_eq!(operator.0.try_wait().unwrap(), None, "an outage is no reason to end");
    assert_eq!((status(port, "/healthz").await, status(port, "/readyz").await), (Some(200), Some(503)));
    assert!(Command::new("kill").arg(operator.0.id().to_string()).status().unwrap().success());
    assert!(end(&mut operator).await.success());
}

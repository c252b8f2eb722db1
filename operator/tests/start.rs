//! The operator's process before it works.

#![allow(clippy::unwrap_used, clippy::panic)] // tests fail by panicking

use std::net::TcpListener;
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

/// Long enough for a process to start or to end on a busy machine.
const LIMIT: Duration = Duration::from_secs(60);

/// A port that nobody listens on.
fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// An operator whose API server refuses connections, and the port on which it serves.
fn without_api_server(folder: &tempfile::TempDir) -> (Child, u16) {
    let kubeconfig = folder.path().join("kubeconfig");
    let away = format!(
        r#"{{"apiVersion": "v1", "kind": "Config", "current-context": "away",
            "contexts": [{{"name": "away", "context": {{"cluster": "away", "user": "nobody"}}}}],
            "clusters": [{{"name": "away", "cluster": {{"server": "http://127.0.0.1:{}"}}}}],
            "users": [{{"name": "nobody", "user": {{}}}}]}}"#,
        free_port()
    );
    std::fs::write(&kubeconfig, away).unwrap();
    let port = free_port();
    let mut command = Command::new(env!("CARGO_BIN_EXE_rlhf-operator"));
    command.env("KUBECONFIG", kubeconfig).args(["--trainer-image", "trainer", "--http-port", &port.to_string()]);
    (command.spawn().unwrap(), port)
}

async fn status(port: u16, path: &str) -> Option<u16> {
    Some(reqwest::get(format!("http://127.0.0.1:{port}{path}")).await.ok()?.status().as_u16())
}

async fn end(child: &mut Child) -> ExitStatus {
    let started = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
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
        assert!(started.elapsed() < LIMIT && operator.try_wait().unwrap().is_none(), "it does not serve");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // Longer than it takes to be refused, and to be refused again.
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert_eq!(operator.try_wait().unwrap(), None, "an outage is no reason to end");
    assert_eq!((status(port, "/healthz").await, status(port, "/readyz").await), (Some(200), Some(503)));
    assert!(Command::new("kill").arg(operator.id().to_string()).status().unwrap().success());
    assert!(end(&mut operator).await.success());
}

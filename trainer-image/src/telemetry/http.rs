//! The worker's HTTP server: `/metrics` for Prometheus, `/progress` for the operator, `/healthz` for the kubelet.
//!
//! `/healthz` answers as long as the process is there and its threads get to run: from before data and models are loaded,
//! however long a step takes, to the end. A process that is stopped, swapped out for good or gone does not answer. The
//! launcher answers for a first worker that has ended while others go on.
//!
//! Where the operator has set a key, `/progress` is for those who send it as their bearer token. It is compared in
//! constant time and never logged.
//!
//! It runs in a thread of its own with its own small runtime, so that it answers while the training thread computes, and
//! ends with the process. It only reads [`Telemetry`], whose lock is never held for longer than a copy. To ask a device for its
//! memory may take as long as the device likes, so metrics are rendered on another thread, one scrape after the other.

use super::Telemetry;
use crate::error::{Error, Result};
use axum::Router;
use axum::extract::State;
use axum::http::header::{AUTHORIZATION, CONTENT_TYPE, WWW_AUTHENTICATE};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use std::io::ErrorKind;
use std::net::{Ipv4Addr, Ipv6Addr, TcpListener};
use std::sync::Arc;
use subtle::ConstantTimeEq;

const HEALTH: &str = "/healthz";

/// What the pages are made of, and who may see them.
#[derive(Clone)]
struct Served {
    telemetry: Telemetry,
    key: Option<Arc<str>>,
    /// Makes the text of `/metrics`.
    render: Render,
}

type Render = Arc<dyn Fn() -> Result<String> + Send + Sync>;

impl Served {
    fn new(telemetry: Telemetry, key: Option<String>) -> Self {
        let rendered = telemetry.clone();
        Self { telemetry, key: key.map(Arc::from), render: Arc::new(move || rendered.render()) }
    }
}

/// Serves `telemetry` on `port` of every interface, until the process ends; its progress only to who has the `key`,
/// where there is one.
///
/// # Errors
/// A port that cannot be had: Prometheus and the operator would look for this worker in vain.
pub fn serve(port: u16, telemetry: Telemetry, key: Option<String>) -> Result<()> {
    serve_on(bind(port)?, router(Served::new(telemetry, key)))
}

/// Serves `/healthz` alone on `port`, until the process ends.
///
/// # Errors
/// The port cannot be had.
pub fn serve_health(port: u16) -> Result<()> {
    serve_on(bind(port)?, Router::new().route(HEALTH, get(async || "ok")))
}

fn bind(port: u16) -> Result<TcpListener> {
    let listener = match TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)) {
        Err(e) if e.kind() == ErrorKind::AddrInUse => Err(e),
        // The kernel has no IPv6.
        Err(_) => TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)),
        bound => bound,
    };
    listener.map_err(|e| {
        Error::config(format!("port {port}, where this worker serves /metrics and /progress, cannot be used: {e}; end what uses it, or choose other ports with --http-port"))
    })
}

fn serve_on(listener: TcpListener, router: Router) -> Result<()> {
    let failed = |e: std::io::Error| Error::bug(format!("the HTTP server cannot start: {e}"));
    listener.set_nonblocking(true).map_err(failed)?;
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_io().max_blocking_threads(1).build().map_err(failed)?;
    let serve = async move { axum::serve(tokio::net::TcpListener::from_std(listener)?, router).await };
    let run = move || {
        if let Err(e) = runtime.block_on(serve) {
            tracing::error!("the HTTP server ended: {e}");
        }
    };
    std::thread::Builder::new().name("http".into()).spawn(run).map(drop).map_err(failed)
}

fn router(served: Served) -> Router {
    Router::new()
        .route("/metrics", get(metrics))
        .route("/progress", get(progress))
        .route(HEALTH, get(async || "ok"))
        .with_state(served)
}

async fn metrics(State(Served { render, .. }): State<Served>) -> Response {
    let rendered = tokio::task::spawn_blocking(move || render()).await;
    let text = rendered.map_err(|e| e.to_string()).and_then(|text| text.map_err(|e| e.to_string()));
    answer("text/plain; version=0.0.4; charset=utf-8", text)
}

async fn progress(State(Served { telemetry, key, .. }): State<Served>, headers: HeaderMap) -> Response {
    if key.is_some_and(|key| !has(&headers, &key)) {
        return (StatusCode::UNAUTHORIZED, [(WWW_AUTHENTICATE, "Bearer")]).into_response();
    }
    answer("application/json", serde_json::to_string(&telemetry.progress()).map_err(|e| e.to_string()))
}

/// Whether a request carries the key as its bearer token.
fn has(headers: &HeaderMap, key: &str) -> bool {
    let token = headers.get(AUTHORIZATION).and_then(|value| value.as_bytes().strip_prefix(b"Bearer "));
    token.is_some_and(|token| token.ct_eq(key.as_bytes()).into())
}

fn answer(content_type: &'static str, body: std::result::Result<String, String>) -> Response {
    match body {
        Ok(text) => ([(CONTENT_TYPE, content_type)], text).into_response(),
        Err(text) => (StatusCode::INTERNAL_SERVER_ERROR, text).into_response(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Figure, tests::telemetry};
    use super::*;
    use rlhf_api::report::Progress;
    use std::io::{Read, Write};
    use std::net::{SocketAddr, TcpStream};

    /// Head and body of the answer to `GET path`.
    fn fetch(address: SocketAddr, path: &str) -> (String, String) {
        fetch_with(address, path, "")
    }

    /// The same, with more lines in the request's head.
    fn fetch_with(address: SocketAddr, path: &str, lines: &str) -> (String, String) {
        let mut stream = TcpStream::connect(address).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: t\r\nConnection: close\r\n{lines}\r\n").unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        (head.to_owned(), body.to_owned())
    }

    #[test]
    fn the_three_pages_show_the_telemetry_as_it_is_now() {
        let (telemetry, listener) = (telemetry(), TcpListener::bind("127.0.0.1:0").unwrap());
        let address = listener.local_addr().unwrap();
        serve_on(listener, router(Served::new(telemetry.clone(), None))).unwrap();
        telemetry.record_step(3, &[(Figure::Loss, 0.5)]);

        let (head, body) = fetch(address, "/progress");
        assert!(
            head.starts_with("HTTP/1.1 200") && head.to_lowercase().contains("content-type: application/json"),
            "{head}"
        );
        assert_eq!(serde_json::from_str::<Progress>(&body).unwrap(), telemetry.progress());
        let (head, body) = fetch(address, "/metrics");
        assert!(head.starts_with("HTTP/1.1 200") && head.contains("text/plain; version=0.0.4"), "{head}");
        assert!(
            body.contains("# TYPE rlhf_loss gauge")
                && body.lines().any(|l| l.starts_with("rlhf_step{") && l.ends_with("} 3")),
            "{body}"
        );
        assert_eq!(fetch(address, "/healthz").1, "ok");
        assert!(fetch(address, "/nothing").0.starts_with("HTTP/1.1 404"));
    }

    #[test]
    fn with_a_key_progress_is_for_those_who_have_it_and_the_rest_for_all() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        serve_on(listener, router(Served::new(telemetry(), Some("0a1b2c".into())))).unwrap();
        for (line, status) in [
            ("", 401),
            ("Authorization: Bearer 0a1b2c\r\n", 200),
            ("authorization: Bearer 0a1b2d\r\n", 401),
            ("Authorization: Bearer 0a1b2\r\n", 401),
            ("Authorization: Bearer 0a1b2c0\r\n", 401),
            ("Authorization: Bearer \r\n", 401),
            ("Authorization: 0a1b2c\r\n", 401),
            ("Authorization: Basic 0a1b2c\r\n", 401),
        ] {
            let (head, body) = fetch_with(address, "/progress", line);
            assert!(head.starts_with(&format!("HTTP/1.1 {status}")), "{line}: {head}");
            assert_eq!(body.contains("totalSteps"), status == 200, "{line}: {body}");
        }
        for path in ["/metrics", "/healthz"] {
            assert!(fetch(address, path).0.starts_with("HTTP/1.1 200"), "{path}");
        }
    }

    /// A device that hangs holds up whoever asks it for its memory.
    #[test]
    fn health_and_progress_are_answered_while_metrics_hang() {
        let (telemetry, listener) = (telemetry(), TcpListener::bind("127.0.0.1:0").unwrap());
        let address = listener.local_addr().unwrap();
        let (let_go, held) = std::sync::mpsc::channel::<()>();
        let held = std::sync::Mutex::new(held);
        let render: Render = Arc::new(move || {
            let _ = held.lock().unwrap().recv();
            Ok("rlhf_step 1".into())
        });
        serve_on(listener, router(Served { render, ..Served::new(telemetry, None) })).unwrap();
        let scrapes = [(); 3].map(|()| std::thread::spawn(move || fetch(address, "/metrics").1));
        std::thread::sleep(std::time::Duration::from_millis(200));
        let (say, said) = std::sync::mpsc::channel();
        std::thread::spawn(move || ["/healthz", "/progress"].map(|path| say.send(fetch(address, path).0)));
        for _ in 0..2 {
            let head = said.recv_timeout(std::time::Duration::from_secs(10)).expect("an answer meanwhile");
            assert!(head.starts_with("HTTP/1.1 200"), "{head}");
        }
        drop(let_go);
        assert_eq!(scrapes.map(|scrape| scrape.join().unwrap()), ["rlhf_step 1"; 3]);
    }

    #[test]
    fn a_taken_port_is_a_clear_error() {
        let taken = TcpListener::bind("0.0.0.0:0").unwrap();
        let port = taken.local_addr().unwrap().port();
        let error = serve(port, telemetry(), None).unwrap_err();
        assert_eq!(error.exit.code(), 64);
        assert!(error.message.contains(&port.to_string()) && error.message.contains("--http-port"), "{error}");
    }
}

//! The worker's HTTP server: `/metrics` for Prometheus, `/progress` for the operator, `/healthz` for anyone.
//!
//! It runs in a thread of its own with its own small runtime, so that it answers while the training thread computes, and
//! ends with the process. It only reads [`Telemetry`], whose lock is never held for longer than a copy.

use super::Telemetry;
use crate::error::{Error, Result};
use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header::CONTENT_TYPE};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use std::net::{Ipv4Addr, TcpListener};

/// Serves `telemetry` on `port` of every interface, until the process ends.
///
/// # Errors
/// A port that cannot be had: Prometheus and the operator would look for this worker in vain.
pub fn serve(port: u16, telemetry: Telemetry) -> Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).map_err(|e| {
        Error::config(format!("port {port}, where this worker serves /metrics and /progress, cannot be used: {e}; end what uses it, or choose other ports with --http-port"))
    })?;
    serve_on(listener, telemetry)
}

fn serve_on(listener: TcpListener, telemetry: Telemetry) -> Result<()> {
    let failed = |e: std::io::Error| Error::bug(format!("the HTTP server cannot start: {e}"));
    listener.set_nonblocking(true).map_err(failed)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().map_err(failed)?;
    let serve = async move { axum::serve(tokio::net::TcpListener::from_std(listener)?, router(telemetry)).await };
    let run = move || {
        if let Err(e) = runtime.block_on(serve) {
            tracing::error!("the HTTP server ended: {e}");
        }
    };
    std::thread::Builder::new().name("http".into()).spawn(run).map(drop).map_err(failed)
}

fn router(telemetry: Telemetry) -> Router {
    Router::new()
        .route("/metrics", get(metrics))
        .route("/progress", get(progress))
        .route("/healthz", get(async || "ok"))
        .with_state(telemetry)
}

async fn metrics(State(telemetry): State<Telemetry>) -> Response {
    answer("text/plain; version=0.0.4; charset=utf-8", telemetry.render().map_err(|e| e.to_string()))
}

async fn progress(State(telemetry): State<Telemetry>) -> Response {
    answer("application/json", serde_json::to_string(&telemetry.progress()).map_err(|e| e.to_string()))
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
        let mut stream = TcpStream::connect(address).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: t\r\nConnection: close\r\n\r\n").unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        (head.to_owned(), body.to_owned())
    }

    #[test]
    fn the_three_pages_show_the_telemetry_as_it_is_now() {
        let (telemetry, listener) = (telemetry(), TcpListener::bind("127.0.0.1:0").unwrap());
        let address = listener.local_addr().unwrap();
        serve_on(listener, telemetry.clone()).unwrap();
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
    fn a_taken_port_is_a_clear_error() {
        let taken = TcpListener::bind("0.0.0.0:0").unwrap();
        let port = taken.local_addr().unwrap().port();
        let error = serve(port, telemetry()).unwrap_err();
        assert_eq!(error.exit.code(), 64);
        assert!(error.message.contains(&port.to_string()) && error.message.contains("--http-port"), "{error}");
    }
}

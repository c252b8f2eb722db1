//! The operator's own HTTP server: `/metrics`, `/healthz` (the process answers) and `/readyz` (the cluster has what
//! is required, and it stands by, or leads and knows the cluster's RLHFJobs and their children).

use crate::controller::Guarded;
use crate::lease::Leadership;
use crate::listed::Listed;
use crate::metrics::Metrics;
use crate::progress::ProgressReader;
use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use kube::runtime::reflector::Store;
use std::future::Future;
use std::sync::{Arc, OnceLock};
use tokio::net::TcpListener;

/// What the server tells of.
#[derive(Clone)]
pub struct Served {
    /// Whether the cluster has what the operator requires.
    pub checked: Arc<OnceLock<()>>,
    /// The operator's metrics.
    pub metrics: Arc<Metrics>,
    /// Knows which trainers answer.
    pub progress: ProgressReader,
    /// The RLHFJobs.
    pub jobs: Store<Guarded>,
    /// Whether everything has been listed.
    pub listed: Listed,
    /// Whether this operator leads: one that does not lists nothing.
    pub leadership: Leadership,
}

/// Serves until `shutdown`.
pub async fn serve(
    listener: TcpListener,
    served: Served,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> std::io::Result<()> {
    axum::serve(listener, router(served)).with_graceful_shutdown(shutdown).await
}

fn router(served: Served) -> Router {
    Router::new()
        .route("/metrics", get(metrics))
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(ready))
        .with_state(served)
}

async fn metrics(State(served): State<Served>) -> impl IntoResponse {
    let jobs = served.jobs.state();
    served.metrics.trainers(served.progress.trainers());
    match served.metrics.render(jobs.iter().map(AsRef::as_ref)) {
        Ok(text) => (StatusCode::OK, [(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], text),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, [(header::CONTENT_TYPE, "text/plain")], format!("{error}\n")),
    }
}

async fn ready(State(served): State<Served>) -> (StatusCode, &'static str) {
    if served.checked.get().is_none() {
        (StatusCode::SERVICE_UNAVAILABLE, "it is not known yet whether the cluster has all that is required\n")
    } else if !served.leadership.holds() {
        (StatusCode::OK, "ok, standing by\n")
    } else if served.listed.all() {
        (StatusCode::OK, "ok\n")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "RLHFJobs, Jobs and pods have not all been listed yet\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::listed::Watch;

    async fn status(port: u16, path: &str) -> u16 {
        reqwest::get(format!("http://127.0.0.1:{port}{path}")).await.unwrap().status().as_u16()
    }

    #[tokio::test]
    async fn it_is_ready_while_it_stands_by_or_once_the_jobs_are_listed_and_stops_when_told() {
        for (leadership, before) in [(Leadership::held(), 503), (Leadership::default(), 200)] {
            let (jobs, _writer) = kube::runtime::reflector::store();
            let listed = Listed::default();
            let (metrics, checked) = (Arc::new(Metrics::new().unwrap()), Arc::<OnceLock<()>>::default());
            let progress = ProgressReader::new().unwrap().0;
            let served =
                Served { checked: checked.clone(), metrics, progress, jobs, listed: listed.clone(), leadership };
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let port = listener.local_addr().unwrap().port();
            let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
            let server = tokio::spawn(serve(listener, served, async move { _ = stopped.await }));
            assert_eq!((status(port, "/healthz").await, status(port, "/readyz").await), (200, 503));
            checked.set(()).unwrap();
            assert_eq!((status(port, "/healthz").await, status(port, "/readyz").await), (200, before));
            for watch in [Watch::RlhfJobs, Watch::Jobs, Watch::Pods] {
                listed.done(None, watch);
            }
            assert_eq!((status(port, "/readyz").await, status(port, "/metrics").await), (200, 200));
            stop.send(()).unwrap();
            server.await.unwrap().unwrap();
        }
    }
}

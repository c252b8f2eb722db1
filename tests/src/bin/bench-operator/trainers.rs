//! What stands in for rank 0 of every stage: one server that answers `GET /progress` for all addresses of pods. Which
//! trainer is meant, the address says that was asked. At some addresses the answers are [`absurd`].

use crate::absurd;
use anyhow::Context;
use axum::Router;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::routing::get;
use rlhf_api::config::HTTP_PORT;
use rlhf_api::report::{Checkpoint, Progress};
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;
use tokio::net::TcpListener;

/// A trainer makes a step a second from when it is first asked, and stands still after its last one.
const STEPS: u64 = 20;

/// When each trainer was first asked.
type Trainers = Arc<Mutex<HashMap<String, Instant>>>;

/// Serves until the program ends.
pub async fn serve() -> anyhow::Result<()> {
    let listener = TcpListener::bind(("0.0.0.0", HTTP_PORT)).await;
    let listener = listener.with_context(|| format!("port {HTTP_PORT} is needed to answer for trainers"))?;
    let app = Router::new().route("/progress", get(progress)).with_state(Trainers::default());
    tokio::spawn(async move { axum::serve(listener, app).await });
    Ok(())
}

async fn progress(State(trainers): State<Trainers>, headers: HeaderMap) -> Result<String, StatusCode> {
    let host = headers.get(header::HOST).and_then(|h| h.to_str().ok()).ok_or(StatusCode::BAD_REQUEST)?;
    if !headers.contains_key(header::AUTHORIZATION) {
        return Err(StatusCode::UNAUTHORIZED);
    }
    if let Some(number) = host.strip_prefix(absurd::ADDRESSES) {
        let number = number.split(':').next().and_then(|n| n.parse().ok()).ok_or(StatusCode::BAD_REQUEST)?;
        return absurd::progress(number).await;
    }
    let mut trainers = trainers.lock().unwrap_or_else(PoisonError::into_inner);
    let begun = *trainers.entry(host.to_owned()).or_insert_with(Instant::now);
    serde_json::to_string(&after(begun.elapsed().as_secs())).map_err(|_| StatusCode::INTERNAL_SERVER_ERROR)
}

/// What a trainer tells after so many seconds: as many figures as a stage of SFT has.
fn after(seconds: u64) -> Progress {
    let step = seconds.min(STEPS);
    let loss = 4.0 - 0.05 * step as f64;
    let metrics = [
        ("loss", loss),
        ("evalLoss", 4.2),
        ("evalPerplexity", 66.7),
        ("gradientNorm", loss / 3.0),
        ("learningRate", 1e-4 * step as f64),
        ("tokensPerSecond", 21_000.0 + step as f64),
    ];
    Progress {
        activity: 0,
        doing: None,
        step,
        total_steps: STEPS,
        eta_seconds: Some(STEPS - step),
        metrics: BTreeMap::from(metrics.map(|(name, value)| (name.to_owned(), value))),
        checkpoint: (step >= 10).then(|| Checkpoint { step: 10, path: "jobs/bench/checkpoints/10".into() }),
    }
}

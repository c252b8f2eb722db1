//! The operator's process: flags, logs, servers, shutdown.
//!
//! It ends well only when it is told to (SIGTERM, SIGINT): passes in flight are finished, then the HTTP server
//! stops. If the controller or the server ends by itself, the process fails, and Kubernetes starts it anew.

use clap::{Parser, ValueEnum};
use kube::Client;
use kube::runtime::events::Recorder;
use rlhf_api::names::FIELD_MANAGER;
use rlhf_operator::build::Settings;
use rlhf_operator::controller::{Context, Watches, check_crd};
use rlhf_operator::http::{Served, serve};
use rlhf_operator::listed::Listed;
use rlhf_operator::metrics::Metrics;
use rlhf_operator::observe::ProgressReader;
use rlhf_operator::retries::Retries;
use std::error::Error;
use std::io::IsTerminal;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tracing_subscriber::EnvFilter;

/// Passes in flight get this long to end after SIGTERM; Kubernetes kills after 30 seconds.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(25);

/// Reconciles RLHFJobs.
#[derive(Parser)]
#[command(name = "rlhf-operator", version)]
struct Args {
    /// Image of prepare and trainer pods.
    #[arg(long, env = "RLHF_TRAINER_IMAGE")]
    trainer_image: String,
    /// Pull policy of the trainer image.
    #[arg(long, env = "RLHF_TRAINER_IMAGE_PULL_POLICY", default_value = "IfNotPresent")]
    trainer_image_pull_policy: PullPolicy,
    /// Port of /metrics, /healthz and /readyz.
    #[arg(long, env = "RLHF_HTTP_PORT", default_value_t = 8080)]
    http_port: u16,
    /// How the operator and its trainers log. RUST_LOG filters.
    #[arg(long, env = "RLHF_LOG_FORMAT", default_value = "text")]
    log_format: LogFormat,
    /// Reconcile RLHFJobs of this namespace only; empty: of all namespaces.
    #[arg(long, env = "RLHF_WATCH_NAMESPACE", default_value = "")]
    watch_namespace: String,
}

#[derive(Clone, Copy, ValueEnum)]
#[value(rename_all = "PascalCase")]
enum PullPolicy {
    Always,
    IfNotPresent,
    Never,
}

#[derive(Clone, Copy, ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

/// The word that a flag takes for a value.
fn word(value: impl ValueEnum) -> String {
    value.to_possible_value().map(|v| v.get_name().to_owned()).unwrap_or_default()
}

#[tokio::main]
async fn main() -> ExitCode {
    let args = Args::parse();
    start_logs(args.log_format);
    match run(args).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn start_logs(format: LogFormat) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let logs = tracing_subscriber::fmt().with_env_filter(filter).with_ansi(std::io::stdout().is_terminal());
    match format {
        LogFormat::Text => logs.init(),
        LogFormat::Json => logs.json().init(),
    }
}

async fn run(args: Args) -> Result<(), Box<dyn Error>> {
    let namespace = Some(args.watch_namespace.as_str()).filter(|n| !n.is_empty());
    let client = Client::try_default().await?;
    check_crd(&client, namespace).await?;
    let watches = Watches::default();
    let (jobs, pods) = watches.readers();
    let metrics = Arc::new(Metrics::new()?);
    let listed = Listed::default();
    let ctx = Arc::new(Context {
        recorder: Recorder::new(client.clone(), FIELD_MANAGER.into()),
        client,
        jobs,
        pods,
        listed: listed.clone(),
        settings: Settings {
            trainer_image: args.trainer_image,
            trainer_image_pull_policy: word(args.trainer_image_pull_policy),
            log_format: word(args.log_format),
        },
        metrics: metrics.clone(),
        progress: ProgressReader::new()?,
        retries: Retries::default(),
    });
    let listener = TcpListener::bind(("::", args.http_port)).await;
    let listener = listener.map_err(|e| format!("cannot listen on port {}: {e}", args.http_port))?;
    let (stop, stopping) = watch::channel(false);
    let (store, controller) = watches.run(ctx, namespace, told(stopping.clone()));
    let server = serve(listener, Served { metrics, jobs: store, listed }, told(stopping));
    tracing::info!(port = args.http_port, namespace = namespace.unwrap_or("all"), "the operator starts");
    until_told(tokio::spawn(controller), tokio::spawn(server), stop).await
}

/// Waits for the signal, or for a task to end that should not.
async fn until_told(
    mut controller: tokio::task::JoinHandle<()>,
    mut server: tokio::task::JoinHandle<std::io::Result<()>>,
    stop: watch::Sender<bool>,
) -> Result<(), Box<dyn Error>> {
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = tokio::signal::ctrl_c() => {}
        _ = &mut controller => return Err("the controller has ended by itself".into()),
        ended = &mut server => return Err(format!("the HTTP server has ended by itself: {ended:?}").into()),
    }
    tracing::info!("told to stop; passes in flight are finished");
    stop.send(true)?;
    let finished = async { (controller.await, server.await) };
    match tokio::time::timeout(SHUTDOWN_LIMIT, finished).await {
        Ok(_) => tracing::info!("stopped"),
        Err(_) => tracing::warn!("a pass did not end within {} seconds and is cut off", SHUTDOWN_LIMIT.as_secs()),
    }
    Ok(())
}

/// Ends once the process is told to stop.
async fn told(mut stopping: watch::Receiver<bool>) {
    _ = stopping.wait_for(|stop| *stop).await;
}

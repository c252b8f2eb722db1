//! The operator's process: flags, logs, servers, shutdown.
//!
//! It serves at once, and works once the cluster has what it requires and it holds the lease. It ends well only when it is
//! told to (SIGTERM, SIGINT): passes in flight are finished, then the lease is released and the HTTP server stops. If the
//! controller or the server ends by itself, or the lease is lost, the process fails at once, and Kubernetes starts it anew.

use clap::{Parser, ValueEnum};
use futures::future::BoxFuture;
use kube::Client;
use kube::runtime::events::Recorder;
use rlhf_api::names::FIELD_MANAGER;
use rlhf_operator::build::{Allowances, NetworkRules, Settings};
use rlhf_operator::clock::Clock;
use rlhf_operator::context::Context;
use rlhf_operator::controller::Watches;
use rlhf_operator::deciding::Deciding;
use rlhf_operator::http::{Served, serve};
use rlhf_operator::keys::ProgressKeys;
use rlhf_operator::known::Known;
use rlhf_operator::lease::{Candidate, Leadership, LeaseTimes, Lost};
use rlhf_operator::listed::Listed;
use rlhf_operator::metrics::Metrics;
use rlhf_operator::progress::ProgressReader;
use rlhf_operator::questions::Questions;
use rlhf_operator::requirements::{self, check_crd, check_fields, check_pod_groups};
use rlhf_operator::retries::Retries;
use rlhf_operator::scope::Scope;
use rlhf_operator::turns::Turns;
use std::error::Error;
use std::io::{ErrorKind, IsTerminal};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::process::ExitCode;
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tokio::task::{JoinError, JoinHandle};
use tracing_subscriber::EnvFilter;

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
    /// Names of Secrets, in the jobs' own namespaces, with which the trainer image is pulled. May be given again.
    #[arg(long, env = "RLHF_TRAINER_IMAGE_PULL_SECRET", value_delimiter = ',')]
    trainer_image_pull_secret: Vec<String>,
    /// Reconcile RLHFJobs of this namespace only. May be given again; left out: of all namespaces.
    #[arg(long, env = "RLHF_WATCH_NAMESPACE", value_delimiter = ',')]
    watch_namespace: Vec<String>,
    /// Reconcile RLHFJobs whose label rlhf.dev/class has this value only; empty: those without the label.
    #[arg(long, env = "RLHF_CLASS", default_value = "")]
    class: String,
    /// Passes that run at the same time, each over another RLHFJob; half of them at most over those of one namespace.
    #[arg(long, env = "RLHF_CONCURRENCY", default_value_t = 24, value_parser = clap::value_parser!(u16).range(1..=1024))]
    concurrency: u16,
    /// Passes in flight get this long to end after SIGTERM: less than the time after which Kubernetes kills.
    #[arg(long, env = "RLHF_SHUTDOWN_SECONDS", default_value_t = 25)]
    shutdown_seconds: u16,
    /// The Lease, in the operator's own namespace, by which operators of one installation elect who works.
    #[arg(long, env = "RLHF_LEASE_NAME", default_value = "rlhf-operator")]
    lease_name: String,
    /// How long a Lease that is not renewed keeps other operators out.
    #[arg(long, env = "RLHF_LEASE_DURATION_SECONDS", default_value_t = 15)]
    lease_duration_seconds: u16,
    /// The operator that leads ends when it could not renew the Lease for so long.
    #[arg(long, env = "RLHF_LEASE_RENEW_DEADLINE_SECONDS", default_value_t = 10)]
    lease_renew_deadline_seconds: u16,
    /// How often operators look at the Lease, and how long a request about it may take.
    #[arg(long, env = "RLHF_LEASE_RETRY_PERIOD_SECONDS", default_value_t = 2)]
    lease_retry_period_seconds: u16,
    /// Begins this process's name in the Lease.
    #[arg(long, env = "HOSTNAME", default_value = "rlhf-operator")]
    host: String,
    /// The Secret, in the operator's own namespace, from which the keys to the progress of trainers follow.
    #[arg(long, env = "RLHF_KEY_SECRET", default_value = "rlhf-operator-key")]
    key_secret: String,
    /// The network of trainer pods, as JSON: {"operator": [peer…], "prometheus": [peer…], "egress": "All" or
    /// "Restricted"}, with peers as in a NetworkPolicy. Left out, no NetworkPolicy is made.
    #[arg(long, env = "RLHF_NETWORK_POLICY", value_parser = network_rules)]
    network_policy: Option<NetworkRules>,
    /// Give nodes to all pods of a stage or to none, by PodGroups, which the cluster must know.
    #[arg(long, env = "RLHF_GANG_SCHEDULING")]
    gang_scheduling: bool,
    /// Let pod templates name a service account of their namespace.
    #[arg(long, env = "RLHF_ALLOW_SERVICE_ACCOUNTS")]
    allow_service_accounts: bool,
    /// Let pod templates add volumes and mounts.
    #[arg(long, env = "RLHF_ALLOW_VOLUMES")]
    allow_volumes: bool,
    /// Let pod templates ask for the capability IPC_LOCK, as RDMA needs it.
    #[arg(long, env = "RLHF_ALLOW_IPC_LOCK")]
    allow_ipc_lock: bool,
    /// Leave the ids of users and groups of pods to the cluster, as OpenShift's restricted-v2 wants it.
    #[arg(long, env = "RLHF_OMIT_USER_IDS")]
    omit_user_ids: bool,
}

impl Args {
    fn scope(&self) -> Scope {
        Scope::new(&self.watch_namespace, &self.class)
    }

    fn lease_times(&self) -> LeaseTimes {
        let seconds = [self.lease_duration_seconds, self.lease_renew_deadline_seconds, self.lease_retry_period_seconds];
        let [duration, renew_deadline, retry_period] = seconds.map(|s| Duration::from_secs(s.into()));
        LeaseTimes { duration, renew_deadline, retry_period }
    }

    /// What is told to those who build trainer pods.
    fn settings(self, keys: ProgressKeys) -> Settings {
        Settings {
            trainer_image: self.trainer_image,
            trainer_image_pull_policy: word(self.trainer_image_pull_policy),
            log_format: word(self.log_format),
            keys,
            network: self.network_policy,
            gang_scheduling: self.gang_scheduling,
            allow: Allowances {
                service_accounts: self.allow_service_accounts,
                volumes: self.allow_volumes,
                ipc_lock: self.allow_ipc_lock,
            },
            omit_user_ids: self.omit_user_ids,
            image_pull_secrets: self.trainer_image_pull_secret.into_iter().filter(|name| !name.is_empty()).collect(),
        }
    }
}

fn network_rules(text: &str) -> Result<NetworkRules, serde_json::Error> {
    serde_json::from_str(text)
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
    // First of all: as a container's first process it would not hear it otherwise.
    let mut terminate = signal(SignalKind::terminate())?;
    let (scope, concurrency) = (args.scope(), args.concurrency);
    let limit = Duration::from_secs(args.shutdown_seconds.into());
    let client = Client::try_default().await?;
    let watches = Watches::default();
    let metrics = Arc::new(Metrics::new()?);
    let (listed, leadership, checked) =
        (Listed::new(scope.clone()), Leadership::default(), Arc::<OnceLock<()>>::default());
    let (progress, answered) = ProgressReader::new()?;
    let served = Served {
        checked: checked.clone(),
        metrics: metrics.clone(),
        progress: progress.clone(),
        jobs: watches.rlhf_jobs(),
        listed: listed.clone(),
        leadership: leadership.clone(),
    };
    let listener = listen(args.http_port).await?;
    tracing::info!(port = args.http_port, %scope, "the operator starts");
    let (stop, stopping) = watch::channel(false);
    let mut server = tokio::spawn(serve(listener, served, told(stopping.clone())));
    let mut candidate =
        Candidate::new(client.clone(), &args.lease_name, &args.host, leadership.clone(), metrics.clone())
            .with_times(args.lease_times())?;
    let begin = async {
        let keys = requirements::answered(async || check(&client, &scope, &args).await).await?;
        _ = checked.set(());
        candidate.acquire().await;
        Ok::<_, requirements::Error>(keys)
    };
    let keys = tokio::select! {
        keys = begin => keys?,
        () = told_to_stop(&mut terminate) => {
            stop.send(true)?;
            _ = tokio::time::timeout(limit, server).await;
            return Ok(());
        }
        ended = &mut server => return Err(format!("the HTTP server has ended by itself: {ended:?}").into()),
    };
    tracing::info!(identity = candidate.identity(), "leads");
    let (jobs, pods) = watches.children();
    let ctx = Arc::new(Context {
        recorder: Recorder::new(client.clone(), FIELD_MANAGER.into()),
        client,
        jobs,
        pods,
        listed,
        settings: args.settings(keys),
        metrics,
        progress,
        retries: Retries::default(),
        clock: Clock::default(),
        known: Known::default(),
        questions: Questions::default(),
        deciding: Deciding::default(),
        turns: Turns::new(concurrency.into()),
        leadership,
    });
    let controller = watches.run(ctx, &scope, answered, told(stopping));
    work(candidate, controller, server, stop, terminate, limit).await
}

/// Of every interface; where the kernel has no IPv6, of those of IPv4.
async fn listen(port: u16) -> Result<TcpListener, String> {
    let listener = match TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).await {
        Err(e) if e.kind() == ErrorKind::AddrInUse => Err(e),
        Err(_) => TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).await,
        bound => bound,
    };
    listener.map_err(|e| format!("cannot listen on port {port}: {e}"))
}

/// Whether the cluster has what the operator requires, of which the keys are a part.
async fn check(client: &Client, scope: &Scope, args: &Args) -> Result<ProgressKeys, requirements::Error> {
    check_crd(client, scope).await?;
    check_fields(client).await?;
    if args.gang_scheduling {
        check_pod_groups(client).await?;
    }
    Ok(ProgressKeys::load(client, client.default_namespace(), &args.key_secret).await?)
}

type Server = JoinHandle<std::io::Result<()>>;

/// Runs the controller while the lease is held, until the process is told to stop.
async fn work(
    candidate: Candidate,
    controller: BoxFuture<'static, ()>,
    mut server: Server,
    stop: watch::Sender<bool>,
    mut terminate: Signal,
    limit: Duration,
) -> Result<(), Box<dyn Error>> {
    let mut controller = tokio::spawn(controller);
    let (done, is_done) = watch::channel(false);
    let mut lease = tokio::spawn(candidate.keep(told(is_done)));
    tokio::select! {
        () = told_to_stop(&mut terminate) => {}
        lost = &mut lease => return Err(why(lost)),
        _ = &mut controller => return Err("the controller has ended by itself".into()),
        ended = &mut server => return Err(format!("the HTTP server has ended by itself: {ended:?}").into()),
    }
    tracing::info!("told to stop; passes in flight are finished");
    stop.send(true)?;
    let finished = async {
        _ = controller.await;
        // Nothing is written any more, so another operator may begin.
        _ = done.send(true);
        (lease.await, server.await)
    };
    match tokio::time::timeout(limit, finished).await {
        Ok((Ok(Ok(())), _)) => tracing::info!("stopped"),
        Ok((lost, _)) => return Err(why(lost)),
        Err(_) => tracing::warn!("a pass did not end within {} seconds and is cut off", limit.as_secs()),
    }
    Ok(())
}

/// Why the lease is kept no longer.
fn why(lost: Result<Result<(), Lost>, JoinError>) -> Box<dyn Error> {
    match lost {
        Ok(Err(lost)) => lost.into(),
        other => format!("the lease's keeper has ended by itself: {other:?}").into(),
    }
}

/// Waits for the signal.
async fn told_to_stop(terminate: &mut Signal) {
    tokio::select! {
        _ = terminate.recv() => {}
        _ = tokio::signal::ctrl_c() => {}
    }
}

/// Ends once the process is told to stop.
async fn told(mut stopping: watch::Receiver<bool>) {
    _ = stopping.wait_for(|stop| *stop).await;
}

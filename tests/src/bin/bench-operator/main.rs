//! `make bench-operator`: the operator with a thousand jobs at once.
//!
//! `tests/bench-operator.sh` starts the control plane and this program. The operator is the release binary with the
//! flags, rights and account that the chart gives it, as a process against the API server; API server, etcd, Job
//! controller and scheduler are real. Played are nodes and pods, by kwok (`tests/scale/*.yaml`), and rank 0's progress, by
//! [`trainers`]. All jobs are applied at once and stop for a while where all of them run their first stage, for what the
//! operator writes when nothing changes; then they run to their end, and nothing changes once more. Without idle time they
//! are not stopped, as the peer's are not.

mod figures;
mod load;
mod parts;
mod peer;
mod trainers;

use anyhow::{Context, bail, ensure};
use clap::Parser;
use e2e::audit::Writes;
use e2e::{RELEASE, SYSTEM, service_account, tools};
use figures::Scrape;
use jiff::Timestamp;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Node;
use kube::api::ListParams;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client, Config};
use parts::Part;
use rlhf_api::job::{Phase, RLHFJob};
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tokio::process::Command;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::sleep;

/// How often something is looked at that is waited for.
const POLL: Duration = Duration::from_secs(2);
/// What kwok plays where pods come to their end.
pub const ALL_STAGES: [&str; 2] = ["run.yaml", "end.yaml"];
/// The addresses of pods; `bench-operator.sh` has this machine answer them.
const POD_CIDR: &str = "10.98.0.0/16";

#[derive(Parser)]
struct Args {
    /// RLHFJobs, applied at once.
    #[arg(long, env = "JOBS", default_value_t = 1000)]
    jobs: usize,
    /// Stages of each: SFT; with 2 the reward model, with 3 PPO too.
    #[arg(long, env = "STAGES", default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=3))]
    stages: u8,
    /// How long writes are counted while nothing changes: once while all jobs run, and once after their end. 0: nothing is
    /// counted, and the jobs run through.
    #[arg(long, env = "IDLE_SECONDS", default_value_t = 600)]
    idle_seconds: u64,
    /// Pods in the cluster that are no RLHFJob's.
    #[arg(long, env = "FOREIGN_PODS", default_value_t = 5000)]
    foreign_pods: usize,
    /// Measures Kubeflow Trainer in place of the operator.
    #[arg(long)]
    peer: bool,
    /// Its jobs have no initializer.
    #[arg(long, requires = "peer")]
    bare: bool,
}

/// What came out.
#[derive(Default, Serialize)]
struct Report {
    jobs: usize,
    stages: u8,
    attempts: u32,
    seconds: f64,
    writes_per_attempt: f64,
    reconcile_p50_ms: f64,
    reconcile_p99_ms: f64,
    reconciles: f64,
    peak_rss_bytes: u64,
    foreign_pods: usize,
    foreign_pods_rss_growth_bytes: i64,
    idle_seconds: u64,
    idle_writes: usize,
    idle_writes_running: usize,
    idle_writes_finished: usize,
    idle_lease_renewals: usize,
    /// CPU time while jobs were under way, by process.
    cpu_seconds: BTreeMap<&'static str, f64>,
    load_before: f64,
    load_after: f64,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let mut terminate = signal(SignalKind::terminate())?;
    // Dropping the bench ends what it has started.
    tokio::select! {
        done = measure(&args) => done,
        _ = terminate.recv() => bail!("told to stop"),
        _ = tokio::signal::ctrl_c() => bail!("told to stop"),
    }
}

async fn measure(args: &Args) -> anyhow::Result<()> {
    if args.peer { peer::bench(args.jobs, !args.bare).await } else { bench(args).await }
}

fn say(text: &str) {
    eprintln!("{} {text}", Timestamp::now().strftime("%H:%M:%S"));
}

async fn bench(args: &Args) -> anyhow::Result<()> {
    let mut report = Report { jobs: args.jobs, stages: args.stages, load_before: parts::load()?, ..Report::default() };
    report.idle_seconds = args.idle_seconds;
    trainers::serve().await?;
    let mut run = Run::start(args).await?;
    run.meet_foreign_pods(args, &mut report).await?;

    let stops = args.idle_seconds > 0;
    say("applying the jobs");
    run.begin()?;
    let mut begun = Instant::now();
    load::jobs(&run.cluster.client, args.jobs, args.stages.into()).await?;
    if stops {
        run.until_stages("sft", "Running", args.jobs).await?;
        report.seconds = begun.elapsed().as_secs_f64();
        run.pause(&mut report)?;
        (report.idle_writes_running, report.idle_lease_renewals) = run.idle(args.idle_seconds, "all jobs run").await?;
        say("letting the jobs go on to their end");
        run.play(&ALL_STAGES).await?;
        run.begin()?;
        begun = Instant::now();
    }
    run.until_finished(args.jobs * (usize::from(args.stages) + 1)).await?;
    report.seconds += begun.elapsed().as_secs_f64();
    run.pause(&mut report)?;
    let (writes, renewals) = run.idle(args.idle_seconds, "all jobs are finished").await?;
    report.idle_writes_finished = writes;
    report.idle_lease_renewals += renewals;
    report.idle_writes = report.idle_writes_running + report.idle_writes_finished;

    run.measure(&mut report).await?;
    report.load_after = parts::load()?;
    print(&report, &run.audit)
}

/// The control plane of the bench.
struct Cluster {
    client: Client,
    /// Where its state and logs are.
    state: PathBuf,
    /// Its processes.
    processes: BTreeMap<&'static str, u32>,
}

impl Cluster {
    async fn connect() -> anyhow::Result<Self> {
        let state = tools::cache().join("cluster");
        let client = client(&tools::kubeconfig()).await?;
        Ok(Self { client, processes: parts::control_plane(&state)?, state })
    }

    /// Makes namespaces of a Pod Security Standard, and as many nodes as so many jobs take at once.
    async fn fill(&self, standard: &str, jobs: usize) -> anyhow::Result<()> {
        say("making nodes and namespaces");
        load::namespaces(&self.client, standard).await?;
        let nodes = load::nodes(&self.client, jobs).await?;
        until("nodes that are Ready", 300, async || Ok(ready_nodes(&self.client).await? == nodes)).await
    }
}

/// The cluster with what runs there.
struct Run {
    cluster: Cluster,
    jobs: usize,
    http: reqwest::Client,
    operator: Part,
    kwok: Part,
    audit: Writes,
    /// CPU time of each process when the jobs were last set going.
    begun: BTreeMap<&'static str, f64>,
}

impl Run {
    async fn start(args: &Args) -> anyhow::Result<Self> {
        let cluster = Cluster::connect().await?;
        let Cluster { client, state, .. } = &cluster;
        say("installing the chart without its pods");
        install().await;
        let flags = flags(client, SYSTEM, RELEASE).await?;
        let kwok = kwok(state, if args.idle_seconds > 0 { &ALL_STAGES[..1] } else { &ALL_STAGES })?;
        cluster.fill("restricted", args.jobs).await?;
        let mut command = Command::new(tools::root().join("target/release/rlhf-operator"));
        let account = account(state, SYSTEM, RELEASE).await?;
        command.args(flags).env("KUBECONFIG", account).env("RUST_LOG", "info").env("HOSTNAME", "bench");
        let operator = Part::start("operator", &mut command, &state.join("log"))?;
        let audit = Writes::of(&service_account(SYSTEM), &state.join("log/audit.log"))?;
        let http = reqwest::Client::builder().no_proxy().build()?;
        let run = Self { cluster, jobs: args.jobs, http, operator, kwok, audit, begun: BTreeMap::new() };
        let leads =
            async || Ok(run.scrape().await.is_ok_and(|s| s.value("rlhf_operator_leader", "").is_ok_and(|v| v == 1.0)));
        until("the operator leads", 60, leads).await?;
        Ok(run)
    }

    /// Whether the memory of the operator grows with pods that do not concern it.
    async fn meet_foreign_pods(&mut self, args: &Args, report: &mut Report) -> anyhow::Result<()> {
        say("making pods of others");
        let before = parts::rss_bytes(self.operator.id())?;
        load::foreign_pods(&self.cluster.client, args.foreign_pods).await?;
        // What a watch brings comes within seconds.
        sleep(Duration::from_secs(10)).await;
        report.foreign_pods = args.foreign_pods;
        report.foreign_pods_rss_growth_bytes = parts::rss_bytes(self.operator.id())? as i64 - before as i64;
        Ok(())
    }

    async fn scrape(&self) -> anyhow::Result<Scrape> {
        Scrape::of(&self.http, "http://127.0.0.1:8080/metrics").await
    }

    /// Has kwok play these files from now on.
    async fn play(&mut self, files: &[&str]) -> anyhow::Result<()> {
        let next = kwok(&self.cluster.state, files)?;
        std::mem::replace(&mut self.kwok, next).stop().await
    }

    fn processes(&self) -> impl Iterator<Item = (&'static str, u32)> {
        let own = [("operator", self.operator.id()), ("kwok", self.kwok.id()), ("bench", std::process::id())];
        self.cluster.processes.iter().map(|(name, id)| (*name, *id)).chain(own)
    }

    fn begin(&mut self) -> anyhow::Result<()> {
        let times: anyhow::Result<_> = self.processes().map(|(name, id)| Ok((name, parts::cpu_seconds(id)?))).collect();
        self.begun = times?;
        Ok(())
    }

    /// Adds the CPU time since [`Self::begin`].
    fn pause(&self, report: &mut Report) -> anyhow::Result<()> {
        for (name, id) in self.processes() {
            let used = parts::cpu_seconds(id)? - self.begun.get(name).copied().unwrap_or_default();
            *report.cpu_seconds.entry(name).or_default() += used;
        }
        Ok(())
    }

    /// Waits until so many jobs have this stage in this phase.
    async fn until_stages(&mut self, stage: &str, phase: &str, wanted: usize) -> anyhow::Result<()> {
        let labels = [format!("stage=\"{stage}\""), format!("phase=\"{phase}\"")];
        let labels: Vec<_> = labels.iter().map(String::as_str).collect();
        self.until(wanted, |scrape| Ok(scrape.count("rlhf_operator_stage_info", &labels))).await
    }

    /// Waits until so many stages, prepare included, have succeeded; the jobs' own ends take long to begin.
    async fn until_finished(&mut self, wanted: usize) -> anyhow::Result<()> {
        self.until(wanted, |s| Ok(s.count("rlhf_operator_stage_info", &["phase=\"Succeeded\""]))).await
    }

    /// Waits until a figure of the operator's is what it should be. There is a deadline for a change of it.
    async fn until(&mut self, wanted: usize, figure: impl Fn(&Scrape) -> anyhow::Result<usize>) -> anyhow::Result<()> {
        const PATIENCE: Duration = Duration::from_secs(180);
        let (mut last, mut since, mut told) = (usize::MAX, Instant::now(), Instant::now());
        loop {
            self.operator.check()?;
            self.kwok.check()?;
            let scrape = self.scrape().await?;
            let now = figure(&scrape)?;
            if now == wanted {
                return Ok(());
            }
            let failed = scrape.value("rlhf_operator_jobs{", "\"Failed\"")?;
            ensure!(failed == 0.0, "{failed} jobs have failed");
            if now != last {
                (last, since) = (now, Instant::now());
            }
            ensure!(since.elapsed() < PATIENCE, "{now} of {wanted} stages, and none more for {} s", PATIENCE.as_secs());
            if told.elapsed() >= Duration::from_secs(20) {
                told = Instant::now();
                say(&format!("{now} of {wanted}"));
            }
            sleep(POLL).await;
        }
    }

    /// Waits until the operator writes nothing more, and counts what it writes from then on: all but renewals of the
    /// lease, and those.
    async fn idle(&mut self, seconds: u64, when: &str) -> anyhow::Result<(usize, usize)> {
        let (settled, quiet) = (Instant::now(), quiet(self.jobs));
        loop {
            let last = self.audit.read_on()?.iter().rev().find(|w| !w.is_lease()).map(|w| w.at);
            let since = Timestamp::now().duration_since(last.context("the operator has written nothing")?);
            if since.unsigned_abs() >= quiet {
                break;
            }
            ensure!(settled.elapsed() < 4 * quiet, "the operator goes on writing while {when}");
            sleep(POLL).await;
        }
        say(&format!("{when}; counting writes for {seconds} s"));
        let (begun, cpu) = (Timestamp::now(), parts::cpu_seconds(self.operator.id())?);
        sleep(Duration::from_secs(seconds)).await;
        self.operator.check()?;
        let used = parts::cpu_seconds(self.operator.id())? - cpu;
        say(&format!("the operator used {used:.1} s of CPU time meanwhile"));
        let writes = self.audit.read_on()?.iter().filter(|w| w.at >= begun);
        let (lease, other): (Vec<_>, Vec<_>) = writes.partition(|w| w.is_lease());
        for write in other.iter().take(10) {
            say(&format!("an idle write: {} {}", write.at, write.kind()));
        }
        Ok((other.len(), lease.len()))
    }

    async fn measure(&mut self, report: &mut Report) -> anyhow::Result<()> {
        let jobs = Api::<RLHFJob>::all(self.cluster.client.clone()).list(&ListParams::default()).await?.items;
        ensure!(jobs.len() == report.jobs, "{} RLHFJobs of {} are there", jobs.len(), report.jobs);
        for job in &jobs {
            let status = job.status.clone().unwrap_or_default();
            let name = job.metadata.name.as_deref().unwrap_or_default();
            ensure!(status.phase == Phase::Succeeded, "{name} is {:?}", status.phase);
            let told = |o: &rlhf_api::report::Output| o.metrics.contains_key("evalLoss");
            ensure!(status.stages.iter().all(|s| s.output.as_ref().is_some_and(told)), "{name} lacks a last word");
            report.attempts += status.slots().map(|s| s.attempt).sum::<u32>();
        }
        let scrape = self.scrape().await?;
        report.reconcile_p50_ms = scrape.reconcile_ms(0.5)?;
        report.reconcile_p99_ms = scrape.reconcile_ms(0.99)?;
        report.reconciles = scrape.value("rlhf_operator_reconcile_duration_seconds_count", "")?;
        report.peak_rss_bytes = parts::peak_rss_bytes(self.operator.id())?;
        println!("API requests of the operator outside of watches");
        for (labels, count) in scrape.series("rlhf_operator_api_requests_total") {
            println!("  {labels:<58}  {count}");
        }
        println!();
        report.writes_per_attempt = self.audit.all.len() as f64 / f64::from(report.attempts);
        Ok(())
    }
}

/// Nothing changes any more when the operator has written nothing for so long: more than its round of questions to so many
/// trainers, of which it asks ten a second, and each of them every ten seconds at most.
fn quiet(jobs: usize) -> Duration {
    Duration::from_secs(jobs as u64 / 10).max(Duration::from_secs(10)) + Duration::from_secs(20)
}

/// Polls until `condition` holds.
async fn until(what: &str, seconds: u64, condition: impl AsyncFn() -> anyhow::Result<bool>) -> anyhow::Result<()> {
    let begun = Instant::now();
    while !condition().await? {
        ensure!(begun.elapsed().as_secs() < seconds, "{what}: not after {seconds} s");
        sleep(POLL).await;
    }
    Ok(())
}

async fn client(kubeconfig: &Path) -> anyhow::Result<Client> {
    let config = Kubeconfig::read_from(kubeconfig).context("the control plane is not up: run `make bench-operator`")?;
    Ok(Client::try_from(Config::from_custom_kubeconfig(config, &KubeConfigOptions::default()).await?)?)
}

/// Installs all of the chart, with no pod of the operator.
async fn install() {
    let chart = tools::root().join("charts/rlhf-operator").display().to_string();
    let args = ["install", RELEASE, &chart, "--namespace", SYSTEM, "--create-namespace", "--set", "replicas=0"];
    tools::helm(&args).await.good();
}

/// What a Deployment would start its program with.
async fn flags(client: &Client, namespace: &str, deployment: &str) -> anyhow::Result<Vec<String>> {
    let deployment = Api::<Deployment>::namespaced(client.clone(), namespace).get(deployment).await?;
    let pod = deployment.spec.template.spec.context("the Deployment has no pod")?;
    pod.containers.into_iter().next().and_then(|c| c.args).context("the Deployment's container has no arguments")
}

/// A kubeconfig with a token of an account.
async fn account(state: &Path, namespace: &str, name: &str) -> anyhow::Result<PathBuf> {
    let token = tools::kubectl(&["create", "token", name, "--namespace", namespace, "--duration", "8h"]).await.good();
    let mut config = Kubeconfig::read_from(tools::kubeconfig())?;
    for user in &mut config.auth_infos {
        user.auth_info =
            Some(kube::config::AuthInfo { token: Some(token.trim().to_owned().into()), ..Default::default() });
    }
    for context in config.contexts.iter_mut().filter_map(|c| c.context.as_mut()) {
        context.namespace = Some(namespace.into());
    }
    let path = state.join(format!("{name}.conf"));
    std::fs::write(&path, serde_yaml_ng::to_string(&config)?)?;
    Ok(path)
}

fn kwok(state: &Path, files: &[&str]) -> anyhow::Result<Part> {
    let mut command = Command::new(tools::cache().join("bin/kwok"));
    command.arg("--kubeconfig").arg(tools::kubeconfig()).args(["--cidr", POD_CIDR]);
    command.args(["--manage-all-nodes", "--node-lease-duration-seconds", "0", "--server-address", ""]);
    for file in files {
        command.arg("--config").arg(tools::root().join("tests/scale").join(file));
    }
    Part::start("kwok", &mut command, &state.join("log"))
}

async fn ready_nodes(client: &Client) -> anyhow::Result<usize> {
    let nodes = Api::<Node>::all(client.clone()).list(&ListParams::default()).await?;
    let ready = |n: &&Node| {
        let status = n.status.iter().flat_map(|s| s.conditions.iter().flatten());
        let tainted = n.spec.as_ref().is_some_and(|s| s.taints.as_ref().is_some_and(|t| !t.is_empty()));
        !tainted && status.into_iter().any(|c| c.type_ == "Ready" && c.status == "True")
    };
    Ok(nodes.items.iter().filter(ready).count())
}

fn print(report: &Report, audit: &Writes) -> anyhow::Result<()> {
    let mb = |bytes: i64| format!("{:.1} MB", bytes as f64 / 1e6);
    let rows = [
        ("jobs, stages of each", format!("{}, {}", report.jobs, report.stages)),
        ("seconds from applied to all finished, idle times left out", format!("{:.0}", report.seconds)),
        ("attempts, prepare included", report.attempts.to_string()),
        ("API writes an attempt", format!("{:.2}", report.writes_per_attempt)),
        ("passes", report.reconciles.to_string()),
        ("time of a pass, median", format!("{:.1} ms", report.reconcile_p50_ms)),
        ("time of a pass, 99th percentile", format!("{:.1} ms", report.reconcile_p99_ms)),
        ("peak memory (VmHWM)", mb(report.peak_rss_bytes as i64)),
        (
            "growth of memory with pods of others",
            format!("{} with {}", mb(report.foreign_pods_rss_growth_bytes), report.foreign_pods),
        ),
        (
            "writes in idle time: all jobs running, all finished",
            format!(
                "{}, {} in {} s each",
                report.idle_writes_running, report.idle_writes_finished, report.idle_seconds
            ),
        ),
        ("load of the machine before and after", format!("{:.1}, {:.1}", report.load_before, report.load_after)),
    ];
    for (what, value) in rows {
        println!("{what:<60}  {value}");
    }
    println!("\nAPI writes of the operator an attempt, by kind");
    for (kind, count) in audit.by_kind() {
        println!("  {kind:<58}  {:.3}", count as f64 / f64::from(report.attempts));
    }
    println!("\nCPU seconds while jobs were under way");
    for (name, seconds) in &report.cpu_seconds {
        println!("  {name:<58}  {seconds:.1}");
    }
    println!("\n{}", serde_json::to_string(report)?);
    Ok(())
}

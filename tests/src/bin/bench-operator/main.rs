//! `make bench-operator`: the operator with a thousand jobs at once.
//!
//! `tests/bench-operator.sh` starts the control plane and this program. The operator is the release binary with the
//! flags, rights and account that the chart gives it, as a process against the API server; API server, etcd, Job
//! controller and scheduler are real. Played are nodes and pods, by kwok (`tests/scale/*.yaml`), and rank 0's progress, by
//! [`trainers`]. All jobs are applied at once and stop for a while where all of them run their first stage, for what the
//! operator writes when nothing changes; then they run to their end, and nothing changes once more. Without idle time they
//! are not stopped, as the peer's are not.
//!
//! Two other measurements have the same cluster under them: [`kills`], the operator killed again and again, and [`hostile`], a
//! namespace that does its worst beside another.

mod absurd;
mod cluster;
mod figures;
mod hands;
mod hostile;
mod kills;
mod latency;
mod load;
mod outcome;
mod parts;
mod peer;
mod run;
mod trainers;

use anyhow::{bail, ensure};
use clap::builder::FalseyValueParser;
use clap::{ArgAction, Parser};
use cluster::ALL_STAGES;
use e2e::audit::Writes;
use jiff::Timestamp;
use rlhf_api::job::Phase;
use run::Run;
use serde::Serialize;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::sleep;

#[derive(Parser)]
struct Args {
    /// RLHFJobs, applied at once: 1000 unless it is said; with --hostile 50 in each of the two namespaces.
    #[arg(long, env = "JOBS")]
    jobs: Option<usize>,
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
    /// Kills the operator with SIGKILL so many times while the jobs run through, starts it anew at once each time, and fails
    /// where a job, an attempt or a count was lost or doubled. There is no idle time then, and there are no pods of others.
    #[arg(long, env = "KILLS", default_value_t = 0)]
    kills: usize,
    /// Measures how soon the operator tells of changes in one namespace, first alone, then beside a hostile one: 16 stages a
    /// job, absurd reports, statuses written over as fast as the API server takes it, pods with copied labels. There is no idle
    /// time then, and there are no pods of others.
    #[arg(long, env = "HOSTILE", action = ArgAction::SetTrue, value_parser = FalseyValueParser::new())]
    hostile: bool,
    /// Measures Kubeflow Trainer in place of the operator.
    #[arg(long)]
    peer: bool,
    /// Its jobs have no initializer.
    #[arg(long, requires = "peer")]
    bare: bool,
}

impl Args {
    fn jobs(&self) -> usize {
        self.jobs.unwrap_or(if self.hostile { hostile::JOBS } else { 1000 })
    }
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
    ensure!(args.kills == 0 || !args.hostile, "kills and hostile are two measurements; choose one");
    if args.peer {
        peer::bench(args.jobs(), !args.bare).await
    } else if args.kills > 0 {
        kills::bench(args.jobs(), args.stages, args.kills).await
    } else if args.hostile {
        hostile::bench(args.jobs(), args.stages).await
    } else {
        bench(args).await
    }
}

fn say(text: &str) {
    eprintln!("{} {text}", Timestamp::now().strftime("%H:%M:%S"));
}

async fn bench(args: &Args) -> anyhow::Result<()> {
    let (jobs, stops) = (args.jobs(), args.idle_seconds > 0);
    let mut report = Report { jobs, stages: args.stages, load_before: parts::load()?, ..Report::default() };
    report.idle_seconds = args.idle_seconds;
    trainers::serve().await?;
    let mut run = Run::start(jobs, if stops { &ALL_STAGES[..1] } else { &ALL_STAGES }).await?;
    meet_foreign_pods(&run, args.foreign_pods, &mut report).await?;

    say("applying the jobs");
    run.begin()?;
    let mut begun = Instant::now();
    load::jobs(&run.cluster.client, jobs, args.stages.into()).await?;
    if stops {
        run.until_stages("", &["stage=\"sft\"", "phase=\"Running\""], jobs).await?;
        report.seconds = begun.elapsed().as_secs_f64();
        run.pause(&mut report.cpu_seconds)?;
        (report.idle_writes_running, report.idle_lease_renewals) = run.idle(args.idle_seconds, "all jobs run").await?;
        say("letting the jobs go on to their end");
        run.play(&ALL_STAGES).await?;
        run.begin()?;
        begun = Instant::now();
    }
    run.until_finished("", jobs * (usize::from(args.stages) + 1)).await?;
    report.seconds += begun.elapsed().as_secs_f64();
    run.pause(&mut report.cpu_seconds)?;
    let (writes, renewals) = run.idle(args.idle_seconds, "all jobs are finished").await?;
    report.idle_writes_finished = writes;
    report.idle_lease_renewals += renewals;
    report.idle_writes = report.idle_writes_running + report.idle_writes_finished;

    measure_end(&run, &mut report).await?;
    report.load_after = parts::load()?;
    print(&report, &run.audit)
}

/// Whether the memory of the operator grows with pods that do not concern it.
async fn meet_foreign_pods(run: &Run, pods: usize, report: &mut Report) -> anyhow::Result<()> {
    say("making pods of others");
    let before = parts::rss_bytes(run.operator_id())?;
    load::foreign_pods(&run.cluster.client, pods).await?;
    // What a watch brings comes within seconds.
    sleep(Duration::from_secs(10)).await;
    report.foreign_pods = pods;
    report.foreign_pods_rss_growth_bytes = parts::rss_bytes(run.operator_id())? as i64 - before as i64;
    Ok(())
}

/// What is to be seen once all jobs are finished.
async fn measure_end(run: &Run, report: &mut Report) -> anyhow::Result<()> {
    let jobs = run.stored_jobs().await?;
    ensure!(jobs.len() == report.jobs, "{} RLHFJobs of {} are there", jobs.len(), report.jobs);
    for job in &jobs {
        let status = job.status.clone().unwrap_or_default();
        let name = job.metadata.name.as_deref().unwrap_or_default();
        ensure!(status.phase == Phase::Succeeded, "{name} is {:?}", status.phase);
        let told = |o: &rlhf_api::report::Output| o.metrics.contains_key("evalLoss");
        ensure!(status.stages.iter().all(|s| s.output.as_ref().is_some_and(told)), "{name} lacks a last word");
        report.attempts += status.slots().map(|s| s.attempt).sum::<u32>();
    }
    let scrape = run.scrape().await?;
    report.reconcile_p50_ms = scrape.reconcile_ms(None, 0.5)?;
    report.reconcile_p99_ms = scrape.reconcile_ms(None, 0.99)?;
    report.reconciles = scrape.passes()?;
    report.peak_rss_bytes = parts::peak_rss_bytes(run.operator_id())?;
    println!("API requests of the operator outside of watches");
    for (labels, count) in scrape.series("rlhf_operator_api_requests_total") {
        println!("  {labels:<58}  {count}");
    }
    println!();
    report.writes_per_attempt = run.audit.all.len() as f64 / f64::from(report.attempts);
    Ok(())
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

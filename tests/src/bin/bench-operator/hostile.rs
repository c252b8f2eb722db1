//! A normal namespace alone, and beside a hostile one (`--hostile`, or `HOSTILE=1 make bench-operator`).
//!
//! The normal namespace has its jobs at once, twice: first alone, then with the hostile one at work. That has as many jobs of 16
//! stages each, which stand side by side and are planned, and [`hands`] that write what [`absurd`](crate::absurd)
//! tells: last words and progress at the bounds and beyond, unreadable words, trainers that never answer, statuses of pods and
//! Jobs as fast as the API server takes them, pods with the labels of others' children. All its attempts end badly, so that it
//! goes on for as long as it is measured.
//!
//! Passes have no namespace in the operator's metrics. So what its work means to a namespace is measured from outside, in the
//! normal one: how soon after a pod's change the job's status tells of it ([`latency`]). The two namespaces share the API
//! server as well; what it took for those writes themselves is printed beside. The aim is that both the median and the 95th
//! percentile are no more than [`AIM`] times what they are alone. The normal jobs must end as they do alone, or the bench fails.

use crate::cluster::{ALL_STAGES, until};
use crate::figures::Scrape;
use crate::hands::{self, Hands};
use crate::latency::{self, Latency};
use crate::run::Run;
use crate::{load, outcome, parts, say, trainers};
use anyhow::ensure;
use e2e::audit::{Write, writes};
use e2e::{SYSTEM, service_account};
use kube::ResourceExt;
use rlhf_api::job::MAX_STAGES;
use serde::Serialize;
use serde_json::json;
use std::collections::BTreeMap;
use std::time::Instant;

/// Jobs of each namespace, unless it is said.
pub const JOBS: usize = 50;
/// How many times as long it may take beside a hostile namespace until a change is told.
const AIM: f64 = 2.0;
const NORMAL: &str = "normal";
/// The label of the normal namespace's series.
const OF_NORMAL: &str = "namespace=\"normal\"";

/// What was measured of the normal namespace.
#[derive(Serialize)]
struct Figures {
    /// From applied to all finished.
    seconds: f64,
    latency: Latency,
    /// Passes of all namespaces, for which the metrics have no label.
    passes: f64,
    pass_p50_ms: f64,
    pass_p95_ms: f64,
}

/// What the hostile namespace did meanwhile.
#[derive(Serialize)]
struct Hostility {
    writes_a_second: f64,
    /// By kind, refused ones apart.
    writes: BTreeMap<String, usize>,
    /// Its jobs by phase at the end.
    jobs: BTreeMap<String, usize>,
    /// Attempts that the operator made for it.
    attempts: usize,
    /// Passes of the operator that failed, by reason, in all.
    failed_passes: BTreeMap<String, String>,
    /// The most memory that the operator held, in all.
    peak_rss_bytes: u64,
}

#[derive(Serialize)]
struct Report {
    jobs: usize,
    stages: u8,
    alone: Figures,
    beside: Figures,
    ratio_p50: f64,
    ratio_p95: f64,
    hostility: Hostility,
}

/// Measures both.
pub async fn bench(jobs: usize, stages: u8) -> anyhow::Result<()> {
    ensure!(jobs > 0, "without jobs there is nothing to measure");
    trainers::serve().await?;
    // The hostile jobs' stages have a pod each.
    let mut run = Run::start(jobs + (jobs * MAX_STAGES).div_ceil(load::NODES_A_STAGE), &ALL_STAGES).await?;
    load::namespace(&run.cluster.client, NORMAL, "restricted").await?;
    let alone = measure(&mut run, "alone", jobs, stages, 0).await?;

    say("the hostile namespace begins");
    let mut hands = Hands::begin(&run.cluster, jobs).await?;
    let under_way = async || Ok(first_attempts(&run.scrape().await?) >= jobs.div_ceil(2));
    until("half of the hostile jobs run", 300, under_way).await?;
    let (begun, before) = (Instant::now(), hands.audit.read_on()?.len());
    let beside = measure(&mut run, "beside", jobs, stages, jobs).await?;
    let written = hands.audit.read_on()?.len() - before;
    let hostility = hostility(&run, &hands, written as f64 / begun.elapsed().as_secs_f64()).await?;
    drop(hands);

    let ratio = |part: fn(&Figures) -> f64| part(&beside) / part(&alone);
    let (ratio_p50, ratio_p95) = (ratio(|f| f.latency.told.p50), ratio(|f| f.latency.told.p95));
    print(&Report { jobs, stages, alone, beside, ratio_p50, ratio_p95, hostility })
}

/// How many hostile jobs have had an attempt at their first stage.
fn first_attempts(scrape: &Scrape) -> usize {
    scrape.count("rlhf_operator_stage_attempt", &["namespace=\"hostile\"", "stage=\"s0\""])
}

/// Runs the normal namespace's jobs of a name to their end; so many were there before.
async fn measure(run: &mut Run, name: &str, jobs: usize, stages: u8, before: usize) -> anyhow::Result<Figures> {
    say(&format!("applying the normal namespace's jobs: {name}"));
    let scraped = run.scrape().await?;
    let begun = Instant::now();
    let manifest = load::job(stages.into());
    let named = |n: usize| manifest.clone().set("/metadata/name", json!(format!("{name}-{n}")));
    load::apply(&run.cluster.client, (0..jobs).map(|n| (NORMAL.to_owned(), named(n)))).await?;
    let each = usize::from(stages) + 1;
    run.until_finished(OF_NORMAL, (before + jobs) * each).await?;
    let seconds = begun.elapsed().as_secs_f64();
    let now = run.scrape().await?;

    let operator = service_account(SYSTEM);
    let log = writes(NORMAL);
    let stored = run.stored_jobs().await?;
    let stored: Vec<_> = stored.into_iter().filter(|job| job.namespace().as_deref() == Some(NORMAL)).collect();
    let own: Vec<Write> = log.iter().filter(|write| write.is_by(&operator)).cloned().collect();
    outcome::refuse(&outcome::faults(&stored, stages.into(), &own))?;
    let of_name: Vec<_> = stored.into_iter().filter(|job| job.name_any().starts_with(name)).collect();
    ensure!(of_name.len() == jobs, "{} jobs of {jobs} are there", of_name.len());
    Ok(Figures {
        seconds,
        latency: latency::measure(&of_name, &log, &operator)?,
        passes: now.passes()? - scraped.passes()?,
        pass_p50_ms: now.reconcile_ms(Some(&scraped), 0.5)?,
        pass_p95_ms: now.reconcile_ms(Some(&scraped), 0.95)?,
    })
}

async fn hostility(run: &Run, hands: &Hands, writes_a_second: f64) -> anyhow::Result<Hostility> {
    let mut jobs = BTreeMap::new();
    let mut attempts = 0;
    for job in run.stored_jobs().await?.iter().filter(|job| job.namespace().as_deref() == Some(hands::NAMESPACE)) {
        let status = job.status.clone().unwrap_or_default();
        *jobs.entry(format!("{:?}", status.phase)).or_default() += 1;
        attempts += status.slots().map(|slot| slot.attempt as usize).sum::<usize>();
    }
    let scrape = run.scrape().await?;
    let failed = scrape.series("rlhf_operator_reconcile_errors_total").filter(|(_, count)| *count != "0");
    let failed_passes = failed.map(|(reason, count)| (reason.to_owned(), count.to_owned())).collect();
    let (writes, peak_rss_bytes) = (hands.audit.by_kind(), parts::peak_rss_bytes(run.operator_id())?);
    Ok(Hostility { writes_a_second, writes, jobs, attempts, failed_passes, peak_rss_bytes })
}

fn print(report: &Report) -> anyhow::Result<()> {
    let Report { alone, beside, hostility, .. } = report;
    let title = format!("the normal namespace: {} jobs of {} stages", report.jobs, report.stages);
    println!("{title:<58}  {:>9}  {:>9}  {:>5}", "alone", "beside", "ratio");
    let row = |what: &str, of: fn(&Figures) -> f64| {
        let (alone, beside) = (of(alone), of(beside));
        println!("{what:<58}  {alone:>9.1}  {beside:>9.1}  {:>5.2}", beside / alone);
    };
    row("changes of pods that were told", |f| f.latency.told.count as f64);
    row("ms from a pod's change to the status, median", |f| f.latency.told.p50);
    row("ms from a pod's change to the status, 95th percentile", |f| f.latency.told.p95);
    row("ms from a pod's change to the status, at most", |f| f.latency.told.most);
    row("of that ms for the write itself, median", |f| f.latency.write.p50);
    row("of that ms for the write itself, 95th percentile", |f| f.latency.write.p95);
    row("seconds from applied to all finished", |f| f.seconds);
    row("passes of all namespaces", |f| f.passes);
    row("ms of a pass of all namespaces, median", |f| f.pass_p50_ms);
    row("ms of a pass of all namespaces, 95th percentile", |f| f.pass_p95_ms);
    let met = if report.ratio_p50.max(report.ratio_p95) <= AIM { "met" } else { "missed" };
    println!("\nat most {AIM} times as long, median and 95th percentile: {met}");

    println!("\nthe hostile namespace: {} jobs of {MAX_STAGES} stages", report.jobs);
    println!("  {:<58}  {:.0}", "its own writes a second while both were at work", hostility.writes_a_second);
    println!("  {:<58}  {}", "attempts that the operator made for it", hostility.attempts);
    println!("  {:<58}  {:.1} MB", "peak memory of the operator (VmHWM)", hostility.peak_rss_bytes as f64 / 1e6);
    for (phase, jobs) in &hostility.jobs {
        println!("  {:<58}  {jobs}", format!("jobs that are {phase} in the end"));
    }
    for (reason, count) in &hostility.failed_passes {
        println!("  {:<58}  {count}", format!("failed passes of the operator, {reason}"));
    }
    println!("\nits own writes in all, by kind; in brackets, what the API server answered to refuse them");
    for (kind, count) in &hostility.writes {
        println!("  {kind:<58}  {count}");
    }
    println!("\n{}", serde_json::to_string(report)?);
    Ok(())
}

//! The operator killed in the middle of its work, again and again (`--kills N`, or `KILLS=N make bench-operator`).
//!
//! All jobs are applied at once and run through. Meanwhile the operator's process ends N times by SIGKILL and is started anew at
//! once with the same flags, as a kubelet does with a container: the new process leads once it has seen the lease of the dead
//! one unrenewed for its duration, which is the chart's. The moments are random, one in each Nth of the Jobs that the operator
//! makes, so that most come where most is written, also while jobs are still being applied. Every other kill follows at once
//! on the write that was waited for; the rest come up to some seconds later, in the midst of other writes.
//!
//! Nothing may be lost or doubled by it. [`outcome`] looks for that in every job's status and among all Jobs that were ever
//! made; and the series of the last process have to say the same. An event may be lost, as the operator tells it beside its
//! writes: how many jobs' success no event tells, and how many two tell, is counted.

use crate::cluster::ALL_STAGES;
use crate::figures::Scrape;
use crate::outcome::{self, made_a_job};
use crate::run::{PATIENCE, Run};
use crate::{load, say, trainers};
use anyhow::ensure;
use e2e::audit::Write;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::Event;
use kube::api::ListParams;
use kube::{Api, Client, ResourceExt};
use rlhf_api::job::RLHFJob;
use serde::Serialize;
use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::{Duration, Instant};
use tokio::time::sleep;

/// How often the audit log is read on while something is waited for in it.
const LOOK: Duration = Duration::from_millis(50);
/// A kill that does not follow at once on a write comes so much later at most.
const LATER: Duration = Duration::from_secs(5);
/// What counts as the moment before a kill.
const MOMENT: SignedDuration = SignedDuration::from_secs(1);

/// What came out.
#[derive(Serialize)]
struct Report {
    jobs: usize,
    stages: u8,
    kills: Vec<Kill>,
    seconds: f64,
    jobs_made: usize,
    /// Writes that the API server refused, such as of a Job that a killed process had made.
    writes_refused: usize,
    successes_told_by_no_event: usize,
    successes_told_twice: usize,
    faults: usize,
}

/// A kill.
#[derive(Serialize)]
struct Kill {
    /// Jobs that the operator had made by then.
    jobs_made: usize,
    /// RLHFJobs that were there and had not ended.
    live: usize,
    /// What the operator wrote in the second before.
    writes_before: usize,
    /// Until the next process had written anything but the lease.
    seconds_to_first_write: f64,
}

/// Measures, and fails where something was lost or doubled.
pub async fn bench(jobs: usize, stages: u8, kills: usize) -> anyhow::Result<()> {
    ensure!(jobs > 0, "without jobs there is nothing to lose");
    trainers::serve().await?;
    let mut run = Run::start(jobs, &ALL_STAGES).await?;
    let client = run.cluster.client.clone();
    let all = jobs * (usize::from(stages) + 1);
    say("applying the jobs");
    let begun = Instant::now();
    let (kills, ()) = tokio::try_join!(kill_all(&mut run, kills, all), load::jobs(&client, jobs, stages.into()))?;
    run.until_finished("", all).await?;
    let seconds = begun.elapsed().as_secs_f64();
    run.idle(0, "all jobs are finished").await?;

    let stored = run.stored_jobs().await?;
    let faults = faults(&run, &stored, jobs, stages.into()).await?;
    let (none, twice) = events(&client, &stored).await?;
    let report = Report {
        jobs,
        stages,
        kills,
        seconds,
        jobs_made: made(&run.audit.all),
        writes_refused: run.audit.all.iter().filter(|write| !write.is_done()).count(),
        successes_told_by_no_event: none,
        successes_told_twice: twice,
        faults: faults.len(),
    };
    print(&report)?;
    outcome::refuse(&faults)
}

/// Kills the operator so many times while it makes `all` Jobs.
async fn kill_all(run: &mut Run, kills: usize, all: usize) -> anyhow::Result<Vec<Kill>> {
    let mut done = Vec::new();
    for number in 0..kills {
        until_made(run, moment(number, kills, all, random())).await?;
        if number % 2 == 1 {
            sleep(LATER.mul_f64(random() as f64 / u64::MAX as f64)).await;
        }
        let kill = kill(run).await?;
        let Kill { jobs_made, live, seconds_to_first_write, .. } = &kill;
        say(&format!(
            "kill {} of {kills}: {jobs_made} of {all} Jobs made, {live} jobs live, the next write came {seconds_to_first_write:.1} s later",
            number + 1
        ));
        done.push(kill);
    }
    Ok(done)
}

/// How many of `all` Jobs are made before the `number`th of so many kills: one of its own part of them.
fn moment(number: usize, kills: usize, all: usize, random: u64) -> usize {
    let (first, next) = (number * all / kills, (number + 1) * all / kills);
    let room = (next - first).max(1) as u64;
    first + 1 + (random % room) as usize
}

fn random() -> u64 {
    RandomState::new().build_hasher().finish()
}

fn made(writes: &[Write]) -> usize {
    writes.iter().filter(|write| made_a_job(write)).count()
}

/// Waits until the operator has made so many Jobs.
async fn until_made(run: &mut Run, wanted: usize) -> anyhow::Result<()> {
    let (mut last, mut since) = (0, Instant::now());
    loop {
        run.check()?;
        let now = made(run.audit.read_on()?);
        if now >= wanted {
            return Ok(());
        }
        if now != last {
            (last, since) = (now, Instant::now());
        }
        ensure!(since.elapsed() < PATIENCE, "{now} Jobs made, and none more for {} s", PATIENCE.as_secs());
        sleep(LOOK).await;
    }
}

async fn kill(run: &mut Run) -> anyhow::Result<Kill> {
    let ended = run.kill_operator().await?;
    let before = run.audit.read_on()?;
    let dead: HashSet<String> = before.iter().filter_map(|write| write.token().map(str::to_owned)).collect();
    let jobs_made = made(before);
    let writes_before = before.iter().filter(|write| ended.duration_since(write.at) <= MOMENT).count();
    let live = |job: &&RLHFJob| !job.status.as_ref().is_some_and(|status| status.phase.is_terminal());
    let live = run.stored_jobs().await?.iter().filter(live).count();
    let seconds_to_first_write = first_write(run, &dead).await?.duration_since(ended).as_secs_f64();
    Ok(Kill { jobs_made, live, writes_before, seconds_to_first_write })
}

/// Waits for the first thing that a process writes which is none of the dead ones, once it has taken the lease.
async fn first_write(run: &mut Run, dead: &HashSet<String>) -> anyhow::Result<Timestamp> {
    let begun = Instant::now();
    loop {
        run.check()?;
        let next = run.audit.read_on()?.iter().filter(|write| write.token().is_some_and(|token| !dead.contains(token)));
        if let Some(first) = next.skip_while(|write| !write.is_lease()).find(|write| !write.is_lease()) {
            return Ok(first.at);
        }
        ensure!(begun.elapsed() < PATIENCE, "the operator that was started anew has written nothing");
        sleep(LOOK).await;
    }
}

/// What was lost or doubled.
async fn faults(run: &Run, stored: &[RLHFJob], jobs: usize, stages: usize) -> anyhow::Result<Vec<String>> {
    let mut faults = outcome::faults(stored, stages, &run.audit.all);
    if stored.len() != jobs {
        faults.push(format!("{} RLHFJobs of {jobs} are there", stored.len()));
    }
    faults.extend(of_series(&run.scrape().await?, jobs, jobs * (stages + 1)));
    Ok(faults)
}

/// What the operator's series say otherwise than they should of so many jobs and stages, prepare included.
fn of_series(scrape: &Scrape, jobs: usize, stages: usize) -> Vec<String> {
    let wanted = [
        ("rlhf_operator_job_info", "phase=\"Succeeded\"", "1", jobs),
        ("rlhf_operator_stage_info", "phase=\"Succeeded\"", "1", stages),
        ("rlhf_operator_stage_attempt", "", "1", stages),
        ("rlhf_operator_stage_restarts_total", "", "0", stages),
        ("rlhf_operator_stage_disruptions_total", "", "0", stages),
    ];
    let mut faults = Vec::new();
    for (name, label, value, count) in wanted {
        let (right, wrong): (Vec<_>, Vec<_>) =
            scrape.series(name).partition(|(labels, told)| labels.contains(label) && *told == value);
        faults.extend(wrong.iter().map(|(labels, told)| format!("the operator tells {name}{{{labels}}} {told}")));
        if right.len() != count {
            faults.push(format!("{} series {name} are {value}, not {count}", right.len()));
        }
    }
    faults
}

/// How many jobs' success no event tells, and how many more than one.
async fn events(client: &Client, jobs: &[RLHFJob]) -> anyhow::Result<(usize, usize)> {
    let of_success = ListParams::default().fields("reason=JobSucceeded");
    let mut told: HashMap<String, i32> = HashMap::new();
    for event in Api::<Event>::all(client.clone()).list(&of_success).await? {
        let series = event.series.and_then(|series| series.count);
        *told.entry(event.involved_object.uid.unwrap_or_default()).or_default() += series.or(event.count).unwrap_or(1);
    }
    let times = |job: &RLHFJob| job.uid().and_then(|uid| told.get(&uid).copied()).unwrap_or(0);
    let count = |told: fn(i32) -> bool| jobs.iter().filter(|job| told(times(job))).count();
    Ok((count(|times| times == 0), count(|times| times > 1)))
}

fn print(report: &Report) -> anyhow::Result<()> {
    println!("kill  Jobs made  jobs live  writes in the second before  seconds to the next process's first write");
    for (number, kill) in (1..).zip(&report.kills) {
        let Kill { jobs_made, live, writes_before, seconds_to_first_write } = kill;
        println!("{number:>4}  {jobs_made:>9}  {live:>9}  {writes_before:>27}  {seconds_to_first_write:>44.1}");
    }
    println!();
    let stages = report.jobs * (usize::from(report.stages) + 1);
    let rows = [
        ("jobs, stages of each", format!("{}, {}", report.jobs, report.stages)),
        ("seconds from applied to all finished", format!("{:.0}", report.seconds)),
        ("Jobs made by the operator, of as many as there are stages", format!("{} of {stages}", report.jobs_made)),
        ("its writes that the API server refused", report.writes_refused.to_string()),
        ("jobs whose success no event tells", report.successes_told_by_no_event.to_string()),
        ("jobs whose success is told twice", report.successes_told_twice.to_string()),
        ("lost or doubled", report.faults.to_string()),
    ];
    for (what, value) in rows {
        println!("{what:<60}  {value}");
    }
    println!("\n{}", serde_json::to_string(report)?);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kills_are_spread_over_all_that_is_made() {
        for (kills, all) in [(10, 2000), (3, 4), (10, 4), (1, 1)] {
            for number in 0..kills {
                for random in [0, 1, 12_345, u64::MAX] {
                    let moment = moment(number, kills, all, random);
                    assert!(moment > number * all / kills, "{moment}: {number} of {kills}, {all}");
                    assert!(moment <= ((number + 1) * all / kills).max(number * all / kills + 1).min(all));
                }
            }
        }
    }

    #[test]
    fn series_that_say_otherwise_are_named() {
        let line = |name: &str, label: &str, value: &str| format!("rlhf_operator_{name}{{a=\"b\",{label}}} {value}\n");
        let of_stage = |attempt: &str, restarts: &str| {
            line("stage_info", "phase=\"Succeeded\"", "1")
                + &line("stage_attempt", "", attempt)
                + &line("stage_restarts_total", "", restarts)
                + &line("stage_disruptions_total", "", "0")
        };
        let job = line("job_info", "phase=\"Succeeded\"", "1");
        let good = job.clone() + &of_stage("1", "0") + &of_stage("1", "0");
        assert!(of_series(&Scrape::new(good), 1, 2).is_empty());
        let restarted = job + &of_stage("1", "0") + &of_stage("2", "1");
        assert_eq!(of_series(&Scrape::new(restarted), 1, 2).len(), 4);
    }
}

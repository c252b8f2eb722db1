//! A run of the bench: the operator as a process, kwok beside it, and how their work is waited for.
//!
//! The operator is started with what the chart's Deployment would start it with, and with a token of its account.

use crate::cluster::{Cluster, POLL, Start, account, install, kwok, start, until};
use crate::figures::Scrape;
use crate::parts::{self, Part};
use crate::say;
use anyhow::{Context, ensure};
use e2e::audit::Writes;
use e2e::{RELEASE, SYSTEM, service_account, tools};
use jiff::Timestamp;
use kube::Api;
use kube::api::ListParams;
use rlhf_api::job::RLHFJob;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};
use tokio::process::Command;
use tokio::time::sleep;

/// How long nothing may change that has to.
pub const PATIENCE: Duration = Duration::from_secs(180);

/// The cluster with what runs there.
pub struct Run {
    pub cluster: Cluster,
    /// What the operator has written.
    pub audit: Writes,
    jobs: usize,
    http: reqwest::Client,
    /// With what the chart starts the operator.
    start: Start,
    operator: Part,
    kwok: Part,
    /// CPU time of each process when the jobs were last set going.
    begun: BTreeMap<&'static str, f64>,
}

impl Run {
    /// Starts all, with as many nodes as so many jobs take at once. Of pods kwok plays these files.
    pub async fn start(jobs: usize, plays: &[&str]) -> anyhow::Result<Self> {
        let cluster = Cluster::connect().await?;
        say("installing the chart without its pods");
        install().await;
        let start = start(&cluster.client, SYSTEM, RELEASE).await?;
        let kwok = kwok(&cluster, plays)?;
        cluster.fill("restricted", jobs).await?;
        let mut command = operator(&cluster, &start).await?;
        let operator = Part::start("operator", &mut command, &cluster.logs())?;
        let audit = Writes::of(&service_account(SYSTEM), &cluster.audit_log())?;
        let http = reqwest::Client::builder().no_proxy().build()?;
        let run = Self { cluster, audit, jobs, http, start, operator, kwok, begun: BTreeMap::new() };
        let leads =
            async || Ok(run.scrape().await.is_ok_and(|s| s.value("rlhf_operator_leader", "").is_ok_and(|v| v == 1.0)));
        until("the operator leads", 60, leads).await?;
        Ok(run)
    }

    /// The operator's process id.
    pub fn operator_id(&self) -> u32 {
        self.operator.id()
    }

    /// An error if a program has ended by itself.
    pub fn check(&mut self) -> anyhow::Result<()> {
        self.operator.check()?;
        self.kwok.check()
    }

    /// Ends the operator in the middle of whatever it does, and starts it anew at once. Gives the time of its end.
    pub async fn kill_operator(&mut self) -> anyhow::Result<Timestamp> {
        // The next one's token is there before.
        let mut next = operator(&self.cluster, &self.start).await?;
        self.check()?;
        self.operator.kill().await?;
        let ended = Timestamp::now();
        self.operator = Part::start("operator", &mut next, &self.cluster.logs())?;
        Ok(ended)
    }

    pub async fn scrape(&self) -> anyhow::Result<Scrape> {
        Scrape::of(&self.http, "http://127.0.0.1:8080/metrics").await
    }

    /// All RLHFJobs as they are stored.
    pub async fn stored_jobs(&self) -> anyhow::Result<Vec<RLHFJob>> {
        Ok(Api::<RLHFJob>::all(self.cluster.client.clone()).list(&ListParams::default()).await?.items)
    }

    /// Has kwok play these files from now on.
    pub async fn play(&mut self, files: &[&str]) -> anyhow::Result<()> {
        let next = kwok(&self.cluster, files)?;
        std::mem::replace(&mut self.kwok, next).kill().await
    }

    fn processes(&self) -> impl Iterator<Item = (&'static str, u32)> {
        let own = [("operator", self.operator.id()), ("kwok", self.kwok.id()), ("bench", std::process::id())];
        self.cluster.processes.iter().map(|(name, id)| (*name, *id)).chain(own)
    }

    /// From now on CPU time is counted.
    pub fn begin(&mut self) -> anyhow::Result<()> {
        let times: anyhow::Result<_> = self.processes().map(|(name, id)| Ok((name, parts::cpu_seconds(id)?))).collect();
        self.begun = times?;
        Ok(())
    }

    /// Adds the CPU time of each process since [`Self::begin`].
    pub fn pause(&self, used: &mut BTreeMap<&'static str, f64>) -> anyhow::Result<()> {
        for (name, id) in self.processes() {
            let since = parts::cpu_seconds(id)? - self.begun.get(name).copied().unwrap_or_default();
            *used.entry(name).or_default() += since;
        }
        Ok(())
    }

    /// Waits until so many stages, prepare included, have succeeded of the jobs with this label; the jobs' own ends take
    /// long to begin.
    pub async fn until_finished(&mut self, of: &str, wanted: usize) -> anyhow::Result<()> {
        self.until_stages(of, &["phase=\"Succeeded\""], wanted).await
    }

    /// Waits until so many stages have all of these labels in the operator's series, of jobs with the label `of` (none: all
    /// jobs), none of which may fail. Their number has to change now and then.
    pub async fn until_stages(&mut self, of: &str, labels: &[&str], wanted: usize) -> anyhow::Result<()> {
        let labels: Vec<_> = labels.iter().copied().chain([of]).collect();
        let (mut last, mut since, mut told) = (usize::MAX, Instant::now(), Instant::now());
        loop {
            self.check()?;
            let scrape = self.scrape().await?;
            let now = scrape.count("rlhf_operator_stage_info", &labels);
            if now == wanted {
                return Ok(());
            }
            let failed = scrape.count("rlhf_operator_job_info", &["phase=\"Failed\"", of]);
            ensure!(failed == 0, "{failed} jobs have failed");
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
    pub async fn idle(&mut self, seconds: u64, when: &str) -> anyhow::Result<(usize, usize)> {
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
}

/// The operator's process. Each has a token of its own, by which the audit log tells its writes from another's.
async fn operator(cluster: &Cluster, start: &Start) -> anyhow::Result<Command> {
    let mut command = Command::new(tools::root().join("target/release/rlhf-operator"));
    let account = account(&cluster.state, SYSTEM, RELEASE).await?;
    command.args(&start.args).envs(start.env.clone()).env("KUBECONFIG", account).env("HOSTNAME", "bench");
    Ok(command)
}

/// Nothing changes any more when the operator has written nothing for so long: more than its round of questions to so many
/// trainers, of which it asks ten a second, and each of them every ten seconds at most.
fn quiet(jobs: usize) -> Duration {
    Duration::from_secs(jobs as u64 / 10).max(Duration::from_secs(10)) + Duration::from_secs(20)
}

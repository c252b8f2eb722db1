//! The operator's own metrics. Labels of what it counts are bounded: no name of a job, namespace or object is ever
//! one. What has such names, the series of single jobs (`jobs`), is made anew at each scrape. `METRICS.md` is
//! rendered from what a scrape shows.

mod first_step;
mod jobs;
mod reason;

pub use reason::Reason;

use crate::controller::Guarded;
use crate::decide::Outcome;
use crate::progress::Trainers;
use first_step::FirstSteps;
use kube::ResourceExt;
use prometheus::{Histogram, HistogramOpts, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder};
use rlhf_api::job::{Phase, RLHFJob, RLHFJobStatus, StageStatus};

/// All metrics of the process.
pub struct Metrics {
    registry: Registry,
    duration: Histogram,
    in_flight: IntGauge,
    first_step: Histogram,
    first_steps: FirstSteps,
    errors: IntCounterVec,
    jobs: IntGaugeVec,
    attempts: IntCounterVec,
    requests: IntCounterVec,
    leader: IntGauge,
    trainers: IntGauge,
    silent: IntGauge,
}

const PHASES: [Phase; 7] = [
    Phase::Pending,
    Phase::Preparing,
    Phase::Waiting,
    Phase::Running,
    Phase::Suspended,
    Phase::Succeeded,
    Phase::Failed,
];

/// A pass that is under way, until it is dropped.
pub struct UnderWay {
    _timer: prometheus::HistogramTimer,
    in_flight: IntGauge,
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.in_flight.dec();
    }
}

impl Metrics {
    /// Registers everything, with each known label value present from the start.
    pub fn new() -> prometheus::Result<Self> {
        let registry = Registry::new();
        let buckets = prometheus::exponential_buckets(0.001, 2.0, 16)?;
        let duration =
            HistogramOpts::new("rlhf_operator_reconcile_duration_seconds", "Time that one pass over one RLHFJob took.");
        let first_step = HistogramOpts::new(
            "rlhf_operator_first_step_seconds",
            "Time from the making of an attempt at a stage to the first step that it told of, without what it waits in a queue.",
        );
        let metrics = Self {
            duration: Histogram::with_opts(duration.buckets(buckets))?,
            in_flight: IntGauge::new(
                "rlhf_operator_reconciles_in_flight",
                "Passes under way now, as many as --concurrency at most; jobs that wait for one of these are not counted.",
            )?,
            first_step: Histogram::with_opts(first_step.buckets(prometheus::exponential_buckets(5.0, 2.0, 12)?))?,
            first_steps: FirstSteps::default(),
            errors: counter(
                "rlhf_operator_reconcile_errors_total",
                "Passes that failed, and stages whose objects the API server refused, by reason.",
                &["reason"],
            )?,
            jobs: IntGaugeVec::new(
                Opts::new(
                    "rlhf_operator_jobs",
                    "RLHFJobs by phase; Undecodable are those that this operator cannot read.",
                ),
                &["phase"],
            )?,
            attempts: counter(
                "rlhf_operator_attempts_total",
                "Attempts at prepare or a stage that ended, by outcome.",
                &["outcome"],
            )?,
            requests: counter(
                "rlhf_operator_api_requests_total",
                "Requests to the API server outside of watches, by verb and code (0: no answer).",
                &["verb", "code"],
            )?,
            leader: IntGauge::new(
                "rlhf_operator_leader",
                "1 while this operator holds the lease and works, 0 while it stands by.",
            )?,
            trainers: IntGauge::new(
                "rlhf_operator_trainers",
                "Trainers that run and are asked for their progress: rank 0 of each attempt at a stage, and prepare's pod.",
            )?,
            silent: IntGauge::new(
                "rlhf_operator_trainers_silent",
                "Those of them that have not answered for a minute. None is restarted for it; where most are, the operator cannot reach them.",
            )?,
            registry,
        };
        let Self { registry, duration, in_flight, first_step, errors, jobs, attempts, requests, leader, .. } = &metrics;
        registry.register(Box::new(metrics.trainers.clone()))?;
        registry.register(Box::new(metrics.silent.clone()))?;
        registry.register(Box::new(leader.clone()))?;
        registry.register(Box::new(duration.clone()))?;
        registry.register(Box::new(in_flight.clone()))?;
        registry.register(Box::new(first_step.clone()))?;
        registry.register(Box::new(errors.clone()))?;
        registry.register(Box::new(jobs.clone()))?;
        registry.register(Box::new(attempts.clone()))?;
        registry.register(Box::new(requests.clone()))?;
        for outcome in Outcome::ALL {
            attempts.with_label_values(&[outcome.as_str()]);
        }
        // A counter that first appears with its first error has no rate of it, and a panel of it no data until then.
        for reason in Reason::ALL {
            errors.with_label_values(&[reason.as_str()]);
        }
        Ok(metrics)
    }

    /// Measures a pass until what it returns is dropped.
    pub fn pass(&self) -> UnderWay {
        self.in_flight.inc();
        UnderWay { _timer: self.duration.start_timer(), in_flight: self.in_flight.clone() }
    }

    /// Counts a failed pass.
    pub fn failed(&self, reason: Reason) {
        self.errors.with_label_values(&[reason.as_str()]).inc();
    }

    /// Counts an attempt whose end is in status.
    pub fn attempt_ended(&self, outcome: Outcome) {
        self.attempts.with_label_values(&[outcome.as_str()]).inc();
    }

    /// Says whether this process leads.
    pub fn leads(&self, leads: bool) {
        self.leader.set(leads.into());
    }

    /// Says how many trainers are asked and how many do not answer.
    pub fn trainers(&self, Trainers { asked, silent }: Trainers) {
        let number = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
        self.trainers.set(number(asked));
        self.silent.set(number(silent));
    }

    /// The attempt of which `slot` speaks was made: from now on its first step is waited for.
    pub fn attempt_made(&self, job: &RLHFJob, slot: &StageStatus) {
        self.first_steps.made((&namespace(job), &job.name_any(), &job.uid().unwrap_or_default()), slot);
    }

    /// A status was written; it may be the first to tell of an attempt's step.
    pub fn status_written(&self, job: &RLHFJob, status: &RLHFJobStatus) {
        let id = (&*namespace(job), &*job.name_any(), &*job.uid().unwrap_or_default());
        for took in self.first_steps.told(id, status, job.spec.suspend) {
            self.first_step.observe(took.as_secs_f64());
        }
    }

    /// The job is gone.
    pub fn forget(&self, namespace: &str, name: &str) {
        self.first_steps.forget(namespace, name);
    }

    /// Counts a request to the API server and hands its result on.
    pub fn api<T>(&self, verb: &'static str, result: kube::Result<T>) -> kube::Result<T> {
        let code = match &result {
            Ok(_) => 200,
            Err(kube::Error::Api(status)) => status.code,
            Err(_) => 0,
        };
        self.requests.with_label_values(&[verb, &code.to_string()]).inc();
        result
    }

    /// The exposition text, with the jobs counted anew and their own series.
    ///
    /// # Errors
    /// A metric cannot be written.
    pub fn render<'a>(&self, jobs: impl Iterator<Item = &'a Guarded> + Clone) -> prometheus::Result<String> {
        for phase in PHASES.map(jobs::phase).into_iter().chain([jobs::UNDECODABLE]) {
            self.jobs.with_label_values(&[phase]).set(0);
        }
        for guarded in jobs.clone() {
            let phase = |job: &RLHFJob| jobs::phase(job.status.as_ref().map(|s| s.phase).unwrap_or_default());
            let phase = guarded.0.as_ref().map_or(jobs::UNDECODABLE, phase);
            self.jobs.with_label_values(&[phase]).inc();
        }
        let (mut text, encoder) = (String::new(), TextEncoder::new());
        encoder.encode_utf8(&self.registry.gather(), &mut text)?;
        jobs::write(jobs, &mut text)?;
        Ok(text)
    }
}

fn namespace(job: &RLHFJob) -> String {
    job.namespace().unwrap_or_default()
}

fn counter(name: &str, help: &str, labels: &[&str]) -> prometheus::Result<IntCounterVec> {
    IntCounterVec::new(Opts::new(name, help), labels)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::build::tests::job;
    use jiff::Timestamp;
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
    use kube::core::DeserializeGuard;
    use rlhf_api::job::StagePhase;
    use rlhf_api::report::{Checkpoint, Progress};
    use std::collections::BTreeSet;
    use std::fmt::Write;
    use std::path::Path;

    fn in_phase(phase: Phase) -> RLHFJob {
        let mut job = job();
        job.status = Some(RLHFJobStatus { phase, ..Default::default() });
        job
    }

    fn guarded(job: RLHFJob) -> Guarded {
        DeserializeGuard(Ok(job))
    }

    fn undecodable() -> Guarded {
        let mut raw = serde_json::to_value(job()).unwrap();
        raw["spec"] = serde_json::json!(5);
        serde_json::from_value(raw).unwrap()
    }

    fn has(text: &str, lines: &[&str]) {
        for line in lines {
            assert!(text.lines().any(|l| l == *line), "{line} is missing in\n{text}");
        }
    }

    #[test]
    fn a_scrape_counts_jobs_by_phase_and_forgets_those_that_are_gone() {
        let metrics = Metrics::new().unwrap();
        let jobs = [Phase::Running, Phase::Running, Phase::Failed].map(|phase| guarded(in_phase(phase)));
        let text = metrics.render(jobs.iter()).unwrap();
        has(&text, &["rlhf_operator_jobs{phase=\"Running\"} 2"]);
        let text = metrics.render(jobs[2..].iter()).unwrap();
        has(&text, &["rlhf_operator_jobs{phase=\"Running\"} 0", "rlhf_operator_jobs{phase=\"Failed\"} 1"]);
    }

    #[test]
    fn case_7_a_job_that_cannot_be_read_is_counted_and_has_series_of_its_own() {
        let metrics = Metrics::new().unwrap();
        let jobs = [guarded(in_phase(Phase::Running)), undecodable()];
        let lines = [
            "rlhf_operator_jobs{phase=\"Running\"} 1",
            "rlhf_operator_jobs{phase=\"Undecodable\"} 1",
            "rlhf_operator_job_info{namespace=\"team\",phase=\"Undecodable\",rlhf_job=\"demo\"} 1",
            "rlhf_operator_job_condition{condition=\"Unsupported\",namespace=\"team\",reason=\"Undecodable\",rlhf_job=\"demo\"} 1",
        ];
        has(&metrics.render(jobs.iter()).unwrap(), &lines);
        has(&metrics.render(jobs[..1].iter()).unwrap(), &["rlhf_operator_jobs{phase=\"Undecodable\"} 0"]);
    }

    #[test]
    fn case_12_passes_attempts_errors_and_requests_are_counted() {
        let metrics = Metrics::new().unwrap();
        let under_way = metrics.pass();
        has(&metrics.render(std::iter::empty()).unwrap(), &["rlhf_operator_reconciles_in_flight 1"]);
        drop(under_way);
        metrics.leads(true);
        metrics.trainers(Trainers { asked: 7, silent: 4 });
        metrics.failed(Reason::Apply);
        metrics.attempt_ended(Outcome::Disrupted);
        let refused = kube::core::Status::failure("no", "Forbidden").with_code(403).boxed();
        assert!(metrics.api::<()>("create", Err(kube::Error::Api(refused))).is_err());
        let lines = [
            "rlhf_operator_leader 1",
            "rlhf_operator_trainers 7",
            "rlhf_operator_trainers_silent 4",
            "rlhf_operator_reconcile_duration_seconds_count 1",
            "rlhf_operator_reconciles_in_flight 0",
            "rlhf_operator_reconcile_errors_total{reason=\"Apply\"} 1",
            "rlhf_operator_reconcile_errors_total{reason=\"Observe\"} 0",
            "rlhf_operator_attempts_total{outcome=\"disrupted\"} 1",
            "rlhf_operator_attempts_total{outcome=\"failed\"} 0",
            "rlhf_operator_api_requests_total{code=\"403\",verb=\"create\"} 1",
        ];
        has(&metrics.render(std::iter::empty()).unwrap(), &lines);
    }

    fn condition(kind: &str, holds: &str) -> Condition {
        let since = Time(Timestamp::UNIX_EPOCH);
        Condition {
            type_: kind.into(),
            status: holds.into(),
            reason: "r".into(),
            message: String::new(),
            observed_generation: None,
            last_transition_time: since,
        }
    }

    /// A job of whose first stage everything is known.
    fn known() -> RLHFJob {
        let progress = Some(Progress { step: 84, total_steps: 200, ..Default::default() });
        let tune = StageStatus {
            name: "tune".into(),
            phase: StagePhase::Running,
            attempt: 5,
            restarts: rlhf_api::job::Restarts { total: 1, ..Default::default() },
            disruptions: 3,
            progress,
            checkpoint: Some(Checkpoint { step: 80, path: "c".into() }),
            ..Default::default()
        };
        let mut job = in_phase(Phase::Running);
        if let Some(status) = &mut job.status {
            status.stages = vec![tune];
            status.conditions =
                [("Stalled", "True"), ("Waiting", "False")].map(|(kind, holds)| condition(kind, holds)).into();
            status.completion_time = Some(Timestamp::UNIX_EPOCH + jiff::SignedDuration::from_secs(90));
        }
        job
    }

    #[test]
    fn a_job_has_series_of_its_own_until_it_is_gone() {
        let metrics = Metrics::new().unwrap();
        let text = metrics.render([guarded(known())].iter()).unwrap();
        let lines = [
            "rlhf_operator_job_info{namespace=\"team\",phase=\"Running\",rlhf_job=\"demo\"} 1",
            "rlhf_operator_job_condition{condition=\"Stalled\",namespace=\"team\",reason=\"r\",rlhf_job=\"demo\"} 1",
            "rlhf_operator_job_condition{condition=\"Waiting\",namespace=\"team\",reason=\"r\",rlhf_job=\"demo\"} 0",
            "rlhf_operator_job_finished_timestamp_seconds{namespace=\"team\",rlhf_job=\"demo\"} 90",
            "rlhf_operator_stage_info{namespace=\"team\",phase=\"Running\",rlhf_job=\"demo\",stage=\"tune\"} 1",
            "rlhf_operator_stage_info{namespace=\"team\",phase=\"Pending\",rlhf_job=\"demo\",stage=\"act\"} 1",
            "rlhf_operator_stage_attempt{namespace=\"team\",rlhf_job=\"demo\",stage=\"tune\"} 5",
            "rlhf_operator_stage_restarts_total{namespace=\"team\",rlhf_job=\"demo\",stage=\"tune\"} 1",
            "rlhf_operator_stage_disruptions_total{namespace=\"team\",rlhf_job=\"demo\",stage=\"tune\"} 3",
            "rlhf_operator_stage_step{namespace=\"team\",rlhf_job=\"demo\",stage=\"tune\"} 84",
            "rlhf_operator_stage_total_steps{namespace=\"team\",rlhf_job=\"demo\",stage=\"tune\"} 200",
            "rlhf_operator_stage_checkpoint_step{namespace=\"team\",rlhf_job=\"demo\",stage=\"tune\"} 80",
            "rlhf_operator_stage_checkpoint_step{namespace=\"team\",rlhf_job=\"demo\",stage=\"act\"} 0",
        ];
        has(&text, &lines);
        assert!(
            !text.contains("rlhf_operator_stage_step{namespace=\"team\",rlhf_job=\"demo\",stage=\"act\"}"),
            "{text}"
        );
        assert!(!metrics.render(std::iter::empty()).unwrap().contains("demo"));
    }

    #[test]
    fn each_of_many_jobs_has_its_series_once_below_one_head() {
        let metrics = Metrics::new().unwrap();
        let job = |number: usize| {
            let mut job = known();
            // Of most jobs nothing is known at first.
            job.status = job.status.filter(|_| number > 150);
            job.metadata.name = Some(format!("job-{number}"));
            guarded(job)
        };
        let jobs: Vec<_> = (0..200).map(job).collect();
        let text = metrics.render(jobs.iter()).unwrap();
        for (family, wanted) in [("stage_attempt", 4 * 200), ("stage_step", 49), ("job_condition", 2 * 49)] {
            let name = format!("rlhf_operator_{family}");
            let series: Vec<_> = text.lines().filter(|l| l.starts_with(&format!("{name}{{"))).collect();
            assert_eq!((series.len(), series.iter().collect::<BTreeSet<_>>().len()), (wanted, wanted), "{family}");
            let heads: Vec<_> =
                text.lines().filter(|l| l.starts_with('#') && l.contains(&format!(" {name} "))).collect();
            assert_eq!(heads.len(), 2, "{heads:?}");
            let place = |line: &str| text.lines().position(|l| l == line).unwrap();
            assert_eq!(place(series[wanted - 1]) - place(heads[1]), wanted, "{family}: they stand together");
        }
    }

    #[test]
    fn an_attempts_first_step_is_measured() {
        let (metrics, job) = (Metrics::new().unwrap(), known());
        let status = job.status.clone().unwrap();
        metrics.attempt_made(&job, &StageStatus { progress: None, ..status.stages[0].clone() });
        for _ in 0..2 {
            metrics.status_written(&job, &status);
            has(&metrics.render(std::iter::empty()).unwrap(), &["rlhf_operator_first_step_seconds_count 1"]);
        }
    }

    #[test]
    fn alerts_ask_only_for_what_a_scrape_shows() {
        let rules = Path::new(env!("CARGO_MANIFEST_DIR")).join("../charts/rlhf-operator/files/alerts.yaml");
        let rules = std::fs::read_to_string(rules).unwrap();
        let words = rules.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        let asked: BTreeSet<_> = words.filter(|w| w.starts_with("rlhf_operator_")).collect();
        assert!(asked.len() > 6, "{asked:?}");
        let shown = reference();
        let missing: Vec<_> = asked.iter().filter(|m| !shown.contains(&format!("| `{m}` |"))).collect();
        assert!(missing.is_empty(), "{missing:?}");
    }

    /// `METRICS.md` as a scrape has it in which every metric has a value.
    fn reference() -> String {
        let metrics = Metrics::new().unwrap();
        assert!(metrics.api("get", Ok(())).is_ok());
        let job = guarded(known());
        metrics.render([&job].into_iter()).unwrap();
        let table = |families: Vec<prometheus::proto::MetricFamily>| {
            let mut rows = String::from("| metric | type | labels | meaning |\n|---|---|---|---|\n");
            for family in families {
                let kind = format!("{:?}", family.get_field_type()).to_lowercase();
                let labels = family.get_metric()[0].get_label().iter().map(|l| format!("`{}`", l.name()));
                let labels = labels.collect::<Vec<_>>().join(", ");
                let _ = writeln!(rows, "| `{}` | {kind} | {labels} | {} |", family.name(), family.help());
            }
            rows
        };
        format!(
            "# Metrics of the operator\n\nGenerated from what a scrape shows; `UPDATE_DOCS=1 cargo test --release -p \
             rlhf-operator the_reference_page` writes it anew.\n\nThe operator serves `GET /metrics` (Prometheus text) on \
             port `http` of its Service.\n\n## The operator\n\nEvery label has few values, whatever runs in the cluster. \
             Counters begin at 0 when the process starts.\n\n{}\n## Each RLHFJob\n\nThese series come from the jobs' \
             status and vanish with the job. `namespace` and `rlhf_job` are the job's, as in the trainers' metrics: a \
             scrape has to honour the labels (`honorLabels: true`, as in the chart's ServiceMonitor).\n\n{}",
            table(metrics.registry.gather()),
            table(jobs::families(&job).collect()),
        )
    }

    #[test]
    fn the_reference_page_is_what_a_scrape_shows() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("METRICS.md");
        if std::env::var_os("UPDATE_DOCS").is_some() {
            std::fs::write(&path, reference()).unwrap();
        }
        assert!(
            std::fs::read_to_string(&path).unwrap_or_default() == reference(),
            "METRICS.md is out of date: run UPDATE_DOCS=1 cargo test --release -p rlhf-operator the_reference_page"
        );
    }
}

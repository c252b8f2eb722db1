//! The operator's own metrics. Labels are bounded: no name of a job, namespace or object is ever one.

use crate::decide::Outcome;
use prometheus::{
    Encoder, Histogram, HistogramOpts, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder,
};
use rlhf_api::job::Phase;

/// All metrics of the process.
pub struct Metrics {
    registry: Registry,
    duration: Histogram,
    errors: IntCounterVec,
    jobs: IntGaugeVec,
    attempts: IntCounterVec,
    requests: IntCounterVec,
    leader: IntGauge,
}

/// Why a pass failed, or did less than it set out to: the values of the error counter's label.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// A read failed.
    Observe,
    /// A write failed.
    Apply,
    /// What the pass decided on had changed meanwhile.
    Stale,
    /// The API server did not answer in time.
    TimedOut,
    /// The API server refused a child.
    Blocked,
    /// The object cannot be read as an RLHFJob.
    Undecodable,
}

impl Reason {
    const ALL: [Self; 6] = [Self::Observe, Self::Apply, Self::Stale, Self::TimedOut, Self::Blocked, Self::Undecodable];

    fn as_str(self) -> &'static str {
        match self {
            Self::Observe => "Observe",
            Self::Apply => "Apply",
            Self::Stale => "Stale",
            Self::TimedOut => "TimedOut",
            Self::Blocked => "Blocked",
            Self::Undecodable => "Undecodable",
        }
    }
}

const PHASES: [(Phase, &str); 6] = [
    (Phase::Pending, "Pending"),
    (Phase::Preparing, "Preparing"),
    (Phase::Running, "Running"),
    (Phase::Suspended, "Suspended"),
    (Phase::Succeeded, "Succeeded"),
    (Phase::Failed, "Failed"),
];

impl Metrics {
    /// Registers everything, with each known label value present from the start.
    pub fn new() -> prometheus::Result<Self> {
        let registry = Registry::new();
        let buckets = prometheus::exponential_buckets(0.001, 4.0, 8)?;
        let duration =
            HistogramOpts::new("rlhf_operator_reconcile_duration_seconds", "Time that one pass over one RLHFJob took.");
        let metrics = Self {
            duration: Histogram::with_opts(duration.buckets(buckets))?,
            errors: counter(
                "rlhf_operator_reconcile_errors_total",
                "Passes that failed and are tried again, by reason.",
                &["reason"],
            )?,
            jobs: IntGaugeVec::new(Opts::new("rlhf_operator_jobs", "RLHFJobs by phase."), &["phase"])?,
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
            registry,
        };
        let Self { registry, duration, errors, jobs, attempts, requests, leader } = &metrics;
        registry.register(Box::new(leader.clone()))?;
        registry.register(Box::new(duration.clone()))?;
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
    pub fn pass(&self) -> prometheus::HistogramTimer {
        self.duration.start_timer()
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

    /// The exposition text, with the jobs counted anew.
    pub fn render(&self, phases: impl Iterator<Item = Phase>) -> prometheus::Result<String> {
        for (_, name) in PHASES {
            self.jobs.with_label_values(&[name]).set(0);
        }
        for phase in phases {
            if let Some((_, name)) = PHASES.iter().find(|(p, _)| *p == phase) {
                self.jobs.with_label_values(&[*name]).inc();
            }
        }
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text)?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }
}

fn counter(name: &str, help: &str, labels: &[&str]) -> prometheus::Result<IntCounterVec> {
    IntCounterVec::new(Opts::new(name, help), labels)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scrape_counts_jobs_by_phase_and_forgets_those_that_are_gone() {
        let metrics = Metrics::new().unwrap();
        let text = metrics.render([Phase::Running, Phase::Running, Phase::Failed].into_iter()).unwrap();
        assert!(text.contains("rlhf_operator_jobs{phase=\"Running\"} 2"), "{text}");
        let text = metrics.render([Phase::Failed].into_iter()).unwrap();
        assert!(text.contains("rlhf_operator_jobs{phase=\"Running\"} 0"), "{text}");
        assert!(text.contains("rlhf_operator_jobs{phase=\"Failed\"} 1"), "{text}");
    }

    #[test]
    fn passes_attempts_errors_and_requests_are_counted() {
        let metrics = Metrics::new().unwrap();
        drop(metrics.pass());
        metrics.leads(true);
        metrics.failed(Reason::Apply);
        metrics.attempt_ended(Outcome::Disrupted);
        let refused = kube::core::Status::failure("no", "Forbidden").with_code(403).boxed();
        assert!(metrics.api::<()>("create", Err(kube::Error::Api(refused))).is_err());
        let text = metrics.render(std::iter::empty()).unwrap();
        for line in [
            "rlhf_operator_leader 1",
            "rlhf_operator_reconcile_duration_seconds_count 1",
            "rlhf_operator_reconcile_errors_total{reason=\"Apply\"} 1",
            "rlhf_operator_reconcile_errors_total{reason=\"Observe\"} 0",
            "rlhf_operator_attempts_total{outcome=\"disrupted\"} 1",
            "rlhf_operator_attempts_total{outcome=\"failed\"} 0",
            "rlhf_operator_api_requests_total{code=\"403\",verb=\"create\"} 1",
        ] {
            assert!(text.contains(line), "{line} is missing in\n{text}");
        }
    }
}

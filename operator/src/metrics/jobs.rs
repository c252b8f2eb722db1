//! The series of single RLHFJobs, made anew at each scrape from the jobs that exist: they vanish with their job, and
//! no counter of the process ever carries a name. `namespace` is the job's, so a scrape has to honour the labels.

use prometheus::proto::MetricFamily;
use prometheus::{GaugeVec, IntCounterVec, IntGaugeVec, Opts, Registry};
use rlhf_api::job::{Phase, RLHFJob, StagePhase, StageStatus};
use rlhf_api::names;

const JOB: [&str; 2] = ["namespace", "rlhf_job"];
const STAGE: [&str; 3] = ["namespace", "rlhf_job", "stage"];

/// The value of a job's `phase` label.
pub(super) const fn phase(phase: Phase) -> &'static str {
    match phase {
        Phase::Pending => "Pending",
        Phase::Preparing => "Preparing",
        Phase::Running => "Running",
        Phase::Suspended => "Suspended",
        Phase::Succeeded => "Succeeded",
        Phase::Failed => "Failed",
    }
}

/// The value of a stage's `phase` label.
const fn stage_phase(phase: StagePhase) -> &'static str {
    match phase {
        StagePhase::Pending => "Pending",
        StagePhase::Starting => "Starting",
        StagePhase::Running => "Running",
        StagePhase::Succeeded => "Succeeded",
        StagePhase::Failed => "Failed",
    }
}

struct Series {
    info: IntGaugeVec,
    condition: IntGaugeVec,
    finished: GaugeVec,
    stage_info: IntGaugeVec,
    attempt: IntGaugeVec,
    restarts: IntCounterVec,
    disruptions: IntCounterVec,
    step: IntGaugeVec,
    total_steps: IntGaugeVec,
}

impl Series {
    fn new() -> prometheus::Result<Self> {
        let gauge = |name: &str, help: &str, labels: &[&str]| IntGaugeVec::new(Opts::new(name, help), labels);
        let counter = |name: &str, help: &str| IntCounterVec::new(Opts::new(name, help), &STAGE);
        Ok(Self {
            info: gauge(
                "rlhf_operator_job_info",
                "1 for each RLHFJob, with the phase in which it is.",
                &[&JOB[..], &["phase"]].concat(),
            )?,
            condition: gauge(
                "rlhf_operator_job_condition",
                "1 for each condition of the RLHFJob's status that holds, 0 for one that held and does no more.",
                &[&JOB[..], &["condition"]].concat(),
            )?,
            finished: GaugeVec::new(
                Opts::new(
                    "rlhf_operator_job_finished_timestamp_seconds",
                    "When the RLHFJob succeeded or failed, in seconds since 1970.",
                ),
                &JOB,
            )?,
            stage_info: gauge(
                "rlhf_operator_stage_info",
                "1 for each stage of each RLHFJob (prepare is one), with the phase in which it is.",
                &[&STAGE[..], &["phase"]].concat(),
            )?,
            attempt: gauge("rlhf_operator_stage_attempt", "The stage's current attempt, 0 before the first.", &STAGE)?,
            restarts: counter(
                "rlhf_operator_stage_restarts_total",
                "Attempts at the stage that followed a failure, as status has it.",
            )?,
            disruptions: counter(
                "rlhf_operator_stage_disruptions_total",
                "Attempts at the stage that followed a disruption, as status has it.",
            )?,
            step: gauge(
                "rlhf_operator_stage_step",
                "The step (PPO: iteration) that the stage last told of; absent before it tells.",
                &STAGE,
            )?,
            total_steps: gauge(
                "rlhf_operator_stage_total_steps",
                "Steps (PPO: iterations) that the stage has; absent before it tells.",
                &STAGE,
            )?,
        })
    }

    fn registry(&self) -> prometheus::Result<Registry> {
        let registry = Registry::new();
        for gauge in [&self.info, &self.condition, &self.stage_info, &self.attempt, &self.step, &self.total_steps] {
            registry.register(Box::new(gauge.clone()))?;
        }
        for counter in [&self.restarts, &self.disruptions] {
            registry.register(Box::new(counter.clone()))?;
        }
        registry.register(Box::new(self.finished.clone()))?;
        Ok(registry)
    }

    fn add(&self, job: &RLHFJob) {
        let (namespace, name) = (text(&job.metadata.namespace), text(&job.metadata.name));
        let status = job.status.clone().unwrap_or_default();
        self.info.with_label_values(&[namespace, name, phase(status.phase)]).set(1);
        for condition in &status.conditions {
            let holds = i64::from(condition.status == "True");
            self.condition.with_label_values(&[namespace, name, &condition.type_]).set(holds);
        }
        if let Some(at) = status.completion_time {
            self.finished.with_label_values(&[namespace, name]).set(at.as_second() as f64);
        }
        let stages = job.spec.stages.iter().map(|s| s.name.as_str());
        for stage in [names::PREPARE].into_iter().chain(stages) {
            let known = status.prepare.iter().chain(&status.stages).find(|s| s.name == stage);
            self.add_stage([namespace, name, stage], &known.cloned().unwrap_or_default());
        }
    }

    fn add_stage(&self, labels: [&str; 3], slot: &StageStatus) {
        let [namespace, job, stage] = labels;
        self.stage_info.with_label_values(&[namespace, job, stage, stage_phase(slot.phase)]).set(1);
        self.attempt.with_label_values(&labels).set(slot.attempt.into());
        self.restarts.with_label_values(&labels).inc_by(slot.restarts.into());
        self.disruptions.with_label_values(&labels).inc_by(slot.disruptions.into());
        if let Some(progress) = &slot.progress {
            self.step.with_label_values(&labels).set(clamped(progress.step));
            self.total_steps.with_label_values(&labels).set(clamped(progress.total_steps));
        }
    }
}

fn text(of: &Option<String>) -> &str {
    of.as_deref().unwrap_or_default()
}

/// A trainer's number, whatever it is.
fn clamped(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

/// The series of these jobs.
pub(super) fn families<'a>(jobs: impl Iterator<Item = &'a RLHFJob>) -> prometheus::Result<Vec<MetricFamily>> {
    let series = Series::new()?;
    jobs.for_each(|job| series.add(job));
    Ok(series.registry()?.gather())
}

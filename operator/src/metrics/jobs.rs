//! The series of single RLHFJobs, made anew at each scrape from the jobs that exist: they vanish with their job, and
//! no counter of the process ever carries a name. `namespace` is the job's, so a scrape has to honour the labels.
//!
//! A thousand jobs have twenty thousand series, which take ten times their text in memory; so there is one family of a few
//! jobs at a time.

use crate::controller::Guarded;
use kube::Resource;
use prometheus::core::Collector;
use prometheus::proto::MetricFamily;
use prometheus::{CounterVec, GaugeVec, Opts, TextEncoder};
use rlhf_api::job::{Phase, RLHFJob, StagePhase, StageStatus};
use rlhf_api::names::{self, CONDITION_UNSUPPORTED};
use rlhf_api::report::Progress;

/// Takes a series: the values of the labels that are a family's own, and its value.
type Put<'a> = &'a mut dyn FnMut(&[&str], f64);

/// Series of one name, by the labels of a job and one's own.
struct Family {
    name: &'static str,
    help: &'static str,
    labels: &'static [&'static str],
    is_counter: bool,
    series: fn(&RLHFJob, Put<'_>),
    /// Of a job that cannot be read.
    undecodable: fn(Put<'_>),
}

/// Of so many jobs a family's series are there at a time.
const AT_ONCE: usize = 64;

/// In the place of a job's phase: it cannot be read.
pub(super) const UNDECODABLE: &str = "Undecodable";

const STAGE: &[&str] = &["stage"];

const FAMILIES: [Family; 10] = [
    Family {
        name: "rlhf_operator_job_info",
        help: "1 for each RLHFJob, with the phase in which it is, or Undecodable.",
        labels: &["phase"],
        is_counter: false,
        series: |job, put| put(&[phase(job.status.as_ref().map(|s| s.phase).unwrap_or_default())], 1.0),
        undecodable: |put| put(&[UNDECODABLE], 1.0),
    },
    Family {
        name: "rlhf_operator_job_condition",
        help: "1 for each condition of the RLHFJob's status that holds, 0 for one that held and does no more, with its reason.",
        labels: &["condition", "reason"],
        is_counter: false,
        series: |job, put| {
            for condition in job.status.iter().flat_map(|s| &s.conditions) {
                put(&[&condition.type_, &condition.reason], f64::from(u8::from(condition.status == "True")));
            }
        },
        undecodable: |put| put(&[CONDITION_UNSUPPORTED, UNDECODABLE], 1.0),
    },
    Family {
        name: "rlhf_operator_job_finished_timestamp_seconds",
        help: "When the RLHFJob succeeded or failed, in seconds since 1970.",
        labels: &[],
        is_counter: false,
        series: |job, put| {
            let at = job.status.as_ref().and_then(|s| s.completion_time);
            at.iter().for_each(|at| put(&[], at.as_second() as f64));
        },
        undecodable: |_| (),
    },
    Family {
        name: "rlhf_operator_stage_info",
        help: "1 for each stage of each RLHFJob (prepare is one), with the phase in which it is.",
        labels: &["stage", "phase"],
        is_counter: false,
        series: |job, put| {
            for (stage, slot) in stages(job) {
                put(&[stage, stage_phase(slot.map(|s| s.phase).unwrap_or_default())], 1.0);
            }
        },
        undecodable: |_| (),
    },
    Family {
        name: "rlhf_operator_stage_attempt",
        help: "The stage's current attempt, 0 before the first.",
        labels: STAGE,
        is_counter: false,
        series: |job, put| of_stages(job, put, |slot| f64::from(slot.attempt)),
        undecodable: |_| (),
    },
    Family {
        name: "rlhf_operator_stage_restarts_total",
        help: "Attempts at the stage that followed a failure, as status has it.",
        labels: STAGE,
        is_counter: true,
        series: |job, put| of_stages(job, put, |slot| f64::from(slot.restarts.total)),
        undecodable: |_| (),
    },
    Family {
        name: "rlhf_operator_stage_disruptions_total",
        help: "Attempts at the stage that followed a disruption, as status has it.",
        labels: STAGE,
        is_counter: true,
        series: |job, put| of_stages(job, put, |slot| f64::from(slot.disruptions)),
        undecodable: |_| (),
    },
    Family {
        name: "rlhf_operator_stage_step",
        help: "The step (PPO: iteration) that the stage last told of; absent before it tells.",
        labels: STAGE,
        is_counter: false,
        series: |job, put| of_progress(job, put, |progress| progress.step),
        undecodable: |_| (),
    },
    Family {
        name: "rlhf_operator_stage_total_steps",
        help: "Steps (PPO: iterations) that the stage has; absent before it tells.",
        labels: STAGE,
        is_counter: false,
        series: |job, put| of_progress(job, put, |progress| progress.total_steps),
        undecodable: |_| (),
    },
    Family {
        name: "rlhf_operator_stage_checkpoint_step",
        help: "The step (PPO: iteration) of the stage's last whole checkpoint, 0 before the first.",
        labels: STAGE,
        is_counter: false,
        series: |job, put| {
            of_stages(job, put, |slot| slot.checkpoint.as_ref().map_or(0.0, |checkpoint| checkpoint.step as f64));
        },
        undecodable: |_| (),
    },
];

/// The value of a job's `phase` label.
pub(super) const fn phase(phase: Phase) -> &'static str {
    match phase {
        Phase::Pending => "Pending",
        Phase::Preparing => "Preparing",
        Phase::Waiting => "Waiting",
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
        StagePhase::Stopped => "Stopped",
    }
}

/// The job's stages, prepare first, each with what status has of it.
fn stages(job: &RLHFJob) -> impl Iterator<Item = (&str, Option<&StageStatus>)> {
    let names = std::iter::once(names::PREPARE).chain(job.spec.stages.iter().map(|s| s.name.as_str()));
    names.map(|name| (name, job.status.as_ref().and_then(|status| status.slot(name))))
}

fn of_stages(job: &RLHFJob, put: Put<'_>, value: fn(&StageStatus) -> f64) {
    for (stage, slot) in stages(job) {
        put(&[stage], slot.map_or(0.0, value));
    }
}

fn of_progress(job: &RLHFJob, put: Put<'_>, value: fn(&Progress) -> u64) {
    for (stage, slot) in stages(job) {
        slot.and_then(|s| s.progress.as_ref()).iter().for_each(|progress| put(&[stage], value(progress) as f64));
    }
}

impl Family {
    /// With the series of these jobs, where there are any.
    fn of<'a>(&self, jobs: impl Iterator<Item = &'a Guarded>) -> prometheus::Result<Vec<MetricFamily>> {
        let labels = [&["namespace", "rlhf_job"], self.labels].concat();
        let options = Opts::new(self.name, self.help);
        let mut families = if self.is_counter {
            let counters = CounterVec::new(options, &labels)?;
            self.put(jobs, |labels, value| counters.with_label_values(labels).inc_by(value));
            counters.collect()
        } else {
            let gauges = GaugeVec::new(options, &labels)?;
            self.put(jobs, |labels, value| gauges.with_label_values(labels).set(value));
            gauges.collect()
        };
        families.retain(|family| !family.get_metric().is_empty());
        Ok(families)
    }

    fn put<'a>(&self, jobs: impl Iterator<Item = &'a Guarded>, put: impl Fn(&[&str], f64)) {
        for guarded in jobs {
            let of = [text(&guarded.meta().namespace), text(&guarded.meta().name)];
            let put: Put<'_> = &mut |own, value| put(&[&of, own].concat(), value);
            match &guarded.0 {
                Ok(job) => (self.series)(job, put),
                Err(_) => (self.undecodable)(put),
            }
        }
    }
}

fn text(of: &Option<String>) -> &str {
    of.as_deref().unwrap_or_default()
}

/// Writes the series of these jobs, family after family.
pub(super) fn write<'a>(jobs: impl Iterator<Item = &'a Guarded>, text: &mut String) -> prometheus::Result<()> {
    let (jobs, encoder, mut part) = (jobs.collect::<Vec<_>>(), TextEncoder::new(), String::new());
    for family in &FAMILIES {
        let mut begun = false;
        for some in jobs.chunks(AT_ONCE) {
            part.clear();
            encoder.encode_utf8(&family.of(some.iter().copied())?, &mut part)?;
            text.push_str(if begun { series(&part) } else { &part });
            begun |= !part.is_empty();
        }
    }
    Ok(())
}

/// What follows a family's help and type, which stand before all of its series.
fn series(family: &str) -> &str {
    let mut left = family;
    while let Some((_, next)) = left.split_once('\n').filter(|_| left.starts_with('#')) {
        left = next;
    }
    left
}

/// All families with the series of a job.
#[cfg(test)]
pub(super) fn families(job: &Guarded) -> impl Iterator<Item = MetricFamily> {
    FAMILIES.iter().flat_map(move |family| family.of([job].into_iter()).unwrap_or_default())
}

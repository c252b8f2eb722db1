//! The Prometheus side of telemetry: what is exported, in one table, and the registry that holds it.
//!
//! Every series carries the constant labels `rlhf_job`, `stage` and `rank`. A figure's gauge appears once the stage has
//! reported it, so a dashboard never shows a zero that nobody measured. `METRICS.md` is rendered from the tables.

use super::figure::{Figure, RewardOf};
use super::memory::Memory;
use crate::error::{Error, Result};
use prometheus::{CounterVec, GaugeVec, Opts, Registry, TextEncoder};

/// What a phase of training does; its seconds are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Reading records and making batches.
    Data,
    /// Generating responses.
    Rollout,
    /// Scoring responses: reward, reference, critic and old log-probabilities.
    Score,
    /// Forward, backward and optimizer steps.
    Train,
    /// Evaluating held-out records or prompts.
    Eval,
    /// Writing and reading checkpoints and outputs.
    Checkpoint,
}

impl Phase {
    /// Every phase.
    pub const ALL: [Phase; 6] =
        [Phase::Data, Phase::Rollout, Phase::Score, Phase::Train, Phase::Eval, Phase::Checkpoint];

    /// The value of the `phase` label.
    pub const fn label(self) -> &'static str {
        match self {
            Phase::Data => "data",
            Phase::Rollout => "rollout",
            Phase::Score => "score",
            Phase::Train => "train",
            Phase::Eval => "eval",
            Phase::Checkpoint => "checkpoint",
        }
    }
}

/// A metric that is not a figure.
struct Instrument {
    name: &'static str,
    labels: &'static [&'static str],
    help: &'static str,
}

const STEP: Instrument =
    Instrument { name: "rlhf_step", labels: &[], help: "Finished optimizer steps (ppo: iterations)." };
const TOTAL_STEPS: Instrument = Instrument { name: "rlhf_total_steps", labels: &[], help: "Steps of the whole stage." };
const CHECKPOINT_STEP: Instrument = Instrument {
    name: "rlhf_checkpoint_step",
    labels: &[],
    help: "The step after which the last whole checkpoint was written.",
};
const TOKENS: Instrument = Instrument {
    name: "rlhf_tokens_total",
    labels: &[],
    help: "Tokens trained on in this attempt, over all ranks: every rank counts the same.",
};
const SAMPLES: Instrument = Instrument {
    name: "rlhf_samples_total",
    labels: &[],
    help: "Samples trained on in this attempt, over all ranks: every rank counts the same.",
};
const SKIPPED_STEPS: Instrument = Instrument {
    name: "rlhf_skipped_steps_total",
    labels: &[],
    help: "Optimizer steps skipped in this attempt because a gradient is not finite: it overflowed (`precision: fp16`), or the batch is bad, which the log names.",
};
const PHASE_SECONDS: Instrument = Instrument {
    name: "rlhf_phase_seconds_total",
    labels: &["phase"],
    help: "Seconds that this rank spent in each phase (`data`, `rollout`, `score`, `train`, `eval`, `checkpoint`) in this attempt.",
};
const MEMORY: Instrument = Instrument {
    name: "rlhf_memory_bytes",
    labels: &["domain", "kind"],
    help: "Memory by `domain` (`host`: resident in this process; `device`: what it has taken from its GPU, where it has one) and \
           `kind` (`current`, `peak`, `limit`). The host's limit is the container's, which the pod's workers share, or the \
           machine's memory where there is none.",
};
const REWARD_SCORE: Instrument = Instrument {
    name: "rlhf_reward_score",
    labels: &["reward"],
    help: "Mean score of the rollout's responses by each reward, before its weight (ppo): `reward/<name>` in `/progress`, the status and `metrics.jsonl`.",
};
const EVAL_REWARD_SCORE: Instrument = Instrument {
    name: "rlhf_eval_reward_score",
    labels: &["reward"],
    help: "Mean score of the responses to the held-out prompts by each reward, before its weight (ppo): `evalReward/<name>` in `/progress`, the status and `metrics.jsonl`.",
};
const INFO: Instrument = Instrument {
    name: "rlhf_info",
    labels: &["attempt", "world_size", "version"],
    help: "1; the labels tell the attempt, the ranks and the trainer's version.",
};

/// Every metric that is not a figure, with its Prometheus type: what the reference page lists.
#[cfg(test)]
const INSTRUMENTS: [(&str, &Instrument); 11] = [
    ("gauge", &STEP),
    ("gauge", &TOTAL_STEPS),
    ("gauge", &CHECKPOINT_STEP),
    ("counter", &TOKENS),
    ("counter", &SAMPLES),
    ("counter", &SKIPPED_STEPS),
    ("counter", &PHASE_SECONDS),
    ("gauge", &MEMORY),
    ("gauge", &REWARD_SCORE),
    ("gauge", &EVAL_REWARD_SCORE),
    ("gauge", &INFO),
];

/// The constant labels of every series.
const CONST_LABELS: [(&str, &str); 3] = [
    ("rlhf_job", "Name of the RLHFJob."),
    ("stage", "The stage's name in the job."),
    ("rank", "The worker's rank among all of the stage's workers."),
];

/// The registry and its handles.
pub(super) struct Metrics {
    registry: Registry,
    figures: Vec<GaugeVec>,
    pub step: GaugeVec,
    pub total_steps: GaugeVec,
    pub checkpoint_step: GaugeVec,
    pub tokens: CounterVec,
    pub samples: CounterVec,
    pub skipped_steps: CounterVec,
    phase_seconds: CounterVec,
    memory: GaugeVec,
    reward_score: GaugeVec,
    eval_reward_score: GaugeVec,
}

impl Metrics {
    /// Everything registered; counters start at 0, gauges appear with their first value.
    pub fn new(job: &str, stage: &str, rank: u32) -> Result<Self> {
        let values = [job.to_owned(), stage.to_owned(), rank.to_string()];
        let labels = CONST_LABELS.iter().map(|(name, _)| (*name).to_owned()).zip(values).collect();
        let registry = Registry::new_custom(None, Some(labels)).map_err(broken)?;
        let figures =
            Figure::ALL.iter().map(|f| gauge(&registry, &Instrument { name: f.metric(), labels: &[], help: f.help() }));
        let this = Self {
            figures: figures.collect::<Result<_>>()?,
            step: gauge(&registry, &STEP)?,
            total_steps: gauge(&registry, &TOTAL_STEPS)?,
            checkpoint_step: gauge(&registry, &CHECKPOINT_STEP)?,
            tokens: counter(&registry, &TOKENS)?,
            samples: counter(&registry, &SAMPLES)?,
            skipped_steps: counter(&registry, &SKIPPED_STEPS)?,
            phase_seconds: counter(&registry, &PHASE_SECONDS)?,
            memory: gauge(&registry, &MEMORY)?,
            reward_score: gauge(&registry, &REWARD_SCORE)?,
            eval_reward_score: gauge(&registry, &EVAL_REWARD_SCORE)?,
            registry,
        };
        this.start_counters();
        Ok(this)
    }

    fn start_counters(&self) {
        add(&self.tokens, 0);
        add(&self.samples, 0);
        add(&self.skipped_steps, 0);
        for phase in Phase::ALL {
            self.add_seconds(phase, 0.0);
        }
    }

    /// Exports what does not change.
    pub fn set_info(&self, attempt: u32, world_size: u32) -> Result<()> {
        let values = [attempt.to_string(), world_size.to_string(), env!("CARGO_PKG_VERSION").to_owned()];
        gauge(&self.registry, &INFO)?.with_label_values(&values).set(1.0);
        Ok(())
    }

    pub fn set_figure(&self, figure: Figure, value: f64) {
        if let Some(gauge) = self.figures.get(figure as usize) {
            set(gauge, value);
        }
    }

    pub fn set_reward(&self, of: RewardOf, name: &str, score: f64) {
        let gauge = match of {
            RewardOf::Rollout => &self.reward_score,
            RewardOf::Evaluation => &self.eval_reward_score,
        };
        gauge.with_label_values(&[name]).set(score);
    }

    pub fn add_seconds(&self, phase: Phase, seconds: f64) {
        self.phase_seconds.with_label_values(&[phase.label()]).inc_by(seconds);
    }

    pub fn seconds(&self, phase: Phase) -> f64 {
        self.phase_seconds.with_label_values(&[phase.label()]).get()
    }

    pub fn set_memory(&self, domain: &str, Memory { current, peak, limit }: Memory) {
        for (kind, bytes) in [("current", Some(current)), ("peak", Some(peak)), ("limit", limit)] {
            if let Some(bytes) = bytes {
                self.memory.with_label_values(&[domain, kind]).set(bytes as f64);
            }
        }
    }

    /// The Prometheus text.
    pub fn render(&self) -> Result<String> {
        TextEncoder::new().encode_to_string(&self.registry.gather()).map_err(broken)
    }
}

/// Sets a gauge without labels of its own.
pub(super) fn set(gauge: &GaugeVec, value: f64) {
    gauge.with_label_values::<&str>(&[]).set(value);
}

/// Adds to a counter without labels of its own.
pub(super) fn add(counter: &CounterVec, n: u64) {
    counter.with_label_values::<&str>(&[]).inc_by(n as f64);
}

fn gauge(registry: &Registry, spec: &Instrument) -> Result<GaugeVec> {
    let gauge = GaugeVec::new(Opts::new(spec.name, spec.help), spec.labels).map_err(broken)?;
    registry.register(Box::new(gauge.clone())).map_err(broken)?;
    Ok(gauge)
}

fn counter(registry: &Registry, spec: &Instrument) -> Result<CounterVec> {
    let counter = CounterVec::new(Opts::new(spec.name, spec.help), spec.labels).map_err(broken)?;
    registry.register(Box::new(counter.clone())).map_err(broken)?;
    Ok(counter)
}

fn broken(error: prometheus::Error) -> Error {
    Error::bug(format!("metrics: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fmt::Write;
    use std::path::Path;

    /// `METRICS.md` as the tables have it.
    fn reference() -> String {
        let mut page = String::from(
            "# Metrics of the trainer\n\nGenerated from the tables in `src/telemetry`; \
             `UPDATE_DOCS=1 cargo test --release -p rlhf-trainer the_reference_page` writes it anew.\n\n\
             Each worker serves `GET /metrics` (Prometheus text) and `GET /progress` (JSON) on port 9400 plus its local rank. \
             Every series carries these labels:\n\n| label | meaning |\n|---|---|\n",
        );
        for (label, help) in CONST_LABELS {
            let _ = writeln!(page, "| `{label}` | {help} |");
        }
        page += "\n## Figures\n\nGauges. Each appears once the stage has reported it, here and under its key in `/progress`, in the RLHFJob's \
                 status and in the step's log line.\n\n| metric | key | meaning |\n|---|---|---|\n";
        for figure in Figure::ALL {
            let _ = writeln!(page, "| `{}` | `{}` | {} |", figure.metric(), figure.key(), figure.help());
        }
        page += "\n## The rest\n\n| metric | type | labels | meaning |\n|---|---|---|---|\n";
        for (kind, Instrument { name, labels, help }) in INSTRUMENTS {
            let labels = labels.iter().map(|l| format!("`{l}`")).collect::<Vec<_>>().join(", ");
            let _ = writeln!(page, "| `{name}` | {kind} | {labels} | {help} |");
        }
        page
    }

    #[test]
    fn the_reference_page_is_what_the_tables_say() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("METRICS.md");
        if std::env::var_os("UPDATE_DOCS").is_some() {
            std::fs::write(&path, reference()).unwrap();
        }
        let committed = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(
            committed == reference(),
            "METRICS.md is out of date: run UPDATE_DOCS=1 cargo test --release -p rlhf-trainer the_reference_page"
        );
    }

    /// Everything that a worker can export, with its type.
    fn exported() -> Vec<(String, String)> {
        let metrics = Metrics::new("j", "s", 0).unwrap();
        metrics.set_info(1, 1).unwrap();
        [RewardOf::Rollout, RewardOf::Evaluation].into_iter().for_each(|of| metrics.set_reward(of, "helpful", 1.0));
        metrics.set_memory("host", Memory { current: 1, peak: 2, limit: None });
        [&metrics.step, &metrics.total_steps, &metrics.checkpoint_step].into_iter().for_each(|g| set(g, 1.0));
        Figure::ALL.iter().for_each(|f| metrics.set_figure(*f, 1.0));
        let text = metrics.render().unwrap();
        let types = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '));
        types.map(|(name, kind)| (name.to_owned(), kind.to_owned())).collect()
    }

    #[test]
    fn what_is_exported_is_what_is_documented() {
        let figures = Figure::ALL.iter().map(|f| (f.metric().to_owned(), "gauge".to_owned()));
        let rest = INSTRUMENTS.map(|(kind, spec)| (spec.name.to_owned(), kind.to_owned()));
        let mut documented: Vec<_> = figures.chain(rest).collect();
        documented.sort();
        assert_eq!(exported(), documented);
    }
}

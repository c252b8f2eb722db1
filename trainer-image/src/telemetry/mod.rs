//! What the trainer tells the world while it runs: log lines, `/metrics` for Prometheus and `/progress` for the operator.
//!
//! Stages report to one [`Telemetry`], which is cheap to clone and to call; [`http`] serves what it holds. A number that is
//! not finite is shown in logs and metrics and left out of the progress document, which is JSON.

mod figure;
pub mod http;
pub mod logging;
pub mod memory;
mod metrics;
mod pace;

pub use figure::{Figure, RewardOf, Rewards};
pub use metrics::Phase;

use crate::data::{records_read, signs_of_life};
use crate::error::Result;
use figure::log_line;
use metrics::Metrics;
use pace::Pace;
use rlhf_api::config::JobRef;
use rlhf_api::report::{Checkpoint, Progress};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

/// Where a stage reports its steps and figures. Clones are the same telemetry.
#[derive(Clone)]
pub struct Telemetry(Arc<Inner>);

struct Inner {
    metrics: Metrics,
    state: Mutex<State>,
    /// The CUDA device whose memory is shown.
    device: OnceLock<usize>,
}

/// How far a download is.
#[derive(Clone, Debug)]
pub struct Fetched {
    /// What is fetched, and how far it is, in words.
    pub doing: String,
    /// Bytes that are there.
    pub bytes: u64,
    /// Bytes in all.
    pub of: u64,
    /// Seconds to the end at the present pace.
    pub eta_seconds: Option<u64>,
}

#[derive(Default)]
struct State {
    progress: Progress,
    pace: Pace,
    counts_records: bool,
}

impl Telemetry {
    /// Telemetry of one worker of one attempt.
    ///
    /// # Errors
    /// A bug: two metrics of one name.
    pub fn new(job: &JobRef, stage: &str, attempt: u32, rank: u32, world_size: u32) -> Result<Telemetry> {
        let metrics = Metrics::new(&job.name, stage, rank)?;
        metrics.set_info(attempt, world_size)?;
        Ok(Self(Arc::new(Inner { metrics, state: Mutex::default(), device: OnceLock::new() })))
    }

    /// Shows the memory of CUDA device `index` from now on. Only the first call counts: a worker has one device.
    pub fn watch_device(&self, index: usize) {
        self.0.device.get_or_init(|| index);
    }

    /// Says how many steps (PPO: iterations) the whole stage has.
    pub fn set_total_steps(&self, total: u64) {
        metrics::set(&self.0.metrics.total_steps, total as f64);
        self.state().progress.total_steps = total;
    }

    /// Says that this attempt goes on after `step`.
    pub fn resume_at(&self, step: u64) {
        metrics::set(&self.0.metrics.step, step as f64);
        let mut state = self.state();
        state.progress.step = step;
        state.pace = Pace::default();
    }

    /// Reports a finished step (PPO: iteration) and its figures, and logs one line of them.
    pub fn record_step(&self, step: u64, figures: &[(Figure, f64)]) {
        metrics::set(&self.0.metrics.step, step as f64);
        self.keep(figures);
        let mut state = self.state();
        state.pace.mark(step, Instant::now());
        let total = state.progress.total_steps;
        let eta_seconds = state.pace.seconds_for(total.saturating_sub(step)).filter(|_| total > 0);
        state.progress.step = step;
        state.progress.eta_seconds = eta_seconds;
        state.progress.doing = None;
        drop(state);
        log_line("step", Some((step, total)), eta_seconds, figures);
    }

    /// Reports figures that belong to no step, such as an evaluation's, and logs one line of them.
    pub fn record(&self, figures: &[(Figure, f64)]) {
        self.keep(figures);
        log_line("figures", None, None, figures);
    }

    /// Reports the mean score by each reward, and logs one line of them.
    pub fn record_rewards(&self, of: RewardOf, rewards: &[(String, f64)]) {
        for (name, score) in rewards {
            self.0.metrics.set_reward(of, name, *score);
        }
        let mut state = self.state();
        for (key, score) in of.keyed(rewards) {
            match score.is_finite() {
                true => state.progress.metrics.insert(key, score),
                false => state.progress.metrics.remove(&key),
            };
        }
        drop(state);
        let words: Vec<String> = of.keyed(rewards).map(|(key, score)| format!("{key}={score:.6}")).collect();
        tracing::info!("rewards: {}", words.join(" "));
    }

    /// Does `work` and counts its seconds under `phase`.
    pub fn phase<T>(&self, phase: Phase, work: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let result = work();
        self.0.metrics.add_seconds(phase, start.elapsed().as_secs_f64());
        result
    }

    /// The seconds counted under `phase` so far.
    pub fn phase_seconds(&self, phase: Phase) -> f64 {
        self.0.metrics.seconds(phase)
    }

    /// Says what is done now, until the next step is reported, or that steps are made.
    pub fn doing(&self, what: impl Into<String>) {
        self.state().progress.doing = Some(what.into());
    }

    /// Says that steps are made from now on.
    pub fn makes_steps(&self) {
        self.state().progress.doing = None;
    }

    /// Tells how far a download is.
    pub fn fetched(&self, fetched: Fetched) {
        let Fetched { doing, bytes, of, eta_seconds } = fetched;
        let mut state = self.state();
        state.progress.activity += 1;
        state.progress.doing = Some(doing);
        state.progress.eta_seconds = eta_seconds;
        for (figure, bytes) in [("fetchedBytes", bytes), ("bytesToFetch", of)] {
            state.progress.metrics.insert(figure.into(), bytes as f64);
        }
    }

    /// Tells how many records have been read as the figure `records`, for a work that does nothing else.
    pub fn count_records(&self) {
        self.state().counts_records = true;
    }

    /// Says that `done` parts of a work that has no steps of its own are done.
    pub fn part_done(&self, done: u64) {
        metrics::set(&self.0.metrics.step, done as f64);
        self.state().progress.step = done;
    }

    /// Shows that the trainer works, though a step may take long.
    pub fn alive(&self) {
        self.state().progress.activity += 1;
    }

    /// Counts tokens that were trained on, over all ranks.
    pub fn add_tokens(&self, n: u64) {
        metrics::add(&self.0.metrics.tokens, n);
    }

    /// Counts samples that were trained on, over all ranks.
    pub fn add_samples(&self, n: u64) {
        metrics::add(&self.0.metrics.samples, n);
    }

    /// Counts an optimizer step that was skipped because a gradient is not finite.
    pub fn skipped_step(&self) {
        metrics::add(&self.0.metrics.skipped_steps, 1);
    }

    /// Reports a checkpoint that is whole.
    pub fn checkpoint(&self, checkpoint: Checkpoint) {
        metrics::set(&self.0.metrics.checkpoint_step, checkpoint.step as f64);
        self.state().progress.checkpoint = Some(checkpoint);
    }

    /// Says that there is no checkpoint any more.
    pub fn no_checkpoint(&self) {
        self.state().progress.checkpoint = None;
    }

    /// How far the stage is: the document served as `/progress`. To read records is to be active.
    pub fn progress(&self) -> Progress {
        let (mut progress, counts_records) = {
            let state = self.state();
            (state.progress.clone(), state.counts_records)
        };
        progress.activity = progress.activity.saturating_add(signs_of_life());
        if counts_records {
            progress.metrics.insert("records".into(), records_read() as f64);
        }
        progress
    }

    /// The Prometheus text, with memory as it is now.
    ///
    /// # Errors
    /// A bug: metrics that Prometheus's text cannot hold.
    pub fn render(&self) -> Result<String> {
        self.0.metrics.set_memory("host", memory::host());
        if let Some(memory) = self.0.device.get().and_then(|index| memory::device(*index)) {
            self.0.metrics.set_memory("device", memory);
        }
        self.0.metrics.render()
    }

    fn keep(&self, figures: &[(Figure, f64)]) {
        let mut state = self.state();
        for (figure, value) in figures {
            self.0.metrics.set_figure(*figure, *value);
            if value.is_finite() {
                state.progress.metrics.insert(figure.key().into(), *value);
            } else {
                state.progress.metrics.remove(figure.key());
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn telemetry() -> Telemetry {
        let job = JobRef { namespace: "team-a".into(), name: "helpful".into(), uid: "u".into() };
        Telemetry::new(&job, "ppo", 2, 1, 4).unwrap()
    }

    /// The value of the first series of `metric` that has all these labels.
    fn sample(telemetry: &Telemetry, metric: &str, labels: &[(&str, &str)]) -> Option<f64> {
        let text = telemetry.render().unwrap();
        let has_labels = |line: &str| labels.iter().all(|(name, value)| line.contains(&format!("{name}=\"{value}\"")));
        let line = text.lines().find(|l| l.starts_with(&format!("{metric}{{")) && has_labels(l))?;
        line.rsplit_once(' ')?.1.parse().ok()
    }

    #[test]
    fn a_step_is_shown_in_progress_and_metrics() {
        let telemetry = telemetry();
        telemetry.set_total_steps(10);
        telemetry.resume_at(4);
        assert_eq!((telemetry.progress().step, telemetry.progress().eta_seconds), (4, None));
        telemetry.record_step(5, &[(Figure::Reward, 1.5), (Figure::Kl, 0.25)]);
        telemetry.record(&[(Figure::EvalReward, 2.0)]);
        telemetry.checkpoint(Checkpoint { step: 5, path: "jobs/x/checkpoints/step-5".into() });
        let progress = telemetry.progress();
        assert_eq!((progress.step, progress.total_steps, progress.percent()), (5, 10, 50));
        assert_eq!(
            progress.metrics,
            [("evalReward", 2.0), ("kl", 0.25), ("reward", 1.5)].map(|(k, v)| (k.to_owned(), v)).into()
        );
        assert_eq!(progress.checkpoint.unwrap().step, 5);
        for (metric, value) in [
            ("rlhf_reward", 1.5),
            ("rlhf_eval_reward", 2.0),
            ("rlhf_step", 5.0),
            ("rlhf_total_steps", 10.0),
            ("rlhf_checkpoint_step", 5.0),
        ] {
            assert_eq!(
                sample(&telemetry, metric, &[("rank", "1"), ("rlhf_job", "helpful"), ("stage", "ppo")]),
                Some(value),
                "{metric}"
            );
        }
        let version = env!("CARGO_PKG_VERSION");
        assert_eq!(
            sample(&telemetry, "rlhf_info", &[("attempt", "2"), ("world_size", "4"), ("version", version)]),
            Some(1.0)
        );
    }

    /// `/progress` also counts the records that have been read, and other tests read some meanwhile.
    #[test]
    fn each_sign_of_life_is_counted_and_told() {
        let telemetry = telemetry();
        assert_eq!(telemetry.state().progress.activity, 0);
        (0..3).for_each(|_| telemetry.alive());
        assert_eq!(telemetry.state().progress.activity, 3);
        telemetry.state().progress.activity = 1 << 40;
        assert!(telemetry.progress().activity >= 1 << 40);
    }

    #[test]
    fn what_is_done_between_steps_is_said_until_the_next_one() {
        let telemetry = telemetry();
        assert_eq!(telemetry.progress().doing, None);
        telemetry.doing("waiting for ranks 1, 2");
        telemetry.part_done(3);
        let progress = telemetry.progress();
        assert_eq!((progress.doing.as_deref(), progress.step), (Some("waiting for ranks 1, 2"), 3));
        telemetry.record_step(4, &[]);
        assert_eq!(telemetry.progress().doing, None);
        telemetry.doing("loading data and models");
        telemetry.makes_steps();
        assert_eq!(telemetry.progress().doing, None);
    }

    #[test]
    fn the_score_by_each_reward_is_told_under_its_name() {
        let telemetry = telemetry();
        let rewards = |helpful, safe| [("helpful".to_owned(), helpful), ("safe".to_owned(), safe)];
        telemetry.record_rewards(RewardOf::Rollout, &rewards(1.5, -0.25));
        telemetry.record_rewards(RewardOf::Evaluation, &rewards(2.0, f64::NAN));
        let told = [("evalReward/helpful", 2.0), ("reward/helpful", 1.5), ("reward/safe", -0.25)];
        assert_eq!(telemetry.progress().metrics, told.map(|(k, v)| (k.to_owned(), v)).into());
        assert_eq!(sample(&telemetry, "rlhf_reward_score", &[("reward", "safe")]), Some(-0.25));
        assert_eq!(sample(&telemetry, "rlhf_eval_reward_score", &[("reward", "helpful")]), Some(2.0));
        assert!(sample(&telemetry, "rlhf_eval_reward_score", &[("reward", "safe")]).unwrap().is_nan());
    }

    #[test]
    fn the_time_left_is_known_after_two_steps_of_this_attempt() {
        let telemetry = telemetry();
        telemetry.set_total_steps(3);
        telemetry.record_step(1, &[]);
        assert_eq!(telemetry.progress().eta_seconds, None);
        telemetry.record_step(2, &[]);
        assert!(telemetry.progress().eta_seconds.is_some());
        telemetry.record_step(3, &[]);
        assert_eq!(telemetry.progress().eta_seconds, Some(0));
    }

    #[test]
    fn without_a_total_there_is_no_time_left() {
        let telemetry = telemetry();
        telemetry.record_step(1, &[]);
        telemetry.record_step(2, &[]);
        assert_eq!(telemetry.progress().eta_seconds, None);
    }

    #[test]
    fn a_number_that_is_not_finite_leaves_progress_readable() {
        let telemetry = telemetry();
        telemetry.record_step(1, &[(Figure::Loss, 3.0), (Figure::GradNorm, 1.0)]);
        telemetry.record_step(2, &[(Figure::Loss, f64::NAN), (Figure::GradNorm, f64::INFINITY), (Figure::Kl, 0.5)]);
        let json = serde_json::to_string(&telemetry.progress()).unwrap();
        let back: Progress = serde_json::from_str(&json).unwrap();
        assert_eq!(back.metrics.keys().collect::<Vec<_>>(), ["kl"]);
        assert!(sample(&telemetry, "rlhf_loss", &[]).unwrap().is_nan());
        assert_eq!(sample(&telemetry, "rlhf_grad_norm", &[]), Some(f64::INFINITY));
    }

    #[test]
    fn a_figure_that_nobody_reported_is_absent_and_counters_start_at_zero() {
        let telemetry = telemetry();
        assert_eq!(sample(&telemetry, "rlhf_loss", &[]), None);
        assert_eq!(sample(&telemetry, "rlhf_checkpoint_step", &[]), None);
        assert_eq!(sample(&telemetry, "rlhf_tokens_total", &[]), Some(0.0));
        for phase in Phase::ALL {
            assert_eq!(sample(&telemetry, "rlhf_phase_seconds_total", &[("phase", phase.label())]), Some(0.0));
        }
    }

    #[test]
    fn counters_add_up_and_clones_are_the_same_telemetry() {
        let telemetry = telemetry();
        telemetry.add_tokens(100);
        telemetry.clone().add_tokens(28);
        telemetry.add_samples(3);
        let answer = telemetry.phase(Phase::Rollout, || {
            let start = Instant::now();
            while start.elapsed().as_millis() < 2 {}
            42
        });
        assert_eq!(answer, 42);
        assert_eq!(sample(&telemetry, "rlhf_tokens_total", &[]), Some(128.0));
        assert_eq!(sample(&telemetry, "rlhf_samples_total", &[]), Some(3.0));
        assert!(sample(&telemetry, "rlhf_phase_seconds_total", &[("phase", "rollout")]).unwrap() >= 0.002);
        assert_eq!(sample(&telemetry, "rlhf_phase_seconds_total", &[("phase", "train")]), Some(0.0));
    }

    #[test]
    fn host_memory_is_sampled_when_it_is_asked_for() {
        let telemetry = telemetry();
        let read = |kind: &str| sample(&telemetry, "rlhf_memory_bytes", &[("domain", "host"), ("kind", kind)]).unwrap();
        assert!(0.0 < read("current") && read("current") <= read("peak") && read("peak") < read("limit"));
        assert_eq!(sample(&telemetry, "rlhf_memory_bytes", &[("domain", "device")]), None);
    }
}

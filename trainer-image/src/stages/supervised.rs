//! The loop that supervised fine-tuning and reward-model training share: epochs over records, global batches,
//! one optimizer step each.

use super::context::Context;
use crate::data::order::permutation;
use crate::engine::{Model, Step};
use crate::error::{Error, Result};
use crate::optim::learning_rate;
use crate::telemetry::{Figure, Phase};
use rlhf_api::report::ExitCode;
use rlhf_api::stage::{Batch, Optimizer};
use serde_json::Value;
use std::time::Instant;

/// Records of a failed step that its error names.
const NAMED_RECORDS: usize = 256;

/// Which records make up each step.
pub(super) struct Schedule<'a> {
    pub records: usize,
    pub epochs: u32,
    pub max_steps: Option<u32>,
    pub batch: &'a Batch,
    pub seed: u64,
}

impl Schedule<'_> {
    fn steps_per_epoch(&self) -> u64 {
        (self.records as u64).div_ceil(self.batch.global_size.into())
    }

    /// Steps of the whole stage.
    pub fn total_steps(&self) -> u64 {
        let all = self.steps_per_epoch() * u64::from(self.epochs);
        self.max_steps.map_or(all, |max| all.min(max.into()))
    }

    /// The records of a step's global batch, the same on every rank. An epoch's last batch holds what is left. `order`
    /// keeps the epoch's permutation between steps.
    pub fn global_batch(&self, step: u64, order: &mut Option<(u64, Vec<usize>)>) -> Vec<usize> {
        let (epoch, index) = (step / self.steps_per_epoch(), (step % self.steps_per_epoch()) as usize);
        if order.as_ref().is_none_or(|(of, _)| *of != epoch) {
            *order = Some((epoch, permutation(self.records, self.seed, epoch)));
        }
        let size = self.batch.global_size as usize;
        order.iter().flat_map(|(_, records)| records).skip(index * size).take(size).copied().collect()
    }
}

/// What a stage learns from a global batch.
pub(crate) trait Objective {
    /// Runs forward and backward over this rank's share of a global batch; returns this rank's sums, the tokens it
    /// ran first. Every rank returns as many.
    fn backward(&self, context: &Context, model: &mut Model, global_batch: &[usize]) -> Result<Vec<f64>>;

    /// Records to learn from.
    fn records(&self) -> usize;

    /// The step's figures from the sums over all ranks.
    fn figures(&self, sums: &[f64]) -> Vec<(Figure, f64)>;

    /// Figures over the held-out records, over all ranks; none where nothing is held out.
    fn evaluate(&self, context: &Context, model: &Model) -> Result<Vec<(Figure, f64)>>;
}

/// The `i`-th run of `size` of this rank's records; empty where it has fewer than others.
pub(super) fn part<T>(records: &[T], i: usize, size: usize) -> &[T] {
    records.chunks(size).nth(i).unwrap_or_default()
}

/// Trains from where the last checkpoint left off to the last step, saving on the way; the held-out figures at the end.
/// They are taken before the first step too: the process ends soon after the last, before anybody could scrape them.
pub(super) fn train(
    context: &Context,
    schedule: &Schedule<'_>,
    optimizer: &Optimizer,
    model: &mut Model,
    objective: &impl Objective,
) -> Result<Vec<(Figure, f64)>> {
    let total = schedule.total_steps();
    let restored = context.restore(total, &mut [("model", model)])?;
    let first = restored.map_or(0, |r| r.step);
    if first < total {
        evaluate(context, model, objective, first)?;
    }
    let mut order = None;
    for step in first..total {
        let started = Instant::now();
        let global_batch = schedule.global_batch(step, &mut order);
        let rate = learning_rate(optimizer, step, total);
        let learnt = make_step(context, model, objective, &global_batch, (optimizer, rate));
        let learnt = learnt.map_err(|e| located(e, step + 1, &global_batch));
        let (mut sums, made) = context.save_if_stopped(learnt, step, &[("model", model)], &Value::Null)?;
        sums.push(f64::from(u8::from(context.asked_to_stop())));
        context.group.sum(&mut sums)?;
        let stop = sums.pop().is_some_and(|votes| votes > 0.0);
        context.telemetry.add_tokens(sums[0] as u64);
        context.telemetry.add_samples(global_batch.len() as u64);
        let mut figures = objective.figures(&sums);
        let speed = sums[0] / started.elapsed().as_secs_f64();
        figures.extend([(Figure::LearningRate, rate), (Figure::TokensPerSecond, speed)]);
        match made {
            Step::Made(norm) => figures.push((Figure::GradNorm, norm)),
            Step::Skipped(norm) => {
                context.skipped(
                    "model",
                    model,
                    norm,
                    &format!("step {}, {}", step + 1, named("records", &global_batch)),
                );
            }
        }
        context.report(step + 1, &figures)?;
        context.step_edge(step + 1, total, stop, &[("model", model)], &Value::Null)?;
    }
    evaluate(context, model, objective, total)
}

/// Learns from a global batch; returns this rank's sums and what the optimizer did.
pub(crate) fn make_step(
    context: &Context,
    model: &mut Model,
    objective: &impl Objective,
    global_batch: &[usize],
    (optimizer, rate): (&Optimizer, f64),
) -> Result<(Vec<f64>, Step)> {
    context.telemetry.phase(Phase::Train, || {
        let sums = objective.backward(context, model, global_batch)?;
        Ok((sums, model.step(optimizer, rate)?))
    })
}

/// Adds to the error of a step where it happened. The cause stands first, as a termination message is cut at its end. A lost
/// peer has nothing to do with the records, and a stop with neither.
fn located(error: Error, step: u64, records: &[usize]) -> Error {
    let Error { exit, message } = error;
    match exit {
        ExitCode::Terminated => return Error { exit, message },
        ExitCode::PeerLost => return Error::new(exit, format!("{message} (step {step})")),
        _ => {}
    }
    Error::new(exit, format!("{message} (step {step}, {})", named("records", records)))
}

/// A batch by the numbers of what it is made of.
pub(super) fn named(what: &str, batch: &[usize]) -> String {
    let named: Vec<String> = batch.iter().take(NAMED_RECORDS).map(usize::to_string).collect();
    let more = match batch.len() - named.len() {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    format!("{what} [{}]{more}", named.join(", "))
}

fn evaluate(context: &Context, model: &Model, objective: &impl Objective, step: u64) -> Result<Vec<(Figure, f64)>> {
    let figures = context.telemetry.phase(Phase::Eval, || objective.evaluate(context, model))?;
    context.report_evaluation(step, &figures)?;
    Ok(figures)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cause_of_a_failed_step_stands_before_its_records() {
        let error = located(Error::bug("odd"), 3, &[7, 1]);
        assert_eq!((error.exit.code(), error.message.as_str()), (70, "odd (step 3, records [7, 1])"));
        let many: Vec<usize> = (0..10_000).collect();
        let error = located(Error::bug("odd"), 3, &many);
        assert!(error.message.ends_with("254, 255] and 9744 more)") && error.message.len() < 2000, "{error}");
        let stopped = located(Error::new(ExitCode::Terminated, "stopped"), 3, &many);
        assert_eq!(stopped.message, "stopped");
        let lost = located(Error::new(ExitCode::PeerLost, "lost"), 3, &many);
        assert_eq!(lost.message, "lost (step 3)");
    }

    #[test]
    fn an_epoch_visits_every_record_once_and_ends_with_what_is_left() {
        let batch = Batch { global_size: 4, micro_size: 2 };
        let schedule = Schedule { records: 10, epochs: 2, max_steps: None, batch: &batch, seed: 1 };
        assert_eq!(schedule.total_steps(), 6);
        let mut order = None;
        for epoch in 0..2 {
            let batches: Vec<_> = (0..3).map(|s| schedule.global_batch(epoch * 3 + s, &mut order)).collect();
            assert_eq!(batches.iter().map(Vec::len).collect::<Vec<_>>(), [4, 4, 2]);
            let mut all = batches.concat();
            all.sort_unstable();
            assert_eq!(all, (0..10).collect::<Vec<_>>());
        }
        assert_ne!(schedule.global_batch(0, &mut order), schedule.global_batch(3, &mut order));
        assert_eq!(Schedule { max_steps: Some(5), ..schedule }.total_steps(), 5);
    }
}

//! Several passes of clipped policy and value steps over one rollout (Schulman 2017; Huang 2024, details 8 to 12).

use super::Models;
use super::experience::{Experience, states};
use crate::data::order::permutation;
use crate::engine::{Model, Step, step_together};
use crate::error::{Error, Result};
use crate::model::Batch;
use crate::stages::Context;
use crate::stages::math::{entropy, log_probabilities, policy_loss, value_loss};
use crate::stages::supervised::{named, part};
use crate::telemetry::Figure;
use rlhf_api::stage::{Optimizer, Ppo};
use std::ops::Range;
use tch::{Kind, Tensor};

/// Sums over the response tokens of mini-batches.
#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    tokens: f64,
    policy_loss: f64,
    value_loss: f64,
    ratio: f64,
    clipped: f64,
    approx_kl: f64,
}

impl Sums {
    fn add(&mut self, other: &Self) {
        let Self { tokens, policy_loss, value_loss, ratio, clipped, approx_kl } = other;
        self.tokens += tokens;
        self.policy_loss += policy_loss;
        self.value_loss += value_loss;
        self.ratio += ratio;
        self.clipped += clipped;
        self.approx_kl += approx_kl;
    }

    fn over_ranks(self, context: &Context) -> Result<Self> {
        let Self { tokens, policy_loss, value_loss, ratio, clipped, approx_kl } = self;
        let mut all = [tokens, policy_loss, value_loss, ratio, clipped, approx_kl];
        context.group.sum(&mut all)?;
        let [tokens, policy_loss, value_loss, ratio, clipped, approx_kl] = all;
        Ok(Self { tokens, policy_loss, value_loss, ratio, clipped, approx_kl })
    }
}

/// Gradient norms of the steps that were made.
#[derive(Clone, Copy, Debug, Default)]
struct Norms {
    sum: f64,
    steps: f64,
}

impl Norms {
    fn mean(&self) -> f64 {
        self.sum / self.steps.max(1.0)
    }
}

/// Learns from a rollout; returns the iteration's figures, means over all response tokens of all passes. With `stops` a request
/// to stop gives it up.
pub(super) fn learn(
    context: &Context,
    settings: &Ppo,
    models: &mut Models,
    experience: &[Experience],
    iteration: u64,
    rates: [f64; 2],
    stops: bool,
) -> Result<Vec<(Figure, f64)>> {
    let mut total = Sums::default();
    let mut norms = [Norms::default(), Norms::default()];
    'passes: for pass in 0..settings.epochs {
        let order = permutation(
            experience.len(),
            context.config.seed,
            iteration * u64::from(settings.epochs) + u64::from(pass),
        );
        for mini_batch in order.chunks(settings.batch.global_size as usize) {
            let rows: Vec<&Experience> = mini_batch.iter().map(|&i| &experience[i]).collect();
            let mut sums = run_mini_batch(context, settings, models, &rows, stops)?;
            if let Some(target) = settings.target_kl {
                sums = sums.over_ranks(context)?;
                total.add(&sums);
                // Before the step that would go on from a policy that is too far, as in Stable-Baselines3 and Spinning Up.
                if sums.approx_kl > target * sums.tokens {
                    models.actor.forget_gradient()?;
                    models.critic.forget_gradient()?;
                    break 'passes;
                }
            } else {
                total.add(&sums);
            }
            let place = format!("iteration {}, pass {}, {}", iteration + 1, pass + 1, named("answers", mini_batch));
            step(context, settings, models, rates, &place, &mut norms)?;
        }
    }
    if settings.target_kl.is_none() {
        total = total.over_ranks(context)?;
    }
    Ok(figures(&total, &norms))
}

/// One step of actor and critic, or of neither. `place` says of which mini-batch.
fn step(
    context: &Context,
    settings: &Ppo,
    models: &mut Models,
    rates: [f64; 2],
    place: &str,
    norms: &mut [Norms; 2],
) -> Result<()> {
    let [actor, critic] =
        [&settings.actor_optimizer, &settings.critic_optimizer].map(|o| o.or_epsilon(Optimizer::PPO_EPSILON));
    let steps = step_together([(&mut models.actor, &actor, rates[0]), (&mut models.critic, &critic, rates[1])])
        .map_err(|e| Error { message: format!("{} ({place})", e.message), ..e })?;
    let named = [("actor", &models.actor), ("critic", &models.critic)];
    for ((step, norms), (name, model)) in steps.into_iter().zip(norms).zip(named) {
        match step {
            Step::Made(norm) => *norms = Norms { sum: norms.sum + norm, steps: norms.steps + 1.0 },
            Step::Skipped(norm) => context.skipped(name, model, norm, place),
        }
    }
    Ok(())
}

fn figures(total: &Sums, norms: &[Norms; 2]) -> Vec<(Figure, f64)> {
    let mean = |sum: f64| sum / total.tokens.max(1.0);
    vec![
        (Figure::PolicyLoss, mean(total.policy_loss)),
        (Figure::ValueLoss, mean(total.value_loss)),
        (Figure::Ratio, mean(total.ratio)),
        (Figure::ClipFraction, mean(total.clipped)),
        (Figure::ApproxKl, mean(total.approx_kl)),
        (Figure::GradNorm, norms[0].mean()),
        (Figure::CriticGradNorm, norms[1].mean()),
    ]
}

/// Forward and backward of actor and critic over this rank's share of a mini-batch.
fn run_mini_batch(
    context: &Context,
    settings: &Ppo,
    models: &mut Models,
    rows: &[&Experience],
    stops: bool,
) -> Result<Sums> {
    let tokens = rows.iter().map(|e| e.response_len()).sum::<usize>().max(1) as f64;
    let share: Vec<&Experience> = context.group.share(rows).into_iter().copied().collect();
    let size = settings.batch.micro_size as usize;
    let rounds = context.group.rounds(rows.len(), size);
    let mut sums = Sums::default();
    for i in 0..rounds {
        if stops {
            context.stop_point()?;
        } else {
            context.asked_to_stop();
        }
        let micro_batch = MicroBatch::new(part(&share, i, size), &models.actor, settings, tokens);
        micro_batch.run_actor(&mut models.actor, i + 1 == rounds, &mut sums)?;
        micro_batch.run_critic(&mut models.critic, i + 1 == rounds, &mut sums)?;
    }
    Ok(sums)
}

/// A few rows as a padded batch, with the numbers of their response tokens joined `[n]`.
struct MicroBatch<'a> {
    settings: &'a Ppo,
    /// Response tokens of the whole mini-batch: what losses are averaged over.
    tokens: f64,
    batch: Batch,
    states: Vec<i64>,
    targets: Tensor,
    log_p: Tensor,
    advantages: Tensor,
    values: Tensor,
    returns: Tensor,
}

impl<'a> MicroBatch<'a> {
    fn new(rows: &[&Experience], actor: &Model, settings: &'a Ppo, tokens: f64) -> Self {
        let device = actor.device();
        let token_rows: Vec<&[i64]> = rows.iter().map(|e| e.tokens.as_slice()).collect();
        let batch = Batch::right_padded(&token_rows, device);
        let targets: Vec<i64> = rows.iter().flat_map(|e| e.response().iter().copied()).collect();
        let joined = |of: fn(&Experience) -> &Vec<f64>| {
            let all: Vec<f32> = rows.iter().flat_map(|e| of(e).iter().map(|x| *x as f32)).collect();
            Tensor::from_slice(&all).to_device(device)
        };
        Self {
            settings,
            tokens,
            states: states(&batch, rows.iter().copied()),
            batch,
            targets: Tensor::from_slice(&targets).to_device(device),
            log_p: joined(|e| &e.log_p),
            advantages: joined(|e| &e.advantages),
            values: joined(|e| &e.values),
            returns: joined(|e| &e.returns),
        }
    }

    fn run_actor(&self, actor: &mut Model, last: bool, sums: &mut Sums) -> Result<()> {
        actor.backward(&self.batch, &self.states, last, |logits, range| {
            let part = |t: &Tensor| slice(t, &range);
            let (log_p, all) = log_probabilities(logits, &part(&self.targets)?, self.settings.sampling.temperature)?;
            let (losses, log_ratio) =
                policy_loss(&log_p, &part(&self.log_p)?, &part(&self.advantages)?, self.settings.clip_ratio)?;
            let mut loss = losses.f_sum(Kind::Float)?;
            sums.tokens += range.len() as f64;
            sums.policy_loss += loss.f_double_value(&[])?;
            self.count(&log_ratio.f_detach()?, sums)?;
            if self.settings.entropy_coefficient > 0.0 {
                loss = loss.f_sub(&(entropy(&all)?.f_sum(Kind::Float)? * self.settings.entropy_coefficient))?;
            }
            Ok(loss / self.tokens)
        })
    }

    /// Adds up the health figures of the log probability ratios `[n]`.
    fn count(&self, log_ratio: &Tensor, sums: &mut Sums) -> Result<()> {
        let sum = |t: Tensor| -> Result<f64> { Ok(t.f_sum(Kind::Double)?.f_double_value(&[])?) };
        let ratio = log_ratio.f_exp()?;
        sums.clipped += sum((&ratio - 1.0).f_abs()?.f_gt(self.settings.clip_ratio)?)?;
        // Schulman 2020, k3 of the old policy from the new: ratio - 1 - log ratio.
        sums.approx_kl += sum((&ratio - 1.0).f_sub(log_ratio)?)?;
        sums.ratio += sum(ratio)?;
        Ok(())
    }

    fn run_critic(&self, critic: &mut Model, last: bool, sums: &mut Sums) -> Result<()> {
        critic.backward(&self.batch, &self.states, last, |values, range| {
            let part = |t: &Tensor| slice(t, &range);
            let loss = value_loss(values, &part(&self.values)?, &part(&self.returns)?, self.settings.clip_value)?
                .f_sum(Kind::Float)?;
            sums.value_loss += loss.f_double_value(&[])?;
            Ok(loss / self.tokens)
        })
    }
}

fn slice(tensor: &Tensor, range: &Range<usize>) -> Result<Tensor> {
    Ok(tensor.f_narrow(0, range.start as i64, range.len() as i64)?)
}

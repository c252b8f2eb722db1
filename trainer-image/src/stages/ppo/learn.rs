//! Several passes of clipped policy and value steps over one rollout (Schulman 2017; Huang 2024, details 8 to 12); without a
//! critic, of policy steps alone.

use super::Models;
use super::experience::{Experience, states};
use crate::data::order::permutation;
use crate::engine::{Model, Step, step_together};
use crate::error::{Error, Result};
use crate::model::Batch;
use crate::stages::Context;
use crate::stages::math::{entropy, kl_loss, log_probabilities, policy_loss, value_loss};
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

/// What learning from one rollout goes by.
pub(super) struct Learning<'a> {
    pub context: &'a Context,
    pub settings: &'a Ppo,
    /// What the KL divergence counts in the loss; 0 where it is in the rewards.
    pub kl_coefficient: f64,
    pub iteration: u64,
    /// The actor's optimizer, and its learning rate.
    pub actor: (&'a Optimizer, f64),
    /// The critic's, where there is one.
    pub critic: Option<(&'a Optimizer, f64)>,
    /// Whether a request to stop gives it up.
    pub stops: bool,
}

impl Learning<'_> {
    /// Learns from a rollout; returns the iteration's figures, means over all response tokens of all passes.
    pub fn learn(&self, models: &mut Models, experience: &[Experience]) -> Result<Vec<(Figure, f64)>> {
        let (context, settings) = (self.context, self.settings);
        let mut total = Sums::default();
        let mut norms = [Norms::default(), Norms::default()];
        'passes: for pass in 0..settings.epochs {
            let number = self.iteration * u64::from(settings.epochs) + u64::from(pass);
            let order = permutation(experience.len(), context.config.seed, number);
            for mini_batch in order.chunks(settings.batch.global_size as usize) {
                let rows: Vec<&Experience> = mini_batch.iter().map(|&i| &experience[i]).collect();
                let mut sums = self.run_mini_batch(models, &rows)?;
                if let Some(target) = settings.target_kl {
                    sums = sums.over_ranks(context)?;
                    total.add(&sums);
                    // Before the step that would go on from a policy that is too far, as in Stable-Baselines3 and Spinning Up.
                    if sums.approx_kl > target * sums.tokens {
                        models.actor.forget_gradient()?;
                        models.critic.as_mut().map_or(Ok(()), Model::forget_gradient)?;
                        break 'passes;
                    }
                } else {
                    total.add(&sums);
                }
                let answers = named("answers", mini_batch);
                self.step(
                    models,
                    &format!("iteration {}, pass {}, {answers}", self.iteration + 1, pass + 1),
                    &mut norms,
                )?;
            }
        }
        if settings.target_kl.is_none() {
            total = total.over_ranks(context)?;
        }
        Ok(figures(&total, &norms, models.critic.is_some()))
    }

    /// One step of actor and critic, or of neither. `place` says of which mini-batch.
    fn step(&self, models: &mut Models, place: &str, norms: &mut [Norms; 2]) -> Result<()> {
        let with_default = |(optimizer, rate): (&Optimizer, f64)| (optimizer.or_epsilon(Optimizer::PPO_EPSILON), rate);
        let (actor, critic) = (with_default(self.actor), self.critic.map(with_default));
        let mut stepping = vec![(&mut models.actor, &actor.0, actor.1)];
        stepping.extend(models.critic.as_mut().zip(critic.as_ref()).map(|(model, (by, rate))| (model, by, *rate)));
        let steps = step_together(stepping).map_err(|e| Error { message: format!("{} ({place})", e.message), ..e })?;
        let named = [("actor", Some(&models.actor)), ("critic", models.critic.as_ref())];
        for ((step, norms), (name, model)) in steps.into_iter().zip(norms).zip(named) {
            match (step, model) {
                (Step::Made(norm), _) => *norms = Norms { sum: norms.sum + norm, steps: norms.steps + 1.0 },
                (Step::Skipped(norm), Some(model)) => self.context.skipped(name, model, norm, place),
                (Step::Skipped(_), None) => {}
            }
        }
        Ok(())
    }

    /// Forward and backward of actor and critic over this rank's share of a mini-batch.
    fn run_mini_batch(&self, models: &mut Models, rows: &[&Experience]) -> Result<Sums> {
        let tokens = rows.iter().map(|e| e.response_len()).sum::<usize>().max(1) as f64;
        let share: Vec<&Experience> = self.context.group.share(rows).into_iter().copied().collect();
        let size = self.settings.batch.micro_size as usize;
        let rounds = self.context.group.rounds(rows.len(), size);
        let mut sums = Sums::default();
        for i in 0..rounds {
            if self.stops {
                self.context.stop_point()?;
            } else {
                self.context.asked_to_stop();
            }
            let micro_batch = MicroBatch::new(part(&share, i, size), &models.actor, self, tokens);
            micro_batch.run_actor(&mut models.actor, i + 1 == rounds, &mut sums)?;
            if let Some(critic) = &mut models.critic {
                micro_batch.run_critic(critic, i + 1 == rounds, &mut sums)?;
            }
        }
        Ok(sums)
    }
}

fn figures(total: &Sums, norms: &[Norms; 2], critic: bool) -> Vec<(Figure, f64)> {
    let mean = |sum: f64| sum / total.tokens.max(1.0);
    let mut figures = vec![
        (Figure::PolicyLoss, mean(total.policy_loss)),
        (Figure::Ratio, mean(total.ratio)),
        (Figure::ClipFraction, mean(total.clipped)),
        (Figure::ApproxKl, mean(total.approx_kl)),
        (Figure::GradNorm, norms[0].mean()),
    ];
    if critic {
        figures.extend([(Figure::ValueLoss, mean(total.value_loss)), (Figure::CriticGradNorm, norms[1].mean())]);
    }
    figures
}

/// A few rows as a padded batch, with the numbers of their response tokens joined `[n]`.
struct MicroBatch<'a> {
    learning: &'a Learning<'a>,
    /// Response tokens of the whole mini-batch: what losses are averaged over.
    tokens: f64,
    batch: Batch,
    states: Vec<i64>,
    targets: Tensor,
    log_p: Tensor,
    reference_log_p: Tensor,
    advantages: Tensor,
    values: Tensor,
    returns: Tensor,
}

impl<'a> MicroBatch<'a> {
    fn new(rows: &[&Experience], actor: &Model, learning: &'a Learning<'a>, tokens: f64) -> Self {
        let device = actor.device();
        let token_rows: Vec<&[i64]> = rows.iter().map(|e| e.tokens.as_slice()).collect();
        let batch = Batch::right_padded(&token_rows, device);
        let targets: Vec<i64> = rows.iter().flat_map(|e| e.response().iter().copied()).collect();
        let joined = |of: fn(&Experience) -> &Vec<f64>| {
            let all: Vec<f32> = rows.iter().flat_map(|e| of(e).iter().map(|x| *x as f32)).collect();
            Tensor::from_slice(&all).to_device(device)
        };
        Self {
            learning,
            tokens,
            states: states(&batch, rows.iter().copied()),
            batch,
            targets: Tensor::from_slice(&targets).to_device(device),
            log_p: joined(|e| &e.log_p),
            reference_log_p: joined(|e| &e.reference_log_p),
            advantages: joined(|e| &e.advantages),
            values: joined(|e| &e.values),
            returns: joined(|e| &e.returns),
        }
    }

    fn run_actor(&self, actor: &mut Model, last: bool, sums: &mut Sums) -> Result<()> {
        let Learning { settings, kl_coefficient, .. } = self.learning;
        actor.backward(&self.batch, &self.states, last, |logits, range| {
            let part = |t: &Tensor| slice(t, &range);
            let (log_p, all) = log_probabilities(logits, &part(&self.targets)?, settings.sampling.temperature)?;
            let (losses, log_ratio) =
                policy_loss(&log_p, &part(&self.log_p)?, &part(&self.advantages)?, settings.clip_ratio)?;
            let mut loss = losses.f_sum(Kind::Float)?;
            sums.tokens += range.len() as f64;
            sums.policy_loss += loss.f_double_value(&[])?;
            self.count(&log_ratio.f_detach()?, sums)?;
            if settings.entropy_coefficient > 0.0 {
                loss = loss.f_sub(&(entropy(&all)?.f_sum(Kind::Float)? * settings.entropy_coefficient))?;
            }
            if *kl_coefficient > 0.0 {
                let kl = kl_loss(settings.kl.estimator, &log_p, &part(&self.reference_log_p)?)?;
                loss = loss.f_add(&(kl.f_sum(Kind::Float)? * *kl_coefficient))?;
            }
            Ok(loss / self.tokens)
        })
    }

    /// Adds up the health figures of the log probability ratios `[n]`.
    fn count(&self, log_ratio: &Tensor, sums: &mut Sums) -> Result<()> {
        let sum = |t: Tensor| -> Result<f64> { Ok(t.f_sum(Kind::Double)?.f_double_value(&[])?) };
        let ratio = log_ratio.f_exp()?;
        sums.clipped += sum((&ratio - 1.0).f_abs()?.f_gt(self.learning.settings.clip_ratio)?)?;
        // Schulman 2020, k3 of the old policy from the new: ratio - 1 - log ratio.
        sums.approx_kl += sum((&ratio - 1.0).f_sub(log_ratio)?)?;
        sums.ratio += sum(ratio)?;
        Ok(())
    }

    fn run_critic(&self, critic: &mut Model, last: bool, sums: &mut Sums) -> Result<()> {
        critic.backward(&self.batch, &self.states, last, |values, range| {
            let part = |t: &Tensor| slice(t, &range);
            let loss =
                value_loss(values, &part(&self.values)?, &part(&self.returns)?, self.learning.settings.clip_value)?
                    .f_sum(Kind::Float)?;
            sums.value_loss += loss.f_double_value(&[])?;
            Ok(loss / self.tokens)
        })
    }
}

fn slice(tensor: &Tensor, range: &Range<usize>) -> Result<Tensor> {
    Ok(tensor.f_narrow(0, range.start as i64, range.len() as i64)?)
}

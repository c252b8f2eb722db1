//! Proximal policy optimisation of a language model against a reward model (Ziegler 2019; Stiennon 2020; Huang 2024).
//!
//! Each iteration: answer a batch of prompts, score the answers, estimate advantages (with a critic or without), learn from
//! them in several passes. Experience is small beside the models, so every rank holds all of it and any rank can learn from any
//! row: what is learnt does not depend on the world size.

mod advantages;
mod evaluate;
mod experience;
mod learn;
mod models;

use super::context::{Context, Edge};
use super::math::{adapted_kl_coefficient, explained_variance};
use crate::data::order::permutation;
use crate::data::{Half, Prompt};
use crate::engine::Model;
use crate::error::{Error, Result};
use crate::model::Source;
use crate::optim::learning_rate;
use crate::telemetry::{Figure, Phase, RewardOf, Rewards};
use evaluate::HeldOut;
use experience::Experience;
pub(crate) use models::{Models, Scorer};
use rlhf_api::report::{ExitCode, Output};
use rlhf_api::stage::{Estimator, KlPlace, Optimizer, Ppo};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::Instant;

/// What a resumed run needs beside the models.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct State {
    kl_coefficient: f64,
    /// Figures of the evaluation before the first iteration.
    before: BTreeMap<String, f64>,
}

/// A PPO stage at work.
pub(crate) struct Run<'a> {
    context: &'a Context,
    settings: &'a Ppo,
    /// How advantages are estimated.
    advantage: Estimator,
    /// The tokens that end a response.
    ends: Vec<i64>,
    models: Models,
    state: State,
}

pub(super) fn run(context: &Context, settings: &Ppo) -> Result<Output> {
    warn_of_cuts(settings);
    let tokenizer = context.tokenizer()?;
    let data = context.telemetry.phase(Phase::Data, || context.dataset())?;
    let (prompts, held_out) = (Half::train(&data), Half::eval(&data));
    let mut source = Source::open(&context.path(&context.config.paths.start_model))?;
    source.spec.known_tokens = Some(tokenizer.vocab_size() as i64);
    let models = Models::load(context, settings, &source)?;
    let mut run = Run::new(context, settings, tokenizer.ends(), models)?;
    let held_out = HeldOut { prompts: held_out, tokenizer: &tokenizer };
    let start = run.restore_or_evaluate(&held_out)?;
    for iteration in start..u64::from(settings.iterations) {
        let (figures, rewards) = run.iterate(iteration, &prompts)?;
        context.report_rewards(RewardOf::Rollout, &rewards);
        context.report(iteration + 1, &figures)?;
        run.save_if_stopped(run.evaluate_if_due(iteration + 1, &held_out), iteration + 1)?;
        run.step_edge(iteration + 1)?;
    }
    let figures = run.evaluate(settings.iterations.into(), "eval-after", &held_out)?;
    let before = run.state.before.into_iter().map(|(key, value)| (format!("{key}Before"), value));
    let metrics = figures.into_iter().chain(before).collect();
    context.export(&run.models.actor, &source, None, metrics)
}

/// Log-probabilities are those of the whole softmax, so cuts make the sampled law another than the scored one.
fn warn_of_cuts(settings: &Ppo) {
    if settings.sampling.top_p < 1.0 || settings.sampling.top_k > 0 {
        tracing::warn!(
            "sampling is cut by topP or topK: the policy that is scored differs from the one that is sampled, and the KL estimate may be negative"
        );
    }
}

impl<'a> Run<'a> {
    /// A run at its first iteration.
    ///
    /// # Errors
    /// How advantages are to be estimated is not known here, or the critic's optimizer is missing.
    pub(crate) fn new(context: &'a Context, settings: &'a Ppo, ends: Vec<i64>, models: Models) -> Result<Self> {
        let advantage = settings.advantage.estimator().ok_or_else(|| super::unknown("ppo.advantage"))?;
        if models.critic.is_some() && settings.critic_optimizer.is_none() {
            return Err(Error::config("ppo.criticOptimizer is missing: advantage gae has a critic"));
        }
        let state = State { kl_coefficient: settings.kl.coefficient, before: BTreeMap::new() };
        Ok(Self { context, settings, advantage, ends, models, state })
    }

    /// The iteration to go on with: that of the newest checkpoint, or 0 after an evaluation of the untrained actor.
    fn restore_or_evaluate(&mut self, held_out: &HeldOut<'_>) -> Result<u64> {
        let mut models = vec![("actor", &mut self.models.actor)];
        models.extend(self.models.critic.as_mut().map(|critic| ("critic", critic)));
        let restored = self.context.restore(self.settings.iterations.into(), &mut models)?;
        match restored {
            Some(restored) => {
                self.state = serde_json::from_value(restored.state).map_err(|e| {
                    Error::input(format!(
                        "checkpoint {}: {e}; delete it to start the stage anew",
                        restored.checkpoint.path
                    ))
                })?;
                Ok(restored.step)
            }
            None => {
                self.state.before = self.evaluate(0, "eval-before", held_out)?;
                Ok(0)
            }
        }
    }

    /// One iteration: rollout, scoring, advantages, learning. Returns its figures, and the mean score by each reward.
    pub(crate) fn iterate(&mut self, iteration: u64, prompts: &Half<Prompt>) -> Result<(Vec<(Figure, f64)>, Rewards)> {
        let (context, settings) = (self.context, self.settings);
        let started = Instant::now();
        // 1-2. Answer prompts and score the answers (experience.rs).
        let stream = [context.config.seed, iteration];
        let rolled_out = self.roll_out(
            &to_answer(settings, context.config.seed, iteration, prompts)?,
            stream,
            [Phase::Rollout, Phase::Score],
        );
        let (mut experience, rollout_speed) =
            self.save_if_stopped(rolled_out, iteration).map_err(|e| match e.exit {
                ExitCode::NotFinite => e.context(format!("iteration {}", iteration + 1)),
                _ => e,
            })?;
        // 3. Advantages over response tokens (advantages/).
        advantages::estimate(&mut experience, settings, self.advantage, self.state.kl_coefficient);
        // 4. Several passes of clipped policy and value steps (learn.rs). A stop in them gives the iteration up and saves
        //    those before it, which are kept until then. Where there is no room to keep them, it waits for the iteration's
        //    end: then at least those fit into a checkpoint.
        let edge = context.keep_edge(iteration, &self.saved_models(), &self.saved_state()?)?;
        let stops = !matches!(edge, Edge::NoRoom);
        if !stops {
            tracing::info!(
                iteration,
                "host memory has no room to keep what is learnt: a stop waits for the next iteration's end"
            );
        }
        let rate = |optimizer: &Optimizer| learning_rate(optimizer, iteration, settings.iterations.into());
        let learning = learn::Learning {
            context,
            settings,
            kl_coefficient: if settings.kl.place == KlPlace::Loss { self.state.kl_coefficient } else { 0.0 },
            iteration,
            actor: (&settings.actor_optimizer, rate(&settings.actor_optimizer)),
            critic: settings.critic_optimizer.as_ref().map(|optimizer| (optimizer, rate(optimizer))),
            stops,
        };
        let learnt = context.telemetry.phase(Phase::Train, || learning.learn(&mut self.models, &experience));
        let (rate, critic_rate) = (learning.actor.1, learning.critic.map(|(_, rate)| rate));
        let learnt = context.save_kept_if_stopped(learnt, edge)?;
        // 5. The KL coefficient for the next iteration.
        let kl_coefficient = self.state.kl_coefficient;
        let kl = experience::mean(&experience, |e| e.kl.iter().sum());
        self.state.kl_coefficient =
            adapted_kl_coefficient(&settings.kl, kl_coefficient, kl, settings.rollout_batch_size);

        let tokens: usize = experience.iter().map(|e| e.tokens.len()).sum();
        context.telemetry.add_tokens(tokens as u64);
        context.telemetry.add_samples(experience.len() as u64);
        let mut figures = rollout_figures(&experience);
        figures.extend(learnt);
        figures.extend([
            (Figure::KlCoefficient, kl_coefficient),
            (Figure::LearningRate, rate),
            (Figure::RolloutTokensPerSecond, rollout_speed),
            (Figure::TokensPerSecond, tokens as f64 / started.elapsed().as_secs_f64()),
        ]);
        figures.extend(critic_rate.map(|rate| (Figure::CriticLearningRate, rate)));
        Ok((figures, self.mean_rewards(&experience)))
    }

    /// The mean score of answers by each reward, before its weight.
    fn mean_rewards(&self, answers: &[Experience]) -> Rewards {
        let of = |(i, scorer): (usize, &Scorer)| {
            let score = |e: &Experience| e.scores.get(i).copied().unwrap_or_default();
            (scorer.name.clone(), experience::mean(answers, score))
        };
        self.models.rewards.iter().enumerate().map(of).collect()
    }

    /// Saves where a checkpoint is due, and stops where asked.
    fn step_edge(&self, iteration: u64) -> Result<()> {
        let context = self.context;
        let stop = context.group.any(context.asked_to_stop())?;
        context.step_edge(iteration, self.settings.iterations.into(), stop, &self.saved_models(), &self.saved_state()?)
    }

    /// As [`Context::save_if_stopped`], while the models are as `iterations` whole iterations have left them.
    fn save_if_stopped<T>(&self, result: Result<T>, iterations: u64) -> Result<T> {
        self.context.save_if_stopped(result, iterations, &self.saved_models(), &self.saved_state()?)
    }

    fn saved_models(&self) -> Vec<(&'static str, &Model)> {
        let critic = self.models.critic.as_ref().map(|critic| ("critic", critic));
        [("actor", &self.models.actor)].into_iter().chain(critic).collect()
    }

    fn saved_state(&self) -> Result<serde_json::Value> {
        serde_json::to_value(&self.state).map_err(|e| Error::bug(e.to_string()))
    }
}

/// The prompts of an iteration, each as often as it is to be answered and with its number among all answers ever given; the same on
/// every rank.
fn to_answer(settings: &Ppo, seed: u64, iteration: u64, prompts: &Half<Prompt>) -> Result<Vec<(u64, Prompt)>> {
    let (size, samples) = (u64::from(settings.rollout_batch_size), u64::from(settings.samples_per_prompt));
    let mut epoch = u64::MAX;
    let mut order = Vec::new();
    let answers = iteration * size..(iteration + 1) * size;
    let prompt_of = |answer: u64| {
        let (number, count) = (answer / samples, prompts.len() as u64);
        if number / count != epoch {
            epoch = number / count;
            order = permutation(prompts.len(), seed, epoch);
        }
        Ok((answer, prompts.get(order[(number % count) as usize])?))
    };
    answers.map(prompt_of).collect()
}

/// The figures of a rollout, over the global batch.
fn rollout_figures(experience: &[Experience]) -> Vec<(Figure, f64)> {
    let mean = |f: &dyn Fn(&Experience) -> f64| experience::mean(experience, f);
    let reward = mean(&|e| e.score);
    let tokens: f64 = experience.iter().map(|e| e.response_len() as f64).sum::<f64>().max(1.0);
    let entropy = experience.iter().map(|e| e.entropy).sum::<f64>() / tokens;
    let mut figures = vec![
        (Figure::Reward, reward),
        (Figure::RewardStd, mean(&|e| (e.score - reward).powi(2)).sqrt()),
        (Figure::Kl, mean(&|e| e.kl.iter().sum())),
        (Figure::Entropy, entropy),
        (Figure::SamplerGap, experience.iter().map(|e| e.sampler_gap[0]).sum::<f64>() / tokens),
        (Figure::SamplerGapMax, experience.iter().map(|e| e.sampler_gap[1]).fold(0.0, f64::max)),
        (Figure::ResponseLength, mean(&|e| e.response_len() as f64)),
        (Figure::EosFraction, mean(&|e| f64::from(u8::from(e.ended)))),
    ];
    if experience.iter().any(|e| !e.returns.is_empty()) {
        let returns = experience.iter().map(|e| e.returns.as_slice());
        let errors = experience.iter().map(|e| e.value_errors.as_slice());
        figures.push((Figure::ExplainedVariance, explained_variance(returns, errors)));
    }
    figures
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn each_prompt_of_a_rollout_is_answered_as_often_as_asked_and_all_take_their_turn() {
        let settings = |samples| -> Ppo {
            serde_json::from_value(json!({
                "rewards": [], "prompts": {"source": "volume://none"}, "iterations": 9, "rolloutBatchSize": 6,
                "samplesPerPrompt": samples, "batch": {"globalSize": 6}, "maxPromptLength": 1, "maxNewTokens": 1,
                "kl": {"coefficient": 0.1}, "actorOptimizer": {"learningRate": 1e-5},
            }))
            .unwrap()
        };
        let prompts: Vec<_> = (0..4).map(|token| Prompt { tokens: vec![token], text: String::new() }).collect();
        let (prompts, _) = Half::held(&prompts).unwrap();
        for (samples, iterations) in [(1, 2), (3, 2), (2, 4)] {
            let all: Vec<_> =
                (0..iterations).flat_map(|i| to_answer(&settings(samples), 42, i, &prompts).unwrap()).collect();
            let numbers: Vec<u64> = all.iter().map(|(number, _)| *number).collect();
            assert_eq!(numbers, (0..6 * iterations).collect::<Vec<_>>(), "each answer is drawn by a number of its own");
            let groups: Vec<_> = all.chunks(samples).map(|group| group[0].1.tokens[0]).collect();
            let alike = all.chunks(samples).all(|group| group.iter().all(|(_, p)| p.tokens == group[0].1.tokens));
            assert!(alike, "answers to a prompt follow each other");
            for epoch in groups.chunks_exact(4) {
                let mut seen = epoch.to_vec();
                seen.sort_unstable();
                assert_eq!(seen, [0, 1, 2, 3]);
            }
        }
    }
}

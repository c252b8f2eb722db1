//! Proximal policy optimisation of a language model against a reward model (Ziegler 2019; Stiennon 2020; Huang 2024).
//!
//! Each iteration: answer a batch of prompts, score the answers, compute advantages, learn from them in several
//! passes. Experience is small beside the models, so every rank holds all of it and any rank can learn from any
//! row: what is learnt does not depend on the world size.

mod evaluate;
mod experience;
mod learn;

use super::context::{Context, keyed};
use super::export::adapter_dir;
use super::math::{adapted_kl_coefficient, explained_variance};
use crate::data::order::permutation;
use crate::data::{Prompt, load_prompts};
use crate::engine::{Backbone, Model};
use crate::error::{Error, Result};
use crate::model::{Adapters, HeadKind, ScoreNormalisation, Source, base_of, read_adapters};
use crate::optim::learning_rate;
use crate::telemetry::{Figure, Phase};
use evaluate::HeldOut;
use experience::Experience;
use rlhf_api::report::Output;
use rlhf_api::stage::{Lora, Ppo};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::Instant;

/// The models of PPO. Actor and critic are trained; reference and reward model are frozen.
pub(crate) struct Models {
    pub actor: Model,
    pub critic: Model,
    pub reference: Model,
    pub reward: Model,
    pub score: ScoreNormalisation,
}

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
    /// The token that ends a response.
    eos: i64,
    models: Models,
    state: State,
}

pub(super) fn run(context: &Context, settings: &Ppo) -> Result<Output> {
    warn_of_cuts(settings);
    let tokenizer = context.tokenizer()?;
    let prompts = context.telemetry.phase(Phase::Data, || {
        load_prompts(&context.dataset(&settings.prompts)?, settings, &tokenizer, context.config.seed)
    })?;
    context.agree_on_data(prompts.train.iter().chain(&prompts.eval).map(|p| p.tokens.as_slice()))?;
    let source = Source::open(&context.path(&context.config.paths.start_model))?;
    let models = Models::load(context, &source, settings.lora.as_ref())?;
    let mut run = Run::new(context, settings, tokenizer.eos(), models);
    let held_out = HeldOut { prompts: &prompts.eval, tokenizer: &tokenizer };
    let start = run.restore_or_evaluate(&held_out)?;
    for iteration in start..u64::from(settings.iterations) {
        let figures = run.iterate(iteration, &prompts.train)?;
        context.report(iteration + 1, &figures)?;
        run.save_if_stopped(run.evaluate_if_due(iteration + 1, &held_out), iteration + 1)?;
        run.step_edge(iteration + 1)?;
    }
    let figures = run.evaluate(settings.iterations.into(), "eval-after", &held_out)?;
    let before = run.state.before.into_iter().map(|(key, value)| (format!("{key}Before"), value));
    let metrics = keyed(&figures).into_iter().chain(before).collect();
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

impl Models {
    fn load(context: &Context, actor: &Source, lora: Option<&Lora>) -> Result<Self> {
        let reward_path = context.config.paths.reward_models.values().next();
        let reward_path = reward_path
            .ok_or_else(|| Error::config("paths.rewardModels is missing: a PPO stage needs a reward model"))?;
        let reward = Source::open(&context.path(reward_path))?;
        let score = reward.score.unwrap_or(ScoreNormalisation { mean: 0.0, std: 1.0 });
        if reward.spec.vocab != actor.spec.vocab {
            return Err(Error::input(format!(
                "the reward model has {} tokens and the actor {}: both must come from the job's model",
                reward.spec.vocab, actor.spec.vocab
            )));
        }
        if !reward.has_score_head() {
            return Err(Error::input(format!(
                "{}: it has no tensor 'score.weight', so it is not a reward model; name a rewardModel stage",
                reward.dir.display()
            )));
        }
        match lora {
            Some(lora) => Self::adapted(context, actor, &reward, score, lora),
            None => Ok(Self {
                actor: context.load(actor, HeadKind::Lm, true, None)?,
                critic: context.load(&reward, HeadKind::Scalar, true, Some(score))?,
                reference: context.load(actor, HeadKind::Lm, false, None)?,
                reward: context.load(&reward, HeadKind::Scalar, false, None)?,
                score,
            }),
        }
    }

    /// The models on frozen backbones: one for actor and reference, and one for critic and reward model, which is the same
    /// where the reward model was itself trained by adapters from the actor's start.
    fn adapted(
        context: &Context,
        actor: &Source,
        reward: &Source,
        score: ScoreNormalisation,
        lora: &Lora,
    ) -> Result<Self> {
        if lora.dropout > 0.0 {
            return Err(Error::config(
                "ppo.lora.dropout must be 0: PPO compares probabilities of one policy; leave it out",
            ));
        }
        let seed = context.config.seed;
        let backbone = context.backbone(actor, HeadKind::Lm)?;
        let trained = backbone.language_model(&Adapters::fresh(&actor.spec, lora, seed)?, seed)?;
        let adapters = adapter_dir(&reward.dir);
        let shares = base_of(&adapters)?.is_some_and(|base| base == context.config.paths.start_model);
        let scorer = if shares {
            let adapters = read_adapters(&adapters, actor.family, &actor.spec)?;
            Scorer { backbone: &backbone, critic: &adapters, reward: Some(&adapters) }.load(context, reward, score)?
        } else {
            let (backbone, fresh) =
                (context.backbone(reward, HeadKind::Scalar)?, Adapters::fresh(&reward.spec, lora, seed)?);
            Scorer { backbone: &backbone, critic: &fresh, reward: None }.load(context, reward, score)?
        };
        let [critic, reward] = scorer;
        tracing::info!(
            actor = trained.trained_parameters(),
            critic = critic.trained_parameters(),
            one_backbone = shares,
            "adapters are trained"
        );
        Ok(Self { reference: trained.without_adapters()?, actor: trained, critic, reward, score })
    }
}

/// What critic and reward model stand on. The critic starts as the reward model.
struct Scorer<'a> {
    backbone: &'a Backbone,
    critic: &'a Adapters,
    reward: Option<&'a Adapters>,
}

impl Scorer<'_> {
    /// Critic and reward model, with the head of `reward`.
    fn load(&self, context: &Context, reward: &Source, score: ScoreNormalisation) -> Result<[Model; 2]> {
        Ok([
            self.backbone.scalar_model(reward, context.scalar_init(Some(score)), Some(self.critic), true)?,
            self.backbone.scalar_model(reward, context.scalar_init(None), self.reward, false)?,
        ])
    }
}

impl<'a> Run<'a> {
    /// A run at its first iteration.
    pub(crate) fn new(context: &'a Context, settings: &'a Ppo, eos: i64, models: Models) -> Self {
        let state = State { kl_coefficient: settings.kl.coefficient, before: BTreeMap::new() };
        Self { context, settings, eos, models, state }
    }

    /// The iteration to go on with: that of the newest checkpoint, or 0 after an evaluation of the untrained actor.
    fn restore_or_evaluate(&mut self, held_out: &HeldOut<'_>) -> Result<u64> {
        let models = &mut self.models;
        let restored = self.context.restore(
            self.settings.iterations.into(),
            &mut [("actor", &mut models.actor), ("critic", &mut models.critic)],
        )?;
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
                self.state.before = keyed(&self.evaluate(0, "eval-before", held_out)?);
                Ok(0)
            }
        }
    }

    /// The prompts of an iteration, each with its number among all prompts ever answered; the same on every rank.
    fn prompts<'p>(&self, iteration: u64, prompts: &'p [Prompt]) -> Vec<(u64, &'p Prompt)> {
        let size = u64::from(self.settings.rollout_batch_size);
        let mut epoch = u64::MAX;
        let mut order = Vec::new();
        (iteration * size..(iteration + 1) * size)
            .map(|number| {
                if number / prompts.len() as u64 != epoch {
                    epoch = number / prompts.len() as u64;
                    order = permutation(prompts.len(), self.context.config.seed, epoch);
                }
                (number, &prompts[order[(number % prompts.len() as u64) as usize]])
            })
            .collect()
    }

    /// One iteration: rollout, scoring, advantages, learning. Returns its figures.
    pub(crate) fn iterate(&mut self, iteration: u64, prompts: &[Prompt]) -> Result<Vec<(Figure, f64)>> {
        let (context, settings) = (self.context, self.settings);
        let started = Instant::now();
        // 1-2. Answer prompts and score the answers (experience.rs).
        let stream = [context.config.seed, iteration];
        let rolled_out = self.roll_out(&self.prompts(iteration, prompts), stream, [Phase::Rollout, Phase::Score]);
        let (mut experience, rollout_speed) = self.save_if_stopped(rolled_out, iteration)?;
        // 3. Advantages over response tokens, whitened over the global batch.
        experience::estimate_advantages(&mut experience, settings, self.state.kl_coefficient);
        // 4. Several passes of clipped policy and value steps (learn.rs). A stop in them loses the iteration, as what is
        //    learnt by half is not saved.
        let rates = [&settings.actor_optimizer, &settings.critic_optimizer]
            .map(|o| learning_rate(o, iteration, settings.iterations.into()));
        let learnt = context
            .telemetry
            .phase(Phase::Train, || learn::learn(context, settings, &mut self.models, &experience, iteration, rates))?;
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
            (Figure::LearningRate, rates[0]),
            (Figure::CriticLearningRate, rates[1]),
            (Figure::RolloutTokensPerSecond, rollout_speed),
            (Figure::TokensPerSecond, tokens as f64 / started.elapsed().as_secs_f64()),
        ]);
        Ok(figures)
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

    fn saved_models(&self) -> [(&'static str, &Model); 2] {
        [("actor", &self.models.actor), ("critic", &self.models.critic)]
    }

    fn saved_state(&self) -> Result<serde_json::Value> {
        serde_json::to_value(&self.state).map_err(|e| Error::bug(e.to_string()))
    }
}

/// The figures of a rollout, over the global batch.
fn rollout_figures(experience: &[Experience]) -> Vec<(Figure, f64)> {
    let mean = |f: &dyn Fn(&Experience) -> f64| experience::mean(experience, f);
    let reward = mean(&|e| e.score);
    let tokens: f64 = experience.iter().map(|e| e.response_len() as f64).sum::<f64>().max(1.0);
    let entropy = experience.iter().map(|e| e.entropy).sum::<f64>() / tokens;
    vec![
        (Figure::Reward, reward),
        (Figure::RewardStd, mean(&|e| (e.score - reward).powi(2)).sqrt()),
        (Figure::Kl, mean(&|e| e.kl.iter().sum())),
        (Figure::Entropy, entropy),
        (Figure::ResponseLength, mean(&|e| e.response_len() as f64)),
        (Figure::EosFraction, mean(&|e| f64::from(u8::from(e.ended)))),
        (
            Figure::ExplainedVariance,
            explained_variance(
                experience.iter().map(|e| e.returns.as_slice()),
                experience.iter().map(|e| e.value_errors.as_slice()),
            ),
        ),
    ]
}

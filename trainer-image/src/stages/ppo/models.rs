//! The models of PPO: which there are, and what they share.
//!
//! Whole models are loaded one by one. With adapters, the actor's frozen start is the backbone of everything that was trained by
//! adapters from it, and each other reward model has a backbone, which a critic that starts from it shares.

use crate::engine::{Backbone, Model};
use crate::error::{Error, Result};
use crate::model::{Adapters, Batch, HeadKind, ScoreNormalisation, Source, base_of, read_adapters};
use crate::stages::Context;
use crate::stages::export::adapter_dir;
use rlhf_api::stage::{Lora, Ppo};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// The models of PPO. Actor and critic are trained; reference and reward models are frozen.
pub(crate) struct Models {
    pub actor: Model,
    /// There where advantages are estimated by one.
    pub critic: Option<Model>,
    pub reference: Model,
    pub rewards: Vec<Scorer>,
}

/// A reward model, and what its scores count.
pub(crate) struct Scorer {
    pub name: String,
    pub weight: f64,
    pub model: Model,
    pub score: ScoreNormalisation,
}

impl Models {
    /// Loads the models that the stage's settings and paths name.
    pub fn load(context: &Context, settings: &Ppo, actor: &Source) -> Result<Self> {
        let sources = Sources::open(context, settings, actor)?;
        match &settings.lora {
            Some(lora) => sources.adapted(lora),
            None => sources.whole(),
        }
    }

    /// The normalised scores of a batch's rows by each reward model, read at `ends`.
    pub fn scores(&self, batch: &Batch, ends: &[i64]) -> Result<Vec<Vec<f64>>> {
        let of = |scorer: &Scorer| {
            let raw = scorer.model.scalars(batch, ends)?;
            Ok(raw.into_iter().map(|raw| (raw - scorer.score.mean) / scorer.score.std).collect())
        };
        self.rewards.iter().map(of).collect()
    }

    /// What the scores of one answer count together.
    pub fn weighted(&self, scores: &[f64]) -> f64 {
        self.rewards.iter().zip(scores).map(|(scorer, score)| scorer.weight * score).sum()
    }
}

/// Models on disk, before any is loaded.
struct Sources<'a> {
    context: &'a Context,
    actor: &'a Source,
    /// `None` where it is the actor's start.
    reference: Option<Source>,
    /// `None` where there is no critic.
    critic: Option<Source>,
    /// Names, weights and models of the rewards.
    rewards: Vec<(&'a str, f64, Source)>,
}

impl<'a> Sources<'a> {
    fn open(context: &'a Context, settings: &'a Ppo, actor: &'a Source) -> Result<Self> {
        let paths = &context.config.paths;
        let open = |path: &String| {
            let mut source = Source::open(&context.path(path))?;
            // Probabilities are compared with the actor's, so they are over the same tokens.
            source.spec.known_tokens = actor.spec.known_tokens;
            Ok::<_, Error>(source)
        };
        let mut rewards = Vec::new();
        for reward in &settings.rewards {
            let path = paths.reward_models.get(&reward.name);
            let path = path.ok_or_else(|| {
                Error::config(format!(
                    "paths.rewardModels has no '{}': each of ppo.rewards needs its model",
                    reward.name
                ))
            })?;
            rewards.push((reward.name.as_str(), reward.weight, open(path)?));
        }
        let first = settings.rewards.first().and_then(|reward| paths.reward_models.get(&reward.name));
        let first = first.ok_or_else(|| Error::config("ppo.rewards is empty: PPO needs a reward model"))?;
        let critic = settings.advantage.gae.map(|_| paths.critic_model.as_ref().unwrap_or(first));
        let reference = paths.reference_model.as_ref().filter(|path| **path != paths.start_model);
        let (reference, critic) = (reference.map(open).transpose()?, critic.map(open).transpose()?);
        Self { context, actor, reference, critic, rewards }.check()
    }

    /// Every model must know the actor's tokens, and what scores must have a head for it.
    fn check(self) -> Result<Self> {
        let scorers = self.rewards.iter().map(|(_, _, source)| source).chain(&self.critic);
        for source in scorers.clone().chain(&self.reference) {
            let (tokens, actors) = (source.spec.vocab, self.actor.spec.vocab);
            if tokens < actors {
                return Err(Error::input(format!(
                    "{}: the model has {tokens} tokens and the actor {actors}: both must have the same tokenizer",
                    source.dir.display()
                )));
            }
        }
        for source in scorers {
            source.check_score_head()?;
        }
        Ok(self)
    }

    fn whole(&self) -> Result<Models> {
        let context = self.context;
        let scorer = |(name, weight, source): &(&str, f64, Source)| {
            let model = context.load(source, HeadKind::Scalar, false, None)?;
            Ok(Scorer { name: (*name).to_owned(), weight: *weight, model, score: score(source) })
        };
        let critic = |source| context.load(source, HeadKind::Scalar, true, Some(score(source)));
        Ok(Models {
            actor: context.load(self.actor, HeadKind::Lm, true, None)?,
            critic: self.critic.as_ref().map(critic).transpose()?,
            reference: context.load(self.reference.as_ref().unwrap_or(self.actor), HeadKind::Lm, false, None)?,
            rewards: self.rewards.iter().map(scorer).collect::<Result<_>>()?,
        })
    }

    fn adapted(&self, lora: &Lora) -> Result<Models> {
        if lora.dropout > 0.0 {
            return Err(Error::config(
                "ppo.lora.dropout must be 0: PPO compares probabilities of one policy; leave it out",
            ));
        }
        let (context, seed) = (self.context, self.context.config.seed);
        let backbone = context.backbone(self.actor, HeadKind::Lm)?;
        let actor = backbone.language_model(&Adapters::fresh(&self.actor.spec, lora, seed)?, seed)?;
        let mut backbones = Backbones { sources: self, actor: &backbone, own: BTreeMap::new() };
        let critic = self.critic.as_ref().map(|source| backbones.scalar_model(source, Some(lora))).transpose()?;
        let mut rewards = Vec::new();
        for (name, weight, source) in &self.rewards {
            let model = backbones.scalar_model(source, None)?;
            rewards.push(Scorer { name: (*name).to_owned(), weight: *weight, model, score: score(source) });
        }
        tracing::info!(
            actor = actor.trained_parameters(),
            critic = critic.as_ref().map_or(0, Model::trained_parameters),
            backbones = 1 + backbones.own.len(),
            "adapters are trained"
        );
        let reference = match &self.reference {
            Some(reference) => context.load(reference, HeadKind::Lm, false, None)?,
            None => actor.without_adapters()?,
        };
        Ok(Models { actor, critic, reference, rewards })
    }
}

/// The frozen backbones of models with adapters.
struct Backbones<'a> {
    sources: &'a Sources<'a>,
    actor: &'a Backbone,
    /// Those of reward models that did not come of the actor's start, by their folders.
    own: BTreeMap<PathBuf, Backbone>,
}

impl Backbones<'_> {
    /// A reward model, or with `trained` a critic that starts from it: with its own adapters where it was trained by some from
    /// the actor's start, and else with fresh ones of these settings.
    fn scalar_model(&mut self, source: &Source, trained: Option<&Lora>) -> Result<Model> {
        let (context, actor) = (self.sources.context, self.sources.actor);
        let init = context.scalar_init(trained.map(|_| score(source)));
        let dir = adapter_dir(&source.dir);
        if base_of(&dir)?.is_some_and(|base| base == context.config.paths.start_model) {
            // The reward model may have been trained with dropout; a critic must give one value for one text.
            let adapters = read_adapters(&dir, actor.family, &actor.spec)?.without_dropout();
            return self.actor.scalar_model(source, init, Some(&adapters), trained.is_some());
        }
        if !self.own.contains_key(&source.dir) {
            self.own.insert(source.dir.clone(), context.backbone(source, HeadKind::Scalar)?);
        }
        let backbone = self.own.get(&source.dir).ok_or_else(|| Error::bug("a backbone is lost"))?;
        let fresh = trained.map(|lora| Adapters::fresh(&source.spec, lora, context.config.seed)).transpose()?;
        backbone.scalar_model(source, init, fresh.as_ref(), trained.is_some())
    }
}

/// How a reward model's raw scores count.
fn score(source: &Source) -> ScoreNormalisation {
    source.score.unwrap_or(ScoreNormalisation { mean: 0.0, std: 1.0 })
}

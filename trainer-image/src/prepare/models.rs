//! The models of a job: those that exist before it, and those that its stages are to make of them.
//!
//! What a stage makes has the shape of its start, so every stage can be held against the shapes of all that it uses before any
//! of them has run.

use super::Parts;
use crate::error::{Error, Result};
use crate::files;
use crate::model::{Adapters, Format, ModelSpec, Source};
use crate::tokenizer::Tokenizer;
use rlhf_api::config::{PrepareConfig, StageConfig};
use rlhf_api::stage::StageKind;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use tch::Kind;

/// What a stage needs a model to be.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    Policy,
    RewardModel,
}

/// A model that is there, or will be.
struct Known {
    spec: ModelSpec,
    /// The number format of its weights.
    kind: Kind,
    /// Whether it has a head that scores; `None` for what a stage will make: the spec says what that is.
    scores: Option<bool>,
    /// Why it cannot be a reward model, where it has no such head.
    scoreless: Option<String>,
    /// Why it cannot be a policy, where its head is missing.
    headless: Option<String>,
}

/// What a stage trains.
#[derive(Clone, Copy)]
pub(super) struct Trained<'a> {
    /// The shape of its model.
    pub model: &'a ModelSpec,
    /// That of the critic, where there is one.
    pub critic: Option<&'a ModelSpec>,
    /// The number format in which the model is written.
    pub kind: Kind,
}

/// Models by their paths below the volume.
pub(super) struct Models {
    volume: PathBuf,
    /// The job's tokenizer, which is that of its model.
    pub tokenizer: Tokenizer,
    known: BTreeMap<String, Known>,
    /// The shapes of those that exist, in the order in which the config names them.
    pub told: Vec<ModelSpec>,
}

impl Models {
    /// Opens the models that exist before the job: the one at `base`, whose tokenizer is the job's, and those that the config
    /// names.
    pub fn open(config: &PrepareConfig, base: &str, volume: &Path, parts: &mut Parts<'_>) -> Result<Self> {
        parts.begin(format!("model {base}"));
        let dir = volume.join(base);
        check_files(&dir)?;
        let (source, tokenizer) = (Source::open(&dir)?, Tokenizer::load(&dir)?);
        let warnings = source.warnings.iter().chain(tokenizer.warnings());
        warnings.for_each(|warning| tracing::warn!("{}: {warning}", dir.display()));
        let mut this = Self { volume: volume.to_path_buf(), tokenizer, known: BTreeMap::new(), told: vec![] };
        this.add(base, source);
        for path in &config.models {
            if !this.known.contains_key(path) {
                parts.begin(format!("model {path}"));
                this.open_other(path)?;
            }
            this.told.extend(this.known.get(path).map(|known| known.spec.clone()));
        }
        Ok(this)
    }

    fn add(&mut self, path: &str, source: Source) {
        let headless = source.check_language_head().err().map(|e| e.message);
        let scoreless = source.check_score_head().err().map(|e| e.message);
        let (scores, kind) = (Some(source.has_score_head()), source.kind);
        let known = Known { spec: source.spec, kind, scores, scoreless, headless };
        self.known.insert(path.into(), known);
    }

    /// A model of another origin: ids of tokens go from one model to the other, so both must have the same.
    fn open_other(&mut self, path: &str) -> Result<()> {
        let dir = self.volume.join(path);
        check_files(&dir)?;
        let (source, tokenizer) = (Source::open(&dir)?, Tokenizer::load(&dir)?);
        if let Some(difference) = tokenizer.difference(&self.tokenizer)? {
            return Err(Error::input(format!(
                "{}: its tokenizer is not the one of the job's model: {difference}; all models of a job must have the same tokenizer",
                dir.display()
            )));
        }
        source.warnings.iter().for_each(|warning| tracing::warn!("{}: {warning}", dir.display()));
        self.add(path, source);
        Ok(())
    }

    /// Holds a stage against all models that it uses, and notes the one that it will make.
    pub fn check_stage(&mut self, stage: &StageConfig) -> Result<()> {
        let paths = &stage.paths;
        let policies = [Some(&paths.start_model), paths.reference_model.as_ref()].into_iter().flatten();
        let scorers = paths.critic_model.iter().chain(paths.reward_models.values());
        let used: Vec<(&String, Role)> =
            policies.map(|p| (p, Role::Policy)).chain(scorers.map(|p| (p, Role::RewardModel))).collect();
        for (path, _) in &used {
            if !self.known.contains_key(*path) {
                self.open_other(path)?;
            }
        }
        let start = self.known.get(&paths.start_model).map(|known| (known.spec.clone(), known.kind));
        let Some((start, kind)) = start else {
            return Err(Error::bug("a stage's start is not known"));
        };
        for (path, role) in used {
            let Some(known) = self.known.get(path) else { continue };
            self.check_role(path, known, role)?;
            let speaks = role == Role::Policy && !matches!(stage.kind, StageKind::RewardModel(_));
            if let Some(what) = known.headless.as_ref().filter(|_| speaks) {
                return Err(Error::input(what));
            }
            check_length(stage, path, &known.spec)?;
            if known.spec.vocab < start.vocab {
                return Err(Error::input(format!(
                    "the model {path} has {} tokens and the one that is trained, {}, has {}: it must know all of them",
                    known.spec.vocab, paths.start_model, start.vocab
                )));
            }
        }
        self.check_targets(stage)?;
        let kind = Format::asked(&stage.export, kind)?.kind;
        let made = Known { spec: start, kind, scores: None, scoreless: None, headless: None };
        self.known.insert(paths.output.clone(), made);
        Ok(())
    }

    /// Every token of a stage's records, up to `highest`, must have an embedding; one that no record holds is not missed. (The
    /// stage's other models know all tokens that its start knows.)
    pub fn check_tokens(&self, stage: &StageConfig, highest: i64) -> Result<()> {
        let path = &stage.paths.start_model;
        let Some(known) = self.known.get(path).filter(|known| highest >= known.spec.vocab) else { return Ok(()) };
        Err(Error::input(format!(
            "its records have the token '{}' (id {highest}), but config.json of {path} says vocab_size {}: it has no embedding; use the tokenizer that belongs to the model",
            self.tokenizer.token(highest).unwrap_or_default(),
            known.spec.vocab
        )))
    }

    /// What a stage trains, which was checked before.
    pub fn trained(&self, stage: &StageConfig) -> Option<Trained<'_>> {
        let paths = &stage.paths;
        let critic = match &stage.kind {
            StageKind::Ppo(s) if s.advantage.gae.is_some() => {
                let first = || s.rewards.first().and_then(|reward| paths.reward_models.get(&reward.name));
                paths.critic_model.as_ref().or_else(first)
            }
            _ => None,
        };
        let spec = |path: &String| self.known.get(path).map(|known| &known.spec);
        let made = self.known.get(&paths.output)?;
        Some(Trained { model: spec(&paths.start_model)?, critic: critic.and_then(spec), kind: made.kind })
    }

    fn check_role(&self, path: &str, known: &Known, role: Role) -> Result<()> {
        match role {
            Role::RewardModel => known.scoreless.as_ref().map_or(Ok(()), |why| Err(Error::input(why))),
            Role::Policy if known.scores == Some(true) => Err(Error::input(format!(
                "{}: it has a tensor 'score.weight', so it is a reward model and no policy to train or to stay near",
                self.volume.join(path).display()
            ))),
            Role::Policy => Ok(()),
        }
    }

    /// Adapters must have something to adapt, in the critic too.
    fn check_targets(&self, stage: &StageConfig) -> Result<()> {
        let Some(lora) = stage.kind.lora() else { return Ok(()) };
        let adapted = [Some(&stage.paths.start_model), stage.paths.critic_model.as_ref()];
        let specs = adapted.into_iter().flatten().filter_map(|path| self.known.get(path));
        specs.into_iter().try_for_each(|known| Adapters::check(&known.spec, lora).map(drop))
    }
}

/// A model's folder holds files (and folders, which nobody reads): to open anything else may take for ever.
fn check_files(model_dir: &Path) -> Result<()> {
    for name in files::names(model_dir)? {
        let path = model_dir.join(name);
        // What cannot be looked at is told by who needs it.
        let kind = std::fs::metadata(&path).ok().filter(|m| !m.is_dir()).and_then(|m| files::special(m.file_type()));
        if let Some(kind) = kind {
            return Err(Error::input(format!(
                "{}: it is {kind}, not a file; a model's folder holds files",
                path.display()
            )));
        }
    }
    Ok(())
}

/// No stage may make a sequence longer than a model that runs over it has positions.
fn check_length(stage: &StageConfig, path: &str, model: &ModelSpec) -> Result<()> {
    let (tokens, settings) = match &stage.kind {
        StageKind::Sft(s) => (i64::from(s.max_length), format!("maxLength {}", s.max_length)),
        StageKind::RewardModel(s) => (i64::from(s.max_length), format!("maxLength {}", s.max_length)),
        StageKind::Ppo(s) => (
            i64::from(s.max_prompt_length) + i64::from(s.max_new_tokens),
            format!("maxPromptLength {} plus maxNewTokens {}", s.max_prompt_length, s.max_new_tokens),
        ),
    };
    let positions = model.max_positions;
    if tokens <= positions {
        return Ok(());
    }
    Err(Error::config(format!(
        "{settings} is more than the {positions} positions of the model ({path}); lower it to {positions} or less"
    )))
}

//! Models in Hugging Face layout, as they are read: `config.json` and the tensors that fit it. [`super::tensors`] finds them, and
//! [`super::export`] writes them.

use super::export::stored;
use super::families::{Config, Family, HfTensor, Layout, gathered};
use super::tensors::{Location, kind_as_asked, locate_all};
use super::{HeadKind, ModelSpec, Param, Segment};
use crate::error::{Error, Result};
use serde_json::Value;
use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use tch::{Kind, Tensor};

pub(super) const CONFIG: &str = "config.json";
/// What old checkpoints hold beside their parameters: tensors that follow from the config.
const BUFFERS: [&str; 3] = [".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq"];
pub(super) const SCORE_WEIGHT: &str = "score.weight";
pub(super) const SCORE_MEAN: &str = "rlhf_score_mean";
pub(super) const SCORE_STD: &str = "rlhf_score_std";

/// Mean and standard deviation of a reward model's raw scores on reference responses: a score counts as
/// `(raw - mean) / std` (Huang 2024, detail 8).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ScoreNormalisation {
    /// Mean of the raw scores.
    pub mean: f64,
    /// Standard deviation of the raw scores, above zero.
    pub std: f64,
}

/// A model on disk, its config understood and its tensors located.
#[derive(Debug)]
pub struct Source {
    /// The model's folder.
    pub dir: PathBuf,
    /// The content of `config.json`.
    pub config: Value,
    /// The model's family.
    pub family: Family,
    /// The model's shape.
    pub spec: ModelSpec,
    /// The score's normalisation, where the config has one.
    pub score: Option<ScoreNormalisation>,
    /// The number format of its weights (that of the token embedding), in which what is trained from it is written.
    pub kind: Kind,
    /// What is odd about it and no error, each in a sentence.
    pub warnings: Vec<String>,
    /// Why the score head that the file has cannot be read.
    unscored: Option<String>,
    tensors: HashMap<String, Location>,
}

/// Reads and checks only the config of the model in `dir`.
///
/// # Errors
/// Names the file and the field that is wrong.
pub fn read_config(dir: &Path) -> Result<(Value, Family, ModelSpec)> {
    let path = dir.join(CONFIG);
    let text = std::fs::read_to_string(&path).map_err(|e| {
        if let Some(error) = super::peft::not_a_model(dir) {
            return error;
        }
        let error = Error::unreadable(&path, &e);
        let message =
            format!("{}; a model folder holds config.json, model.safetensors and tokenizer files", error.message);
        Error { message, ..error }
    })?;
    let config: Value = serde_json::from_str(&text).map_err(|e| Error::input(format!("{}: {e}", path.display())))?;
    let (family, spec) = Family::read(&Config { path: &path, json: &config })?;
    Ok((config, family, spec))
}

impl Source {
    /// Opens the model in `dir`.
    ///
    /// # Errors
    /// Names the file that is missing or wrong.
    pub fn open(dir: &Path) -> Result<Self> {
        let (config, family, spec) = read_config(dir)?;
        let number = |field: &str| config.get(field).and_then(Value::as_f64);
        let score = number(SCORE_MEAN)
            .zip(number(SCORE_STD))
            .filter(|(_, std)| *std > 0.0)
            .map(|(mean, std)| ScoreNormalisation { mean, std });
        let tensors = locate_all(dir)?;
        let (dir, warnings) = (dir.to_path_buf(), vec![]);
        let mut source =
            Self { dir, config, family, spec, score, kind: Kind::Float, warnings, unscored: None, tensors };
        source.untie();
        source.check()?;
        Ok(source)
    }

    /// Where the config ties the head to the token embedding and yet the file has both, and they differ, they are two: as in
    /// `transformers` 5. (A tool that merges adapters into one of them leaves such a file.)
    fn untie(&mut self) {
        let (embedding, head) = (self.entry(Param::TokenEmbedding), self.entry(Param::LmHeadWeight));
        let (Some(embedding), Some(head)) = (embedding, head) else { return };
        let (Some(one), Some(other)) = (self.find(&embedding), self.find(&head)) else { return };
        if !self.spec.tied_head || one.equals(other) {
            return;
        }
        self.warnings.push(format!(
            "config.json says tie_word_embeddings, but '{}' and '{}' differ in the file; they are kept apart, and the trained model says tie_word_embeddings false",
            embedding.name, head.name
        ));
        self.spec.tied_head = false;
        self.config["tie_word_embeddings"] = Value::Bool(false);
    }

    /// Checks that every parameter is there, in its shape and in a number format that can be read, and that no part of the
    /// backbone is left out. Who needs a head asks for it.
    fn check(&mut self) -> Result<()> {
        let mut used: HashSet<String> = HashSet::from([SCORE_WEIGHT.into()]);
        for segment in self.spec.segments() {
            for (entry, shape) in stored(self.family, &self.spec, segment, HeadKind::Lm) {
                let Some(location) = self.find(&entry) else {
                    if entry.parts == [Param::LmHeadWeight] {
                        continue;
                    }
                    return Err(self.error(format!("tensor '{}' is missing", entry.name)));
                };
                let kind = self.check_tensor(&entry.name, location, &shape)?;
                if entry.parts == [Param::TokenEmbedding] {
                    self.kind = kind;
                }
                used.extend(self.names(&entry));
            }
        }
        self.check_score();
        if self.spec.tied_head {
            used.extend(self.entry(Param::LmHeadWeight).iter().flat_map(|entry| self.names(entry)));
        }
        self.check_unused(&used)
    }

    /// A score head that cannot be read, as that of a classifier of several labels, counts as none: most have no need of one.
    fn check_score(&mut self) {
        let Some(score) = self.tensors.get(SCORE_WEIGHT) else { return };
        let Err(fault) = kind_as_asked(SCORE_WEIGHT, score, &[1, self.spec.embed_width()]) else { return };
        self.warnings.push(format!("{fault}: the model counts as one without a score head"));
        self.tensors.remove(SCORE_WEIGHT);
        self.unscored = Some(fault);
    }

    /// Checks a tensor's shape and number format, which it returns.
    fn check_tensor(&self, name: &str, location: &Location, shape: &[i64]) -> Result<Kind> {
        kind_as_asked(name, location, shape).map_err(|fault| self.error(fault))
    }

    /// What the file has and the model does not: within the backbone it would make another model; elsewhere it is told.
    fn check_unused(&mut self, used: &HashSet<String>) -> Result<()> {
        let buffer = |name: &str| BUFFERS.iter().any(|suffix| name.ends_with(suffix));
        let mut unused: Vec<&str> =
            self.tensors.keys().map(String::as_str).filter(|n| !used.contains(*n) && !buffer(n)).collect();
        unused.sort_unstable();
        let prefix = self.family.backbone_prefix();
        let (inside, outside): (Vec<&str>, Vec<&str>) = unused.into_iter().partition(|n| n.starts_with(prefix));
        let some = |names: &[&str]| {
            let first: Vec<String> = names.iter().take(3).map(|n| format!("'{n}'")).collect();
            format!("{}{}", first.join(", "), if names.len() > 3 { ", ..." } else { "" })
        };
        if !inside.is_empty() {
            return Err(self.error(format!(
                "the file has {} tensors for which a model with this config.json has no use ({}): it would be trained, and written, as another model; mend config.json (attention_bias, mlp_bias, num_hidden_layers), or take them out of the file",
                inside.len(),
                some(&inside)
            )));
        }
        if !outside.is_empty() {
            self.warnings.push(format!(
                "{} tensors of the file are not used and will not be in the trained model: {}",
                outside.len(),
                some(&outside)
            ));
        }
        Ok(())
    }

    /// Makes sure that there is a language model's head.
    ///
    /// # Errors
    /// Names the tensor that is missing.
    pub fn check_language_head(&self) -> Result<()> {
        match self.entry(Param::LmHeadWeight).filter(|_| !self.spec.tied_head) {
            Some(entry) if self.find(&entry).is_none() => {
                Err(self.error(format!("tensor '{}' is missing", entry.name)))
            }
            _ => Ok(()),
        }
    }

    /// The tensor that holds a parameter alone.
    fn entry(&self, param: Param) -> Option<HfTensor> {
        let segments = [Segment::Embed, Segment::Head].into_iter();
        segments.flat_map(|s| self.family.tensors(s)).find(|entry| entry.parts == [param])
    }

    /// The names under which a checkpoint may have a tensor.
    fn names(&self, entry: &HfTensor) -> Vec<String> {
        let short = entry.name.strip_prefix(self.family.backbone_prefix()).map(String::from);
        let mut names: Vec<String> = std::iter::once(entry.name.clone()).chain(short).collect();
        // The one copy of a tied matrix may have either name.
        if self.spec.tied_head && entry.parts == [Param::TokenEmbedding] {
            names.extend(self.entry(Param::LmHeadWeight).map(|head| head.name));
        }
        names
    }

    fn find(&self, entry: &HfTensor) -> Option<&Location> {
        self.names(entry).iter().find_map(|name| self.tensors.get(name))
    }

    /// The parameters of a segment in the order of [`ModelSpec::params`], as fp32 copies on the CPU. A scalar head
    /// that the checkpoint lacks is `None`.
    ///
    /// # Errors
    /// Names the tensor that is missing or has another shape.
    pub fn segment(&self, segment: Segment, head: HeadKind) -> Result<Vec<Option<Tensor>>> {
        let mut found = HashMap::new();
        let specs = self.spec.params(segment, head);
        let shapes: HashMap<Param, &[i64]> = specs.iter().map(|p| (p.param, p.shape.as_slice())).collect();
        for entry in self.family.tensors(segment).iter().filter(|t| t.parts.iter().all(|p| shapes.contains_key(p))) {
            self.split(entry, &shapes, &mut found)?;
        }
        if let Some(weight) = self.tensors.get(SCORE_WEIGHT).filter(|_| shapes.contains_key(&Param::ScalarHeadWeight)) {
            found.insert(Param::ScalarHeadWeight, weight.copy(&self.dir, SCORE_WEIGHT)?);
            found.insert(Param::ScalarHeadBias, Tensor::zeros([1], (Kind::Float, tch::Device::Cpu)));
        }
        specs.iter().map(|p| self.checked(found.remove(&p.param), p.param, &p.shape)).collect()
    }

    /// Makes sure that there is a reward model's head.
    ///
    /// # Errors
    /// Says that it is missing, or why it cannot be read.
    pub fn check_score_head(&self) -> Result<()> {
        if self.has_score_head() {
            return Ok(());
        }
        let missing = format!("it has no tensor '{SCORE_WEIGHT}'");
        Err(self.error(format!(
            "{}, so it is not a reward model; name a rewardModel stage, or the folder of one",
            self.unscored.as_ref().unwrap_or(&missing)
        )))
    }

    /// Whether the checkpoint has a scalar head that can be read.
    pub fn has_score_head(&self) -> bool {
        self.tensors.contains_key(SCORE_WEIGHT)
    }

    fn checked(&self, tensor: Option<Tensor>, param: Param, shape: &[i64]) -> Result<Option<Tensor>> {
        match tensor {
            Some(t) if t.size() == shape => Ok(Some(t)),
            Some(t) => {
                Err(self.error(format!("{param:?} has shape {:?}, but config.json asks for {shape:?}", t.size())))
            }
            None if matches!(param, Param::ScalarHeadWeight | Param::ScalarHeadBias) => Ok(None),
            None => Err(self.error(format!("{param:?} is missing"))),
        }
    }

    /// Reads one checkpoint tensor and splits it into its parameters.
    fn split(
        &self,
        entry: &HfTensor,
        shapes: &HashMap<Param, &[i64]>,
        found: &mut HashMap<Param, Tensor>,
    ) -> Result<()> {
        let location = self.find(entry);
        let location = location.ok_or_else(|| self.error(format!("tensor '{}' is missing", entry.name)))?;
        let whole = location.copy(&self.dir, &entry.name)?;
        let whole = if entry.layout == Layout::Transposed {
            whole.f_transpose(0, 1).map_err(|_| self.error(format!("tensor '{}' is not a matrix", entry.name)))?
        } else {
            whole
        };
        let sizes: Vec<i64> = entry.parts.iter().filter_map(|p| shapes.get(p)?.first().copied()).collect();
        if whole.size().first() != Some(&sizes.iter().sum()) {
            return Err(self.error(format!(
                "tensor '{}' has shape {:?}, but config.json asks for {} rows",
                entry.name,
                location.shape(),
                sizes.iter().sum::<i64>()
            )));
        }
        let parts = match entry.layout {
            Layout::Heads => gathered(&whole, self.spec.heads, sizes.len() as i64)?,
            Layout::Rows | Layout::Transposed => whole.f_split_with_sizes(sizes, 0)?,
        };
        found.extend(entry.parts.iter().copied().zip(parts));
        Ok(())
    }

    fn error(&self, what: String) -> Error {
        Error::input(format!("{}: {what}", self.dir.display()))
    }
}

//! Models in Hugging Face layout, in and out: `config.json` and `model.safetensors` (or shards with an index).
//!
//! Reading maps the files into memory and copies one tensor at a time; writing goes to a sibling folder that
//! is renamed when it is whole, so a reader sees the old model or the new one and never half of one.

use super::families::{Config, Family, HfTensor};
use super::{HeadKind, ModelSpec, Param, Segment};
use crate::error::{Error, Result};
use crate::files;
use memmap2::Mmap;
use safetensors::tensor::{Dtype, Metadata, SafeTensors, View};
use serde_json::{Value, json};
use std::borrow::Cow;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tch::{Kind, Tensor};

const CONFIG: &str = "config.json";
const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const SCORE_WEIGHT: &str = "score.weight";
const SCORE_MEAN: &str = "rlhf_score_mean";
const SCORE_STD: &str = "rlhf_score_std";

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
    tensors: HashMap<String, Location>,
}

/// A tensor in a file that is mapped into memory.
#[derive(Debug)]
pub(super) struct Location {
    map: Arc<Mmap>,
    offset: usize,
    shape: Vec<i64>,
    dtype: Dtype,
}

impl Location {
    /// An fp32 copy of the tensor called `name` in a file in `dir`.
    pub(super) fn copy(&self, dir: &Path, name: &str) -> Result<Tensor> {
        let error = |what: String| Error::input(format!("{}: tensor '{name}' {what}", dir.display()));
        let kind = kind_of(self.dtype)
            .ok_or_else(|| error(format!("has type {:?}; F32, F16 and BF16 are supported", self.dtype)))?;
        let view = c10d::from_mmap(self.map.clone(), self.offset, &self.shape, kind)?;
        let copy = view.f_to_dtype(Kind::Float, false, true)?;
        if copy.f_isfinite()?.f_all()?.f_int64_value(&[])? == 0 {
            return Err(error("holds NaN or infinity".into()));
        }
        Ok(copy)
    }
}

/// Reads and checks only the config of the model in `dir`.
///
/// # Errors
/// Names the file and the field that is wrong.
pub fn read_config(dir: &Path) -> Result<(Value, Family, ModelSpec)> {
    let path = dir.join(CONFIG);
    let text = std::fs::read_to_string(&path).map_err(|e| {
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
        let mut tensors = HashMap::new();
        for path in weight_files(dir)? {
            locate(&path, &mut tensors)?;
        }
        Ok(Self { dir: dir.to_path_buf(), config, family, spec, score, tensors })
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
        for entry in
            self.family.tensors(&self.spec, segment).iter().filter(|t| t.parts.iter().all(|p| shapes.contains_key(p)))
        {
            self.split(entry, &shapes, &mut found)?;
        }
        if let Some(weight) = self.tensors.get(SCORE_WEIGHT).filter(|_| shapes.contains_key(&Param::ScalarHeadWeight)) {
            found.insert(Param::ScalarHeadWeight, weight.copy(&self.dir, SCORE_WEIGHT)?);
            found.insert(Param::ScalarHeadBias, Tensor::zeros([1], (Kind::Float, tch::Device::Cpu)));
        }
        specs.iter().map(|p| self.checked(found.remove(&p.param), p.param, &p.shape)).collect()
    }

    /// Whether the checkpoint has a scalar head.
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
        let short = entry.name.strip_prefix(self.family.backbone_prefix());
        let location = self.tensors.get(&entry.name).or_else(|| short.and_then(|s| self.tensors.get(s)));
        let location = location.ok_or_else(|| self.error(format!("tensor '{}' is missing", entry.name)))?;
        let whole = location.copy(&self.dir, &entry.name)?;
        let whole = if entry.transposed {
            whole.f_transpose(0, 1).map_err(|_| self.error(format!("tensor '{}' is not a matrix", entry.name)))?
        } else {
            whole
        };
        let sizes: Vec<i64> = entry.parts.iter().filter_map(|p| shapes.get(p)?.first().copied()).collect();
        if whole.size().first() != Some(&sizes.iter().sum()) {
            return Err(self.error(format!(
                "tensor '{}' has shape {:?}, but config.json asks for {} rows",
                entry.name,
                location.shape,
                sizes.iter().sum::<i64>()
            )));
        }
        let parts = whole.f_split_with_sizes(sizes, 0)?;
        found.extend(entry.parts.iter().copied().zip(parts));
        Ok(())
    }

    fn error(&self, what: String) -> Error {
        Error::input(format!("{}: {what}", self.dir.display()))
    }
}

/// The model's weight files: the one, or those that the index names.
fn weight_files(dir: &Path) -> Result<Vec<PathBuf>> {
    let (single, index) = (dir.join(WEIGHTS), dir.join(INDEX));
    if single.exists() || !index.exists() {
        return Ok(vec![single]);
    }
    let text = std::fs::read_to_string(&index).map_err(|e| Error::unreadable(&index, &e))?;
    let json: Value = serde_json::from_str(&text).map_err(|e| Error::input(format!("{}: {e}", index.display())))?;
    let map = json
        .get("weight_map")
        .and_then(Value::as_object)
        .ok_or_else(|| Error::input(format!("{}: field 'weight_map' is missing", index.display())))?;
    let mut names: Vec<&str> = map.values().filter_map(Value::as_str).collect();
    names.sort_unstable();
    names.dedup();
    if let Some(bad) = names.iter().find(|n| n.contains(['/', '\\']) || n.starts_with('.')) {
        return Err(Error::input(format!("{}: '{bad}' is not the name of a file beside it", index.display())));
    }
    Ok(names.into_iter().map(|n| dir.join(n)).collect())
}

/// Adds the tensors of one safetensors file, every range checked by its header's own rules.
pub(super) fn locate(path: &Path, tensors: &mut HashMap<String, Location>) -> Result<()> {
    let wrong = |e: &dyn std::fmt::Display| Error::input(format!("{}: {e}", path.display()));
    let map = c10d::map_file(path).map_err(|e| Error::unreadable(path, &e))?;
    let (header, metadata): (usize, Metadata) = SafeTensors::read_metadata(&map).map_err(|e| wrong(&e))?;
    for (name, info) in metadata.tensors() {
        let shape = info.shape.iter().map(|&n| n as i64).collect();
        let offset = header + 8 + info.data_offsets.0;
        tensors.insert(name, Location { map: map.clone(), offset, shape, dtype: info.dtype });
    }
    Ok(())
}

fn kind_of(dtype: Dtype) -> Option<Kind> {
    match dtype {
        Dtype::F32 => Some(Kind::Float),
        Dtype::F16 => Some(Kind::Half),
        Dtype::BF16 => Some(Kind::BFloat16),
        _ => None,
    }
}

/// An fp32 tensor on its way into a file: its bytes are copied only while they are written.
pub struct Outgoing {
    tensor: Tensor,
    shape: Vec<usize>,
}

impl Outgoing {
    /// Prepares a tensor of any kind and device for writing as fp32.
    ///
    /// # Errors
    /// Where libtorch fails.
    pub fn new(tensor: &Tensor) -> Result<Self> {
        let tensor = tensor.f_detach()?.f_to_device(tch::Device::Cpu)?.f_to_kind(Kind::Float)?.f_contiguous()?;
        let shape = tensor.size().iter().map(|&n| n as usize).collect();
        Ok(Self { tensor, shape })
    }
}

impl View for Outgoing {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    #[allow(clippy::expect_used)] // `new` made it a contiguous fp32 tensor on the CPU, the one case that cannot fail
    fn data(&self) -> Cow<'_, [u8]> {
        let mut bytes = vec![0; self.data_len()];
        self.tensor.f_copy_data_u8(&mut bytes, self.tensor.numel()).expect("a contiguous fp32 tensor on the CPU");
        Cow::Owned(bytes)
    }

    fn data_len(&self) -> usize {
        self.tensor.numel() * size_of::<f32>()
    }
}

/// Writes a trained model beside nothing else into `dir`, replacing what was there: weights, config, and
/// whatever `extra` puts into the folder before it takes its place.
///
/// `segments` are the model's parameters, segment by segment, in the order of [`ModelSpec::params`]. Of a scalar
/// head only the weight is written, as `transformers` has no bias there: a reward model's bias is part of `score`.
///
/// # Errors
/// Names the path where storage failed.
pub fn write_model(
    dir: &Path,
    source: &Source,
    head: HeadKind,
    score: Option<ScoreNormalisation>,
    segments: &[(Segment, Vec<Tensor>)],
    extra: impl FnOnce(&Path) -> Result<()>,
) -> Result<()> {
    let mut outgoing = Vec::new();
    for (segment, tensors) in segments {
        join(source, *segment, head, tensors, &mut outgoing)?;
    }
    files::replace_dir(dir, |temporary| {
        let weights = temporary.join(WEIGHTS);
        let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
        safetensors::serialize_to_file(outgoing, Some(metadata), &weights).map_err(|e| Error::storage(&weights, e))?;
        let config =
            serde_json::to_vec_pretty(&exported_config(source, head, score)).map_err(|e| Error::bug(e.to_string()))?;
        files::write(&temporary.join(CONFIG), &config)?;
        extra(temporary)
    })
}

/// Joins a segment's parameters into the tensors of a checkpoint.
pub(super) fn join(
    source: &Source,
    segment: Segment,
    head: HeadKind,
    tensors: &[Tensor],
    outgoing: &mut Vec<(String, Outgoing)>,
) -> Result<()> {
    let specs = source.spec.params(segment, head);
    let find = |param: &Param| specs.iter().position(|s| s.param == *param).and_then(|i| tensors.get(i));
    for entry in source.family.tensors(&source.spec, segment) {
        let parts: Vec<&Tensor> = entry.parts.iter().filter_map(find).collect();
        if parts.len() != entry.parts.len() {
            continue;
        }
        let whole = if let [only] = parts[..] { only.shallow_clone() } else { Tensor::f_cat(&parts, 0)? };
        let whole = if entry.transposed { whole.f_transpose(0, 1)? } else { whole };
        outgoing.push((entry.name, Outgoing::new(&whole)?));
    }
    if let Some(weight) = find(&Param::ScalarHeadWeight) {
        outgoing.push((SCORE_WEIGHT.into(), Outgoing::new(weight)?));
    }
    Ok(())
}

/// The start model's config with what the trained model changed.
fn exported_config(source: &Source, head: HeadKind, score: Option<ScoreNormalisation>) -> Value {
    let mut config = source.config.clone();
    config["architectures"] = json!([source.family.architecture(head)]);
    for dtype in ["torch_dtype", "dtype"] {
        if config.get(dtype).is_some() {
            config[dtype] = json!("float32");
        }
    }
    if head == HeadKind::Scalar {
        config["num_labels"] = json!(1);
        config["id2label"] = json!({"0": "score"});
        config["label2id"] = json!({"score": 0});
        // `transformers` reads the score at the last token that is not the pad token, so where that is also the end
        // token it would read one token early; without a pad token it reads at the last one, as the trainer does.
        let end = config.get("eos_token_id").cloned().unwrap_or_default();
        let pad = config.get("pad_token_id").cloned().unwrap_or_default();
        if pad == end || end.as_array().is_some_and(|ends| ends.contains(&pad)) {
            config["pad_token_id"] = Value::Null;
        }
    }
    if let Some(score) = score {
        config[SCORE_MEAN] = json!(score.mean);
        config[SCORE_STD] = json!(score.std);
    }
    config
}

//! Models in Hugging Face layout, as they are written: segment by segment, so that no more than one is in memory for it.
//!
//! A model is written beside its place and takes it once it is whole, so a reader sees the old model or the new one and never
//! half of one.

use super::families::{Family, HfTensor, Layout, dealt};
use super::hf::{CONFIG, SCORE_MEAN, SCORE_STD, SCORE_WEIGHT, ScoreNormalisation, Source};
use super::weights::{SHARD_BYTES, Weights};
use super::{HeadKind, ModelSpec, Param, Segment};
use crate::error::{Error, Result};
use crate::files::{self, NewDir};
use crate::lease::Lease;
use memory_plan::parse_bytes;
use rlhf_api::stage::{Export, Precision};
use safetensors::tensor::{Dtype, View};
use serde_json::{Value, json};
use std::borrow::Cow;
use std::path::Path;
use tch::{Kind, Tensor};

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

/// How a model's weights are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Format {
    /// Their number format.
    pub kind: Kind,
    /// The largest file, unless one tensor is larger.
    pub shard_bytes: u64,
}

impl Format {
    /// As asked for, and where nothing is, in the number format `start` of the model from which the stage starts.
    ///
    /// # Errors
    /// The size of a shard is no amount of bytes.
    pub fn asked(asked: &Export, start: Kind) -> Result<Self> {
        let bytes = |text: &String| {
            parse_bytes(text).ok_or_else(|| {
                Error::config(format!(
                    "export.maxShardSize '{text}' is no amount of bytes; write one such as 5G or 512Mi"
                ))
            })
        };
        let shard_bytes = asked.max_shard_size.as_ref().map_or(Ok(SHARD_BYTES), bytes)?;
        Ok(Self { kind: asked.dtype.map_or(start, number_format), shard_bytes })
    }
}

/// The number format of a precision.
pub fn number_format(precision: Precision) -> Kind {
    match precision {
        Precision::Fp32 => Kind::Float,
        Precision::Bf16 => Kind::BFloat16,
        Precision::Fp16 => Kind::Half,
    }
}

/// What the config of a model with a scalar head says of its scores.
#[derive(Clone, Copy, Debug, Default)]
pub struct Scores {
    /// How they are normalised.
    pub normalisation: Option<ScoreNormalisation>,
    /// The token that fills up short rows in `transformers`, which reads a score at the last token that is another: no token
    /// at which sequences end.
    pub pad: Option<i64>,
}

/// A trained model on its way to disk: it is given segment by segment, and is there once it is finished.
pub struct ModelWriter<'a> {
    dir: NewDir,
    source: &'a Source,
    head: HeadKind,
    kind: Kind,
    weights: Weights,
}

impl<'a> ModelWriter<'a> {
    /// Begins writing a model that was trained from `source` beside nothing else into `dir`; it takes its place if `lease`
    /// holds then.
    ///
    /// Of a scalar head only the weight is written, as `transformers` has no bias there: a reward model's bias is part of its
    /// normalisation.
    ///
    /// # Errors
    /// Names the path where storage failed.
    pub fn create(dir: &Path, source: &'a Source, head: HeadKind, format: Format, lease: &Lease) -> Result<Self> {
        let dir = NewDir::create(dir, lease)?;
        let segments = source.spec.segments().into_iter();
        let tensors: Vec<_> = segments
            .flat_map(|segment| stored(source.family, &source.spec, segment, head))
            .map(|(entry, shape)| (entry.name, shape))
            .collect();
        let weights = Weights::create(dir.path(), &tensors, format.kind, format.shard_bytes)?;
        Ok(Self { dir, source, head, kind: format.kind, weights })
    }

    /// Writes a segment's parameters, which are in the order of [`ModelSpec::params`].
    ///
    /// # Errors
    /// Names the path where storage failed.
    pub fn write(&mut self, segment: Segment, values: &[Tensor]) -> Result<()> {
        let params = self.source.spec.params(segment, self.head);
        for (entry, _) in stored(self.source.family, &self.source.spec, segment, self.head) {
            let find = |part: &Param| params.iter().position(|s| s.param == *part).and_then(|i| values.get(i));
            let parts: Vec<&Tensor> = entry.parts.iter().filter_map(find).collect();
            if entry.layout == Layout::Heads {
                let dealt = dealt(&parts, self.source.spec.heads)?;
                self.weights.write(&entry, &dealt.iter().collect::<Vec<_>>())?;
            } else {
                self.weights.write(&entry, &parts)?;
            }
        }
        Ok(())
    }

    /// Writes the config and whatever `extra` puts into the folder, and lets the model take its place. `about` is what there
    /// is to say of a scalar head.
    ///
    /// # Errors
    /// Names the path where storage failed, or the lease was lost.
    pub fn finish(self, about: Scores, extra: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
        self.weights.finish()?;
        let config = exported_config(self.source, self.head, self.kind, about);
        let config = serde_json::to_vec_pretty(&config).map_err(|e| Error::bug(e.to_string()))?;
        files::write(&self.dir.path().join(CONFIG), &config)?;
        extra(self.dir.path())?;
        self.dir.publish()
    }
}

/// The tensors of a checkpoint that hold a segment's parameters under this head, with their shapes.
pub(super) fn stored(family: Family, spec: &ModelSpec, segment: Segment, head: HeadKind) -> Vec<(HfTensor, Vec<i64>)> {
    let params = spec.params(segment, head);
    let score = HfTensor::plain(SCORE_WEIGHT.into(), Param::ScalarHeadWeight);
    let shaped = |entry: HfTensor| {
        let find = |part: &Param| params.iter().find(|s| s.param == *part);
        let parts = entry.parts.iter().map(find).collect::<Option<Vec<_>>>()?;
        let mut shape = parts.first()?.shape.clone();
        *shape.first_mut()? = parts.iter().filter_map(|p| p.shape.first()).sum();
        if entry.layout == Layout::Transposed {
            shape.reverse();
        }
        Some((entry, shape))
    };
    family.tensors(segment).into_iter().chain([score]).filter_map(shaped).collect()
}

/// The start model's config with what the trained model changed.
fn exported_config(source: &Source, head: HeadKind, kind: Kind, about: Scores) -> Value {
    let mut config = source.config.clone();
    config["architectures"] = json!([source.family.architecture(head)]);
    let name = match kind {
        Kind::Half => "float16",
        Kind::BFloat16 => "bfloat16",
        _ => "float32",
    };
    let named: Vec<&str> = ["torch_dtype", "dtype"].into_iter().filter(|field| config.get(*field).is_some()).collect();
    // Some readers go by the config alone, and take fp32 where it says nothing.
    for field in if named.is_empty() { vec!["torch_dtype"] } else { named } {
        config[field] = json!(name);
    }
    if head == HeadKind::Scalar {
        config["num_labels"] = json!(1);
        config["id2label"] = json!({"0": "score"});
        config["label2id"] = json!({"score": 0});
        config["problem_type"] = json!("regression");
        // Without a pad token `transformers` reads the score at the last token, as the trainer does, but takes no batches.
        config["pad_token_id"] = json!(about.pad);
    }
    if let Some(score) = about.normalisation {
        config[SCORE_MEAN] = json!(score.mean);
        config[SCORE_STD] = json!(score.std);
    }
    config
}

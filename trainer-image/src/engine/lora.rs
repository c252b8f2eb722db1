//! Models on a frozen backbone that they share, each with its own adapters and head (LoRA, Hu 2021).
//!
//! What is frozen rests as the strategy says, in memory once for all models on it, with neither gradient nor optimizer
//! state. A block's adapters are a second, small chunk beside its own; a scalar head is trained whole. The same model without
//! its adapters is the one that it started from.

use super::chunk::Chunk;
use super::group::Group;
use super::layout::ChunkLayout;
use super::link::Link;
use super::model::{Model, ScalarInit, random_values, segment_chunk, source_values};
use super::placement::Placement;
use crate::error::{Error, Result};
use crate::model::{Adapters, HeadKind, ModelSpec, ParamSpec, Segment, Source, merge_adapters};
use rlhf_api::stage::Lora;
use std::rc::Rc;
use tch::Tensor;

/// Frozen chunks on which several models may stand: the embedding, the blocks, and a language model's head.
pub struct Backbone {
    spec: ModelSpec,
    chunks: Vec<Rc<Chunk>>,
    language_head: Option<Rc<Chunk>>,
    placement: Placement,
    group: Rc<Group>,
}

impl Backbone {
    /// Loads the backbone of the model in `source`, and its head where that is a language model's. Every rank of the group
    /// calls it.
    ///
    /// # Errors
    /// Names the tensor or file that is wrong, or says that the device has no room.
    pub fn load(source: &Source, head: HeadKind, placement: Placement, group: &Rc<Group>) -> Result<Self> {
        let init = ScalarInit { seed: 0, fold: None };
        Self::build(&source.spec, head, placement, group, |segment, specs| {
            source_values(source, segment, head, specs, init)
        })
    }

    /// A backbone of random weights, as [`Model::random`].
    ///
    /// # Errors
    /// The device has no room.
    pub fn random(spec: &ModelSpec, head: HeadKind, placement: Placement, group: &Rc<Group>) -> Result<Self> {
        Self::build(spec, head, placement, group, |_, specs| random_values(spec, specs))
    }

    fn build(
        spec: &ModelSpec,
        head: HeadKind,
        placement: Placement,
        group: &Rc<Group>,
        mut values: impl FnMut(Segment, &[ParamSpec]) -> Result<Vec<Tensor>>,
    ) -> Result<Self> {
        let placement = Placement { trainable: false, ..placement };
        let mut load = |segment| segment_chunk(spec, segment, head, placement, group, &mut values).map(Rc::new);
        let below = spec.segments().into_iter().filter(|s| *s != Segment::Head);
        let chunks = below.map(&mut load).collect::<Result<_>>()?;
        let language_head = (head == HeadKind::Lm).then(|| load(Segment::Head)).transpose()?;
        Ok(Self { spec: spec.clone(), chunks, language_head, placement, group: group.clone() })
    }

    /// The backbone's language model, with adapters to be trained.
    ///
    /// # Errors
    /// The backbone has no such head, or the device has no room.
    pub fn language_model(&self, adapters: &Adapters, seed: u64) -> Result<Model> {
        let head = self.language_head.as_ref().map(|chunk| Link::shared(chunk, None));
        let head = head.ok_or_else(|| Error::bug("the backbone was loaded without a language model's head"))?;
        self.model(HeadKind::Lm, head, Some(adapters), seed, true)
    }

    /// A scalar model on the backbone, whose head is that of `source`; head and adapters are trained or not.
    ///
    /// # Errors
    /// Names the tensor that is wrong, or says that the device has no room.
    pub fn scalar_model(
        &self,
        source: &Source,
        init: ScalarInit,
        adapters: Option<&Adapters>,
        trainable: bool,
    ) -> Result<Model> {
        let values = |segment, specs: &[ParamSpec]| source_values(source, segment, HeadKind::Scalar, specs, init);
        self.scalar(values, adapters, init.seed, trainable)
    }

    /// A scalar model on the backbone with a head of random weights.
    ///
    /// # Errors
    /// The device has no room.
    pub fn random_scalar_model(&self, adapters: &Adapters, seed: u64, trainable: bool) -> Result<Model> {
        self.scalar(|_, specs| random_values(&self.spec, specs), Some(adapters), seed, trainable)
    }

    fn scalar(
        &self,
        mut values: impl FnMut(Segment, &[ParamSpec]) -> Result<Vec<Tensor>>,
        adapters: Option<&Adapters>,
        seed: u64,
        trainable: bool,
    ) -> Result<Model> {
        let placement = Placement { trainable, ..self.placement };
        let head = segment_chunk(&self.spec, Segment::Head, HeadKind::Scalar, placement, &self.group, &mut values)?;
        self.model(HeadKind::Scalar, Link::own(head), adapters, seed, trainable)
    }

    fn model(
        &self,
        kind: HeadKind,
        head: Link,
        adapters: Option<&Adapters>,
        seed: u64,
        trainable: bool,
    ) -> Result<Model> {
        let placement = Placement { trainable, ..self.placement };
        let link = |(i, chunk): (usize, &Rc<Chunk>)| {
            let values = i.checked_sub(1).and_then(|block| adapters.map(|a| (a, &a.blocks[block])));
            let adapter = values.map(|(adapters, values)| {
                let layout = ChunkLayout::new(self.spec.adapter_params(&adapters.lora));
                Chunk::new(layout, values, false, placement, &self.group)
            });
            Ok(Link::shared(chunk, adapter.transpose()?))
        };
        let mut links = self.chunks.iter().enumerate().map(link).collect::<Result<Vec<_>>>()?;
        links.push(head);
        let lora = adapters.map(|a| (a.lora.clone(), seed));
        Ok(Model::of(self.spec.clone(), kind, links, lora, placement, &self.group))
    }
}

impl Model {
    /// The frozen model under the adapters, which shares its memory: the one that training started from.
    ///
    /// # Errors
    /// A bug: it has chunks of its own.
    pub fn without_adapters(&self) -> Result<Model> {
        let links = self.links.iter().map(Link::without_adapter).collect::<Option<Vec<_>>>();
        let links = links.ok_or_else(|| Error::bug("a model that is trained whole has none to start from"))?;
        let placement = Placement { trainable: false, ..self.placement };
        Ok(Model::of(self.spec.clone(), self.head, links, None, placement, &self.group))
    }

    /// Hands the parameters to `take`, on rank 0 alone and segment by segment, while the other ranks wait: no more than one
    /// segment is in memory for it. What is frozen comes from `source`, from which the model was loaded, so that its number
    /// format here costs no digits. Every rank calls it.
    ///
    /// # Errors
    /// What `take` fails with; where libtorch fails, a peer was lost or `source` cannot be read.
    pub fn parameters(&self, source: &Source, mut take: impl FnMut(SegmentValues) -> Result<()> + Send) -> Result<()> {
        let (spec, head, lora) = (&self.spec, self.head, self.lora());
        for (segment, link) in spec.segments().into_iter().zip(&self.links) {
            let own = link.own_chunk().map(Chunk::values).transpose()?.flatten();
            let adapters = link.adapter().map(Chunk::values).transpose()?.flatten();
            let work = || {
                let values = match own {
                    Some(values) => values,
                    None => source.segment(segment, head)?.into_iter().flatten().collect(),
                };
                if let (Some(lora), Some(factors)) = (lora, &adapters) {
                    merge_adapters(lora, factors, spec, &spec.params(segment, head), &values)?;
                }
                take(SegmentValues { segment, values, adapters })
            };
            self.group.while_first(|| c10d::on_host(work))?;
        }
        Ok(())
    }

    /// Its adapters' rank, scale and targets, where it has some.
    pub fn lora(&self) -> Option<&Lora> {
        self.lora.as_ref().map(|(lora, _)| lora)
    }
}

/// A segment's parameters in fp32 in host memory.
pub struct SegmentValues {
    /// The segment.
    pub segment: Segment,
    /// In the order of [`ModelSpec::params`], with adapters merged in. They may be the very values that are trained.
    pub values: Vec<Tensor>,
    /// The adapters by themselves, in the order of [`ModelSpec::adapter_params`].
    pub adapters: Option<Vec<Tensor>>,
}

//! Models on a frozen backbone that they share, each with its own adapters and head (LoRA, Hu 2021).
//!
//! What is frozen rests as the strategy says, in memory once for all models on it, with neither gradient nor optimizer
//! state. A block's adapters are a second, small chunk beside its own; a scalar head is trained whole. The same model without
//! its adapters is the one that it started from.

use super::chunk::Chunk;
use super::group::Group;
use super::layout::ChunkLayout;
use super::link::Link;
use super::model::{Model, ScalarInit, segment_chunk, source_values};
use super::placement::Placement;
use crate::error::{Error, Result};
use crate::model::{Adapters, HeadKind, ModelSpec, ParamSpec, Segment, Source};
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
        let placement = Placement { trainable: false, ..placement };
        let init = ScalarInit { seed: 0, fold: None };
        let mut values = |segment, specs: &[ParamSpec]| source_values(source, segment, head, specs, init);
        let mut load = |segment| segment_chunk(&source.spec, segment, head, placement, group, &mut values).map(Rc::new);
        let below = source.spec.segments().into_iter().filter(|s| *s != Segment::Head);
        let chunks = below.map(&mut load).collect::<Result<_>>()?;
        let language_head = (head == HeadKind::Lm).then(|| load(Segment::Head)).transpose()?;
        Ok(Self { spec: source.spec.clone(), chunks, language_head, placement, group: group.clone() })
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
        let placement = Placement { trainable, ..self.placement };
        let mut values = |segment, specs: &[ParamSpec]| source_values(source, segment, HeadKind::Scalar, specs, init);
        let head = segment_chunk(&self.spec, Segment::Head, HeadKind::Scalar, placement, &self.group, &mut values)?;
        self.model(HeadKind::Scalar, Link::own(head), adapters, init.seed, trainable)
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

    /// The adapters as they are now, in fp32 on the CPU; `None` where the model has none. Every rank calls it.
    ///
    /// # Errors
    /// Where libtorch fails or a peer was lost.
    pub fn adapters(&self) -> Result<Option<Adapters>> {
        let Some((lora, _)) = &self.lora else { return Ok(None) };
        let values = || self.links.iter().filter_map(Link::adapter).map(Chunk::values).collect::<Result<_>>();
        let blocks = c10d::on_host(values)?;
        Ok(Some(Adapters { lora: lora.clone(), blocks }))
    }

    /// The parameters' fp32 values on the CPU, segment by segment, with adapters merged in. What is frozen comes from
    /// `source`, from which the model was loaded, so that its number format here costs no digits. Every rank calls it.
    ///
    /// # Errors
    /// Where libtorch fails, a peer was lost or `source` cannot be read.
    pub fn parameters(&self, source: &Source) -> Result<Vec<(Segment, Vec<Tensor>)>> {
        let adapters = self.adapters()?;
        let values = |(segment, link): (Segment, &Link)| {
            let params = self.spec.params(segment, self.head);
            let mut values = match link.without_adapter() {
                None => link.base().values()?,
                Some(_) => source.segment(segment, self.head)?.into_iter().flatten().collect(),
            };
            if let (Some(adapters), Segment::Block(block)) = (&adapters, segment) {
                adapters.merge(&self.spec, block, &params, &mut values)?;
            }
            Ok((segment, values))
        };
        self.spec.segments().into_iter().zip(&self.links).map(values).collect()
    }
}

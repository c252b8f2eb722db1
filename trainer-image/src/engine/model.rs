//! A model as a chain of chunks: loading, and inference.
//!
//! Segments run in order, and each one's chunk is fetched while the segment before it runs. Where a chunk rests whole on
//! the device, fetching costs nothing.

use super::chunk::Chunk;
use super::group::Group;
use super::layout::ChunkLayout;
use super::link::{HeldLink, Link, LinkFetch};
use super::loss_scale::LossScale;
use super::placement::Placement;
use super::step::Skips;
use crate::error::Result;
use crate::model::transformer::{self, AttentionContext, LayerCache};
use crate::model::{Batch, HeadKind, ModelSpec, Param, ParamSpec, ScoreNormalisation, Segment, Source};
use rlhf_api::stage::Lora;
use std::ops::Range;
use std::rc::Rc;
use tch::{Device, Kind, Tensor};

/// What a scalar head starts from.
#[derive(Clone, Copy, Debug)]
pub struct ScalarInit {
    /// Seeds the weight where the checkpoint has none, drawn from N(0, 1/(h+1)) (Stiennon 2020).
    pub seed: u64,
    /// Rewrites the head `w x + b` as `(w x + b - mean) / std`, so that a critic starts in units of normalised scores.
    pub fold: Option<ScoreNormalisation>,
}

/// A model's chunks, in segment order, spread over the ranks of its group.
pub struct Model {
    pub(super) spec: ModelSpec,
    pub(super) head: HeadKind,
    pub(super) links: Vec<Link>,
    /// What its adapters are, where it has some, and what seeds their dropout.
    pub(super) lora: Option<(Lora, u64)>,
    pub(super) placement: Placement,
    pub(super) group: Rc<Group>,
    pub(super) updates: i64,
    pub(super) loss_scale: Option<LossScale>,
    pub(super) skips: Skips,
    /// The link whose reduction is in flight.
    pub(super) reducing: Option<usize>,
}

/// The head's chunk while it is in use, and that of the embedding where the head is tied to it.
pub(super) struct HeldHead {
    head: HeldLink,
    embed: Option<HeldLink>,
}

impl HeldHead {
    /// Output for positions `[n, h]`: logits `[n, v]` or scalars `[n]`.
    pub(super) fn run(&self, spec: &ModelSpec, x: &Tensor) -> Result<Tensor> {
        transformer::head(spec, self.head.params(), self.tied()?, x)
    }

    /// The tied output weights.
    pub(super) fn tied(&self) -> Result<Option<&Tensor>> {
        self.embed.as_ref().map(|e| e.params().get(Param::TokenEmbedding)).transpose()
    }

    /// The head's own parameters that are trained, in order.
    pub(super) fn trained(&self) -> impl Iterator<Item = &Tensor> {
        self.head.trained()
    }
}

impl Model {
    /// Loads a model from disk, segment by segment. Every rank of the group calls it.
    ///
    /// # Errors
    /// Names the tensor or file that is wrong, or says that the device has no room.
    pub fn load(
        source: &Source,
        head: HeadKind,
        init: ScalarInit,
        placement: Placement,
        group: &Rc<Group>,
    ) -> Result<Self> {
        Self::build(&source.spec, head, placement, group, |segment, specs| {
            source_values(source, segment, head, specs, init)
        })
    }

    /// A model of random weights as GPT-2's start from (Radford 2019: N(0, 0.02), norms 1, biases 0): as large and as fast as a
    /// trained one.
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
        let chunk = |segment| segment_chunk(spec, segment, head, placement, group, &mut values).map(Link::own);
        let links = spec.segments().into_iter().map(chunk).collect::<Result<_>>()?;
        Ok(Self::of(spec.clone(), head, links, None, placement, group))
    }

    pub(super) fn of(
        spec: ModelSpec,
        head: HeadKind,
        links: Vec<Link>,
        lora: Option<(Lora, u64)>,
        placement: Placement,
        group: &Rc<Group>,
    ) -> Self {
        let loss_scale = (placement.trainable && placement.kind() == Kind::Half).then(LossScale::default);
        let group = group.clone();
        Self {
            spec,
            head,
            links,
            lora,
            placement,
            group,
            updates: 0,
            loss_scale,
            skips: Skips::default(),
            reducing: None,
        }
    }

    /// The model's shape.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// What stands on top.
    pub fn head_kind(&self) -> HeadKind {
        self.head
    }

    /// The device that runs it.
    pub fn device(&self) -> Device {
        self.placement.device
    }

    /// The number format that it computes in.
    pub fn kind(&self) -> Kind {
        self.placement.kind()
    }

    /// Optimizer steps made so far.
    pub fn updates(&self) -> i64 {
        self.updates
    }

    /// The loss scale, where it is trained in fp16.
    pub fn loss_scale(&self) -> Option<LossScale> {
        self.loss_scale
    }

    /// The batches that may still be skipped.
    pub fn skips(&self) -> Skips {
        self.skips
    }

    /// The chunks that are trained, in segment order.
    pub fn trained(&self) -> impl Iterator<Item = &Chunk> {
        self.links.iter().filter_map(Link::trained)
    }

    /// The chunks that are trained, in segment order, to be restored; [`Model::restored`] follows.
    pub fn trained_mut(&mut self) -> impl Iterator<Item = &mut Chunk> {
        self.links.iter_mut().filter_map(Link::trained_mut)
    }

    /// Elements of what is trained, without the padding between tensors.
    pub fn trained_parameters(&self) -> i64 {
        self.trained().map(|chunk| chunk.specs().map(|s| s.shape.iter().product::<i64>()).sum::<i64>()).sum()
    }

    /// Whether running it takes part in collectives, so that every rank must run it equally often.
    pub fn runs_in_step(&self) -> bool {
        self.placement.shards_parameters() && self.group.world_size() > 1
    }

    /// The ranks that run it together.
    pub fn group(&self) -> &Group {
        &self.group
    }

    /// The last block's output `[b, t, h]`, without a graph.
    ///
    /// # Errors
    /// Where libtorch fails.
    pub fn hidden(&self, batch: &Batch) -> Result<Tensor> {
        let context = self.attention_within(batch)?;
        self.run(&batch.tokens, &batch.positions, &context, None)
    }

    fn attention(&self, positions: &Tensor, mask: Option<&Tensor>) -> Result<AttentionContext> {
        AttentionContext::new(&self.spec, positions, mask, self.kind())
    }

    /// The attention of a pass over a whole batch.
    pub(super) fn attention_within(&self, batch: &Batch) -> Result<AttentionContext> {
        Ok(self.attention(&batch.positions, batch.mask.as_ref())?.with_spans(batch.spans()))
    }

    /// As [`Model::hidden`] for the next tokens `[b, t]` of rows whose past is in `caches` (one a block), which grow by them.
    /// `mask` `[b, 1, t, past + t]` says what each may see; without one, a single token sees
    /// everything and several see what the causal rule allows.
    ///
    /// # Errors
    /// Where libtorch fails.
    pub fn hidden_cached(
        &self,
        tokens: &Tensor,
        positions: &Tensor,
        mask: Option<&Tensor>,
        caches: &mut [LayerCache],
    ) -> Result<Tensor> {
        let context = self.attention(positions, mask)?;
        self.run(tokens, positions, &context, Some(caches))
    }

    fn run(
        &self,
        tokens: &Tensor,
        positions: &Tensor,
        context: &AttentionContext,
        mut caches: Option<&mut [LayerCache]>,
    ) -> Result<Tensor> {
        tch::no_grad(|| {
            let mut coming = self.links[0].fetch()?;
            let mut x = Tensor::new();
            for i in 0..=self.spec.layers {
                // The next block's parameters come while this segment runs.
                let next = (i < self.spec.layers).then(|| self.links[i + 1].fetch()).transpose()?;
                let held = coming.ready()?;
                x = match i.checked_sub(1) {
                    None => transformer::embed(&self.spec, held.params(), tokens, positions)?,
                    Some(block) => {
                        let cache = caches.as_deref_mut().and_then(|c| c.get_mut(block));
                        transformer::block(&self.spec, held.block(block, self.scale(), None), &x, context, cache)?
                    }
                };
                let Some(next) = next else { break };
                coming = next;
            }
            Ok(x)
        })
    }

    /// Starts fetching what the head needs.
    pub(super) fn fetch_head(&self) -> Result<(LinkFetch, Option<LinkFetch>)> {
        let head = self.links[self.spec.layers + 1].fetch()?;
        let tied = self.head == HeadKind::Lm && self.spec.tied_head;
        Ok((head, tied.then(|| self.links[0].fetch()).transpose()?))
    }

    pub(super) fn hold_head(&self) -> Result<HeldHead> {
        let (head, embed) = self.fetch_head()?;
        Ok(HeldHead { head: head.ready()?, embed: embed.map(LinkFetch::ready).transpose()? })
    }

    /// Runs the head over `rows` (indices into the flattened `[b * t]` of `hidden`), slice by slice: `visit` gets the
    /// head's output (logits `[n, v]` or scalars `[n]`) and which of `rows` it belongs to.
    ///
    /// # Errors
    /// Where libtorch or `visit` fails.
    pub fn visit_head(
        &self,
        hidden: &Tensor,
        rows: &[i64],
        mut visit: impl FnMut(&Tensor, Range<usize>) -> Result<()>,
    ) -> Result<()> {
        let flat = hidden.f_reshape([-1, self.spec.hidden])?;
        tch::no_grad(|| {
            let head = self.hold_head()?;
            for range in self.slices(rows.len()) {
                let x = flat.f_index_select(0, &self.indices(&rows[range.clone()]))?;
                visit(&head.run(&self.spec, &x)?, range)?;
            }
            Ok(())
        })
    }

    /// A scalar model's output at `rows` of a batch.
    ///
    /// # Errors
    /// Where libtorch fails.
    pub fn scalars(&self, batch: &Batch, rows: &[i64]) -> Result<Vec<f64>> {
        let mut all = Vec::with_capacity(rows.len());
        self.visit_head(&self.hidden(batch)?, rows, |out, _| {
            all.extend(Vec::<f64>::try_from(out.f_to_kind(Kind::Double)?)?);
            Ok(())
        })?;
        Ok(all)
    }

    /// The bias of a scalar head, as the optimizer holds it. Every rank calls it.
    ///
    /// # Errors
    /// Where libtorch fails or a peer was lost.
    pub fn scalar_bias(&self) -> Result<f64> {
        let head = self.links[self.spec.layers + 1].base();
        let values = head.values()?.unwrap_or_default();
        let bias = head.specs().position(|s| s.param == Param::ScalarHeadBias).and_then(|i| values.get(i));
        let mut bias = [bias.map_or(Ok(0.0), |b| b.f_double_value(&[0]))?];
        // Rank 0 alone has the values.
        self.group.sum(&mut bias)?;
        Ok(bias[0])
    }

    /// What the adapters' output is multiplied by.
    pub(super) fn scale(&self) -> f64 {
        self.lora.as_ref().map_or(1.0, |(lora, _)| lora.scale())
    }

    pub(super) fn indices(&self, rows: &[i64]) -> Tensor {
        Tensor::from_slice(rows).to_device(self.placement.device)
    }

    pub(super) fn slices(&self, rows: usize) -> Vec<Range<usize>> {
        let width = if self.head == HeadKind::Lm { self.spec.vocab } else { 1 };
        let step = (self.placement.head_slice_bytes / (width * size_of::<f32>() as i64)).max(1) as usize;
        (0..rows).step_by(step).map(|start| start..(start + step).min(rows)).collect()
    }
}

/// A segment's random start.
pub(super) fn random_values(spec: &ModelSpec, specs: &[ParamSpec]) -> Result<Vec<Tensor>> {
    specs.iter().map(|param| random_value(spec, param)).collect()
}

fn random_value(model: &ModelSpec, spec: &ParamSpec) -> Result<Tensor> {
    let options = (Kind::Float, Device::Cpu);
    Ok(match spec.param {
        norm if norm.is_norm_weight() && !model.traits.norms_from_one => Tensor::f_ones(&spec.shape, options)?,
        _ if spec.shape.len() < 2 => Tensor::f_zeros(&spec.shape, options)?,
        _ => Tensor::f_randn(&spec.shape, options)? * 0.02,
    })
}

/// A segment's chunk.
pub(super) fn segment_chunk(
    spec: &ModelSpec,
    segment: Segment,
    head: HeadKind,
    placement: Placement,
    group: &Rc<Group>,
    values: &mut impl FnMut(Segment, &[ParamSpec]) -> Result<Vec<Tensor>>,
) -> Result<Chunk> {
    let specs = spec.params(segment, head);
    let values = c10d::on_host(|| values(segment, &specs))?;
    let many = !matches!(segment, Segment::Block(_));
    Chunk::new(ChunkLayout::new(specs), &values, many, placement, group)
}

/// A segment's parameters as they lie on disk; a scalar head that is not there starts as `init` says.
pub(super) fn source_values(
    source: &Source,
    segment: Segment,
    head: HeadKind,
    specs: &[ParamSpec],
    init: ScalarInit,
) -> Result<Vec<Tensor>> {
    let values = source.segment(segment, head)?.into_iter().zip(specs);
    let value = |(value, s): (Option<Tensor>, &ParamSpec)| {
        let value = value.map_or_else(|| scalar_init(&source.spec, s.param, &s.shape, init), Ok)?;
        folded(value, s.param, init.fold)
    };
    values.map(value).collect()
}

/// The scalar head's start: weight from N(0, 1/(h+1)), bias 0.
fn scalar_init(spec: &ModelSpec, param: Param, shape: &[i64], init: ScalarInit) -> Result<Tensor> {
    if param != Param::ScalarHeadWeight {
        return Ok(Tensor::f_zeros(shape, (Kind::Float, Device::Cpu))?);
    }
    let numel: i64 = shape.iter().product();
    let std = 1.0 / ((spec.embed_width() + 1) as f64).sqrt();
    let values: Vec<f32> = (0..numel).map(|i| (std * crate::random::normal(&[init.seed, i as u64])) as f32).collect();
    Ok(Tensor::from_slice(&values).f_view(shape)?)
}

/// A scalar head's parameter with the normalisation folded in.
fn folded(value: Tensor, param: Param, fold: Option<ScoreNormalisation>) -> Result<Tensor> {
    Ok(match (param, fold) {
        (Param::ScalarHeadWeight, Some(score)) => value.f_div_scalar(score.std)?,
        (Param::ScalarHeadBias, Some(score)) => value.f_sub_scalar(score.mean)?.f_div_scalar(score.std)?,
        _ => value,
    })
}

//! Training of a model: segment-wise backward. Optimizer steps are in [`super::step`].
//!
//! Forward keeps each block's input and, without recomputation, its graph (Chen 2016 is the other way). Backward goes from
//! the head to the embedding, asks autograd for the gradients of one segment at a time, and starts that chunk's reduction
//! over the ranks while the next segment's backward runs. No hooks are needed, and every segment's memory is free as early
//! as it can be.

use super::chunk::Chunk;
use super::group::Gather;
use super::link::{HeldLink, LinkFetch};
use super::loss_scale::LossScale;
use super::model::{HeldHead, Model};
use super::step::Skips;
use crate::error::{Error, Result};
use crate::model::transformer::{self, AttentionContext};
use crate::model::{Batch, Dropout, Param};
use rlhf_api::stage::Recompute;
use std::ops::Range;
use tch::Tensor;

/// What forward keeps of one block for its backward.
struct Kept {
    input: Tensor,
    output: Option<Tensor>,
    /// The block's parameters: those that a graph refers to, and those of the last block, whose backward follows at once.
    held: Option<HeldLink>,
    parked: bool,
}

/// What a block's forward needs beside its parameters and its input.
struct Pass {
    attention: AttentionContext,
    dropout: Option<Dropout>,
}

impl Model {
    /// Forward and backward over one micro-batch: adds the gradients of the sum of `loss` over slices of `rows`.
    ///
    /// `loss` gets the head's output for a slice and which of `rows` it is, and returns a scalar tensor. With `last`
    /// (the step's last micro-batch on this rank) gradients that were kept whole until now are reduced. A rank that has
    /// fewer micro-batches than others runs a batch without rows instead.
    ///
    /// # Errors
    /// Where libtorch or `loss` fails, or a peer was lost.
    pub fn backward(
        &mut self,
        batch: &Batch,
        rows: &[i64],
        last: bool,
        loss: impl FnMut(&Tensor, Range<usize>) -> Result<Tensor>,
    ) -> Result<()> {
        let pass = Pass { attention: self.attention_within(batch)?, dropout: self.dropout(batch)? };
        let (mut kept, output) = self.forward_kept(batch, &pass)?;
        let mut upstream = self.head_backward(&output, rows, loss)?;
        drop(output);
        self.reduce(self.spec.layers + 1, last)?;
        let mut coming = self.fetch_kept(&mut kept)?;
        while let (Some(segment), Some(fetch)) = (kept.pop(), coming.take()) {
            coming = self.fetch_kept(&mut kept)?;
            let i = kept.len();
            upstream = self.block_backward(i, segment, fetch.ready()?, &upstream, &pass)?;
            self.reduce(i + 1, last)?;
        }
        self.embed_backward(batch, &upstream)?;
        self.reduce(0, last)?;
        self.finish_reductions()
    }

    /// Starts the reduction of a link's trained chunk and ends the one before it, so that one is in flight while a segment's backward runs.
    fn reduce(&mut self, link: usize, last: bool) -> Result<()> {
        let Some(trained) = self.links[link].trained_mut() else { return Ok(()) };
        trained.start_reduction(last)?;
        let before = self.reducing.replace(link);
        self.finish_reduction(before)
    }

    fn finish_reductions(&mut self) -> Result<()> {
        let last = self.reducing.take();
        self.finish_reduction(last)
    }

    fn finish_reduction(&mut self, link: Option<usize>) -> Result<()> {
        link.and_then(|link| self.links[link].trained_mut()).map_or(Ok(()), Chunk::finish_reduction)
    }

    /// What the adapters drop of this batch, where they drop something.
    fn dropout(&self, batch: &Batch) -> Result<Option<Dropout>> {
        let dropping = self.lora.as_ref().filter(|(lora, _)| lora.dropout > 0.0);
        dropping.map(|(lora, seed)| Dropout::new(lora.dropout, *seed, self.updates as u64, batch)).transpose()
    }

    fn run_block(&self, block: usize, held: &HeldLink, input: &Tensor, pass: &Pass) -> Result<Tensor> {
        let params = held.block(block, self.scale(), pass.dropout.as_ref());
        transformer::block(&self.spec, params, input, &pass.attention, None)
    }

    fn forward_kept(&self, batch: &Batch, pass: &Pass) -> Result<(Vec<Kept>, Tensor)> {
        let layers = self.spec.layers;
        let mut kept = Vec::with_capacity(layers);
        let embed = self.links[0].fetch()?;
        let mut coming = Some(self.links[1].fetch()?);
        let mut x =
            tch::no_grad(|| transformer::embed(&self.spec, embed.ready()?.params(), &batch.tokens, &batch.positions))?;
        for i in 0..layers {
            let Some(held) = coming.take().map(LinkFetch::ready).transpose()? else { break };
            coming = (i + 1 < layers).then(|| self.links[i + 2].fetch()).transpose()?;
            let input = x.f_detach()?.f_set_requires_grad(true)?;
            let run = || self.run_block(i, &held, &input, pass);
            let (output, graph) = match self.placement.strategy.recompute {
                Recompute::Block => (tch::no_grad(run)?, false),
                Recompute::None => (run()?, true),
            };
            x = output.f_detach()?;
            let parked = i + 1 < layers;
            if parked {
                held.park()?;
            }
            let held = (graph || !parked).then_some(held);
            kept.push(Kept { input, output: graph.then_some(output), held, parked });
        }
        Ok((kept, x))
    }

    /// Starts fetching the parameters of the last of `kept`.
    fn fetch_kept(&self, kept: &mut [Kept]) -> Result<Option<LinkFetch>> {
        let link = &self.links[kept.len()];
        let Some(segment) = kept.last_mut() else { return Ok(None) };
        Ok(Some(match segment.held.take() {
            Some(held) if segment.parked => link.fetch_again(held)?,
            Some(held) => held.into(),
            None => link.fetch()?,
        }))
    }

    /// The gradient with regard to `hidden` `[b, t, h]`; those of the head (and of a tied embedding) are accumulated.
    fn head_backward(
        &mut self,
        hidden: &Tensor,
        rows: &[i64],
        mut loss: impl FnMut(&Tensor, Range<usize>) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let head = self.hold_head()?;
        let flat = hidden.f_reshape([-1, self.spec.hidden])?;
        let mut upstream = flat.f_zeros_like()?;
        for range in self.slices(rows.len()) {
            let indices = self.indices(&rows[range.clone()]);
            let x = flat.f_index_select(0, &indices)?.f_set_requires_grad(true)?;
            let value = loss(&head.run(&self.spec, &x)?, range)?;
            if let Some(gradient) = self.head_slice_backward(&head, &x, &value)? {
                let _ = upstream.f_index_add_(0, &indices, &gradient)?;
            }
        }
        Ok(upstream.f_view_as(hidden)?)
    }

    /// The gradient of a slice's loss `value` with regard to its input `x`.
    fn head_slice_backward(&mut self, head: &HeldHead, x: &Tensor, value: &Tensor) -> Result<Option<Tensor>> {
        let tied = head.tied()?.filter(|t| t.requires_grad());
        let inputs: Vec<&Tensor> = std::iter::once(x).chain(head.trained()).chain(tied).collect();
        let scale = self.scale_of_loss();
        let mut gradients = c10d::grad(&[value], &[&value.f_full_like(scale)?], &inputs, false)?;
        let of_tied = tied.is_some().then(|| gradients.pop()).flatten();
        self.accumulate(self.spec.layers + 1, &gradients[1..])?;
        if of_tied.is_some() {
            self.accumulate(0, &of_tied)?;
        }
        Ok(gradients[0].take())
    }

    /// Adds gradients to those of the link's trained chunk, where it has one.
    fn accumulate<'g>(&mut self, link: usize, gradients: impl IntoIterator<Item = &'g Option<Tensor>>) -> Result<()> {
        self.links[link].trained_mut().map_or(Ok(()), |chunk| chunk.accumulate(gradients))
    }

    fn block_backward(
        &mut self,
        i: usize,
        kept: Kept,
        held: HeldLink,
        upstream: &Tensor,
        pass: &Pass,
    ) -> Result<Tensor> {
        let output = match kept.output {
            Some(output) => output,
            None => self.run_block(i, &held, &kept.input, pass)?,
        };
        let inputs: Vec<&Tensor> = std::iter::once(&kept.input).chain(held.trained()).collect();
        let mut gradients = c10d::grad(&[&output], &[upstream], &inputs, false)?;
        self.accumulate(i + 1, &gradients[1..])?;
        gradients[0].take().ok_or_else(|| Error::bug("a block's output does not depend on its input"))
    }

    /// An embedding's gradient is `upstream`, added up by token and by position; it needs parameters only where a token's row
    /// goes through some on its way.
    fn embed_backward(&mut self, batch: &Batch, upstream: &Tensor) -> Result<()> {
        if self.links[0].trained().is_none() {
            return Ok(());
        }
        let of_tokens = if self.spec.refines_embedding() {
            self.refinement_backward(batch, upstream)?
        } else {
            transformer::scale_embedding(&self.spec, upstream)?
        };
        let positions = transformer::position_rows(&self.spec, &batch.positions)?;
        let Some(chunk) = self.links[0].trained_mut() else { return Ok(()) };
        let params: Vec<Param> = chunk.specs().map(|s| s.param).collect();
        for (slot, param) in params.into_iter().enumerate() {
            let (indices, rows) = match param {
                Param::TokenEmbedding => (&batch.tokens, &of_tokens),
                Param::PositionEmbedding => (&positions, upstream),
                _ => continue,
            };
            let width = rows.size().last().copied().unwrap_or_default();
            chunk.accumulate_rows(slot, &indices.f_flatten(0, -1)?, &rows.f_reshape([-1, width])?)?;
        }
        Ok(())
    }

    /// The gradient with regard to tokens' rows; those of the parameters that they go through are accumulated.
    fn refinement_backward(&mut self, batch: &Batch, upstream: &Tensor) -> Result<Tensor> {
        let held = self.links[0].fetch()?.ready()?;
        let rows = tch::no_grad(|| transformer::token_rows(held.params(), &batch.tokens))?;
        let rows = rows.f_detach()?.f_set_requires_grad(true)?;
        let refined = transformer::refine(&self.spec, held.params(), &rows)?;
        let table = |p: &Param| matches!(p, Param::TokenEmbedding | Param::PositionEmbedding);
        let params: Vec<Param> = self.links[0].base().specs().map(|s| s.param).collect();
        let through: Vec<&Tensor> =
            params.iter().zip(held.trained()).filter(|(p, _)| !table(p)).map(|(_, t)| t).collect();
        let inputs: Vec<&Tensor> = std::iter::once(&rows).chain(through).collect();
        let mut gradients = c10d::grad(&[&refined], &[upstream], &inputs, false)?.into_iter();
        let of_rows =
            gradients.next().flatten().ok_or_else(|| Error::bug("an embedding does not depend on its rows"))?;
        let all: Vec<Option<Tensor>> =
            params.iter().map(|p| if table(p) { None } else { gradients.next().flatten() }).collect();
        self.accumulate(0, &all)?;
        Ok(of_rows)
    }

    /// Two exchanges are in flight at most, as each may need a chunk's room on the device.
    pub(super) fn publish(&mut self) -> Result<()> {
        let mut before: Option<Gather> = None;
        for chunk in self.trained_mut() {
            let next = chunk.publish()?;
            std::mem::replace(&mut before, next).map_or(Ok(()), Gather::finish)?;
        }
        before.map_or(Ok(()), Gather::finish)
    }

    /// Goes on from restored chunks, which have seen so many optimizer steps. Every rank calls it.
    ///
    /// # Errors
    /// Where libtorch fails or a peer was lost.
    pub fn restored(&mut self, updates: i64, loss_scale: Option<LossScale>, skips: Skips) -> Result<()> {
        (self.updates, self.skips) = (updates, skips);
        if self.loss_scale.is_some() {
            self.loss_scale = Some(loss_scale.unwrap_or_default());
        }
        self.publish()
    }
}

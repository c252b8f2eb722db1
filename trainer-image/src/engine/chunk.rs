//! One segment's parameters as a flat buffer: where it rests, how it comes to the device, and how it is updated.
//!
//! A chunk is the unit of gathering, reducing, offloading, optimising and checkpointing. At rest its working copy is whole
//! or this rank's part (`zero3`), on the device or on the host; to be used it is fetched, whole, onto the device. The
//! optimizer works on fp32 values (Micikevicius 2018) of the part that this rank updates. Where that is the working copy
//! itself, there is no second one.

use super::gradient::Gradient;
use super::group::{self, Gather, Group};
use super::layout::{ChunkLayout, part, part_size};
use super::lent::Lent;
use super::placement::Placement;
use crate::error::{Error, Result};
use crate::model::ParamSpec;
use crate::model::transformer::Params;
use c10d::{AdamW, Mark};
use std::cell::RefCell;
use std::ops::Range;
use std::rc::Rc;
use std::sync::{Arc, Weak};
use tch::Tensor;

/// A segment's parameters, and what training adds to them.
pub struct Chunk {
    layout: ChunkLayout,
    placement: Placement,
    group: Rc<Group>,
    /// The working copy at rest: `[padded]`, or this rank's part.
    home: Tensor,
    /// The parameters, where the chunk rests whole on the device.
    resident: Option<Rc<Params>>,
    training: Option<Training>,
}

struct Training {
    /// The elements of the padded chunk that this rank updates.
    own: Range<i64>,
    /// Their fp32 values.
    master: Tensor,
    state: OptimizerState,
    gradient: Gradient,
    /// What others may still read of the above.
    lent: RefCell<Vec<Weak<Lent>>>,
}

/// AdamW's two moments of the elements that this rank updates.
struct OptimizerState {
    first: Tensor,
    second: Tensor,
}

/// A chunk's whole parameters on the device, for as long as this lives.
pub(super) struct Held {
    params: Rc<Params>,
    /// The memory that came for this use; `None` where the chunk rests on the device.
    flat: Option<Tensor>,
}

impl Held {
    /// The parameters.
    pub(super) fn params(&self) -> &Params {
        &self.params
    }

    /// Gives the memory back while a graph still refers to it; [`Chunk::fetch_again`] fills it anew.
    pub(super) fn park(&self) -> Result<()> {
        self.flat.as_ref().map_or(Ok(()), |flat| Ok(c10d::resize_storage(flat, 0)?))
    }
}

/// Parameters on their way to the device.
#[must_use = "the parameters are there only after ready()"]
pub(super) struct Fetch {
    held: Held,
    gather: Option<Gather>,
    copied: Option<Copied>,
}

/// A copy that the device waits for before anything else, even where nobody does: its memory may be another's by then.
struct Copied(Mark);

impl Drop for Copied {
    fn drop(&mut self) {
        let _ = self.0.pass();
    }
}

impl Fetch {
    /// Waits until the parameters are there.
    pub(super) fn ready(self) -> Result<Held> {
        self.gather.map(Gather::finish).transpose()?;
        self.copied.as_ref().map(|copied| copied.0.pass()).transpose()?;
        Ok(self.held)
    }
}

impl From<Held> for Fetch {
    fn from(held: Held) -> Self {
        Self { held, gather: None, copied: None }
    }
}

impl Chunk {
    /// The names of what a checkpoint keeps of a trained chunk.
    pub const SAVED: [&'static str; 3] = ["parameters", "first-moment", "second-moment"];

    /// A chunk that holds these values, in the layout's order. `many` says that one micro-batch adds to its gradient many
    /// times.
    ///
    /// # Errors
    /// Where the device or the host has no room or a value has the wrong shape.
    pub fn new(
        layout: ChunkLayout,
        values: &[Tensor],
        many: bool,
        placement: Placement,
        group: &Rc<Group>,
    ) -> Result<Self> {
        let (rank, world) = (group.rank(), group.world_size());
        let size = part_size(layout.numel, world);
        let (padded, part) = (size * i64::from(world), i64::from(rank) * size..(i64::from(rank) + 1) * size);
        let whole = c10d::on_host(|| layout.join(values, padded))?;
        let rests = if placement.shards_parameters() { part.clone() } else { 0..padded };
        let mut home = placement.home_zeros(rests.end - rests.start)?;
        home.f_copy_(&whole.f_narrow(0, rests.start, rests.end - rests.start)?)?;
        let training = if placement.trainable {
            let own = if placement.shards_state() { part } else { 0..padded };
            let len = own.end - own.start;
            let master = if placement.master_is_home() {
                home.f_narrow(0, own.start - rests.start, len)?
            } else {
                let mut master = placement.state_zeros(len)?;
                master.f_copy_(&whole.f_narrow(0, own.start, len)?)?;
                master
            };
            let state = OptimizerState { first: placement.state_zeros(len)?, second: placement.state_zeros(len)? };
            let gradient = Gradient::new(&layout, own.clone(), many, &placement, world)?;
            Some(Training { own, master, state, gradient, lent: RefCell::default() })
        } else {
            None
        };
        let mut chunk = Self { layout, placement, group: group.clone(), home, resident: None, training };
        if !placement.shards_parameters() && !placement.streams() {
            chunk.resident = Some(Rc::new(chunk.leaves(&chunk.home)?));
        }
        Ok(chunk)
    }

    /// Whether it has a gradient and an optimizer state.
    pub fn is_trained(&self) -> bool {
        self.training.is_some()
    }

    /// Elements of the chunk, without padding for the ranks.
    pub fn numel(&self) -> i64 {
        self.layout.numel
    }

    /// Where its parameters lie.
    pub fn layout(&self) -> &ChunkLayout {
        &self.layout
    }

    fn padded(&self) -> i64 {
        part_size(self.layout.numel, self.group.world_size()) * i64::from(self.group.world_size())
    }

    /// Parameters over a flat buffer, as leaves of autograd's graph. They have a version counter of their own, so that a
    /// buffer that is filled again with the same values does not count as changed.
    fn leaves(&self, flat: &Tensor) -> Result<Params> {
        let trainable = self.placement.trainable;
        let views = self.layout.views(&flat.f_data()?)?;
        let leaves =
            views.into_iter().map(|v| Ok(v.f_detach()?.f_set_requires_grad(trainable)?)).collect::<Result<Vec<_>>>()?;
        Ok(Params::new(self.layout.slots.iter().map(|(spec, _)| spec.param), leaves))
    }

    /// Starts bringing the whole chunk to the device.
    pub(super) fn fetch(&self) -> Result<Fetch> {
        if let Some(params) = &self.resident {
            return Ok(Held { params: params.clone(), flat: None }.into());
        }
        let flat = Tensor::f_empty([self.padded()], (self.placement.kind(), self.placement.device))?;
        let params = Rc::new(self.leaves(&flat)?);
        self.fill(Held { params, flat: Some(flat) })
    }

    /// Starts bringing the chunk back into memory that was parked.
    pub(super) fn fetch_again(&self, held: Held) -> Result<Fetch> {
        match &held.flat {
            None => Ok(held.into()),
            Some(flat) => {
                let bytes = flat.numel() * self.placement.kind().elt_size_in_bytes();
                c10d::resize_storage(flat, bytes)?;
                self.fill(held)
            }
        }
    }

    fn fill(&self, held: Held) -> Result<Fetch> {
        let Some(flat) = &held.flat else { return Ok(held.into()) };
        if self.placement.shards_parameters() {
            let gather = Some(self.group.start_gather(flat, &self.home)?);
            return Ok(Fetch { held, gather, copied: None });
        }
        // After what the device is at: the buffer may be one that an earlier segment has just given back.
        let side = self.group.side();
        let ((), copied) = side.after(&side.mark()?, || c10d::copy(flat, &self.home))?;
        Ok(Fetch { held, gather: None, copied: Some(Copied(copied)) })
    }

    /// Adds gradients, one a parameter in order; `None` stands for zero.
    pub(super) fn accumulate<'g>(&mut self, gradients: impl IntoIterator<Item = &'g Option<Tensor>>) -> Result<()> {
        let Some(training) = &mut self.training else { return Ok(()) };
        for (view, gradient) in training.gradient.views(&self.layout, &self.placement)?.iter().zip(gradients) {
            if let Some(gradient) = gradient {
                let _ = view.shallow_clone().f_add_(gradient)?;
            }
        }
        Ok(())
    }

    /// Adds `rows` `[n, h]` to the rows at `indices` `[n]` of the gradient of the parameter in place `slot`.
    pub(super) fn accumulate_rows(&mut self, slot: usize, indices: &Tensor, rows: &Tensor) -> Result<()> {
        let Some(training) = &mut self.training else { return Ok(()) };
        let views = training.gradient.views(&self.layout, &self.placement)?;
        let view = views.get(slot).ok_or_else(|| Error::bug(format!("the chunk has no parameter {slot}")))?;
        let _ = view.shallow_clone().f_index_add_(0, indices, &rows.f_to_kind(view.kind())?)?;
        Ok(())
    }

    /// The parameters' order.
    pub(super) fn specs(&self) -> impl Iterator<Item = &ParamSpec> {
        self.layout.slots.iter().map(|(spec, _)| spec)
    }

    /// Starts reducing what a micro-batch (the `last` of its step or not) brought, where that is due.
    pub(super) fn start_reduction(&mut self, last: bool) -> Result<()> {
        let Self { layout, placement, group, training, .. } = self;
        training.as_mut().map_or(Ok(()), |t| t.gradient.start_reduction(layout, placement, group, last))
    }

    /// Waits for the reduction in flight, if there is one.
    pub(super) fn finish_reduction(&mut self) -> Result<()> {
        let Self { placement, group, training, .. } = self;
        training.as_mut().map_or(Ok(()), |t| t.gradient.finish_reduction(placement, group))
    }

    /// The squared L2 norm of the gradient's part that this rank updates, as a tensor `[]` on the CPU.
    pub(super) fn squared_norm(&self) -> Result<Option<Tensor>> {
        let Some(training) = &self.training else { return Ok(None) };
        let own = training.gradient.own()?;
        Ok(Some(own.f_dot(&own)?))
    }

    /// One AdamW step of this rank's part with the gradient times `scale`; `step` counts from 1. The working copy follows
    /// with [`Chunk::publish`].
    pub(super) fn optimize(&mut self, adamw: &AdamW, weight_decay: f64, scale: f64, step: i64) -> Result<()> {
        let Some(Training { own, master, state, gradient, lent }) = &mut self.training else { return Ok(()) };
        lent.take().iter().filter_map(Weak::upgrade).try_for_each(|lent| lent.keep())?;
        let mut values = gradient.own()?;
        if scale != 1.0 {
            let _ = values.f_mul_scalar_(scale)?;
        }
        let boundary = self.layout.decayed.clamp(own.start, own.end) - own.start;
        for (start, end, decay) in [(0, boundary, weight_decay), (boundary, own.end - own.start, 0.0)] {
            if start < end {
                let part = |t: &Tensor| t.f_narrow(0, start, end - start);
                let adamw = AdamW { weight_decay: decay, ..*adamw };
                adamw.step(&part(master)?, &part(&values)?, &part(&state.first)?, &part(&state.second)?, step)?;
            }
        }
        gradient.clear()
    }

    /// Forgets the gradient.
    pub(super) fn skip(&mut self) -> Result<()> {
        self.training.as_mut().map_or(Ok(()), |t| t.gradient.clear())
    }

    /// Brings the updated values into the working copy at rest, and starts exchanging them where every rank rests the whole.
    pub(super) fn publish(&mut self) -> Result<Option<Gather>> {
        let Some(training) = &self.training else { return Ok(None) };
        let own = &training.own;
        let start = if self.placement.shards_parameters() { 0 } else { own.start };
        let mut resting = self.home.f_narrow(0, start, own.end - own.start)?;
        if !self.placement.master_is_home() {
            resting.f_copy_(&training.master)?;
        }
        let exchange = self.placement.shards_state() && !self.placement.shards_parameters();
        exchange.then(|| self.group.start_gather(&self.home, &resting)).transpose()
    }

    /// The parameters' fp32 values in host memory, one tensor a parameter, on rank 0 alone; every rank must call it. They may be
    /// the very ones that are trained.
    pub(super) fn values(&self) -> Result<Option<Vec<Tensor>>> {
        let (held, sharded) = match &self.training {
            Some(training) => (&training.master, self.placement.shards_state()),
            None => (&self.home, self.placement.shards_parameters()),
        };
        let whole = if sharded {
            self.group.gather_on_first(held)?
        } else {
            self.group.is_first().then(|| group::on_host(held)).transpose()?
        };
        whole.map(|whole| self.layout.views(&whole)).transpose()
    }

    /// The gradient accumulated since the last step, one tensor a parameter, where the chunk is trained.
    ///
    /// # Errors
    /// Where libtorch fails.
    pub fn gradients(&mut self) -> Result<&[Tensor]> {
        let Self { layout, placement, training, .. } = self;
        training.as_mut().map_or(Ok(&[]), |t| t.gradient.views(layout, placement))
    }

    /// Elements of each of [`Chunk::SAVED`] on this rank: those that [`part`] gives it, whatever the strategy.
    pub fn saved_numel(&self) -> i64 {
        let range = self.saved_range();
        range.end - range.start
    }

    fn saved_range(&self) -> Range<i64> {
        part(self.layout.numel, self.group.rank(), self.group.world_size())
    }

    /// Lends what a checkpoint keeps of a trained chunk on this rank, as fp32 values in the order of [`Chunk::SAVED`].
    ///
    /// # Errors
    /// Where libtorch fails.
    pub fn lend(&self) -> Result<Vec<Arc<Lent>>> {
        let Some(training) = &self.training else { return Ok(vec![]) };
        let start = (self.saved_range().start - training.own.start).max(0);
        let lend = |t: &Tensor| Lent::new(&t.f_narrow(0, start, self.saved_numel())?);
        let lent = training.parts().into_iter().map(lend).collect::<Result<Vec<_>>>()?;
        training.lent.borrow_mut().extend(lent.iter().map(Arc::downgrade));
        Ok(lent)
    }

    /// Takes from the piece of a checkpoint that begins at element `start` what this rank keeps.
    ///
    /// # Errors
    /// Where there is no such part, or libtorch fails.
    pub fn restore(&mut self, name: &str, start: i64, piece: &Tensor) -> Result<()> {
        let Some(training) = &self.training else { return Ok(()) };
        let overlap = start.max(training.own.start)..(start + piece.size()[0]).min(training.own.end);
        if overlap.is_empty() {
            return Ok(());
        }
        let parts = Self::SAVED.into_iter().zip(training.parts()).find(|(part, _)| *part == name);
        let (_, target) = parts.ok_or_else(|| Error::bug(format!("a chunk has no part '{name}'")))?;
        let len = overlap.end - overlap.start;
        target.f_narrow(0, overlap.start - training.own.start, len)?.f_copy_(&piece.f_narrow(
            0,
            overlap.start - start,
            len,
        )?)?;
        Ok(())
    }
}

impl Training {
    /// In the order of [`Chunk::SAVED`].
    fn parts(&self) -> [&Tensor; 3] {
        [&self.master, &self.state.first, &self.state.second]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::HEAD_SLICE_BYTES;
    use crate::model::Param;
    use rlhf_api::stage::{Offload, Sharding, Strategy};
    use serde_json::Value;
    use tch::{Device, Kind};

    fn numbers(json: &Value) -> Vec<f64> {
        json.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
    }

    /// torch's AdamW with gradient clipping, five steps: tests/golden/adamw.json. The reference is in fp64, so 1e-6 is fp32's rounding.
    #[test]
    fn five_clipped_steps_with_decay_equal_those_of_torch() {
        let golden: Value = serde_json::from_str(include_str!("../../../tests/golden/adamw.json")).unwrap();
        for sharding in [Sharding::Ddp, Sharding::Zero1, Sharding::Zero2, Sharding::Zero3] {
            for offload in [Offload::None, Offload::Optimizer, Offload::Parameters] {
                five_steps(&golden, Strategy { sharding, offload, ..Strategy::default() });
            }
        }
    }

    fn five_steps(golden: &Value, strategy: Strategy) {
        let number = |field: &str| golden[field].as_f64().unwrap();
        let tensor = |json: &Value, shape: &[i64]| Tensor::from_slice(&numbers(json)).to_kind(Kind::Float).view(shape);
        let layout = ChunkLayout::new(vec![
            ParamSpec { param: Param::QueryWeight, shape: vec![2, 3] },
            ParamSpec { param: Param::QueryBias, shape: vec![3] },
        ]);
        let of = |json: &Value| [tensor(&json["weight"], &[2, 3]), tensor(&json["bias"], &[3])];
        let placement =
            Placement { device: Device::Cpu, trainable: true, strategy, head_slice_bytes: HEAD_SLICE_BYTES };
        let group = Rc::new(Group::alone());
        let mut chunk = Chunk::new(layout, &of(&golden["start"]), false, placement, &group).unwrap();
        let adamw = AdamW {
            lr: number("learning_rate"),
            beta1: number("beta1"),
            beta2: number("beta2"),
            epsilon: number("epsilon"),
            weight_decay: 0.0,
        };
        for (step, expected) in (1..).zip(golden["steps"].as_array().unwrap()) {
            chunk.accumulate(&of(&expected["gradient"]).map(Some)).unwrap();
            chunk.start_reduction(true).unwrap();
            chunk.finish_reduction().unwrap();
            let norm = chunk.squared_norm().unwrap().unwrap().sqrt().double_value(&[]);
            let scale = (number("max_grad_norm") / (norm + 1e-6)).min(1.0);
            let lent = chunk.lend().unwrap();
            let before = chunk.training.as_ref().unwrap().parts().map(Tensor::copy);
            chunk.optimize(&adamw, number("weight_decay"), scale, step).unwrap();
            assert!(chunk.publish().unwrap().is_none_or(|g| g.finish().is_ok()));
            for (lent, before) in lent.iter().zip(before) {
                let mut bytes = vec![0; 4 * lent.numel()];
                assert_eq!(lent.read(&mut bytes).unwrap(), bytes.len());
                let read = Tensor::from_data_size(&bytes, &[lent.numel() as i64], Kind::Float);
                assert_eq!(read, before.narrow(0, 0, lent.numel() as i64), "{strategy:?}: what was lent is as it was");
            }
            let held = chunk.fetch().unwrap().ready().unwrap();
            for (name, actual) in ["weight", "bias"].iter().zip(held.params().tensors()) {
                let expected = Tensor::from_slice(&numbers(&expected[*name]));
                let gap = (actual.flatten(0, -1).to_kind(Kind::Double) - expected).abs().max().double_value(&[]);
                assert!(gap < 1e-6, "{strategy:?}, step {step}, {name}: off by {gap}");
            }
        }
    }
}

//! The gradient of one chunk, from the first micro-batch of a step to the optimizer.
//!
//! It is summed in fp32. Under `ddp` and `zero1` every rank keeps it whole on its device and it is reduced once, after the
//! step's last micro-batch. Under `zero2` and `zero3` (Rajbhandari 2020), and where the optimizer is on the host, each
//! micro-batch's gradient arrives in a buffer, is reduced while the next segment's backward runs, and only what this rank
//! keeps is added to the sum.

use super::group::{Group, Scatter};
use super::layout::{ChunkLayout, part_size};
use super::placement::Placement;
use crate::error::{Error, Result};
use c10d::{Mark, Work};
use std::ops::Range;
use tch::{Kind, Tensor};

/// A chunk's gradient.
pub(super) struct Gradient {
    /// fp32: the whole chunk `[padded]` where gradients are kept, else what this rank keeps of it.
    sum: Tensor,
    /// Nothing was added since it was cleared; its values are then those of the step before, except where it is whole.
    empty: bool,
    /// Where autograd's gradients are added: views of `sum`, or of a buffer that lasts until its reduction.
    arriving: Option<Arriving>,
    /// A reduction in flight, and what the device had been told to do before it.
    reducing: Option<(Reducing, Mark)>,
    /// The elements of the chunk that this rank's optimizer updates.
    own: Range<i64>,
    /// Elements of the chunk, padding included.
    padded: i64,
    /// The buffer's number format.
    kind: Kind,
}

struct Arriving {
    flat: Tensor,
    views: Vec<Tensor>,
}

enum Reducing {
    Whole(Option<Work>, Tensor),
    Part(Scatter),
}

impl Reducing {
    /// Waits, and returns what came of it.
    fn finish(self) -> Result<Tensor> {
        match self {
            Reducing::Whole(work, flat) => {
                work.map(Work::wait).transpose()?;
                Ok(flat)
            }
            Reducing::Part(scatter) => scatter.finish(),
        }
    }
}

impl Gradient {
    /// An empty gradient. `own` are the elements that this rank's optimizer updates. `many` says that a micro-batch adds to
    /// it many times, so that 16 bits would lose too much.
    pub(super) fn new(
        layout: &ChunkLayout,
        own: Range<i64>,
        many: bool,
        placement: &Placement,
        world: u32,
    ) -> Result<Self> {
        let padded = part_size(layout.numel, world) * i64::from(world);
        let keeps = placement.keeps_gradients();
        let sum = placement.state_zeros(if keeps { padded } else { own.end - own.start })?;
        let arriving =
            if keeps { Some(Arriving { views: layout.views(&sum)?, flat: sum.shallow_clone() }) } else { None };
        let kind = if many { Kind::Float } else { placement.kind() };
        Ok(Self { sum, empty: true, arriving, reducing: None, own, padded, kind })
    }

    /// What gradients are added to now, one tensor a parameter.
    pub(super) fn views(&mut self, layout: &ChunkLayout, placement: &Placement) -> Result<&[Tensor]> {
        if self.arriving.is_none() {
            let flat = Tensor::f_zeros([self.padded], (self.kind, placement.device))?;
            self.arriving = Some(Arriving { views: layout.views(&flat)?, flat });
        }
        Ok(self.arriving.as_ref().map_or(&[], |a| &a.views))
    }

    /// Starts the reduction over the ranks of what a micro-batch brought, where one is due: after each, or after the `last`
    /// of the step. Every rank calls it in the same order.
    pub(super) fn start_reduction(
        &mut self,
        layout: &ChunkLayout,
        placement: &Placement,
        group: &Group,
        last: bool,
    ) -> Result<()> {
        let flat = if placement.keeps_gradients() {
            if !last {
                return Ok(());
            }
            self.sum.shallow_clone()
        } else {
            self.views(layout, placement)?;
            let Some(arrived) = self.arriving.take() else { return Ok(()) };
            // What travels has the working copy's format.
            if group.world_size() > 1 { arrived.flat.f_to_kind(placement.kind())? } else { arrived.flat }
        };
        let reducing = if placement.shards_state() {
            Reducing::Part(group.start_scatter(&flat)?)
        } else {
            Reducing::Whole(group.start_sum(&flat)?, flat)
        };
        self.reducing = Some((reducing, group.side().mark()?));
        Ok(())
    }

    /// Waits for the reduction, if one is in flight, and adds what came to the sum.
    pub(super) fn finish_reduction(&mut self, placement: &Placement, group: &Group) -> Result<()> {
        let Some((reducing, started)) = self.reducing.take() else { return Ok(()) };
        if placement.keeps_gradients() {
            let reduced = reducing.finish()?;
            let mut own = self.own()?;
            // Without peers, or without parts, what was reduced is the sum itself.
            if reduced.data_ptr() != own.data_ptr() && placement.shards_state() {
                own.f_copy_(&reduced)?;
            }
            return Ok(());
        }
        let reduced = if placement.state_on_host() {
            // The host waits for this copy alone, and not for the backward of the segments that the device was given since.
            let target = self.sum.device();
            group.side().after(&started, || Ok::<_, Error>(reducing.finish()?.f_to_device(target)?))?.0
        } else {
            reducing.finish()?
        };
        if std::mem::take(&mut self.empty) {
            self.sum.f_copy_(&reduced)?;
        } else {
            let _ = self.sum.f_add_(&reduced)?;
        }
        Ok(())
    }

    /// The reduced gradient of the elements that this rank updates, fp32.
    pub(super) fn own(&self) -> Result<Tensor> {
        let len = self.own.end - self.own.start;
        let start = if self.sum.size()[0] == len { 0 } else { self.own.start };
        Ok(self.sum.f_narrow(0, start, len)?)
    }

    /// Forgets the gradient.
    pub(super) fn clear(&mut self) -> Result<()> {
        self.empty = true;
        if self.arriving.is_some() {
            let _ = self.sum.f_zero_()?;
        }
        Ok(())
    }
}

//! Where each parameter of a segment lies in its flat chunk.

use crate::error::{Error, Result};
use crate::model::ParamSpec;
use memory_plan::ALIGN;
use sha2::{Digest, Sha256};
use tch::{Device, Kind, Tensor};

/// The fixed order, shapes and offsets of a chunk's parameters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChunkLayout {
    /// Each parameter and the element at which it starts.
    pub slots: Vec<(ParamSpec, i64)>,
    /// Elements before this one belong to matrices, which weight decay applies to.
    pub decayed: i64,
    /// Elements of the whole chunk, padding included.
    pub numel: i64,
}

impl ChunkLayout {
    /// Lays out parameters in their order, matrices first as [`crate::model::ModelSpec::params`] gives them.
    pub fn new(params: Vec<ParamSpec>) -> Self {
        let (mut numel, mut decayed) = (0, 0);
        let mut slots = Vec::with_capacity(params.len());
        for spec in params {
            let matrix = spec.shape.len() >= 2;
            let end = numel + spec.shape.iter().product::<i64>();
            slots.push((spec, numel));
            numel = (end + ALIGN - 1) / ALIGN * ALIGN;
            decayed = if matrix { numel } else { decayed };
        }
        Self { slots, decayed, numel }
    }

    /// Adds what decides where each number lies to a hash: parameters' names, shapes and offsets.
    pub fn digest(&self, hasher: &mut Sha256) {
        for (ParamSpec { param, shape }, offset) in &self.slots {
            hasher.update(format!("{param:?} {shape:?} at {offset}\n"));
        }
        hasher.update(format!("{} of {}\n", self.decayed, self.numel));
    }

    /// The values, in the layout's order, as one flat fp32 tensor on the CPU, padded to `[padded]`.
    ///
    /// # Errors
    /// Where a value has another shape than the layout's.
    pub fn join(&self, values: &[Tensor], padded: i64) -> Result<Tensor> {
        let flat = Tensor::f_zeros([padded], (Kind::Float, Device::Cpu))?;
        let views = self.views(&flat)?;
        if !views.iter().map(Tensor::size).eq(values.iter().map(Tensor::size)) {
            return Err(Error::bug("a chunk was given values of other shapes than its layout's"));
        }
        for (mut view, value) in views.into_iter().zip(values) {
            view.f_copy_(value)?;
        }
        Ok(flat)
    }

    /// Views of `flat` `[numel]`, one a parameter.
    ///
    /// # Errors
    /// Where `flat` is too short.
    pub fn views(&self, flat: &Tensor) -> Result<Vec<Tensor>> {
        let view = |(spec, offset): &(ParamSpec, i64)| {
            Ok(flat.f_narrow(0, *offset, spec.shape.iter().product())?.f_view(spec.shape.as_slice())?)
        };
        self.slots.iter().map(view).collect()
    }
}

/// Elements that each of `world_size` ranks keeps of a chunk of `numel`: equal parts, the last of them padded.
pub fn part_size(numel: i64, world_size: u32) -> i64 {
    numel.div_euclid(i64::from(world_size)) + i64::from(numel % i64::from(world_size) != 0)
}

/// The elements of a chunk of `numel` that `rank` of `world_size` ranks keeps, without the padding of the last part.
pub fn part(numel: i64, rank: u32, world_size: u32) -> std::ops::Range<i64> {
    let size = part_size(numel, world_size);
    let start = (i64::from(rank) * size).min(numel);
    start..(start + size).min(numel)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Param;
    use proptest::prelude::*;

    #[test]
    fn matrices_come_first_and_every_tensor_is_aligned() {
        let spec = |param, shape: &[i64]| ParamSpec { param, shape: shape.to_vec() };
        let layout = ChunkLayout::new(vec![
            spec(Param::QueryWeight, &[3, 5]),
            spec(Param::OutputWeight, &[2, 2]),
            spec(Param::QueryBias, &[3]),
        ]);
        let offsets: Vec<i64> = layout.slots.iter().map(|(_, o)| *o).collect();
        assert_eq!((offsets, layout.decayed, layout.numel), (vec![0, 16, 32], 32, 48));
    }

    #[test]
    fn two_orders_of_as_many_numbers_have_two_digests() {
        let spec = |param| ParamSpec { param, shape: vec![4, 4] };
        let layout = |params: [Param; 2]| ChunkLayout::new(params.map(spec).to_vec());
        let digest = |layout: &ChunkLayout| {
            let mut hasher = Sha256::new();
            layout.digest(&mut hasher);
            hasher.finalize()
        };
        let (one, other) =
            (layout([Param::QueryWeight, Param::OutputWeight]), layout([Param::OutputWeight, Param::QueryWeight]));
        assert!(one.numel == other.numel && digest(&one) == digest(&one.clone()) && digest(&one) != digest(&other));
    }

    proptest! {
        #[test]
        fn parts_cover_a_chunk_once_and_none_is_larger_than_its_room(numel in 0i64..10_000, world in 1u32..40) {
            let mut next = 0;
            for rank in 0..world {
                let part = part(numel, rank, world);
                prop_assert_eq!(part.start, next);
                prop_assert!(part.end - part.start <= part_size(numel, world));
                next = part.end;
            }
            prop_assert_eq!(next, numel);
        }
    }
}

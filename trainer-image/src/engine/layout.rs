//! Where each parameter of a segment lies in its flat chunk.

use crate::error::Result;
use crate::model::ParamSpec;
use tch::Tensor;

/// Each tensor starts at a multiple of this many elements (64 bytes in fp32, a cache line and a vector register).
const ALIGN: i64 = 16;

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

/// The contiguous part of `numel` elements that `rank` of `world_size` ranks keeps: the first ranks get one more.
pub fn shard(numel: i64, rank: u32, world_size: u32) -> std::ops::Range<i64> {
    let (rank, world) = (i64::from(rank), i64::from(world_size));
    let (each, extra) = (numel / world, numel % world);
    let start = rank * each + rank.min(extra);
    start..start + each + i64::from(rank < extra)
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

    proptest! {
        #[test]
        fn shards_cover_a_chunk_once(numel in 0i64..10_000, world in 1u32..40) {
            let mut next = 0;
            for rank in 0..world {
                let part = shard(numel, rank, world);
                prop_assert_eq!(part.start, next);
                next = part.end;
            }
            prop_assert_eq!(next, numel);
        }
    }
}

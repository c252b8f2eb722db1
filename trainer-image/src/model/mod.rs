//! One transformer with switches, and a small file per family that maps Hugging Face configs and tensor names onto it.
//!
//! A model is a chain of segments (embedding, blocks, head). This module knows the mathematics of each segment
//! and the parameters it needs; where those parameters live and how the segments are chained is the engine's.
//! Shapes: `b` batch, `t` time, `h` hidden, `n` heads, `d` head dimension, `v` vocabulary.

mod adapters;
mod attention;
mod batch;
mod dropout;
mod export;
pub mod families;
mod hf;
mod peft;
mod rope;
mod tensors;
mod torch;
pub mod transformer;
mod weights;

pub use adapters::{Adapters, merge_adapters};
pub use batch::Batch;
pub use dropout::Dropout;
pub use export::{Format, ModelWriter, Scores, number_format};
pub use hf::{ScoreNormalisation, Source, read_config};
pub use peft::{base_of, read_adapters, write_adapters};
pub use rlhf_api::model::{HeadKind, Mlp, ModelSpec, Norm, Param, ParamSpec, Positions, RopeScaling, Segment, Traits};
pub use weights::SHARD_BYTES;

#[cfg(test)]
pub(crate) mod fixture;
#[cfg(test)]
mod tests;

//! The engine trains a model segment by segment.
//!
//! A model is a chain of segments; each segment's parameters are one flat [`chunk::Chunk`]. Forward keeps each
//! block's input (and, without recomputation, its graph); backward goes from the head to the embedding, asks
//! autograd for the gradients of one segment at a time, and starts that chunk's reduction over the ranks while
//! the next segment's backward runs. The head runs over slices of tokens, so logits `[b, t, v]` are never whole
//! in memory. Stages see none of this: they hand over a batch, the positions of interest and a loss.

mod chunk;
mod group;
mod layout;
mod model;

pub use chunk::{Chunk, OptimizerState};
pub use group::Group;
pub use layout::{ChunkLayout, shard};
pub use model::{HEAD_SLICE_BYTES, Model, Placement, ScalarInit};

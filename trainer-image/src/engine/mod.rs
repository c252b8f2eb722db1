//! The engine trains a model that may not fit: segment by segment, spread over ranks and between device and host.
//!
//! A model is a chain of segments; each segment's parameters are one flat [`Chunk`]. A chunk rests where the strategy says
//! and is fetched to the device for the time in which its segment runs, the next one while the one before runs. Strategies
//! (`ddp` and the three stages of ZeRO, Rajbhandari 2020; offloading, Ren 2021) are settings of this one mechanism. The head
//! runs over slices of tokens, so logits `[b, t, v]` are never whole in memory. Models that train adapters (LoRA, Hu 2021)
//! share their frozen chunks. Stages see none of this: they hand over a batch, the positions of interest and a loss.

mod chunk;
mod gradient;
mod group;
mod layout;
mod lent;
mod link;
mod lora;
mod loss_scale;
mod model;
mod placement;
mod step;
mod train;

pub use chunk::Chunk;
pub use group::Group;
pub use layout::{ChunkLayout, part};
pub use lent::Lent;
pub use lora::{Backbone, SegmentValues};
pub use loss_scale::LossScale;
pub use memory_plan::HEAD_SLICE_BYTES;
pub use model::{Model, ScalarInit};
pub use placement::Placement;
pub use step::{Skips, Step, step_together};

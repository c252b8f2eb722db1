//! How many bytes each strategy needs on device and host, for a model's shape and a stage, and which strategy is the fastest
//! that fits.
//!
//! Pure arithmetic over the shapes that the engine trains, with neither libtorch nor Kubernetes, so that the operator plans with
//! the same numbers as the trainer.

mod choose;
mod estimate;
mod placed;
mod presets;
mod quantity;
mod segment;
#[cfg(test)]
mod tests;

pub use choose::{
    DEVICE_MARGIN, DoesNotFit, Fixed, HOST_MARGIN, Named, PROCESS_BYTES, Verdict, choose, fastest, next_more_frugal,
    strategies, verdicts,
};
pub use estimate::{
    DeviceBytes, HEAD_SLICE_BYTES, HostBytes, Machines, Plan, ROLLOUT_ROWS, Scorer, Stage, Task, dataset_bytes,
    estimate,
};
pub use presets::{keys, preset};
pub use quantity::{parse_bytes, parse_quantity};
pub use segment::ALIGN;

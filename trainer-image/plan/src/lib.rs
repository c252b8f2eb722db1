//! How many bytes each strategy needs on device and host, for a model's shape and a stage, and which strategy is the fastest
//! that fits.
//!
//! Pure arithmetic over the shapes that the engine trains, with neither libtorch nor Kubernetes, so that the operator plans with
//! the same numbers as the trainer.

mod presets;
pub mod spec;

pub use presets::{keys, preset};

//! The API of the RLHF operator.
//!
//! Three audiences meet here and nowhere else:
//! - users, through [`job::RLHFJob`] (`rlhf.dev/v1alpha1`), validated by CEL rules in the API server;
//! - the trainer, which reads a [`config::StageConfig`];
//! - the operator, which reads back a [`report::Progress`] and a [`report::TerminationMessage`].
//!
//! The crate does no I/O. The `crd` feature adds the custom resource; the trainer is built without it
//! and so links neither kube nor k8s-openapi.

pub mod choice;
pub mod config;
pub mod decimal;
#[cfg(feature = "crd")]
pub mod job;
pub mod model;
#[cfg(feature = "crd")]
pub mod names;
pub mod reference;
pub mod report;
pub mod source;
pub mod stage;
mod unknown;

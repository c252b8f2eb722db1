//! The operator: reconciles RLHFJobs into Jobs, ConfigMaps and Services.
//!
//! A pass over a job is [`observe`] (all reads), [`decide`] (pure: all rules) and [`apply`] (all writes).
//! [`controller`] drives it; [`build`], [`classify`] and [`view`] are what the rules are made of. Of several operators
//! the holder of the [`lease`] works.

pub mod apply;
pub mod build;
pub mod children;
pub mod classify;
pub mod clock;
pub mod context;
pub mod controller;
pub mod decide;
pub mod deciding;
pub mod http;
pub mod images;
pub mod keys;
pub mod known;
pub mod lease;
pub mod listed;
pub mod metrics;
pub mod observe;
pub mod pass;
pub mod progress;
pub mod questions;
pub mod requirements;
pub mod retries;
pub mod scope;
pub mod turns;
pub mod view;
mod watches;

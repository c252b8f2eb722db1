//! The harness of the tests on a real cluster.
//!
//! [`on_the_cluster`] gives a test a [`Scene`]: a namespace with the test's name under the `restricted` Pod Security
//! Standard, a volume with a small model and text, and the operator, installed by Helm once for all tests, which run
//! side by side. [`on_the_cluster_with`] gives it an operator of its own, [`on_the_cluster_alone`] the whole cluster. The
//! cluster is the one that `tests/cluster/up.sh` starts on this machine, and no other: the tests reach into its
//! node's processes and files. They wait for conditions, each with a deadline that only ends what hangs, and one
//! that fails prints what its jobs, pods, events and logs last said.

// A harness speaks to tests, and a test ends by panic.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

pub mod audit;
pub mod kueue;
pub mod manifest;
mod operator;
mod part;
mod report;
mod scene;
mod suite;
pub mod tools;
mod turns;
mod volume;

pub use operator::{Operator, Uninstalled, labelled, service_account};
pub use part::Part;
pub use scene::{
    History, Scene, Told, attempt, condition, eventually, kill_operator, kill_worker, lose_container, operator_memory,
    stage, starve_worker, uid,
};
pub use suite::{change_definition, on_the_cluster, on_the_cluster_alone, on_the_cluster_at_last, on_the_cluster_with};
pub use volume::{SavedModel, Step, Volume};

/// The namespace of the operator that tests share.
pub const SYSTEM: &str = "rlhf-system";
/// The Helm release of the operator, which is also the name of what it makes.
pub const RELEASE: &str = "rlhf-operator";

//! The harness of the tests on a real cluster.
//!
//! [`on_the_cluster`] gives a test a [`Scene`]: a namespace with the test's name under the `restricted` Pod Security
//! Standard, a volume with a small model and text, and the operator, installed by Helm once for all tests. The
//! cluster is the one that `tests/cluster/up.sh` starts on this machine, and no other: the tests reach into its
//! node's processes and files. They wait for conditions, each with a deadline, and one that fails prints what its
//! jobs, pods, events and logs last said.

// A harness speaks to tests, and a test ends by panic.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

pub mod audit;
pub mod kueue;
pub mod manifest;
mod part;
mod report;
mod scene;
mod suite;
pub mod tools;
mod volume;

pub use part::Part;
pub use scene::{History, Scene, Told, eventually, kill_operator, kill_worker, operator_memory, stage, starve_worker};
pub use suite::{
    Uninstalled, change_definition, install, install_with, labelled, leader, on_the_cluster, on_the_cluster_alone,
    operator_passes, operator_pods, uninstall,
};
pub use volume::{SavedModel, Step, Volume};

/// The namespace of the operator.
pub const SYSTEM: &str = "rlhf-system";
/// The Helm release of the operator, which is also the name of what it makes.
pub const RELEASE: &str = "rlhf-operator";

//! What the operator's chart has to allow before a job may ask for it, since its author might not get it otherwise.

use super::{Settings, SpecError, Task};
use rlhf_api::job::RLHFJob;

/// What a job's pod template may have, by the operator's flags.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Allowances {
    /// A service account, by which a cloud gives pods rights.
    pub service_accounts: bool,
    /// Further volumes, such as a Secret of the namespace.
    pub volumes: bool,
    /// The capability IPC_LOCK.
    pub ipc_lock: bool,
}

/// Whether all that a task's pods ask for is allowed.
pub(super) fn allowed(job: &RLHFJob, task: Task<'_>, settings: &Settings) -> Result<(), SpecError> {
    let (template, allow) = (task.compute(job).pod_template, settings.allow);
    let asked = [
        (
            "serviceAccountName",
            template.service_account_name.is_some(),
            allow.service_accounts,
            "trainer.allow.serviceAccountName",
        ),
        ("volumes", !template.volumes.is_empty(), allow.volumes, "trainer.allow.volumes"),
        ("volumeMounts", !template.volume_mounts.is_empty(), allow.volumes, "trainer.allow.volumes"),
        ("ipcLock", template.ipc_lock, allow.ipc_lock, "trainer.allow.ipcLock"),
    ];
    let refused = asked.into_iter().find(|(_, asked, allowed, _)| *asked && !allowed);
    refused.map_or(Ok(()), |(field, _, _, switch)| {
        let field = format!("podTemplate.{field} of {}", task.name());
        Err(SpecError::NotAllowed { field, switch })
    })
}

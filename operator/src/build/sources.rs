//! What of a job lies outside of its volume, and the Secrets that open those places.
//!
//! Prepare brings it onto the volume, so only prepare's pod gets the Secrets, as files that its kubelet mounts: the operator never
//! reads them, and neither a config nor an environment nor another pod has them. Of a Secret it gets entries that are made to be
//! used so, whatever else is in it. One that is missing is prepare's to tell.

use k8s_openapi::api::core::v1::{KeyToPath, SecretVolumeSource, Volume, VolumeMount};
use rlhf_api::config::SECRETS_DIR;
use rlhf_api::job::{RLHFJob, Stage};
use rlhf_api::source::{self, Remote, SECRET_ENTRIES, SecretRef};
use std::collections::BTreeSet;

/// Each place once, the job's model first.
pub(super) fn of(job: &RLHFJob) -> Vec<Remote> {
    let run_dir = job.run_dir();
    let mut all: Vec<Remote> = Vec::new();
    let mut add = |field: String, uri: &str, is_model: bool, secret: &Option<SecretRef>| {
        let path = source::folder(&run_dir, uri);
        let secret = secret.as_ref().map(|secret| secret.name.clone());
        if let Some(known) = all.iter_mut().find(|known| known.path == path) {
            known.secret = known.secret.take().or(secret);
        } else if source::is_remote(uri) {
            all.push(Remote { field, uri: uri.to_owned(), is_model, path, secret });
        }
    };
    if let Some(uri) = &job.spec.model.source {
        add("spec.model.source".into(), uri, true, &job.spec.model.secret_ref);
    }
    for (stage, kind) in job.spec.stages.iter().filter_map(|stage: &Stage| Some((stage, stage.kind()?))) {
        let below = |field: &str| format!("spec.stages[{}].{field}", stage.name);
        for named in kind.models() {
            if let Some(uri) = &named.model.source {
                add(below(&format!("{}.source", named.field)), uri, true, &named.model.secret_ref);
            }
        }
        let (field, dataset) = kind.dataset();
        for (part, uri) in dataset.files() {
            add(below(&format!("{}.{field}.{part}", kind.name())), uri, false, &dataset.secret_ref);
        }
    }
    all
}

/// The volumes of prepare's pod with the Secrets, and where they are mounted.
pub(super) fn secrets(job: &RLHFJob) -> Vec<(Volume, VolumeMount)> {
    let names: BTreeSet<String> = of(job).into_iter().filter_map(|remote| remote.secret).collect();
    let mount = |(i, name): (usize, String)| {
        let volume = format!("source-{i}");
        let item = |entry: &str| KeyToPath { key: entry.into(), path: entry.into(), ..Default::default() };
        let secret = SecretVolumeSource {
            secret_name: Some(name.clone()),
            items: Some(SECRET_ENTRIES.map(item).into()),
            optional: Some(true),
            ..Default::default()
        };
        let mount = VolumeMount {
            name: volume.clone(),
            mount_path: format!("{SECRETS_DIR}/{name}"),
            read_only: Some(true),
            ..Default::default()
        };
        (Volume { name: volume, secret: Some(secret), ..Default::default() }, mount)
    };
    names.into_iter().enumerate().map(mount).collect()
}

//! Which image a job's pods run: the one that the operator was set to when the job started, by the digest under which the
//! registry gave it to the first pod. Another version of the operator, or a tag that is moved, changes no job that runs.

use crate::context::Context;
use crate::view::CONTAINER;
use k8s_openapi::api::core::v1::Pod;
use kube::api::ListParams;
use kube::{Api, ResourceExt};
use rlhf_api::job::{Images, RLHFJob, RLHFJobStatus, StagePhase};
use rlhf_api::names;

/// Puts the trainer's image into a status that is about to be written: once prepare runs, by its digest. The API server is
/// asked for the pod then, and once more when prepare has succeeded.
///
/// # Errors
/// The pods of prepare cannot be listed.
pub async fn pin(job: &RLHFJob, status: &mut RLHFJobStatus, ctx: &Context) -> kube::Result<()> {
    let Some(slot) = status.prepare.as_ref().filter(|slot| slot.attempt > 0) else { return Ok(()) };
    let before = job.status.as_ref().and_then(|status| Some(status.prepare.as_ref()?.phase));
    let is_new = matches!(slot.phase, StagePhase::Running | StagePhase::Succeeded) && before != Some(slot.phase);
    let mut image = status.images.clone().unwrap_or(Images { trainer: ctx.settings.trainer_image.clone() });
    if is_new && !image.trainer.contains('@') {
        let ids = image_ids(job, slot.attempt, ctx).await?;
        image.trainer = ids.iter().find_map(|id| by_digest(&image.trainer, id)).unwrap_or(image.trainer);
    }
    status.images = Some(image);
    Ok(())
}

/// What kubelets tell of the image of prepare's pods.
async fn image_ids(job: &RLHFJob, attempt: u32, ctx: &Context) -> kube::Result<Vec<String>> {
    let uid = job.uid().unwrap_or_default();
    let name = names::attempt(&job.name_any(), &uid, names::PREPARE, attempt);
    let labels = [(names::LABEL_JOB_UID, &*uid), (names::LABEL_STAGE, names::PREPARE)];
    let selector = labels.map(|(key, value)| format!("{key}={value}")).join(",");
    let api: Api<Pod> = ctx.api(job);
    let pods = ctx.metrics.api("list", api.list(&ListParams::default().labels(&selector)).await)?;
    let own = |pod: &&Pod| pod.owner_references().iter().any(|o| o.kind == "Job" && o.name == name);
    let statuses = pods.items.iter().filter(own).filter_map(|pod| pod.status.as_ref()?.container_statuses.as_ref());
    Ok(statuses.flatten().filter(|c| c.name == CONTAINER).map(|c| c.image_id.clone()).collect())
}

/// The image by its digest, from the `imageID` that a kubelet tells of a container of it; `None` where that is no digest of
/// the registry's, as of an image that was loaded onto the node.
pub fn by_digest(image: &str, image_id: &str) -> Option<String> {
    let id = image_id.strip_prefix("docker-pullable://").unwrap_or(image_id);
    let (repository, digest) = id.split_once('@')?;
    let hex = digest.strip_prefix("sha256:")?;
    let is_digest = hex.len() == 64 && hex.bytes().all(|b| b.is_ascii_hexdigit());
    // A node that has the same image under several names tells any of them, and each registry has its own digests.
    (is_digest && whole(repository) == whole(repository_of(image)))
        .then(|| format!("{}@{digest}", repository_of(image)))
}

/// An image's name without tag and digest.
fn repository_of(image: &str) -> &str {
    let name = image.split_once('@').map_or(image, |(name, _)| name);
    match name.rsplit_once(':') {
        // A colon before a slash stands before a port.
        Some((name, tag)) if !tag.contains('/') => name,
        _ => name,
    }
}

/// With the registry, and the folder, that are meant where none are named.
fn whole(repository: &str) -> String {
    let is_registry = |first: &str| first.contains(['.', ':']) || first == "localhost";
    match repository.split_once('/') {
        Some((first, _)) if is_registry(first) => repository.to_owned(),
        Some(_) => format!("docker.io/{repository}"),
        None => format!("docker.io/library/{repository}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::apply::tests::{first, lines, server};
    use serde_json::json;

    #[tokio::test]
    async fn the_image_is_pinned_once_prepare_runs_and_asked_for_no_more() {
        let digest = format!("sha256:{}", "0a".repeat(32));
        let pod = |owner: &str, id: &str| {
            json!({"metadata": {"name": "p", "ownerReferences": [
                {"apiVersion": "batch/v1", "kind": "Job", "name": owner, "uid": "u", "controller": true}]},
                "status": {"containerStatuses": [{"name": CONTAINER, "ready": true, "restartCount": 0, "image": "i",
                    "imageID": format!("docker.io/rlhf/trainer@sha256:{id}")}]}})
        };
        let (mut job, decision) = first();
        let name = names::attempt("demo", "0123456789-abc", names::PREPARE, 1);
        let pods = [pod("somebody-elses", &"0b".repeat(32)), pod(&name, &"0a".repeat(32))];
        let (ctx, log) = server(vec![("GET pods", 200, json!({"metadata": {}, "items": pods}))]);
        let mut status = decision.status;
        let image = |status: &RLHFJobStatus| status.images.clone().unwrap().trainer;
        pin(&job, &mut status, &ctx).await.unwrap();
        assert_eq!((image(&status), lines(&log).len()), (ctx.settings.trainer_image.clone(), 0));
        job.status = Some(status.clone());
        status.prepare.as_mut().unwrap().phase = StagePhase::Running;
        pin(&job, &mut status, &ctx).await.unwrap();
        assert_eq!(image(&status), format!("docker.io/rlhf/trainer@{digest}"));
        job.status = Some(status.clone());
        status.prepare.as_mut().unwrap().phase = StagePhase::Succeeded;
        pin(&job, &mut status, &ctx).await.unwrap();
        assert_eq!(
            (image(&status), lines(&log)),
            (format!("docker.io/rlhf/trainer@{digest}"), vec!["GET pods".to_owned()])
        );
    }

    #[test]
    fn case_25_an_image_is_pinned_by_the_registrys_digest_and_by_no_other() {
        let digest = format!("sha256:{}", "0a".repeat(32));
        let id = |repository: &str| format!("{repository}@{digest}");
        for (image, image_id, wanted) in [
            ("docker.io/rlhf/trainer:1", id("docker.io/rlhf/trainer"), Some("docker.io/rlhf/trainer")),
            ("rlhf/trainer:1", id("docker.io/rlhf/trainer"), Some("rlhf/trainer")),
            ("trainer", id("docker.io/library/trainer"), Some("trainer")),
            ("localhost:5000/trainer", id("localhost:5000/trainer"), Some("localhost:5000/trainer")),
            ("r.example/t:1", id("docker-pullable://r.example/t"), Some("r.example/t")),
            ("r.example/t@sha256:00", id("r.example/t"), Some("r.example/t")),
            ("r.example/t:1", id("mirror.example/t"), None),
            ("r.example/t:1", digest.clone(), None),
            ("r.example/t:1", "r.example/t@sha256:short".into(), None),
            ("r.example/t:1", String::new(), None),
        ] {
            assert_eq!(by_digest(image, &image_id), wanted.map(id), "{image} {image_id}");
        }
    }
}

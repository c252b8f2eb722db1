//! Which image a job's pods run: the one that the operator was set to when the job started, by the digest under which the
//! registry gave it to the first pod. Another version of the operator, or a tag that is moved, changes no job that runs.

use crate::view::PodView;
use rlhf_api::job::Images;

/// Puts the digest into the image that a job was started with, where a pod that ran it tells one.
pub fn pin<'a>(images: &mut Images, mut pods: impl Iterator<Item = &'a PodView>) {
    if !images.trainer.contains('@')
        && let Some(pinned) = pods.find_map(|pod| by_digest(&images.trainer, pod.image_id.as_deref()?))
    {
        images.trainer = pinned;
    }
}

/// The image by its digest, from the `imageID` that a kubelet tells of a container of it; `None` where that is no digest of
/// the registry's, as of an image that was loaded onto the node.
fn by_digest(image: &str, image_id: &str) -> Option<String> {
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

//! What a failed test prints: the jobs' status, pods, events, and the last lines of the logs.

use crate::scene::Scene;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::events::v1::Event;
use kube::api::{ListParams, LogParams};
use kube::{Api, ResourceExt};
use rlhf_api::job::RLHFJob;

const LOG_LINES: i64 = 30;

/// Prints what is known of a scene.
pub async fn print(scene: &Scene) {
    eprintln!("---- namespace {} ----", scene.namespace);
    jobs(scene).await;
    pods(scene).await;
    events(scene).await;
    logs(&scene.operator.pods_api(), &ListParams::default()).await;
}

async fn jobs(scene: &Scene) {
    match scene.api::<RLHFJob>().list(&ListParams::default()).await {
        Ok(jobs) => {
            for job in jobs {
                let status = serde_yaml_ng::to_string(&job.status).unwrap_or_default();
                eprintln!("RLHFJob {}, status:\n{status}", job.name_any());
            }
        }
        Err(error) => eprintln!("no RLHFJobs: {error}"),
    }
}

async fn pods(scene: &Scene) {
    let api = scene.api::<Pod>();
    match api.list(&ListParams::default()).await {
        Ok(pods) => {
            for pod in &pods {
                let status = pod.status.clone().unwrap_or_default();
                let state = status.container_statuses.unwrap_or_default().pop().and_then(|c| c.state);
                let state = serde_json::to_string(&state).unwrap_or_default();
                eprintln!("pod {}: {}, {state}", pod.name_any(), status.phase.unwrap_or_default());
            }
        }
        Err(error) => eprintln!("no pods: {error}"),
    }
    logs(&api, &ListParams::default()).await;
}

async fn events(scene: &Scene) {
    match scene.api::<Event>().list(&ListParams::default()).await {
        Ok(mut events) => {
            events.items.sort_by_key(|e| e.metadata.creation_timestamp.clone());
            for event in events {
                let about = event.regarding.unwrap_or_default();
                let (kind, name) = (about.kind.unwrap_or_default(), about.name.unwrap_or_default());
                eprintln!(
                    "event {kind} {name}: {}: {}",
                    event.reason.unwrap_or_default(),
                    event.note.unwrap_or_default()
                );
            }
        }
        Err(error) => eprintln!("no events: {error}"),
    }
}

async fn logs(api: &Api<Pod>, which: &ListParams) {
    let last = LogParams { tail_lines: Some(LOG_LINES), ..Default::default() };
    for pod in api.list(which).await.into_iter().flatten() {
        let name = pod.name_any();
        match api.logs(&name, &last).await {
            Ok(text) => eprintln!("-- log of {name}:\n{text}"),
            Err(error) => eprintln!("-- no log of {name}: {error}"),
        }
    }
}

//! What a hostile namespace says: reports at the bounds of what is believed and beyond, words that nobody can read, and
//! statuses that no controller would write. Each is one of a few, by a turn that its caller counts.

use axum::http::StatusCode;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use rlhf_api::job::RLHFJob;
use rlhf_api::names;
use serde_json::{Value, json};
use std::time::Duration;
use tokio::time::sleep;

/// How the addresses begin at which absurd progress is told; kwok gives none of them.
pub const ADDRESSES: &str = "10.98.255.";
/// The most layers of a model that are believed.
const MOST_LAYERS: u64 = 1 << 12;
/// Longer than any document that is read.
const TOO_LONG: usize = 100 << 10;
/// Longer than a client waits for progress.
const NEVER: Duration = Duration::from_secs(60);

/// What is written over a pod's status, as a merge patch of it.
pub fn pod_status(pod: &Pod, turn: usize) -> Value {
    let phase = pod.status.as_ref().and_then(|s| s.phase.as_deref()).unwrap_or_default();
    let label = |name: &str| pod.labels().get(name).map(String::as_str).unwrap_or_default();
    // How a pod ends does not change with the turn, nor with it whether another attempt follows.
    let own = pod.name_any().bytes().map(usize::from).sum::<usize>();
    match (phase, label(names::LABEL_STAGE)) {
        ("Pending", _) => waiting(pod, turn),
        (_, names::PREPARE) if label(names::LABEL_ATTEMPT) == "1" => ended(pod, 0, &prepared(own, turn)),
        (_, names::PREPARE) => ended(pod, 0, &prepared(0, turn)),
        ("Running", _) if turn.is_multiple_of(2) => running(turn / 2),
        _ => {
            let code = [71, 137, 143, 255, 1][own % 5];
            ended(pod, code, &last_word(code, turn))
        }
    }
}

/// What is written over a Job's status, as a merge patch of it.
pub fn job_status(turn: usize) -> Value {
    match turn % 4 {
        0 => json!({"active": turn % 100, "ready": 0}),
        1 => json!({"terminating": turn % 100}),
        2 => json!({"conditions": [{"type": "Absurd", "status": "Unknown", "message": words(turn)}]}),
        _ => json!({"completedIndexes": "0-4294967295", "succeeded": i32::MAX}),
    }
}

/// A pod with the labels of a job's second attempt at its first stage, whose child it is not.
pub fn copy_of_child(job: &RLHFJob) -> Value {
    let uid = job.uid().unwrap_or_default();
    let stage = job.spec.stages.first().map(|stage| stage.name.as_str());
    json!({
        "metadata": {
            "name": format!("copy-{uid}"),
            "labels": {
                names::LABEL_JOB: job.name_any(), names::LABEL_JOB_UID: uid, names::LABEL_STAGE: stage,
                names::LABEL_ATTEMPT: "2", names::LABEL_MANAGED_BY: names::FIELD_MANAGER,
            },
            "annotations": {"batch.kubernetes.io/job-completion-index": "0"},
        },
        "spec": {"schedulerName": "nobody", "containers": [{"name": "trainer", "image": "example.com/copy:1"}]},
    })
}

/// What a trainer answers at the address of this number.
pub async fn progress(number: u64) -> Result<String, StatusCode> {
    let figures: serde_json::Map<_, _> = (0..300).map(|n| (format!("figure{n}"), json!(1e308))).collect();
    let told = |step: u64| {
        json!({
            "step": step, "totalSteps": u64::MAX, "activity": u64::MAX, "etaSeconds": u64::MAX, "doing": words(0),
            "metrics": figures, "checkpoint": {"step": u64::MAX, "path": "p".repeat(10_000)},
        })
        .to_string()
    };
    match number % 4 {
        0 => {
            sleep(NEVER).await;
            Err(StatusCode::SERVICE_UNAVAILABLE)
        }
        1 => Ok(told(u64::MAX)),
        2 => Ok("x".repeat(10 * TOO_LONG)),
        // Something new at every question.
        _ => Ok(told(u64::try_from(Timestamp::now().as_millisecond()).unwrap_or_default())),
    }
}

/// Words that nobody can read: control characters, directions of writing, templates.
fn words(turn: usize) -> String {
    format!("{turn} {}", "\u{7}\u{202e}%s{{.}}\u{fffd}\u{1f4a9}".repeat(100))
}

fn waiting(pod: &Pod, turn: usize) -> Value {
    let reason = format!("Absurd{}", turn % 7);
    let state = json!({"waiting": {"reason": reason, "message": words(turn)}});
    let unplaced = json!([{"type": "PodScheduled", "status": "False", "reason": reason, "message": words(turn)}]);
    match pod.spec.as_ref().and_then(|spec| spec.node_name.as_ref()) {
        None => json!({"conditions": unplaced}),
        // kwok, which waits until a pod has been left alone, would never have it run.
        Some(_) if turn % 5 == 4 => {
            json!({"phase": "Running", "containerStatuses": containers(pod, &json!({"running": {}}))})
        }
        Some(_) => json!({"containerStatuses": containers(pod, &state)}),
    }
}

fn running(turn: usize) -> Value {
    let condition = |kind: &str, status: &str| json!({"type": kind, "status": status, "message": words(turn)});
    match turn % 3 {
        0 => json!({"conditions": [condition("Ready", "False"), condition("Absurd", "Unknown")]}),
        1 => json!({"conditions": [condition("DisruptionTarget", "True")], "message": words(turn)}),
        _ => {
            let ip = format!("{ADDRESSES}{}", 1 + turn % 250);
            json!({"podIP": ip, "podIPs": [{"ip": ip}]})
        }
    }
}

fn ended(pod: &Pod, code: i32, word: &str) -> Value {
    let state = json!({"terminated": {"exitCode": code, "reason": "Absurd", "message": word}});
    let phase = if code == 0 { "Succeeded" } else { "Failed" };
    json!({"phase": phase, "containerStatuses": containers(pod, &state)})
}

/// The statuses of all containers of a pod, in one state.
fn containers(pod: &Pod, state: &Value) -> Vec<Value> {
    let all = pod.spec.iter().flat_map(|spec| &spec.containers);
    let status = |name: &str, image: &str| json!({"name": name, "image": image, "imageID": "", "ready": false, "restartCount": 0, "state": state});
    all.map(|container| status(&container.name, container.image.as_deref().unwrap_or_default())).collect()
}

/// The last word of prepare: of a model with as many layers as are believed, with which every stage can be planned, or one of
/// four that cannot be used.
fn prepared(which: usize, turn: usize) -> String {
    let layers = |layers: u64| {
        let model = json!({
            "vocab": 1024, "hidden": 64, "layers": layers, "heads": 1, "kvHeads": 1, "headDim": 64, "ffn": 64,
            "maxPositions": 1 << 16, "norm": "layer", "normEps": 1e-5, "mlp": "gelu", "qkvBias": true,
            "attentionOutputBias": true, "mlpBias": true, "tiedHead": true});
        let data =
            |n: usize| json!({"stage": stage_name(n), "longestTokens": 1 << 16, "sequences": 1, "records": 1000});
        let datasets: Vec<_> = (0..rlhf_api::job::MAX_STAGES).map(data).collect();
        let prepared = json!({"models": [model], "datasets": datasets});
        json!({"code": 0, "reason": "Done", "message": words(turn), "prepared": prepared}).to_string()
    };
    match which % 5 {
        0 => layers(MOST_LAYERS),
        1 => layers(u64::MAX),
        2 => layers(MOST_LAYERS).replace("1024", "1e308"),
        3 => json!({"code": 0, "reason": "Done", "message": "x".repeat(TOO_LONG)}).to_string(),
        _ => format!("{{\"code\": 0, \"prepared\": {}", "[".repeat(8_000)),
    }
}

/// The last word of a trainer.
fn last_word(code: i32, turn: usize) -> String {
    let checkpoint = json!({"step": u64::MAX, "path": "../".repeat(2_000)});
    let figures: serde_json::Map<_, _> = (0..300).map(|n| (format!("figure{n}"), json!(-1e308))).collect();
    match turn % 4 {
        0 => json!({"code": code, "reason": "R".repeat(8_000), "message": words(turn), "rank": u32::MAX, "step": u64::MAX,
            "checkpoint": checkpoint})
        .to_string(),
        1 => "[".repeat(8_000),
        2 => words(turn),
        _ => json!({"code": i32::MIN, "reason": "", "message": "", "output": {"path": "p".repeat(8_000), "metrics": figures}})
            .to_string(),
    }
}

/// The name of a hostile job's stage.
pub fn stage_name(number: usize) -> String {
    format!("s{number}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use rlhf_api::report::{Progress, TerminationMessage};

    fn pod(phase: &str, stage: &str, attempt: &str) -> Pod {
        serde_json::from_value(json!({
            "metadata": {"name": "p", "labels": {names::LABEL_STAGE: stage, names::LABEL_ATTEMPT: attempt}},
            "spec": {"nodeName": "n", "containers": [{"name": "trainer", "image": "i"}]}, "status": {"phase": phase},
        }))
        .unwrap()
    }

    fn word_of(status: &Value) -> &str {
        status["containerStatuses"][0]["state"]["terminated"]["message"].as_str().unwrap()
    }

    #[test]
    fn a_second_attempt_at_prepare_tells_shapes_that_are_believed_and_others_do_not() {
        let shapes = |word: &str| TerminationMessage::parse(word.as_bytes()).ok().and_then(|(word, _)| word.prepared);
        let second = pod_status(&pod("Running", names::PREPARE, "2"), 3);
        assert_eq!(second["phase"], "Succeeded");
        let told = shapes(word_of(&second)).unwrap();
        assert_eq!((told.models[0].layers as u64, told.datasets.len()), (MOST_LAYERS, 16));
        assert!((1..5).all(|which| shapes(&prepared(which, 0)).is_none()));
        assert!(shapes(&prepared(0, 7)).is_some());
    }

    #[test]
    fn a_pod_that_is_written_over_again_and_again_runs_in_the_end() {
        let phases: Vec<_> = (0..5).map(|turn| pod_status(&pod("Pending", "s0", "1"), turn)["phase"].clone()).collect();
        assert_eq!(phases, [json!(null), json!(null), json!(null), json!(null), json!("Running")]);
    }

    #[test]
    fn pods_end_badly_in_one_way_each_whatever_is_told_meanwhile() {
        let codes = |turn: usize| {
            let status = pod_status(&pod("Failed", "s0", "1"), turn);
            (status["phase"].clone(), status["containerStatuses"][0]["state"]["terminated"]["exitCode"].clone())
        };
        assert_eq!(codes(0), codes(1));
        assert_eq!(codes(0).0, "Failed");
        assert_ne!(pod_status(&pod("Running", "s0", "1"), 0)["phase"], "Failed", "it is disturbed before it is ended");
        assert_eq!(pod_status(&pod("Running", "s0", "1"), 1)["phase"], "Failed");
    }

    #[tokio::test]
    async fn progress_is_absurd_but_of_the_contract_where_it_is_told() {
        assert!(Progress::parse(progress(1).await.unwrap().as_bytes()).is_ok());
        assert!(Progress::parse(progress(3).await.unwrap().as_bytes()).is_ok());
        assert!(Progress::parse(progress(2).await.unwrap().as_bytes()).is_err());
    }
}

//! What is built of a job, and the job that most tests build.

mod attempts;
mod configs;
mod networks;
mod pods;
mod sources;

use super::*;
use crate::view::INDEX_KEY;
use k8s_openapi::api::core::v1::{Container, PodSpec};
use rlhf_api::config::{PrepareConfig, StageConfig, env};
use rlhf_api::job::RLHFJob;
use rlhf_api::stage::{Offload, Precision, Recompute, Sharding};
use serde_json::{Value, json};

pub(crate) const FIRST: Attempt = Attempt { number: 1, strategy: STRATEGY };
const STRATEGY: Strategy = Strategy {
    sharding: Sharding::Zero3,
    offload: Offload::None,
    recompute: Recompute::Block,
    precision: Precision::Bf16,
};

pub(crate) fn settings() -> Settings {
    Settings {
        trainer_image: "docker.io/rlhf/trainer:test".into(),
        trainer_image_pull_policy: "IfNotPresent".into(),
        log_format: "json".into(),
        keys: ProgressKeys::new([7; 32]),
        network: Some(rules("All")),
        gang_scheduling: true,
        allow: Allowances::default(),
        omit_user_ids: false,
        image_pull_secrets: vec![],
    }
}

pub(crate) fn rules(egress: &str) -> NetworkRules {
    serde_json::from_value(json!({
        "operator": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "sys"}},
                      "podSelector": {"matchLabels": {"app.kubernetes.io/name": "rlhf-operator"}}}],
        "prometheus": [{"namespaceSelector": {}, "podSelector": {"matchLabels": {"app.kubernetes.io/name": "prometheus"}}}],
        "egress": egress,
    }))
    .unwrap()
}

/// SFT, a reward model from the base model, and PPO of both. Names differ from every label's and kind's own.
pub(crate) fn job() -> RLHFJob {
    let optimizer = json!({"learningRate": 1e-4});
    let batch = json!({"globalSize": 8});
    let supervised = json!({"dataset": {"source": "volume://data/d.jsonl"}, "epochs": 1, "batch": batch, "maxLength": 64, "optimizer": optimizer});
    serde_json::from_value(json!({
        "apiVersion": "rlhf.dev/v1alpha1", "kind": "RLHFJob",
        "metadata": {"name": "demo", "namespace": "team", "uid": "0123456789-abc", "generation": 1, "resourceVersion": "7"},
        "spec": {
            "model": {"source": "volume://models/base"},
            "storage": {"volumeClaim": {"claimName": "claim"}},
            "compute": {"nodes": 2, "cpuWorkersPerNode": 2},
            "stages": [
                {"name": "tune", "sft": supervised},
                {"name": "judge", "rewardModel": supervised},
                {"name": "act", "seed": 7, "ppo": {
                    "start": {"stage": "tune"}, "rewards": [{"name": "liked", "model": {"stage": "judge"}}], "prompts": {"source": "volume://data/p.jsonl"},
                    "iterations": 2, "rolloutBatchSize": 8, "batch": batch, "maxPromptLength": 8, "maxNewTokens": 8,
                    "kl": {"coefficient": 0.1}, "actorOptimizer": optimizer, "criticOptimizer": optimizer}},
            ],
        },
    }))
    .unwrap()
}

fn service_name() -> String {
    names::service("demo", "0123456789-abc")
}

/// The name of what belongs to the stage `tune`.
const TUNE: &str = "demo-tune-prgzn";

fn with_compute(compute: Value) -> RLHFJob {
    let mut job = job();
    job.spec.compute = serde_json::from_value(compute).unwrap();
    job
}

fn build(job: &RLHFJob, index: usize, attempt: u32) -> Children {
    children(job, Task::all(job).nth(index).unwrap(), Attempt { number: attempt, strategy: STRATEGY }, &settings())
        .unwrap()
}

fn pod(children: &Children) -> PodSpec {
    children.job.spec.clone().unwrap().template.spec.unwrap()
}

fn container(children: &Children) -> Container {
    pod(children).containers[0].clone()
}

fn env_value(children: &Children, name: &str) -> Option<String> {
    container(children).env.unwrap().into_iter().find(|e| e.name == name)?.value
}

//! The jobs that tests apply: the example with smaller counts and fewer stages. Whatever else the example says, the
//! tests run too.

use rlhf_api::reference::VOLUME_SCHEME;
use serde_json::{Value, json};

/// The example's name.
pub const NAME: &str = "sentiment";

/// The definition of RLHFJobs.
pub const DEFINITION: &str = "rlhfjobs.rlhf.dev";

/// A manifest under change.
#[derive(Clone)]
pub struct Manifest(pub Value);

/// Every manifest of a folder of the repository, by file name.
pub fn manifests(folder: &str) -> Vec<(String, Value)> {
    let folder = crate::tools::root().join(folder);
    let entries = std::fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let mut paths: Vec<_> =
        entries.map(|e| e.unwrap().path()).filter(|p| p.extension().is_some_and(|e| e == "yaml")).collect();
    paths.sort();
    paths.iter().map(|path| (path.display().to_string(), read(path))).collect()
}

fn read(path: &std::path::Path) -> Value {
    let text = std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_yaml_ng::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// More steps than a stage makes while a test looks at it, however fast the machine is.
pub const ENDLESS: u64 = 30_000;

/// examples/sentiment.yaml with counts that make a run of seconds: two pods of one process for each stage. They ask for
/// little, so that the pods of many tests have room on one node.
pub fn example() -> Manifest {
    let example = Manifest(read(&crate::tools::root().join("examples/sentiment.yaml")));
    assert_eq!(example.0["metadata"]["name"], NAME);
    example
        .set("/spec/compute/resources/requests", json!({"cpu": "50m", "memory": "128Mi"}))
        .stage("sft", "sft/maxSteps", json!(15))
        .stage("sft", "sft/batch", json!({"globalSize": 8, "microSize": 4}))
        .stage("sft", "sft/maxLength", json!(48))
        .stage("reward", "rewardModel/maxSteps", json!(15))
        .stage("reward", "rewardModel/batch", json!({"globalSize": 8, "microSize": 4}))
        .stage("reward", "rewardModel/maxLength", json!(48))
        .stage("ppo", "ppo/iterations", json!(8))
        .stage("ppo", "ppo/rolloutBatchSize", json!(16))
        .stage("ppo", "ppo/epochs", json!(2))
        .stage("ppo", "ppo/batch", json!({"globalSize": 8, "microSize": 4}))
        .stage("ppo", "ppo/maxNewTokens", json!(16))
        .stage("ppo", "ppo/evalEveryIterations", json!(2))
        .stage("ppo", "checkpoint", json!({"everySteps": 2}))
}

/// Fine-tuning alone, which goes on until it is stopped and writes no checkpoint of its own accord.
pub fn endless() -> Manifest {
    example().only(&["sft"]).stage("sft", "sft/epochs", json!(1000)).stage("sft", "sft/maxSteps", json!(ENDLESS)).stage(
        "sft",
        "checkpoint",
        json!({"everySteps": ENDLESS}),
    )
}

/// A job that stays where it is, since its claim does not exist.
pub fn waits(name: &str) -> Manifest {
    example().set("/metadata/name", json!(name)).set("/spec/storage/volumeClaim/claimName", json!("missing"))
}

impl Manifest {
    /// Sets a field that the manifest has, by JSON pointer: the example must not drift away from the tests.
    pub fn set(mut self, pointer: &str, value: Value) -> Self {
        *self.0.pointer_mut(pointer).unwrap_or_else(|| panic!("the manifest has no {pointer}")) = value;
        self
    }

    /// Sets a field of a stage, by the fields on the way to it.
    pub fn stage(mut self, stage: &str, path: &str, value: Value) -> Self {
        let mut place =
            self.stages().iter_mut().find(|s| s["name"] == stage).unwrap_or_else(|| panic!("no stage {stage}"));
        let (parents, last) = path.rsplit_once('/').map_or((vec![], path), |(p, l)| (p.split('/').collect(), l));
        for field in parents {
            place = place.get_mut(field).unwrap_or_else(|| panic!("stage {stage} has no {field}"));
        }
        place[last] = value;
        self
    }

    /// Keeps only these stages.
    pub fn only(mut self, stages: &[&str]) -> Self {
        self.stages().retain(|s| stages.iter().any(|name| s["name"] == *name));
        self
    }

    /// Lets the reward model start from the job's model, and so beside the sft stage.
    pub fn reward_from_base(mut self) -> Self {
        let reward = self.stages().iter_mut().find(|s| s["name"] == "reward").expect("the example has a stage reward");
        reward["rewardModel"]
            .as_object_mut()
            .and_then(|r| r.remove("start"))
            .expect("the reward model starts from sft");
        self
    }

    /// The path of the job's model below the volume.
    pub fn model(&self) -> String {
        let source = self.0["spec"]["model"]["source"].as_str().expect("the manifest has a model");
        source.strip_prefix(VOLUME_SCHEME).expect("the model is on the volume").to_owned()
    }

    /// The path of a stage's dataset below the volume.
    pub fn dataset(&self, stage: &str, field: &str) -> String {
        let stages = self.0["spec"]["stages"].as_array().expect("the manifest has stages");
        let stage = stages.iter().find(|s| s["name"] == stage).expect("the manifest has the stage");
        let source =
            stage.pointer(&format!("/{field}/source")).and_then(Value::as_str).expect("the stage has the dataset");
        source.strip_prefix(VOLUME_SCHEME).expect("the dataset is on the volume").to_owned()
    }

    fn stages(&mut self) -> &mut Vec<Value> {
        self.0["spec"]["stages"].as_array_mut().expect("the manifest has stages")
    }
}

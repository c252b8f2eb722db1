//! A job's volume as the node sees it: a folder of this machine, filled before the job starts and read afterwards.

use crate::tools::cache;
use rlhf_api::job::RLHFJob;
use rlhf_api::names;
use safetensors::SafeTensors;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};

/// The user of the images.
const USER: u32 = 65532;
/// Records kept of each dataset: more than the tests' few steps take, and read in no time.
const RECORDS: usize = 300;

/// A folder that pods mount at /data.
pub struct Volume(PathBuf);

/// A line of a stage's learning curves that tells of a training step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// The step.
    pub step: u64,
    /// The attempt that made it.
    pub attempt: u64,
}

/// A model in Hugging Face layout.
pub struct SavedModel {
    /// config.json.
    pub config: Value,
    /// Shapes of the tensors of model.safetensors.
    pub shapes: BTreeMap<String, Vec<usize>>,
    /// model.safetensors.
    pub weights: Vec<u8>,
    /// tokenizer.json.
    pub tokenizer: Vec<u8>,
}

impl Volume {
    /// A fresh volume with the small model and the beginnings of the datasets.
    pub fn new(name: &str) -> Self {
        let volume = Self(cache().join("e2e").join(name));
        volume.remove();
        let assets = cache().join("assets/volume");
        copy(&assets.join("models/glassllm"), &volume.0.join("models/glassllm"), |bytes| bytes);
        copy(&assets.join("data/imdb"), &volume.0.join("data/imdb"), first_lines);
        own(&volume.0);
        volume
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Deletes the folder.
    pub fn remove(&self) {
        match fs::remove_dir_all(&self.0) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => panic!("{}: {e}", self.0.display()),
            _ => {}
        }
    }

    /// Replaces a line, counted from 1, of a file.
    pub fn replace_line(&self, file: &str, line: usize, text: &str) {
        let path = self.0.join(file);
        let content = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let mut lines: Vec<&str> = content.lines().collect();
        lines[line - 1] = text;
        fs::write(&path, lines.join("\n")).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    }

    /// A model by its path below the volume.
    pub fn model(&self, path: &str) -> SavedModel {
        let dir = self.0.join(path);
        let read = |file: &str| fs::read(dir.join(file)).unwrap_or_else(|e| panic!("{path}/{file}: {e}"));
        let weights = read("model.safetensors");
        let tensors = SafeTensors::deserialize(&weights).unwrap_or_else(|e| panic!("{path}/model.safetensors: {e}"));
        let shapes = tensors.iter().map(|(name, view)| (name.to_owned(), view.shape().to_vec())).collect();
        let config = serde_json::from_slice(&read("config.json")).unwrap_or_else(|e| panic!("{path}/config.json: {e}"));
        SavedModel { config, shapes, weights, tokenizer: read("tokenizer.json") }
    }

    /// The training steps of a stage, in the order in which they were made; none before the first.
    pub fn steps(&self, job: &RLHFJob, stage: &str) -> Vec<Step> {
        let text = fs::read_to_string(self.stage_dir(job, stage).join("metrics.jsonl")).unwrap_or_default();
        let whole = text.rsplit_once('\n').map_or("", |(lines, _)| lines);
        let lines = whole
            .lines()
            .map(|l| serde_json::from_str::<Value>(l).unwrap_or_else(|e| panic!("metrics.jsonl: {e}: {l}")));
        let number =
            |line: &Value, key: &str| line[key].as_u64().unwrap_or_else(|| panic!("metrics.jsonl: no {key}: {line}"));
        // Evaluations write lines too, but only a step has a learning rate.
        let steps = lines.filter(|line| line["learningRate"].is_number());
        steps.map(|line| Step { step: number(&line, "step"), attempt: number(&line, "attempt") }).collect()
    }

    /// The steps of a stage's checkpoints that are there, in order.
    pub fn checkpoints(&self, job: &RLHFJob, stage: &str) -> Vec<u64> {
        let dir = self.0.join(names::checkpoints_dir(&job.run_dir(), stage));
        let entries = fs::read_dir(dir).into_iter().flatten().filter_map(Result::ok);
        let names = entries.filter_map(|e| e.file_name().into_string().ok());
        let mut steps: Vec<u64> = names.filter_map(|n| n.strip_prefix("step-")?.parse().ok()).collect();
        steps.sort_unstable();
        steps
    }

    /// The samples of an evaluation of a PPO stage.
    pub fn samples(&self, job: &RLHFJob, stage: &str, evaluation: &str) -> Vec<Value> {
        let path = self.stage_dir(job, stage).join(format!("samples/{evaluation}.jsonl"));
        let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        text.lines().map(|l| serde_json::from_str(l).unwrap_or_else(|e| panic!("{}: {e}", path.display()))).collect()
    }

    fn stage_dir(&self, job: &RLHFJob, stage: &str) -> PathBuf {
        self.0.join(job.run_dir()).join(stage)
    }
}

fn first_lines(bytes: Vec<u8>) -> Vec<u8> {
    bytes.split_inclusive(|b| *b == b'\n').take(RECORDS).flatten().copied().collect()
}

fn copy(from: &Path, to: &Path, change: impl Fn(Vec<u8>) -> Vec<u8>) {
    let entries =
        fs::read_dir(from).unwrap_or_else(|e| panic!("{}: {e}; tests/assets/fetch.sh makes it", from.display()));
    fs::create_dir_all(to).unwrap_or_else(|e| panic!("{}: {e}", to.display()));
    for entry in entries.map(|e| e.expect("a folder can be read")) {
        let bytes = fs::read(entry.path()).unwrap_or_else(|e| panic!("{}: {e}", entry.path().display()));
        fs::write(to.join(entry.file_name()), change(bytes)).unwrap_or_else(|e| panic!("{}: {e}", to.display()));
    }
}

/// Gives a folder and all in it to the images' user.
fn own(path: &Path) {
    chown(path, Some(USER), Some(USER)).unwrap_or_else(|e| panic!("{}: {e}; run the tests as root", path.display()));
    if path.is_dir() {
        fs::read_dir(path).expect("a folder can be read").for_each(|e| own(&e.expect("a folder can be read").path()));
    }
}

//! A volume with a tiny random model of either family, a tokenizer and data for the three stages, on which the real
//! `rlhf-trainer launch` runs with as many processes as a test asks for.

#![allow(dead_code)] // each test binary uses a part

use rlhf_api::config::StageConfig;
use rlhf_trainer::run::Run;
use rustix::process::{Pid, Signal, kill_process};
use safetensors::SafeTensors;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// The random models of `tests/golden/models` that tests train.
pub const FAMILIES: [&str; 3] = ["gpt2", "llama-gqa-untied", "llama-tied-headdim"];
const WORDS: i64 = 90;
const EOS: i64 = 96;

/// A job's volume in a temporary folder.
pub struct Volume {
    root: TempDir,
}

/// How a stage is launched.
#[derive(Clone, Debug)]
pub struct Launch {
    pub processes: u32,
    pub attempt: u32,
    pub config: Value,
    /// The run in the stage's folder was begun with other settings, and goes on with these all the same.
    pub adopts: bool,
}

/// What a finished launch left.
pub struct Finished {
    pub code: Option<i32>,
    pub message: Value,
    pub log: String,
}

impl Volume {
    /// A volume with the golden model of this name, a word-level tokenizer over its vocabulary, and data.
    pub fn new(model: &str) -> Self {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("models/base");
        fs::create_dir_all(&dir).unwrap();
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/models").join(model);
        for file in ["config.json", "model.safetensors"] {
            fs::copy(golden.join(file), dir.join(file)).unwrap();
        }
        write_tokenizer(&dir);
        let volume = Self { root };
        volume.write_data();
        volume
    }

    pub fn path(&self, relative: &str) -> PathBuf {
        self.root.path().join(relative)
    }

    fn write_data(&self) {
        fs::create_dir_all(self.path("data")).unwrap();
        let words = |seed: i64, n: i64| {
            (0..n).map(|i| format!("w{}", (seed * 31 + i * i * 7 + i) % WORDS)).collect::<Vec<_>>().join(" ")
        };
        // A prompt and what follows it are read as one text, in which a blank separates words.
        let after = |words: String| format!(" {words}");
        let lines = |of: &dyn Fn(i64) -> Value| (0..60).map(|i| of(i).to_string()).collect::<Vec<_>>().join("\n");
        fs::write(
            self.path("data/sft.jsonl"),
            lines(&|i| json!({"prompt": words(i, 2), "completion": after(words(i + 7, 2 + i % 9))})),
        )
        .unwrap();
        let pair = |i| {
            let (chosen, rejected) = (after(words(i + 3, 2 + i % 5)), after(words(i + 50, 1 + i % 7)));
            json!({"prompt": words(i, 2), "chosen": chosen, "rejected": rejected})
        };
        fs::write(self.path("data/pairs.jsonl"), lines(&pair)).unwrap();
        fs::write(self.path("data/prompts.jsonl"), lines(&|i| json!({"prompt": words(i, 1 + i % 4)}))).unwrap();
    }

    /// Runs a stage to its end.
    pub fn run(&self, launch: &Launch) -> Finished {
        let mut running = self.start(launch);
        let status = running.child.wait().unwrap();
        running.finish(status)
    }

    /// Runs a stage that has to succeed.
    pub fn succeed(&self, launch: &Launch) -> Finished {
        let finished = self.run(launch);
        assert_eq!(finished.code, Some(0), "{launch:?}\n{}\n{}", finished.message, finished.log);
        finished
    }

    /// Starts a stage in one pod.
    pub fn start(&self, launch: &Launch) -> Running {
        self.start_as(launch, &Pod::default())
    }

    /// Starts a stage, or a pod of it.
    pub fn start_as(&self, launch: &Launch, pod: &Pod) -> Running {
        let name = format!("{}{}", launch.config["stage"].as_str().unwrap(), pod.name);
        let config = self.path(&format!("{name}.json"));
        fs::write(&config, launch.config.to_string()).unwrap();
        if launch.adopts {
            self.adopt(launch);
        }
        let (log, termination) = (self.path(&format!("{name}.log")), self.path(&format!("{name}.end")));
        let _ = fs::remove_file(&termination);
        let output = fs::File::create(&log).unwrap();
        let program = env!("CARGO_BIN_EXE_rlhf-trainer").to_string();
        let words: Vec<&String> = pod.wrapper.iter().chain([&program]).collect();
        let child = Command::new(words[0])
            .args(&words[1..])
            .args(["launch", "--http-port", &pod.http_port.to_string(), "--config"])
            .arg(&config)
            .arg("--termination-file")
            .arg(&termination)
            .env("RLHF_VOLUME", self.root.path())
            .env("NPROC_PER_NODE", launch.processes.to_string())
            .env("RLHF_ATTEMPT", launch.attempt.to_string())
            .env("MASTER_PORT", free_port().to_string())
            .env("OMP_NUM_THREADS", "1")
            .envs(pod.env.iter().map(|(name, value)| (name, value)))
            .stdout(Stdio::from(output.try_clone().unwrap()))
            .stderr(Stdio::from(output))
            .spawn()
            .unwrap();
        Running { child, log, termination }
    }

    /// Makes the run in a stage's folder one that was begun with this config.
    fn adopt(&self, launch: &Launch) {
        let config: StageConfig = serde_json::from_value(launch.config.clone()).unwrap();
        let run = Run::new(&config, self.root.path());
        assert!(run.check().is_err(), "nothing was changed on the way");
        let path = run.dir().join("run.json");
        let mut begun: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        for key in ["stage", "kind", "seed", "paths"] {
            begun[key] = launch.config[key].clone();
        }
        fs::write(path, begun.to_string()).unwrap();
        let _ = fs::remove_file(run.dir().join("output.json"));
    }

    /// The last value of a figure at each step of a stage's learning curves, by step.
    pub fn curve(&self, stage: &str, figure: &str) -> Vec<f64> {
        let mut by_step = BTreeMap::new();
        for line in self.history(stage) {
            if let (Some(step), Some(value)) = (line["step"].as_u64(), line[figure].as_f64()) {
                by_step.insert(step, value);
            }
        }
        by_step.into_values().collect()
    }

    /// The lines of a stage's learning curves.
    pub fn history(&self, stage: &str) -> Vec<Value> {
        let text = fs::read_to_string(self.path(&format!("jobs/j/{stage}/metrics.jsonl"))).unwrap_or_default();
        text.lines().filter_map(|l| serde_json::from_str(l).ok()).collect()
    }

    /// The steps that an attempt trained, in order; evaluations are no steps.
    pub fn trained(&self, stage: &str, attempt: u64) -> Vec<u64> {
        let lines = self.history(stage).into_iter().filter(|l| l["attempt"] == attempt && !l["gradNorm"].is_null());
        lines.filter_map(|l| l["step"].as_u64()).collect()
    }

    /// The bytes of a stage's trained weights.
    pub fn weights(&self, stage: &str) -> Vec<u8> {
        fs::read(self.path(&format!("jobs/j/{stage}/model/model.safetensors"))).unwrap()
    }

    /// The steps of a stage's checkpoints, in order.
    pub fn checkpoints(&self, stage: &str) -> Vec<u64> {
        let entries = fs::read_dir(self.path(&format!("jobs/j/{stage}/checkpoints"))).into_iter().flatten();
        let names = entries.map(|e| e.unwrap().file_name().into_string().unwrap());
        let mut steps: Vec<u64> = names.filter_map(|n| n.strip_prefix("step-")?.parse().ok()).collect();
        steps.sort_unstable();
        steps
    }

    /// The bytes of a stage's trained adapters, where it has trained some.
    pub fn adapter_weights(&self, stage: &str) -> Option<Vec<u8>> {
        fs::read(self.path(&format!("jobs/j/{stage}/adapter/adapter_model.safetensors"))).ok()
    }

    /// Copies another volume's job folder, as a new pod would find it.
    pub fn copy_job(&self, from: &Volume) {
        copy_dir(&from.path("jobs"), &self.path("jobs"));
    }
}

/// What is particular about a pod.
#[derive(Clone, Debug, Default)]
pub struct Pod {
    /// Tells its files from those of other pods on the same volume.
    pub name: String,
    /// The program that starts the trainer's, with its arguments; none starts it directly.
    pub wrapper: Vec<String>,
    pub env: Vec<(String, String)>,
    /// The first worker's port; 0: none.
    pub http_port: u16,
}

impl Pod {
    /// Pod `node_rank` of `nodes`, which meet at `port`.
    pub fn of_gang(node_rank: u32, nodes: u32, port: u16) -> Self {
        Self { name: format!("-{node_rank}"), ..Self::default() }
            .env("NODE_RANK", node_rank)
            .env("NNODES", nodes)
            .env("MASTER_PORT", port)
    }

    pub fn env(mut self, name: &str, value: impl ToString) -> Self {
        self.env.push((name.into(), value.to_string()));
        self
    }

    pub fn under(mut self, wrapper: &[&str]) -> Self {
        self.wrapper = wrapper.iter().map(|word| word.to_string()).collect();
        self
    }
}

/// A port that is free now.
pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// The body of `GET path`, or `None` where nobody answers.
pub fn fetch(port: u16, path: &str) -> Option<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: t\r\nConnection: close\r\n\r\n").ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).ok()?;
    Some(text.split_once("\r\n\r\n")?.1.to_owned())
}

/// A stage that runs. What is left of it when a test fails is killed.
pub struct Running {
    pub child: Child,
    log: PathBuf,
    termination: PathBuf,
}

impl Running {
    /// Waits for its end.
    pub fn wait(mut self) -> Finished {
        let status = self.child.wait().unwrap();
        self.finish(status)
    }

    /// What it has logged so far.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Sends the launcher a signal.
    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// The process of a local rank.
    pub fn worker(&self, local_rank: u32) -> Pid {
        let wanted = format!("LOCAL_RANK={local_rank}");
        let has_rank = |pid: &u32| {
            fs::read(format!("/proc/{pid}/environ"))
                .unwrap_or_default()
                .split(|b| *b == 0)
                .any(|v| v == wanted.as_bytes())
        };
        let pid = descendants(self.child.id()).into_iter().find(has_rank).unwrap();
        Pid::from_raw(pid as i32).unwrap()
    }

    fn finish(&self, status: ExitStatus) -> Finished {
        let message = fs::read_to_string(&self.termination)
            .ok()
            .and_then(|t| serde_json::from_str(&t).ok())
            .unwrap_or(Value::Null);
        Finished { code: status.code(), message, log: self.log() }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.child.try_wait().unwrap().is_none() {
            for pid in descendants(self.child.id()).into_iter().chain([self.child.id()]) {
                // One that ended by itself meanwhile is as dead.
                let _ = kill_process(Pid::from_raw(pid as i32).unwrap(), Signal::KILL);
            }
            self.child.wait().unwrap();
        }
    }
}

/// The processes below a process.
fn descendants(pid: u32) -> Vec<u32> {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    let children: Vec<u32> = children.split_whitespace().map(|child| child.parse().unwrap()).collect();
    children.iter().copied().chain(children.iter().flat_map(|child| descendants(*child))).collect()
}

impl Finished {
    /// Checks exit code, reason and parts of the message.
    pub fn expect(&self, code: i32, reason: &str, parts: &[&str]) {
        let (message, log) = (&self.message, &self.log);
        assert_eq!(
            (self.code, message["code"].as_i64(), message["reason"].as_str()),
            (Some(code), Some(code.into()), Some(reason)),
            "{message}\n{log}"
        );
        let text = message["message"].as_str().unwrap();
        assert!(!text.contains('\n') && parts.iter().all(|part| text.contains(part)), "{parts:?} in {text}\n{log}");
    }

    /// The step of the last checkpoint.
    pub fn checkpoint(&self) -> Option<u64> {
        self.message["checkpoint"]["step"].as_u64()
    }
}

/// A volume on which `stage` has run to its end.
pub fn finished(family: &str, launch: &Launch) -> Volume {
    let volume = Volume::new(family);
    if launch.config["stage"] == "ppo" {
        volume.succeed(&reward());
    }
    volume.succeed(launch);
    volume
}

/// What a pod finds that starts after `step`: later checkpoints and the model are gone.
pub fn rewound(whole: &Volume, family: &str, stage: &str, step: u64) -> Volume {
    let volume = Volume::new(family);
    volume.copy_job(whole);
    fs::remove_dir_all(volume.path(&format!("jobs/j/{stage}/model"))).unwrap();
    for written in volume.checkpoints(stage) {
        if written > step {
            fs::remove_dir_all(volume.path(&format!("jobs/j/{stage}/checkpoints/step-{written}"))).unwrap();
        }
    }
    volume
}

/// Polls until a condition holds; fails the test after some minutes, as machines of others' tests at the same time are slow.
pub fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(300);
    while !holds() {
        assert!(Instant::now() < deadline, "waited for minutes for: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn copy_dir(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_dir(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

fn write_tokenizer(dir: &Path) {
    let mut vocab: serde_json::Map<String, Value> = (0..WORDS).map(|i| (format!("w{i}"), json!(i))).collect();
    for (name, id) in [("<unk>", 94), ("<bos>", 95), ("<eos>", EOS)] {
        vocab.insert(name.into(), json!(id));
    }
    let special = |id: i64, content: &str| json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true});
    let tokenizer = json!({
        "version": "1.0",
        "added_tokens": [special(94, "<unk>"), special(95, "<bos>"), special(EOS, "<eos>")],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
    });
    fs::write(dir.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    fs::write(
        dir.join("tokenizer_config.json"),
        json!({"eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}).to_string(),
    )
    .unwrap();
}

/// Its epsilon is above the gradients that are only rounding, such as those of GPT-2's key biases: with torch's 1e-8 Adam would
/// move a parameter by its whole learning rate whichever way such a gradient was rounded.
fn optimizer(learning_rate: f64) -> Value {
    json!({"learningRate": learning_rate, "schedule": "linear", "warmupRatio": 0.1, "weightDecay": 0.01, "epsilon": 1e-5})
}

fn stage(name: &str, kind: Value, start: &str, reward: Option<&str>) -> Launch {
    let mut paths = json!({"baseModel": "models/base", "startModel": start, "output": format!("jobs/j/{name}/model"), "checkpoints": format!("jobs/j/{name}/checkpoints")});
    if let Some(reward) = reward {
        paths["rewardModels"] = json!({"liked": reward});
        paths["criticModel"] = json!(reward);
    }
    let config = json!({
        "job": {"namespace": "n", "name": "j", "uid": "u"}, "stage": name, "kind": kind, "seed": 7, "paths": paths,
        "checkpoint": {"everySteps": 10, "keep": 100}, "keepCheckpoints": "Always", "collectiveTimeoutSeconds": 30,
    });
    Launch { processes: 1, attempt: 1, config, adopts: false }
}

/// Twenty steps of supervised fine-tuning on the base model.
pub fn sft() -> Launch {
    let settings = json!({
        "dataset": {"source": "volume://data/sft.jsonl", "evalFraction": 0.1}, "format": "promptCompletion", "epochs": 50, "maxSteps": 20,
        "batch": {"globalSize": 6, "microSize": 6}, "maxLength": 12, "optimizer": optimizer(1e-3),
    });
    stage("sft", json!({"sft": settings}), "models/base", None)
}

/// Twenty steps of reward-model training on the base model.
pub fn reward() -> Launch {
    let settings = json!({
        "dataset": {"source": "volume://data/pairs.jsonl", "evalFraction": 0.1}, "epochs": 50, "maxSteps": 20,
        "batch": {"globalSize": 6, "microSize": 6}, "maxLength": 12, "centeringCoefficient": 0.01, "optimizer": optimizer(1e-3),
    });
    stage("reward", json!({"rewardModel": settings}), "models/base", None)
}

/// PPO of the base model against the `reward` stage's model: five iterations of four optimizer steps.
pub fn ppo() -> Launch {
    let settings = json!({
        "rewards": [{"name": "liked", "model": {"stage": "reward"}}], "prompts": {"source": "volume://data/prompts.jsonl", "evalFraction": 0.1}, "iterations": 5, "rolloutBatchSize": 12,
        "batch": {"globalSize": 6, "microSize": 6}, "epochs": 2, "maxPromptLength": 4, "maxNewTokens": 7, "kl": {"coefficient": 0.05, "target": 1.0},
        "actorOptimizer": optimizer(1e-3), "criticOptimizer": optimizer(1e-3),
    });
    let mut launch = stage("ppo", json!({"ppo": settings}), "models/base", Some("jobs/j/reward/model"));
    launch.config["checkpoint"] = json!({"everySteps": 2, "keep": 100});
    launch
}

impl Launch {
    pub fn processes(mut self, processes: u32) -> Self {
        self.processes = processes;
        self
    }

    /// The attempt of this number, with the settings of those before it.
    pub fn attempt(mut self, attempt: u32) -> Self {
        (self.attempt, self.adopts) = (attempt, false);
        self
    }

    /// The attempt of this number, with settings that were changed on the way: a run of a user's would be refused.
    pub fn adopting(mut self, attempt: u32) -> Self {
        (self.attempt, self.adopts) = (attempt, true);
        self
    }

    /// Changes the strategy: `{"sharding": …, "offload": …, "recompute": …, "precision": …}`, each of them optional.
    pub fn strategy(mut self, strategy: Value) -> Self {
        self.config["strategy"] = strategy;
        self
    }

    /// Changes one of the stage's settings, named by a JSON pointer.
    pub fn with(mut self, pointer: &str, value: Value) -> Self {
        let kind = self.config["kind"].as_object().unwrap().keys().next().unwrap().clone();
        let (parent, key) = pointer.rsplit_once('/').unwrap();
        self.config["kind"][&kind].pointer_mut(parent).unwrap()[key] = value;
        self
    }

    /// Trains adapters.
    pub fn lora(self, settings: Value) -> Self {
        self.with("/lora", settings)
    }

    pub fn micro(self, size: u32) -> Self {
        self.with("/batch/microSize", json!(size))
    }
}

/// Every number of a weights file, tensor after tensor in the order of their names.
pub fn numbers(weights: &[u8]) -> Vec<f32> {
    let file = SafeTensors::deserialize(weights).unwrap();
    let mut names = file.names();
    names.sort_unstable();
    let bytes = names.iter().flat_map(|n| file.tensor(n).unwrap().data().to_vec()).collect::<Vec<u8>>();
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

/// The largest difference of two weight files, relative to their largest number.
pub fn relative_gap(a: &[u8], b: &[u8]) -> f64 {
    let (a, b) = (numbers(a), numbers(b));
    assert_eq!(a.len(), b.len());
    assert!(a.iter().chain(&b).all(|x| x.is_finite()), "a weight is not finite");
    let largest = a.iter().fold(0f32, |m, x| m.max(x.abs()));
    f64::from(a.iter().zip(&b).fold(0f32, |m, (x, y)| m.max((x - y).abs())) / largest)
}

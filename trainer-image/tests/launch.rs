//! The program as a pod runs it: real processes, a real (tiny, random) model, exit codes and last words.

#![allow(clippy::unwrap_used, clippy::panic)] // tests and what they are made of fail by panicking

mod common;

use common::{Volume, fetch, free_port};
use rlhf_api::report::{MAX_TERMINATION_BYTES, Progress, TerminationMessage};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use std::fs;
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

const PROGRAM: &str = env!("CARGO_BIN_EXE_rlhf-trainer");

/// A volume, ports, and a config that trains for very long.
struct Job {
    volume: Volume,
    config: Value,
    http_port: u16,
    master_port: u16,
}

impl Job {
    fn new() -> Self {
        let mut config = common::sft().with("/epochs", json!(1000)).with("/maxSteps", json!(100_000)).config;
        config["checkpoint"] = json!({"everySteps": 10_000});
        let http_port = (0..100).map(|_| free_port()).find(|p| TcpListener::bind(("0.0.0.0", p + 1)).is_ok()).unwrap();
        Self { volume: Volume::new("llama-tied-headdim"), config, http_port, master_port: free_port() }
    }

    /// Replaces the records.
    fn write_records(&self, records: &str) {
        fs::write(self.volume.path("data/sft.jsonl"), records).unwrap();
    }

    /// Writes the config as it is now and returns the command of a pod with `workers` workers.
    fn pod(&self, name: &str, workers: u32) -> Pod {
        let mut pod = self.program(name, &["launch", "--http-port", &self.http_port.to_string()], &self.config);
        pod.command.env("NPROC_PER_NODE", workers.to_string()).env("MASTER_PORT", self.master_port.to_string());
        pod
    }

    /// The command of the prepare pod.
    fn prepare(&self) -> Pod {
        self.program(
            "prepare",
            &["prepare", "--http-port", &self.http_port.to_string()],
            &json!({"job": self.config["job"], "stages": [self.config]}),
        )
    }

    fn program(&self, name: &str, args: &[&str], config: &Value) -> Pod {
        let (config_file, last_word) =
            (self.volume.path(&format!("{name}.json")), self.volume.path(&format!("{name}.termination")));
        fs::write(&config_file, config.to_string()).unwrap();
        let mut command = Command::new(PROGRAM);
        command.args(args).arg("--config").arg(&config_file).arg("--termination-file").arg(&last_word);
        command.env("RLHF_VOLUME", self.volume.path("")).env("OMP_NUM_THREADS", "1").stderr(Stdio::piped());
        Pod { command, config: config_file, last_word }
    }
}

/// A program of the trainer image that has not started.
struct Pod {
    command: Command,
    config: PathBuf,
    last_word: PathBuf,
}

impl Pod {
    fn env(mut self, name: &str, value: &str) -> Self {
        self.command.env(name, value);
        self
    }

    /// Runs it to its end.
    fn run(self) -> Ended {
        self.start().end()
    }

    fn start(mut self) -> Running {
        let child = self.command.spawn().unwrap();
        Running { child: Some(child), last_word: self.last_word }
    }
}

/// One that runs; killed if a test leaves it behind.
struct Running {
    child: Option<Child>,
    last_word: PathBuf,
}

/// How it ended.
struct Ended {
    code: i32,
    message: TerminationMessage,
    log: String,
}

impl Running {
    fn pid(&self) -> Pid {
        Pid::from_child(self.child.as_ref().unwrap())
    }

    /// The process of a local rank.
    fn worker(&self, local_rank: u32) -> Pid {
        let parent = self.pid().as_raw_pid();
        let children = fs::read_to_string(format!("/proc/{parent}/task/{parent}/children")).unwrap();
        let wanted = format!("LOCAL_RANK={local_rank}");
        let has_rank = |pid: &&str| {
            fs::read(format!("/proc/{pid}/environ")).unwrap().split(|b| *b == 0).any(|v| v == wanted.as_bytes())
        };
        Pid::from_raw(children.split_whitespace().find(has_rank).unwrap().parse().unwrap()).unwrap()
    }

    fn end(mut self) -> Ended {
        let Output { status, stderr, .. } = self.child.take().unwrap().wait_with_output().unwrap();
        let (log, text) = (String::from_utf8(stderr).unwrap(), fs::read_to_string(&self.last_word).unwrap_or_default());
        assert!(text.len() <= MAX_TERMINATION_BYTES);
        let message = serde_json::from_str(&text).unwrap_or_else(|e| panic!("no last word ({e}): {log}"));
        Ended { code: status.code().unwrap(), message, log }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            child.kill().and_then(|()| child.wait()).unwrap();
        }
    }
}

impl Ended {
    /// Checks exit code and message, the same in both places.
    fn expect(&self, code: i32, reason: &str, parts: &[&str]) {
        let TerminationMessage { message, .. } = &self.message;
        assert_eq!(
            (self.code, self.message.code, self.message.reason.as_str()),
            (code, code, reason),
            "{message}\n{}",
            self.log
        );
        for part in parts {
            assert!(message.contains(part), "{part} is not in: {message}");
        }
    }
}

/// Waits, for two minutes at most, until a worker's progress is what `reached` wants.
fn await_progress(port: u16, reached: impl Fn(&Progress) -> bool) -> Progress {
    for _ in 0..2400 {
        let progress = fetch(port, "/progress").and_then(|body| serde_json::from_str(&body).ok());
        match progress.filter(|p| reached(p)) {
            Some(progress) => return progress,
            None => std::thread::sleep(Duration::from_millis(50)),
        }
    }
    panic!("the worker at port {port} does not get there");
}

#[test]
fn wrong_flags_end_with_64_and_help_with_0() {
    let run = |args: &[&str]| Command::new(PROGRAM).args(args).output().unwrap();
    let wrong = run(&["launch", "--no-such-flag"]);
    assert_eq!(wrong.status.code(), Some(64));
    assert!(String::from_utf8_lossy(&wrong.stderr).contains("--no-such-flag"));
    assert_eq!(run(&["worker", "--http-port", "70000"]).status.code(), Some(64));
    let help = run(&["--help"]);
    assert_eq!(help.status.code(), Some(0));
    assert!(String::from_utf8_lossy(&help.stdout).contains("launch"));
}

#[test]
fn a_config_that_is_not_json_is_named_with_line_and_column() {
    let job = Job::new();
    let pod = job.pod("pod", 1);
    fs::write(&pod.config, "{\n  \"job\": nothing\n}").unwrap();
    let path = pod.config.display().to_string();
    let ended = pod.run();
    ended.expect(64, "BadConfig", &[&path, "line 2 column"]);
    assert!(ended.log.contains("line 2 column"), "{}", ended.log);
}

#[test]
fn a_long_message_is_cut_to_what_kubernetes_keeps() {
    let mut job = Job::new();
    job.config["kind"] = json!({"x".repeat(20_000): {}});
    job.pod("pod", 1).run().expect(64, "BadConfig", &["unknown variant `xxxx"]);
}

#[test]
fn a_field_of_a_newer_operator_is_named_and_does_no_harm() {
    let mut job = Job::new();
    job.config["kind"]["sft"]["maxSteps"] = json!(2);
    (job.config["kind"]["sft"]["lorra"], job.config["newer"]) = (json!({"rank": 4}), json!(true));
    let ended = job.pod("pod", 2).run();
    ended.expect(0, "Done", &[]);
    for field in ["kind.sft.lorra", "newer"] {
        let told = ended.log.lines().filter(|l| l.contains("does not know") && l.contains(field)).count();
        assert_eq!(told, 1, "{field}: {}", ended.log);
    }
    assert!(job.prepare().run().log.contains("stages.0.kind.sft.lorra"));
}

#[test]
fn a_volume_that_is_not_there_is_named() {
    Job::new().pod("pod", 1).env("RLHF_VOLUME", "/no/such/volume").run().expect(
        64,
        "BadConfig",
        &["/no/such/volume", "RLHF_VOLUME"],
    );
}

#[test]
fn a_wrong_environment_variable_is_named() {
    for (name, value) in
        [("NODE_RANK", "one"), ("NPROC_PER_NODE", "-1"), ("RUST_LOG", "rlhf=loud"), ("RLHF_LOG_FORMAT", "xml")]
    {
        Job::new().pod("pod", 1).env(name, value).run().expect(64, "BadConfig", &[name, value]);
    }
    Job::new().pod("pod", 2).env("OMP_NUM_THREADS", "many").run().expect(64, "BadConfig", &["OMP_NUM_THREADS", "many"]);
}

#[test]
fn a_taken_port_is_said_before_anything_is_loaded() {
    let job = Job::new();
    let _taken = TcpListener::bind(("0.0.0.0", job.http_port)).unwrap();
    job.pod("pod", 1).run().expect(64, "BadConfig", &[&job.http_port.to_string(), "--http-port"]);
}

#[test]
fn a_wrong_record_is_named_by_every_rank_and_told_once() {
    let job = Job::new();
    job.write_records("{\"prompt\": \"w1\", \"completion\": \"w2\"}\n{\"prompt\": 7}\n");
    job.pod("pod", 2).run().expect(65, "BadInput", &["sft.jsonl:2", "prompt"]);
}

#[test]
fn two_workers_train_to_the_end_and_say_where_the_model_is() {
    let mut job = Job::new();
    job.config["kind"]["sft"]["maxSteps"] = json!(5);
    let ended = job.pod("pod", 2).env("RLHF_LOG_FORMAT", "json").run();
    ended.expect(0, "Done", &[]);
    let output = ended.message.output.unwrap();
    assert_eq!(output.path, "jobs/j/sft/model");
    assert!(output.metrics["evalLoss"] > 0.0 && job.volume.path(&output.path).join("model.safetensors").exists());
    assert_eq!((ended.message.rank, ended.message.step, ended.message.checkpoint.unwrap().step), (None, Some(5), 5));

    let lines: Vec<Value> =
        ended.log.lines().map(|l| serde_json::from_str(l).unwrap_or_else(|e| panic!("{e}: {l}"))).collect();
    let steps_of = |rank: u32| lines.iter().filter(|l| l["message"] == "step" && l["span"]["rank"] == rank).count();
    assert_eq!((steps_of(0), steps_of(1)), (5, 5));
    assert!(
        lines.iter().filter(|l| l["message"] == "step").all(|l| l["loss"].as_f64().unwrap() > 0.0),
        "{}",
        ended.log
    );
}

#[test]
fn sigterm_saves_a_checkpoint_and_the_next_attempt_goes_on_from_it() {
    let job = Job::new();
    let first = job.pod("first", 2).start();
    for rank in [0, 1] {
        await_progress(job.http_port + rank, |p| p.step >= 2);
        let metrics = fetch(job.http_port + rank, "/metrics").unwrap();
        assert!(
            metrics.lines().any(|l| l.starts_with("rlhf_loss{") && l.contains(&format!("rank=\"{rank}\""))),
            "{metrics}"
        );
        assert!(
            metrics.lines().any(|l| l.starts_with("rlhf_phase_seconds_total{")
                && l.contains("phase=\"train\"")
                && !l.ends_with(" 0")),
            "{metrics}"
        );
    }
    kill_process(first.pid(), Signal::TERM).unwrap();
    kill_process(first.pid(), Signal::TERM).unwrap_or_default();
    let ended = first.end();
    ended.expect(143, "Terminated", &["checkpoint"]);
    let (step, checkpoint) = (ended.message.step.unwrap(), ended.message.checkpoint.unwrap());
    assert!(checkpoint.step == step && job.volume.path(&checkpoint.path).is_dir(), "{checkpoint:?} {step}");

    let second = job.pod("second", 2).env("RLHF_ATTEMPT", "2").start();
    let progress = await_progress(job.http_port, |p| p.step > step);
    assert_eq!(progress.checkpoint.unwrap().step, step);
    kill_process(second.pid(), Signal::INT).unwrap();
    let ended = second.end();
    ended.expect(143, "Terminated", &[]);
    assert!(ended.message.step.unwrap() > step && ended.log.contains("resumed"), "{}", ended.log);
}

#[test]
fn a_killed_worker_is_the_cause_and_its_peer_notices() {
    let job = Job::new();
    let pod = job.pod("pod", 2).start();
    await_progress(job.http_port, |p| p.step >= 2);
    kill_process(pod.worker(1), Signal::KILL).unwrap();
    let ended = pod.end();
    ended.expect(137, "Killed", &["rank 1", "SIGKILL"]);
    assert_eq!(ended.message.rank, Some(1));
    assert!(ended.message.step.unwrap() >= 2 && ended.log.contains("Code(75)"), "{}", ended.log);
}

#[test]
fn a_worker_that_hangs_when_its_peer_fails_is_killed_in_the_end() {
    let job = Job::new();
    let pod = job.pod("pod", 2).start();
    await_progress(job.http_port, |p| p.step >= 2);
    kill_process(pod.worker(0), Signal::STOP).unwrap();
    kill_process(pod.worker(1), Signal::ABORT).unwrap();
    let ended = pod.end();
    ended.expect(137, "Killed", &["rank 1", "SIGABRT"]);
    assert!(ended.log.contains("sending SIGTERM") && ended.log.contains("sending SIGKILL"), "{}", ended.log);
}

/// The first worker, whom the kubelet asks, has ended, and another takes its time.
#[test]
fn a_pod_answers_for_its_health_to_the_end() {
    let job = Job::new();
    let pod = job.pod("pod", 2).start();
    await_progress(job.http_port, |p| p.step >= 2);
    assert_eq!(fetch(job.http_port, "/healthz").as_deref(), Some("ok"));
    kill_process(pod.worker(1), Signal::STOP).unwrap();
    kill_process(pod.worker(0), Signal::KILL).unwrap();
    let gone = || fetch(job.http_port, "/progress").is_some_and(|body| body.is_empty());
    common::wait_until("the launcher to answer in its place", gone);
    assert_eq!(fetch(job.http_port, "/healthz").as_deref(), Some("ok"));
    pod.end().expect(137, "Killed", &["rank 0", "SIGKILL"]);
    assert_eq!(fetch(job.http_port, "/healthz"), None);
}

#[test]
fn prepare_says_what_it_checks_and_refuses_a_pipe_instead_of_waiting_for_it() {
    let job = Job::new();
    let records = fs::read_to_string(job.volume.path("data/sft.jsonl")).unwrap() + "\n";
    job.write_records(&records.repeat(20_000));
    let pod = job.prepare().start();
    let progress = await_progress(job.http_port, |p| p.metrics.get("records").is_some_and(|n| *n > 0.0));
    assert_eq!(progress.doing.as_deref(), Some("checking stage 'sft': volume://data/sft.jsonl"));
    assert_eq!((progress.step, progress.total_steps), (1, 2));
    assert!(progress.activity > 0);
    assert_eq!(fetch(job.http_port, "/healthz").as_deref(), Some("ok"));
    pod.end().expect(0, "Done", &[]);

    for file in ["data/sft.jsonl", "models/base/model.safetensors", "models/base/tokenizer.json"] {
        let job = Job::new();
        fs::remove_file(job.volume.path(file)).unwrap();
        assert!(Command::new("mkfifo").arg(job.volume.path(file)).status().unwrap().success());
        job.prepare().run().expect(65, "BadInput", &[file, "a named pipe, not a file"]);
    }
}

#[test]
fn pods_with_different_configs_refuse_to_train_together() {
    let (mut job, other_ports) = (Job::new(), Job::new().http_port);
    let one = job.pod("one", 1).env("NNODES", "2").env("NODE_RANK", "0").start();
    (job.config["seed"], job.http_port) = (json!(2), other_ports);
    let two = job.pod("two", 1).env("NNODES", "2").env("NODE_RANK", "1").start();
    for pod in [one, two] {
        pod.end().expect(64, "BadConfig", &["do not have the same config"]);
    }
}

#[test]
fn prepare_counts_the_records_and_names_a_wrong_one() {
    let job = Job::new();
    let good = job.prepare().run();
    good.expect(0, "Done", &[]);
    let output = good.message.output.unwrap();
    assert_eq!((output.path.as_str(), output.metrics["sft.records"]), ("jobs/j", 60.0));
    assert_eq!(output.metrics["sft.train"] + output.metrics["sft.eval"], 60.0);
    job.write_records("{\"prompt\": \"w1\"}\n");
    job.prepare().run().expect(65, "BadInput", &["sft.jsonl:1", "completion"]);
    let pod = job.prepare();
    fs::write(&pod.config, "[]").unwrap();
    pod.run().expect(64, "BadConfig", &["prepare.json", "line 1"]);
}

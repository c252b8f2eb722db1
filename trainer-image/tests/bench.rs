//! `rlhf-trainer bench` measures what it says it does.

#![allow(clippy::unwrap_used, clippy::panic)] // helpers of tests

use rlhf_api::stage::Precision;
use rlhf_trainer::worker::cpu_multiplies;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/models/gpt2")
}

fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rlhf-trainer"));
    command.arg("bench").args(arguments).args(["--batch", "2", "--prompt-tokens", "4", "--rounds", "1", "--model"]);
    command.arg(model()).env("OMP_NUM_THREADS", "1");
    command
}

fn bench(arguments: &[&str]) -> Output {
    let mut command = command(arguments);
    if !cpu_multiplies(Precision::Bf16) {
        // The default would take minutes for each workload.
        command.args(["--precision", "fp32"]);
    }
    command.output().unwrap()
}

#[test]
fn every_workload_tells_speed_memory_and_phases() {
    for (workload, phases) in [
        ("ppo", &["rollout", "score", "train"][..]),
        ("sft", &["train"]),
        ("reward", &["train"]),
        ("generate", &["rollout"]),
    ] {
        let output = bench(&[workload, "--new-tokens", "3", "--json"]);
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
        let figures: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
        let positive = |field: &str| assert!(figures[field].as_f64().unwrap() > 0.0, "{workload}, {field}: {figures}");
        ["samples_per_second", "tflops", "utilisation", "peak_device_bytes", "peak_host_bytes"]
            .into_iter()
            .for_each(positive);
        assert_eq!(phases.contains(&"rollout"), figures["new_tokens_per_second"].is_f64(), "{figures}");
        let told: Vec<&String> = figures["phase_seconds"].as_object().unwrap().keys().collect();
        assert_eq!(told, phases, "{workload}");
    }
}

/// engine.md's table for zero3: the parameters are gathered in forward and in backward, and the gradients scattered. Over two
/// ranks each sends half of each.
#[test]
fn two_ranks_of_zero3_send_what_the_strategy_needs() {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let rank = |rank: &str| {
        let mut command =
            command(&["sft", "--new-tokens", "3", "--sharding", "zero3", "--precision", "fp32", "--json"]);
        command.env("NPROC_PER_NODE", "2").env("LOCAL_RANK", rank).env("MASTER_PORT", port.to_string());
        command.stdout(std::process::Stdio::piped()).spawn().unwrap()
    };
    let (first, second) = (rank("0"), rank("1"));
    let first = first.wait_with_output().unwrap();
    assert!(second.wait_with_output().unwrap().status.success() && first.status.success());
    let text = String::from_utf8(first.stdout).unwrap();
    let figures: Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    let (_, _, spec) = rlhf_trainer::model::read_config(&model()).unwrap();
    let parameters = spec.parameter_count(rlhf_trainer::model::HeadKind::Lm) as f64;
    let needed = 3.0 * 4.0 * parameters / 2.0;
    let sent = figures["sent_bytes"].as_f64().unwrap();
    println!("sent {sent} bytes a step, {:.2} of what the table says", sent / needed);
    assert!(sent > 0.7 * needed && sent < 1.1 * needed, "sent {sent}, needed {needed}");
}

#[test]
fn what_cannot_be_measured_is_refused_with_64() {
    let too_long = bench(&["sft", "--new-tokens", "100000"]);
    assert_eq!(too_long.status.code(), Some(64));
    assert!(String::from_utf8_lossy(&too_long.stderr).contains("positions"), "{too_long:?}");
    let unknown =
        Command::new(env!("CARGO_BIN_EXE_rlhf-trainer")).args(["bench", "sft", "--model", "9b"]).output().unwrap();
    assert_eq!(unknown.status.code(), Some(64));
    assert!(String::from_utf8_lossy(&unknown.stderr).contains("--model 9b: neither a folder"), "{unknown:?}");
}

//! `rlhf-trainer bench` measures what it says it does.

#![allow(clippy::unwrap_used, clippy::panic)] // helpers of tests

use serde_json::Value;
use std::path::Path;
use std::process::{Command, Output};

fn bench(arguments: &[&str]) -> Output {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/models/gpt2");
    Command::new(env!("CARGO_BIN_EXE_rlhf-trainer"))
        .arg("bench")
        .args(arguments)
        .args(["--batch", "2", "--prompt-tokens", "4", "--rounds", "1", "--model"])
        .arg(model)
        .env("OMP_NUM_THREADS", "1")
        .output()
        .unwrap()
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
